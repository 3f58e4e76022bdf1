// The development page: a phone that shows the messages of the inbox, and forms for the
// two calls. The service sends the states of codes; the page does not count attempts.
import { errorText, locale, messageParts, sampleSignName, textOf, translate } from './words.js';
import { snippets } from './snippets.js';

const $ = id => document.getElementById(id);
const maxMessages = 1000; // the service keeps as many

$('signature').value = sampleSignName;

// --- events of the service

let settings = {};
let clockOffset = 0; // the service's clock minus ours, in ms
const messages = new Map(); // by id, oldest first
let failures = [];
let shownNumber = '';
let pinned = false; // the user chose shownNumber or sent to it; messages to other numbers do not replace it
let expectedNumber = ''; // the number of the last send from this page
let lastId = -1; // the highest known id

const now = () => Date.now() + clockOffset;

// A browser opens six connections to a host, so one window has the stream of events for all
// visible windows: the one that holds a lock. It publishes the events on the channel. Browsers have
// Web Locks only on https and localhost; otherwise each window has its own stream.
const channel = navigator.locks && new BroadcastChannel('events');
const windowId = Math.random();
let stream; // an EventSource, if this window has the stream
let stopListening; // ends the wait for the lock, or closes the stream

function listenWhileVisible() {
  stopListening?.();
  stopListening = undefined;
  if (document.hidden) return;
  if (!channel) {
    stopListening = openStream();
    return;
  }
  const waiting = new AbortController();
  let release;
  navigator.locks.request('events', { signal: waiting.signal }, () => new Promise(resolve => {
    const close = openStream();
    release = () => resolve(close());
  })).catch(() => {}); // hidden before it got the lock
  stopListening = () => release ? release() : waiting.abort();
  channel.postMessage({ joinedWindow: windowId });
}

// The window with the stream sends its state to a window that joins. The others apply events.
if (channel) channel.onmessage = ({ data }) => {
  if (data.joinedWindow) {
    if (stream && $('signal').dataset.on) channel.postMessage({ to: data.joinedWindow, ...currentState() });
  } else if (stopListening && !stream && (!data.to || data.to === windowId)) applyEvent(data);
};

const currentState = () => $('signal').dataset.on === 'true'
  ? { settings, clockOffset, update: { whole: true, messages: [...messages.values()].reverse(), failures } }
  : { lost: true };

// openStream returns the function that closes the stream.
function openStream() {
  stream = new EventSource('inbox/events');
  const publish = event => {
    channel?.postMessage(event);
    applyEvent(event);
  };
  stream.addEventListener('settings', e => {
    const settings = JSON.parse(e.data);
    publish({ settings, clockOffset: Date.parse(settings.now) - Date.now() });
  });
  stream.addEventListener('inbox', e => publish({ update: JSON.parse(e.data) }));
  stream.onerror = () => {
    publish({ lost: true });
    // A browser does not reconnect if the response is no stream, such as a proxy's error.
    if (stream.readyState === EventSource.CLOSED) setTimeout(listenWhileVisible, 1000);
  };
  return () => {
    stream.close();
    stream = undefined;
  };
}

// applyEvent applies an event of the stream, from this window or from the one that has it.
function applyEvent(event) {
  if (event.lost) showConnection(false);
  if (event.settings) {
    if (settings.started && settings.started !== event.settings.started) lastId = 0; // a new process starts at 1
    ({ settings, clockOffset } = event);
    $('version').textContent = settings.version;
    showConnection(true);
    checkNumber($('send-number'));
    checkNumber($('valid-number'));
  }
  if (event.update) applyUpdate(event.update);
}

function showConnection(connected) {
  const signal = $('signal');
  if (signal.dataset.on === String(connected)) return;
  signal.dataset.on = connected;
  signal.textContent = textOf(connected ? 'connected' : 'reconnecting');
}

function applyUpdate(update) {
  const newest = update.messages[0];
  const arrived = update.messages.filter(m => m.id > lastId);
  const first = lastId < 0;
  if (update.whole) {
    messages.clear();
    threadNumber = undefined; // after a restart, ids start again
    if (!update.messages.some(m => m.phone_number === shownNumber)) pinned = false;
  }
  for (const m of update.messages.reverse()) messages.set(m.id, m);
  lastId = Math.max(0, ...messages.keys());
  for (const id of messages.keys()) {
    if (messages.size <= maxMessages) break;
    messages.delete(id);
  }
  failures = update.failures;
  if (arrived.some(m => m.phone_number === expectedNumber)) {
    show(expectedNumber);
    expectedNumber = '';
    if (matchMedia('(max-width: 800px)').matches) $('phone').scrollIntoView({ block: 'nearest' }); // the phone is below the form
  } else if (newest && (!shownNumber || arrived.length && !pinned)) shownNumber = newest.phone_number;
  if (arrived.length && !first) {
    const [m] = arrived;
    $('announcement').textContent = textOf('announcement', spaced(m.phone_number), [...m.code].join(' '), m.signature);
    if (m.phone_number !== shownNumber) {
      $('other').hidden = false;
      $('other').value = m.phone_number;
      $('other').textContent = textOf('otherNumber', spaced(m.phone_number));
    }
  }
  draw();
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

function drawNumbers(force) {
  const numbers = new Set([...messages.values()].reverse().map(m => m.phone_number)); // newest first
  const empty = !numbers.has(shownNumber);
  if (shownNumber) numbers.add(shownNumber); // cleared, and still shown
  const list = $('numbers');
  // Do not change a list that is open.
  if (force || document.activeElement !== list || list.value !== shownNumber) {
    const options = [...numbers].map(n => new Option(spaced(n), n, false, n === shownNumber));
    list.replaceChildren(...(options.length ? options : [new Option(textOf('noMessages'), '')]));
  }
  list.disabled = numbers.size === 0;
  $('nothing').hidden = !empty;
  $('clear').ariaLabel = shownNumber && textOf('clearOf', spaced(shownNumber));
  if ($('other').value === shownNumber || !numbers.has($('other').value)) $('other').hidden = true;
}

const bubbles = new Map(); // by message id, of threadNumber
let threadNumber = ''; // the number whose bubbles are in the thread

function drawThread() {
  const thread = $('thread');
  const list = thread.firstElementChild;
  const follow = threadNumber !== shownNumber || thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
  if (threadNumber !== shownNumber) {
    bubbles.clear();
    list.replaceChildren();
    threadNumber = shownNumber;
  }
  for (const [id, bubble] of bubbles) {
    if (messages.has(id)) continue;
    bubble.remove();
    bubbles.delete(id);
  }
  let added = false;
  for (const m of messages.values()) {
    if (m.phone_number !== shownNumber) continue;
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
  [before.textContent, at.textContent, after.textContent] = messageParts(duration(settings.code_ttl_seconds));
  code.textContent = m.code;
  code.setAttribute('aria-label', textOf('copyCode', m.code));
  code.onclick = () => copy(m.code, code);
  const time = li.querySelector('time');
  time.dateTime = m.sent_at;
  time.textContent = new Date(m.sent_at).toLocaleTimeString(locale, { timeStyle: 'short' });
  if (m.template_code) li.querySelector('.meta').title = m.template_code;
  li.message = m;
  return li;
}

const stateOf = m => m.state === 'live' && now() >= Date.parse(m.expires_at) ? 'expired' : m.state;
const secondsLeft = m => Math.min(settings.code_ttl_seconds, Math.max(0, Math.ceil((Date.parse(m.expires_at) - now()) / 1000)));
const liveText = m => textOf('live', m.attempts_left, clock(secondsLeft(m)));

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
      text.textContent = textOf(state);
      continue;
    }
    const dots = document.createElement('span');
    dots.className = 'dots';
    dots.ariaHidden = 'true';
    if (settings.attempt_limit <= 5) dots.textContent = '●'.repeat(m.attempts_left) + '○'.repeat(Math.max(0, settings.attempt_limit - m.attempts_left));
    text.replaceChildren(dots, ' ' + liveText(m));
    li.querySelector('.life i').style.width = 100 * secondsLeft(m) / settings.code_ttl_seconds + '%';
  }
  drawLiveCode();
  for (const wait of document.querySelectorAll('.wait')) {
    const seconds = Math.ceil((wait.until - Date.now()) / 1000);
    setText(wait, seconds > 0 ? textOf('wait', clock(seconds)) : textOf('waitOver'));
  }
}

// drawLiveCode shows the phone's live code beside the form of Valid.
function drawLiveCode() {
  const number = $('valid-number').e164;
  const live = [...messages.values()].filter(m => m.phone_number === number && stateOf(m) === 'live');
  const newest = live.at(-1);
  let text = number ? textOf('noLiveCode') : '';
  if (newest) text = live.length === 1 ? textOf('oneLiveCode', liveText(newest)) : textOf('liveCodes', live.length, liveText(newest));
  setText($('live-code'), text);
  const suggestion = $('suggestion');
  if (!newest && suggestion === document.activeElement) $('code').focus(); // its button gets hidden
  suggestion.hidden = !newest;
  if (newest && suggestion.value !== newest.code) {
    suggestion.value = newest.code;
    suggestion.textContent = textOf('suggestion', newest.code);
  }
}

let generalFailure; // the failure for all numbers
let timesStale = false; // #times shows the times of an earlier failure
let changeError = ''; // of the last change

function drawFailures() {
  const nameOf = kind => $('failure').querySelector(`[value="${kind}"]`).textContent;
  if (generalFailure) timesStale = true;
  generalFailure = failures.find(f => !f.phone_number && f.kind !== 'none');
  const own = failures.filter(f => f.phone_number);
  const texts = own.slice(0, 3).map(f => {
    if (f.kind === 'none') return textOf('succeedingNumber', spaced(f.phone_number));
    return textOf(f.times ? 'failingNumberSome' : 'failingNumber', f.times, nameOf(f.kind), spaced(f.phone_number));
  });
  if (generalFailure) texts.unshift(textOf(generalFailure.times ? 'failingSome' : 'failingAll', generalFailure.times, nameOf(generalFailure.kind)));
  if (own.length > 3) texts.push(textOf('failingMore', own.length - 3));
  setText($('failing'), changeError || texts.join(' '));
  if (changesInProgress) return; // the fields are newer than the events
  $('failure').value = generalFailure ? generalFailure.kind : 'none';
  if ((generalFailure || timesStale) && document.activeElement !== $('times')) {
    $('times').value = generalFailure?.times ?? '';
    timesStale = false;
  }
}

// setText sets a text only if it differs: a screen reader reads every change.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

$('numbers').onchange = e => show(e.target.value);
$('numbers').onpointerdown = $('numbers').onblur = () => drawNumbers(true);
$('other').onclick = e => {
  show(e.target.value);
  $('thread').focus(); // its button gets hidden
};
function show(number) {
  shownNumber = number;
  pinned = true;
  draw();
}

// requestChange requests a change of the inbox or the failures, whose result comes back as an event.
// Requests run one after the other, so that the last one wins.
let lastChange = Promise.resolve();
let changesInProgress = 0;
function requestChange(path, request) {
  changesInProgress++;
  lastChange = lastChange.then(() => fetch(path, request)).then(async response => {
    changeError = response.ok ? '' : await response.text();
  }).catch(() => {
    changeError = textOf('unreachable');
    showConnection(false);
  });
  lastChange.then(() => setTimeout(() => { // wait for its event
    changesInProgress--;
    draw();
  }, 200));
}

$('clear').onclick = () => {
  if (!shownNumber) return;
  requestChange('inbox.json?phone_number=' + encodeURIComponent(shownNumber), { method: 'DELETE' });
  $('announcement').textContent = textOf('noMessages');
};

$('failure').onchange = $('times').onchange = () => {
  const kind = $('failure').value;
  const times = $('times');
  const invalid = !times.checkValidity();
  times.ariaInvalid = String(invalid);
  setText($('times-is'), invalid ? textOf('timesInvalid') : '');
  if (invalid || kind === 'none' && !generalFailure) return;
  requestChange('failures.json', { method: 'PUT', body: JSON.stringify(kind === 'none' || times.value === '' ? { kind } : { kind, times: Number(times.value) }) });
};
$('times').onblur = draw;

// --- formats of numbers and times

const spaced = number => number.replace(/^\+86(\d{3})(\d{4})(\d{4})$/, '+86 $1 $2 $3');
const clock = s => s >= 3600 ? `${Math.floor(s / 3600)}:${two(s / 60 % 60)}:${two(s % 60)}` : `${Math.floor(s / 60)}:${two(s % 60)}`;
const two = n => String(Math.floor(n)).padStart(2, '0');
const duration = s => s % 60 ? textOf('seconds', s) : textOf('minutes', s / 60);

// --- the forms

// The names of headers have a hyphen, the names of fields of the message have none.
const entriesOf = (form, isHeader) => Object.fromEntries([...new FormData(form)].filter(([name, value]) => value !== '' && name.includes('-') === isHeader));
const fieldsOf = form => entriesOf(form, false);
const headersOf = form => entriesOf(form, true);
const responseHeaders = ['idempotency-replayed', 'code-expires-in', 'resend-after', 'verification-outcome', 'attempts-left'];

// checkNumber shows how the service parses the number, or the error.
async function checkNumber(input) {
  const raw = input.value.trim(); // the service reads a leading space as +
  const hint = $(input.id + '-is');
  let text = '', invalid = false, e164 = '';
  try {
    const parsed = await (await fetch('number.json?phone_number=' + encodeURIComponent(raw))).json();
    e164 = parsed.phone_number ?? '';
    invalid = !e164;
    text = invalid ? errorText('number', parsed.fault) : spaced(e164);
  } catch { } // the phone shows the lost connection
  if (input.value.trim() !== raw) return; // edited in the meantime
  input.e164 = e164;
  input.ariaInvalid = String(invalid);
  hint.textContent = text;
  drawLiveCode();
}

// call makes a call with the fields of form, and shows its response in answer. explain returns the text
// for an OK. call returns whether the status is OK.
async function call(method, form, answer, explain) {
  const start = performance.now();
  const showOnly = text => {
    answer.replaceChildren(newElement('p', 'verdict', text));
    answer.dataset.ok = false;
  };
  const metadata = headersOf(form);
  if (/[^ -~]/.test(Object.values(metadata).join(''))) { // fetch would throw
    showOnly(textOf('onlyASCII'));
    return false;
  }
  const timers = [setTimeout(() => showOnly(textOf('inProgress')), 200)];
  if (!channel) timers.push(setTimeout(() => showOnly(textOf('tooManyWindows')), 3000));
  let response, body;
  try {
    response = await fetch('/phonenumberservice.PhoneNumberService/' + method, {
      method: 'POST', headers: { 'Content-Type': 'application/json', 'want-details': 'true', ...metadata }, body: JSON.stringify(fieldsOf(form)),
    });
    body = await response.json();
  } catch {
    showOnly(textOf('unreachable'));
    return false;
  } finally {
    timers.forEach(clearTimeout);
  }
  const took = Math.round(performance.now() - start);
  const status = response.ok ? 'OK' : body.code === 'canceled' ? 'CANCELLED' : String(body.code).toUpperCase();
  const details = (body.details ?? []).map(d => d.debug ?? {});
  const reason = details.find(d => d.reason)?.reason;
  const lines = [newElement('p', 'verdict', response.ok ? explain(body) : errorText(reason, body.message)), newElement('p', 'status', `${status} · HTTP ${response.status} · ${took} ms`)];
  for (const d of details) {
    if (d.reason) lines.push(newElement('p', 'detail', textOf('reason') + [d.reason, d.domain, d.metadata?.request_id].filter(Boolean).join(' · ')));
    if (d.retryDelay) {
      const wait = newElement('p', 'detail wait', '');
      wait.role = 'timer'; // not announced every second
      wait.until = Date.now() + 1000 * parseFloat(d.retryDelay);
      lines.push(wait);
    }
    for (const v of d.fieldViolations ?? []) {
      if (form.elements[v.field]) form.elements[v.field].ariaInvalid = 'true';
      const want = v.field === 'phone_number' ? errorText('number', v.description) : v.description;
      if (!lines[0].textContent.includes(want)) lines.push(newElement('p', 'detail', `${textOf('field')}${v.field} ${want}`));
    }
  }
  const headers = responseHeaders.filter(name => response.headers.has(name)).map(name => `${name}: ${response.headers.get(name)}`);
  if (headers.length) lines.push(newElement('p', 'detail', headers.join(' · ')));
  const raw = document.createElement('details');
  raw.open = response.ok;
  raw.append(newElement('summary', '', 'JSON'), newElement('pre', '', JSON.stringify(body, null, response.ok ? 0 : 2)));
  answer.replaceChildren(...lines, raw);
  answer.dataset.ok = response.ok && body.valid !== false;
  tick();
  return response.ok;
}

function newElement(tag, className, text) {
  const e = document.createElement(tag);
  e.className = className;
  e.textContent = text;
  return e;
}

function onSubmit(form, f) {
  form.onsubmit = async e => {
    e.preventDefault();
    const button = form.querySelector('.primary');
    if (button.ariaDisabled === 'true') return; // in progress
    button.ariaDisabled = 'true';
    await f().finally(() => { button.ariaDisabled = 'false'; });
  };
}

onSubmit($('send-form'), async () => {
  await lastChange; // apply pending changes first
  expectedNumber = $('send-number').e164;
  const ok = await call('SendSMS', $('send-form'), $('send-answer'), () => textOf('sent'));
  if (ok) $('valid-answer').replaceChildren(); // it belongs to an older code
  else expectedNumber = '';
});
onSubmit($('valid-form'), () => call('Valid', $('valid-form'), $('valid-answer'), body => textOf(body.valid ? 'valid' : 'invalid')));

$('suggestion').onclick = e => {
  $('code').value = e.target.value;
  drawSnippets();
  $('valid-form').querySelector('.primary').focus();
};

let validNumberEdited = false; // then it no longer copies the number of SendSMS
$('send-number').oninput = e => {
  checkNumber(e.target);
  if (!validNumberEdited) {
    $('valid-number').value = e.target.value;
    checkNumber($('valid-number'));
  }
};
$('valid-number').oninput = e => {
  validNumberEdited = e.target.value !== '' && e.target.value !== $('send-number').value;
  checkNumber(e.target);
};
$('signature').oninput = $('template').oninput = $('send-context').oninput = $('valid-context').oninput = $('key').oninput = e => { e.target.ariaInvalid = null; };
for (const id of ['send-number', 'valid-number']) {
  $(id).onchange = e => { // announce an error after the input
    if (e.target.ariaInvalid === 'true') $('announcement').textContent = $(id + '-is').textContent;
  };
}

// --- the same call in a terminal and in other languages

const languages = snippets(location);

for (const method of ['send', 'valid']) {
  const place = $(method + '-snippets');
  place.append($('snippet').content.cloneNode(true));
  translate(place);
  const tabs = place.querySelector('.tabs');
  tabs.ariaLabel = textOf('language');
  for (const name of Object.keys(languages)) {
    const label = document.createElement('label');
    const radio = Object.assign(document.createElement('input'), { type: 'radio', name: method + '-language', value: name, checked: name === 'curl' });
    label.append(radio, newElement('span', '', name));
    tabs.append(label);
  }
  const button = place.querySelector('.copy');
  button.onclick = () => copy(place.querySelector('code').textContent, button);
}

function drawSnippets() {
  for (const [id, method] of [['send', 'SendSMS'], ['valid', 'Valid']]) {
    const name = document.querySelector(`[name=${id}-language]:checked`).value;
    const pre = $(id + '-snippets').querySelector('pre');
    pre.firstChild.textContent = languages[name](method, fieldsOf($(id + '-form')), headersOf($(id + '-form')));
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
  button.dataset.copied = textOf('copied');
  $('announcement').textContent = textOf('copied');
  setTimeout(() => delete button.dataset.copied, 1200);
}

// --- start

document.addEventListener('visibilitychange', listenWhileVisible);
listenWhileVisible();
draw();
drawSnippets();
setInterval(tick, 1000);
