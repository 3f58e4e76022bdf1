// The development page: a phone that shows the messages of the inbox, and forms for the
// two calls. The service sends the states of codes; the page does not count attempts.
import { around, errorText, locale, sample, say, translate } from './words.js';

const $ = id => document.getElementById(id);
const kept = 1000; // messages; the service keeps as many

$('signature').value = sample;

// --- events of the service

let settings = {};
let behind = 0; // the service's clock minus ours, in ms
const messages = new Map(); // by id, oldest first
let failures = [];
let shown = ''; // the number whose messages are shown
let chosen = false; // by hand or by a send; other numbers do not replace it
let expected = ''; // the number of the last send from this page
let last = -1; // the highest known id

const now = () => Date.now() + behind;

// A browser opens six connections to a host, so one window has the stream of events for all
// visible windows: the one that holds a lock. Browsers have Web Locks only on https and
// localhost; otherwise each window has its own stream.
const windows = navigator.locks && new BroadcastChannel('events');
const name = Math.random(); // identifies this window
let events; // the stream, if this window has it
let leave; // ends the wait or the stream

function listenWhileSeen() {
  leave?.();
  leave = undefined;
  if (document.hidden) return;
  if (!windows) {
    leave = listen();
    return;
  }
  const waiting = new AbortController();
  let release;
  navigator.locks.request('events', { signal: waiting.signal }, () => new Promise(resolve => {
    const close = listen();
    release = () => resolve(close());
  })).catch(() => {}); // hidden before it got the lock
  leave = () => release ? release() : waiting.abort();
  windows.postMessage({ joins: name });
}

if (windows) windows.onmessage = ({ data }) => {
  if (data.joins) {
    if (events && $('signal').dataset.on) windows.postMessage({ to: data.joins, ...state() });
  } else if (leave && !events && (!data.to || data.to === name)) hear(data);
};

const state = () => $('signal').dataset.on === 'true'
  ? { settings, behind, update: { whole: true, messages: [...messages.values()].reverse(), failures } }
  : { lost: true };

// listen opens the stream, and returns the function that closes it.
function listen() {
  events = new EventSource('inbox/events');
  const tell = heard => {
    windows?.postMessage(heard);
    hear(heard);
  };
  events.addEventListener('settings', e => {
    const settings = JSON.parse(e.data);
    tell({ settings, behind: Date.parse(settings.now) - Date.now() });
  });
  events.addEventListener('inbox', e => tell({ update: JSON.parse(e.data) }));
  events.onerror = () => {
    tell({ lost: true });
    // A browser does not reconnect if the response is no stream, such as a proxy's error.
    if (events.readyState === EventSource.CLOSED) setTimeout(listenWhileSeen, 1000);
  };
  return () => {
    events.close();
    events = undefined;
  };
}

// hear applies an event of the stream, from this window or from the one that has it.
function hear(heard) {
  if (heard.lost) connected(false);
  if (heard.settings) {
    if (settings.started && settings.started !== heard.settings.started) last = 0; // a new process starts at 1
    ({ settings, behind } = heard);
    $('version').textContent = settings.version;
    connected(true);
    checkNumber($('send-number'));
    checkNumber($('valid-number'));
  }
  if (heard.update) take(heard.update);
}

function connected(yes) {
  const signal = $('signal');
  if (signal.dataset.on === String(yes)) return;
  signal.dataset.on = yes;
  signal.textContent = say(yes ? 'connected' : 'reconnecting');
}

function take(update) {
  const newest = update.messages[0];
  const arrived = update.messages.filter(m => m.id > last);
  const first = last < 0;
  if (update.whole) {
    messages.clear();
    drawnFor = undefined; // after a restart, ids start again
    if (!update.messages.some(m => m.phone_number === shown)) chosen = false;
  }
  for (const m of update.messages.reverse()) messages.set(m.id, m);
  last = Math.max(0, ...messages.keys());
  for (const id of messages.keys()) {
    if (messages.size <= kept) break;
    messages.delete(id);
  }
  failures = update.failures;
  if (arrived.some(m => m.phone_number === expected)) {
    shown = expected;
    chosen = true;
    expected = '';
    if (matchMedia('(max-width: 800px)').matches) $('phone').scrollIntoView({ block: 'nearest' }); // the phone is below the form
  } else if (newest && (!shown || arrived.length && !chosen)) shown = newest.phone_number;
  if (arrived.length && !first) {
    const [m] = arrived;
    $('heard').textContent = say('heard', spaced(m.phone_number), [...m.code].join(' '), m.signature);
    if (m.phone_number !== shown) tellOf(m.phone_number);
  }
  draw();
}

function tellOf(number) {
  $('other').hidden = false;
  $('other').value = number;
  $('other').textContent = say('other', spaced(number));
}

// --- the phone

let drawing = false;
function draw() { // at most once a frame
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawNumbers();
    drawThread();
    drawFailures();
    tick();
  });
}

function drawNumbers(anyway) {
  const numbers = new Set([...messages.values()].reverse().map(m => m.phone_number)); // newest first
  const empty = !numbers.has(shown);
  if (shown) numbers.add(shown); // cleared, and still shown
  const list = $('numbers');
  // Do not change a list that is open.
  if (anyway || document.activeElement !== list || list.value !== shown) {
    const options = [...numbers].map(n => new Option(spaced(n), n, false, n === shown));
    list.replaceChildren(...(options.length ? options : [new Option(say('nobody'), '')]));
  }
  list.disabled = numbers.size === 0;
  $('nothing').hidden = !empty;
  $('clear').ariaLabel = shown && say('clearOf', spaced(shown));
  if ($('other').value === shown || !numbers.has($('other').value)) $('other').hidden = true;
}

const bubbles = new Map(); // by message id, of the shown number
let drawnFor = '';

function drawThread() {
  const thread = $('thread');
  const list = thread.firstElementChild;
  const follow = drawnFor !== shown || thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
  if (drawnFor !== shown) {
    bubbles.clear();
    list.replaceChildren();
    drawnFor = shown;
  }
  for (const [id, bubble] of bubbles) {
    if (messages.has(id)) continue;
    bubble.remove();
    bubbles.delete(id);
  }
  let added = false;
  for (const m of messages.values()) {
    if (m.phone_number !== shown) continue;
    const bubble = bubbles.get(m.id);
    if (bubble) bubble.message = m;
    else {
      bubbles.set(m.id, list.appendChild(bubbleOf(m)));
      list.children[list.children.length - 20]?.classList.add('far');
      added = true;
    }
  }
  if (added && follow) thread.scrollTop = thread.scrollHeight;
}

function bubbleOf(m) {
  const li = $('message').content.firstElementChild.cloneNode(true);
  const [sign, before, whole, after] = li.querySelector('.bubble').children;
  const [code, at] = whole.children;
  sign.textContent = m.signature && `【${m.signature}】`;
  [before.textContent, at.textContent, after.textContent] = around(duration(settings.code_ttl_seconds));
  code.textContent = m.code;
  code.setAttribute('aria-label', say('copyCode', m.code));
  code.onclick = () => copy(m.code, code);
  const time = li.querySelector('time');
  time.dateTime = m.sent_at;
  time.textContent = new Date(m.sent_at).toLocaleTimeString(locale, { timeStyle: 'short' });
  if (m.template_code) li.querySelector('.meta').title = m.template_code;
  li.message = m;
  return li;
}

const stateOf = m => m.state === 'live' && now() >= Date.parse(m.expires_at) ? 'expired' : m.state;
const left = m => Math.min(settings.code_ttl_seconds, Math.max(0, Math.ceil((Date.parse(m.expires_at) - now()) / 1000)));
const lifeOf = m => say('life', m.attempts_left, clock(left(m)));

// tick updates the texts that depend on the time: every second, and after every change.
function tick() {
  $('clock').textContent = new Date().toLocaleTimeString(locale, { hour: 'numeric', minute: '2-digit' }).replace(/\s?[AP]M$/i, '');
  for (const li of bubbles.values()) {
    const m = li.message;
    const state = stateOf(m);
    if (state !== 'live' && li.dataset.state === state) continue;
    li.dataset.state = state;
    li.querySelector('.code').tabIndex = state === 'live' ? 0 : -1; // Tab skips dead codes
    const text = li.querySelector('.state');
    if (state !== 'live') {
      text.textContent = say(state);
      continue;
    }
    const dots = document.createElement('span');
    dots.className = 'dots';
    dots.ariaHidden = 'true';
    if (settings.attempt_limit <= 5) dots.textContent = '●'.repeat(m.attempts_left) + '○'.repeat(Math.max(0, settings.attempt_limit - m.attempts_left));
    text.replaceChildren(dots, ' ' + lifeOf(m));
    li.querySelector('.life i').style.width = 100 * left(m) / settings.code_ttl_seconds + '%';
  }
  drawAlive();
  for (const wait of document.querySelectorAll('.wait')) {
    const seconds = Math.ceil((wait.over - Date.now()) / 1000);
    tell(wait, seconds > 0 ? say('wait', clock(seconds)) : say('waited'));
  }
}

// drawAlive shows the phone's valid code beside the form of Valid.
function drawAlive() {
  const number = $('valid-number').e164;
  const alive = [...messages.values()].filter(m => m.phone_number === number && stateOf(m) === 'live');
  const newest = alive.at(-1);
  let text = number ? say('noneAlive') : '';
  if (newest) text = alive.length === 1 ? say('aliveNow', lifeOf(newest)) : say('moreAlive', alive.length, lifeOf(newest));
  tell($('alive'), text);
  const suggestion = $('suggestion');
  if (!newest && suggestion === document.activeElement) $('code').focus(); // its button gets hidden
  suggestion.hidden = !newest;
  if (newest && suggestion.value !== newest.code) {
    suggestion.value = newest.code;
    suggestion.textContent = say('from', newest.code);
  }
}

let general; // the failure of every number
let told = true; // #times is up to date
let trouble = ''; // error of the last change

function drawFailures() {
  const nameOf = kind => $('failure').querySelector(`[value="${kind}"]`).textContent;
  if (general) told = false;
  general = failures.find(f => !f.phone_number && f.kind !== 'none');
  const own = failures.filter(f => f.phone_number);
  const texts = own.slice(0, 3).map(f => {
    if (f.kind === 'none') return say('succeedingNumber', spaced(f.phone_number));
    return say(f.times ? 'failingNumberSome' : 'failingNumber', f.times, nameOf(f.kind), spaced(f.phone_number));
  });
  if (general) texts.unshift(say(general.times ? 'failingSome' : 'failingAll', general.times, nameOf(general.kind)));
  if (own.length > 3) texts.push(say('failingMore', own.length - 3));
  tell($('failing'), trouble || texts.join(' '));
  if (asking) return; // the fields are newer than the events
  $('failure').value = general ? general.kind : 'none';
  if ((general || !told) && document.activeElement !== $('times')) {
    $('times').value = general?.times ?? '';
    told = true;
  }
}

// tell sets a text only if it differs: a screen reader reads every change.
function tell(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

$('numbers').onchange = e => show(e.target.value);
$('numbers').onpointerdown = $('numbers').onblur = () => drawNumbers(true);
$('other').onclick = e => {
  show(e.target.value);
  $('thread').focus(); // its button gets hidden
};
function show(number) {
  shown = number;
  chosen = true;
  draw();
}

// ask requests a change, whose result comes back as an event. Requests run one after the
// other, so that the last one wins.
let asked = Promise.resolve();
let asking = 0;
function ask(path, request) {
  asking++;
  asked = asked.then(() => fetch(path, request)).then(async answer => {
    trouble = answer.ok ? '' : await answer.text();
  }).catch(() => {
    trouble = say('unreachable');
    connected(false);
  });
  asked.then(() => setTimeout(() => { // wait for its event
    asking--;
    draw();
  }, 200));
}

$('clear').onclick = () => {
  if (!shown) return;
  ask('inbox.json?phone_number=' + encodeURIComponent(shown), { method: 'DELETE' });
  $('heard').textContent = say('nobody');
};

$('failure').onchange = $('times').onchange = () => {
  const kind = $('failure').value;
  const times = $('times');
  const fault = !times.checkValidity();
  times.ariaInvalid = String(fault);
  tell($('times-is'), fault ? say('timesFault') : '');
  if (fault || kind === 'none' && !general) return;
  ask('failures.json', { method: 'PUT', body: JSON.stringify(kind === 'none' || times.value === '' ? { kind } : { kind, times: Number(times.value) }) });
};
$('times').onblur = draw;

// --- formats of numbers and times

const spaced = number => number.replace(/^\+86(\d{3})(\d{4})(\d{4})$/, '+86 $1 $2 $3');
const clock = s => s >= 3600 ? `${Math.floor(s / 3600)}:${two(s / 60 % 60)}:${two(s % 60)}` : `${Math.floor(s / 60)}:${two(s % 60)}`;
const two = n => String(Math.floor(n)).padStart(2, '0');
const duration = s => s % 60 ? say('seconds', s) : say('minutes', s / 60);

// --- the forms

const fieldsOf = form => Object.fromEntries([...new FormData(form)].filter(([, value]) => value !== ''));

// checkNumber shows how the service parses the number, or the error.
async function checkNumber(input) {
  const raw = input.value.trim(); // the service reads a leading space as +
  const hint = $(input.id + '-is');
  let text = '', fault = false, e164 = '';
  try {
    const answer = await (await fetch('number.json?phone_number=' + encodeURIComponent(raw))).json();
    e164 = answer.phone_number ?? '';
    fault = !e164;
    text = fault ? errorText('number', answer.fault) : spaced(e164);
  } catch { } // the phone shows the lost connection
  if (input.value.trim() !== raw) return; // edited in the meantime
  input.e164 = e164;
  input.ariaInvalid = String(fault);
  hint.textContent = text;
  drawAlive();
}

async function call(method, form, answer, explain) {
  const began = performance.now();
  const only = text => {
    answer.replaceChildren(line('p', 'verdict', text));
    answer.dataset.ok = false;
  };
  const underWay = [setTimeout(() => only(say('underWay')), 200)];
  if (!windows) underWay.push(setTimeout(() => only(say('crowded')), 3000));
  let response, body;
  try {
    response = await fetch('/phonenumberservice.PhoneNumberService/' + method, {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(fieldsOf(form)),
    });
    body = await response.json();
  } catch {
    only(say('unreachable'));
    return false;
  } finally {
    underWay.forEach(clearTimeout);
  }
  const took = Math.round(performance.now() - began);
  const status = response.ok ? 'OK' : body.code === 'canceled' ? 'CANCELLED' : String(body.code).toUpperCase();
  const details = (body.details ?? []).map(d => d.debug ?? {});
  const reason = details.find(d => d.reason)?.reason;
  const lines = [line('p', 'verdict', response.ok ? explain(body) : errorText(reason, body.message)), line('p', 'status', `${status} · HTTP ${response.status} · ${took} ms`)];
  for (const d of details) {
    if (d.reason) lines.push(line('p', 'detail', say('reason') + [d.reason, d.domain, d.metadata?.request_id].filter(Boolean).join(' · ')));
    if (d.retryDelay) {
      const wait = line('p', 'detail wait', '');
      wait.role = 'timer'; // not announced every second
      wait.over = Date.now() + 1000 * parseFloat(d.retryDelay);
      lines.push(wait);
    }
    for (const v of d.fieldViolations ?? []) {
      if (form.elements[v.field]) form.elements[v.field].ariaInvalid = 'true';
      const want = v.field === 'phone_number' ? errorText('number', v.description) : v.description;
      if (!lines[0].textContent.includes(want)) lines.push(line('p', 'detail', `${say('field')}${v.field} ${want}`));
    }
  }
  const raw = document.createElement('details');
  raw.open = response.ok;
  raw.append(line('summary', '', 'JSON'), line('pre', '', JSON.stringify(body, null, response.ok ? 0 : 2)));
  answer.replaceChildren(...lines, raw);
  answer.dataset.ok = response.ok && body.valid !== false;
  tick();
  return response.ok;
}

function line(tag, className, text) {
  const e = document.createElement(tag);
  e.className = className;
  e.textContent = text;
  return e;
}

function onSubmit(form, f) {
  form.onsubmit = async e => {
    e.preventDefault();
    const button = form.querySelector('.primary');
    if (button.ariaDisabled === 'true') return; // still under way
    button.ariaDisabled = 'true';
    await f().finally(() => { button.ariaDisabled = 'false'; });
  };
}

onSubmit($('send-form'), async () => {
  await asked; // apply pending changes first
  expected = $('send-number').e164;
  const ok = await call('SendSMS', $('send-form'), $('send-answer'), () => say('sent'));
  if (ok) $('valid-answer').replaceChildren(); // it belongs to an older code
  else expected = '';
});
onSubmit($('valid-form'), () => call('Valid', $('valid-form'), $('valid-answer'), body => say(body.valid ? 'right' : 'wrong')));

$('suggestion').onclick = e => {
  $('code').value = e.target.value;
  drawSnippets();
  $('valid-form').querySelector('.primary').focus();
};

let ownNumber = false; // Valid's number was edited, and no longer follows
$('send-number').oninput = e => {
  checkNumber(e.target);
  if (!ownNumber) {
    $('valid-number').value = e.target.value;
    checkNumber($('valid-number'));
  }
};
$('valid-number').oninput = e => {
  ownNumber = e.target.value !== '' && e.target.value !== $('send-number').value;
  checkNumber(e.target);
};
$('signature').oninput = $('template').oninput = e => { e.target.ariaInvalid = null; };
for (const id of ['send-number', 'valid-number']) {
  $(id).onchange = e => { // announce an error after the input
    if (e.target.ariaInvalid === 'true') $('heard').textContent = $(id + '-is').textContent;
  };
}

// --- the same call in a terminal and in Go

const shell = text => `'${text.replaceAll("'", `'\\''`)}'`;

function goLines(method, fields) {
  const valid = method === 'Valid'; // its response has a field
  const names = { phone_number: 'PhoneNumber', signature: 'Signature', template_code: 'TemplateCode', code: 'Code' };
  const members = Object.entries(fields).map(([name, value]) => `${names[name]}: ${JSON.stringify(value)}`).join(', ');
  return `conn, err := grpc.NewClient(${JSON.stringify(location.host)}, grpc.WithTransportCredentials(insecure.NewCredentials()))
if err != nil {
	return err
}
defer conn.Close()
client := phonenumberservice.NewPhoneNumberServiceClient(conn)
${valid ? 'res, err :=' : '_, err ='} client.${method}(ctx, &phonenumberservice.${method}Request{${members}})
if err != nil {
	return err
}${valid ? '\nfmt.Println(res.Valid)' : ''}`;
}

const json = fields => JSON.stringify(fields, null, 1).replace(/\n */g, ' '); // spaces allow line breaks
const languages = {
  curl: (method, fields) => `curl -d ${shell(json(fields))} \\
${location.origin}/phonenumberservice.PhoneNumberService/${method}`,
  grpcurl: (method, fields) => `grpcurl -plaintext ${method === 'Valid' ? '-emit-defaults ' : ''}\\
  -d ${shell(json(fields))} \\
  ${location.host} phonenumberservice.PhoneNumberService/${method}`,
  Go: goLines,
};

for (const method of ['send', 'valid']) {
  const place = $(method + '-snippets');
  place.append($('snippet').content.cloneNode(true));
  translate(place);
  const tabs = place.querySelector('.tabs');
  tabs.ariaLabel = say('language');
  for (const name of Object.keys(languages)) {
    const label = document.createElement('label');
    const radio = Object.assign(document.createElement('input'), { type: 'radio', name: method + '-language', value: name, checked: name === 'curl' });
    label.append(radio, line('span', '', name));
    tabs.append(label);
  }
  const button = place.querySelector('.copy');
  button.onclick = () => copy(place.querySelector('code').textContent, button);
}

function drawSnippets() {
  for (const [id, method] of [['send', 'SendSMS'], ['valid', 'Valid']]) {
    const name = document.querySelector(`[name=${id}-language]:checked`).value;
    const pre = $(id + '-snippets').querySelector('pre');
    pre.firstChild.textContent = languages[name](method, fieldsOf($(id + '-form')));
  }
}
addEventListener('input', drawSnippets);

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without https or localhost
    const area = Object.assign(document.createElement('textarea'), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
    button.focus();
  }
  button.dataset.copied = say('copied');
  $('heard').textContent = say('copied');
  setTimeout(() => delete button.dataset.copied, 1200);
}

// --- start

document.addEventListener('visibilitychange', listenWhileSeen);
listenWhileSeen();
draw();
drawSnippets();
setInterval(tick, 1000);
