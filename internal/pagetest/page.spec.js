import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { root } from './build.js';
import { expect, Phone, test } from './service.js';

const run = promisify(execFile);
const wrong = code => String((Number(code) + 1) % 1_000_000).padStart(6, '0');

test('flow: a new user sends a code, sees it and verifies it', async ({ phone }) => {
  await phone.open();
  const code = await phone.sendCode();
  await expect(phone.messages).toContainText(`【Acme】Your code is ${code}`);
  await expect(phone.messages).toContainText('3 attempts');
  await expect(phone.sendResponse).toContainText('OK · HTTP 200');
  await expect(phone.valid).toContainText('A code is valid: 3 attempts');
  await phone.page.getByRole('button', { name: `From Messages: ${code}` }).click();
  await expect(phone.page.getByLabel('Code', { exact: true })).toHaveValue(code);
  await phone.page.keyboard.press('Enter'); // focus is on Verify
  await expect(phone.validResponse).toContainText('{"valid":true}');
  await expect(phone.messages).toContainText('used');
  await expect(phone.valid).toContainText('The phone has no valid code for this number.');
  await phone.page.getByRole('button', { name: 'Verify' }).click();
  await expect(phone.validResponse).toContainText('{"valid":false}');
});

test('attempts: three wrong codes use them up', async ({ phone }) => {
  await phone.open();
  const code = await phone.sendCode();
  for (const left of ['2 attempts', '1 attempt,', 'no attempts left']) {
    await phone.verify(wrong(code));
    await expect(phone.messages).toContainText(left);
    await expect(phone.validResponse).toContainText('{"valid":false}');
  }
  await phone.verify(code);
  await expect(phone.validResponse).toContainText('{"valid":false}');
  await expect(phone.messages).toContainText('no attempts left');
});

test('metadata: a code counts in its context, and a key is one message', async ({ phone }) => {
  await phone.open();
  await phone.page.locator('#send-context').fill('login');
  await phone.page.locator('#key').fill('0123456789');
  const code = await phone.sendCode();
  await expect(phone.sendResponse).toContainText('code-expires-in: 600 · resend-after: 60');
  await expect(phone.page.locator('#send-snippets code')).toContainText("-H 'verification-context: login' -H 'idempotency-key: 0123456789'");
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.sendResponse).toContainText('idempotency-replayed: true');
  await expect(phone.messages).toHaveCount(1);
  await phone.verify(code);
  await expect(phone.validResponse).toContainText('verification-outcome: no_code · attempts-left: 0');
  await phone.page.locator('#valid-context').fill('login');
  await phone.verify(code);
  await expect(phone.validResponse).toContainText('{"valid":true}');
  await phone.page.locator('#key').fill('登录登录登录登录');
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.sendResponse).toContainText('only printable ASCII');
  await phone.page.locator('#key').fill('short');
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.page.locator('#key')).toHaveAttribute('aria-invalid', 'true');
});

test('messages: a newer code replaces the older one, also if another program sent it', async ({ phone, service }) => {
  await phone.open();
  await phone.sendCode();
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  await expect(phone.messages).toHaveCount(2);
  await expect(phone.messages.nth(0)).toContainText('replaced by a newer code');
  await expect(phone.messages.nth(1)).toContainText('【Shop】');
  await service.call('Valid', { phone_number: '18600000000', code: await phone.code(1) });
  await expect(phone.messages.nth(1)).toContainText('used');
});

test.describe('with a short code TTL', () => {
  test.use({ settings: { PHONENUMBER_CODE_TTL: '2s' } });
  test('messages: the page shows that a code expires', async ({ phone }) => {
    await phone.open();
    await phone.sendCode();
    await expect(phone.messages).toContainText('valid for 2 s');
    await expect(phone.messages).toContainText(/0:0[12] left/);
    await expect(phone.messages).toContainText('expired');
    await expect(phone.valid).toContainText('The phone has no valid code for this number.');
  });
});

test('failures: sends fail like at Aliyun, once or until they are turned off', async ({ phone }) => {
  await phone.open();
  const button = phone.page.getByRole('button', { name: 'Send code' });
  for (const [kind, status, reason, wait] of [
    ['Limit by minute', 'RESOURCE_EXHAUSTED · HTTP 429', 'isv.BUSINESS_LIMIT_CONTROL', /Wait (1:00|0:59)/],
    ['Limit by hour', 'RESOURCE_EXHAUSTED · HTTP 429', 'isv.BUSINESS_LIMIT_CONTROL', /Wait (1:00:00|59:59)/],
    ['Limit by day', 'RESOURCE_EXHAUSTED · HTTP 429', 'isv.BUSINESS_LIMIT_CONTROL', /Wait (24:00:00|23:59:59)/],
    ['Illegal number', 'INVALID_ARGUMENT · HTTP 400', 'isv.MOBILE_NUMBER_ILLEGAL', /Field: phone_number/],
    ['No balance', 'FAILED_PRECONDITION · HTTP 400', 'isv.AMOUNT_NOT_ENOUGH', /nothing was sent/],
  ]) {
    await phone.failure.selectOption(kind);
    await expect(phone.send).toContainText(`Every send fails: ${kind}.`);
    for (let i = 0; i < 2; i++) {
      await button.click();
      await expect(button).toHaveAttribute('aria-disabled', 'false');
      await expect(phone.sendResponse).toContainText(status);
      await expect(phone.sendResponse).toContainText(`Reason: ${reason} · aliyun.com`);
      await expect(phone.sendResponse).toContainText(wait);
    }
  }
  await expect(phone.sendResponse).not.toContainText('Wait');
  await phone.failure.selectOption('Limit by minute');
  await button.click();
  await expect(phone.sendResponse).toContainText('Wait 0:5'); // it counts down
  await phone.failure.selectOption('No balance');
  await phone.page.getByLabel('For sends').fill('1');
  await phone.page.keyboard.press('Tab');
  await expect(phone.send).toContainText('The next send fails: No balance.');
  await button.click();
  await expect(phone.failure).toHaveValue('none');
  await expect(phone.messages).toHaveCount(0);
  await phone.sendCode();
  await expect(phone.sendResponse).toContainText('OK · HTTP 200');
});

test.describe('with a short SMS timeout', () => {
  test.use({ settings: { PHONENUMBER_SMS_TIMEOUT: '1s', PHONENUMBER_FAIL_SENDS: 'timeout_delivered:1' } });
  test('failures: after a time-out the SMS can arrive, and its code is valid', async ({ phone }) => {
    await phone.open();
    await expect(phone.send).toContainText('The next send fails: Time-out, arrives.');
    await phone.page.getByRole('button', { name: 'Send code' }).dblclick(); // one send
    await expect(phone.messages).toContainText('3 attempts');
    await expect(phone.sendResponse).toHaveText('Under way…');
    const code = await phone.code(0);
    await expect(phone.sendResponse).toContainText('DEADLINE_EXCEEDED · HTTP 504');
    expect(await phone.service.inbox()).toHaveLength(1);
    await expect(phone.sendResponse).toContainText('SMS_TIMEOUT');
    await phone.verify(code);
    await expect(phone.validResponse).toContainText('{"valid":true}');
    await phone.failure.selectOption('Time-out');
    await phone.page.getByRole('button', { name: 'Send code' }).click();
    await expect(phone.sendResponse).toHaveText('Under way…'); // no longer the previous response
    await expect(phone.sendResponse).toContainText('DEADLINE_EXCEEDED');
    await expect(phone.messages).toHaveCount(1);
  });
});

test('number: checked while the user types', async ({ phone }) => {
  await phone.open();
  const number = phone.send.getByLabel('Phone number');
  await number.fill('+852 9123-4567');
  await expect(phone.send).toContainText('+85291234567');
  await expect(number).toHaveAttribute('aria-invalid', 'false');
  await expect(phone.valid.getByLabel('Phone number')).toHaveValue('+852 9123-4567'); // copies the other field
  await number.fill('01012345678');
  await expect(phone.send).toContainText('must be one mobile number, for example "+8618612345678"');
  await expect(number).toHaveAttribute('aria-invalid', 'true');
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.sendResponse).toContainText('INVALID_ARGUMENT · HTTP 400');
  await expect(phone.sendResponse).toContainText('phone_number must be one mobile number');
  await phone.valid.getByLabel('Phone number').fill('10086');
  await expect(phone.valid).toContainText('must be one mobile number');
  await number.fill('18600000000');
  await expect(phone.valid.getByLabel('Phone number')).toHaveValue('10086'); // no longer copies it
});

test('numbers: listed newest first, and can be switched', async ({ phone, service }) => {
  await phone.open();
  for (const n of ['18600000001', '18600000002', '+85291234567']) await service.call('SendSMS', { phone_number: n, signature: n });
  const numbers = phone.page.getByLabel('Messages to', { exact: true });
  await expect(numbers.getByRole('option')).toHaveText(['+85291234567', '+86 186 0000 0002', '+86 186 0000 0001']);
  await expect(phone.messages).toContainText('【+85291234567】');
  await numbers.selectOption('+8618600000001');
  await expect(phone.messages).toContainText('【18600000001】');
  await service.call('SendSMS', { phone_number: '18600000002', signature: 'again' });
  await phone.page.getByRole('button', { name: 'New: +86 186 0000 0002' }).click();
  await expect(phone.messages).toHaveCount(2);
  await expect(phone.messages.last()).toContainText('【again】');
  await phone.page.getByRole('button', { name: 'Clear the messages to +86 186 0000 0002' }).click();
  await expect(phone.messages).toHaveCount(0); // still the same number
  await expect(numbers).toHaveValue('+8618600000002');
  expect(await service.inbox('?phone_number=18600000002')).toEqual([]);
  expect(await service.inbox()).toHaveLength(2);
});

test('numbers: the phone stays with the number of the page\'s own last send', async ({ phone, service }) => {
  await phone.open();
  await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
  await expect(phone.messages).toContainText('【Shop】'); // the page has not sent yet
  await phone.numberChecked();
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.messages).toContainText('【Acme】');
  await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
  await expect(phone.page.getByRole('button', { name: 'New: +86 186 0000 0001' })).toBeVisible();
  await expect(phone.messages).toContainText('【Acme】');
});

test('hidden tab: it closes its event stream, and shows missed messages when it is visible again', async ({ phone, service }) => {
  await phone.open();
  await phone.sendCode();
  const setHidden = hidden => phone.page.evaluate(hidden => {
    Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
    document.dispatchEvent(new Event('visibilitychange'));
  }, hidden);
  const streamClosed = phone.page.waitForEvent('requestfailed', r => r.url().endsWith('/inbox/events'));
  await setHidden(true);
  await streamClosed;
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
  await expect(phone.messages).toHaveCount(1);
  await setHidden(false);
  await expect(phone.messages).toHaveCount(2);
  await expect(phone.page.getByRole('button', { name: 'New: +86 186 0000 0001' })).toBeVisible();
});

// openWindows opens windows until there are count. streams gets each window that opens an event stream.
async function openWindows(phone, context, count) {
  const streams = [];
  const phones = [phone];
  while (phones.length < count) phones.push(new Phone(await context.newPage(), phone.service));
  for (const p of phones) p.page.on('request', r => { if (r.url().endsWith('/inbox/events')) streams.push(p); });
  for (const p of phones) await p.open();
  return { phones, streams };
}

test('windows: one stream serves more windows than a browser has connections', async ({ phone, context, service }) => {
  await service.fail({ phone_number: '18600000009', kind: 'limit_day' });
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  const { phones, streams } = await openWindows(phone, context, 9);
  for (const p of phones) {
    await expect(p.messages).toHaveCount(1); // sent before the windows opened
    await expect(p.send).toContainText('Sends to +86 186 0000 0009 fail: Limit by day.');
  }
  const code = await phones.at(-1).sendCode();
  for (const p of phones) {
    await expect(p.messages).toHaveCount(2);
    await expect(p.messages.nth(1)).toContainText(code);
    await expect(p.messages.nth(1)).toContainText(/3 attempts, (10:00|9:5\d) left/);
  }
  await phones.at(3).verify(code);
  await expect(phones.at(3).validResponse).toContainText('{"valid":true}');
  for (const p of phones) await expect(p.messages.nth(1)).toContainText('used');
  expect(streams).toEqual([phone]);
});

test('windows: if the one with the stream is hidden or closed, another one opens it', async ({ phone, context, service }) => {
  const { phones, streams } = await openWindows(phone, context, 3);
  const [first, second, third] = phones;
  await first.page.evaluate(() => {
    Object.defineProperty(document, 'hidden', { value: true, configurable: true });
    document.dispatchEvent(new Event('visibilitychange'));
  });
  await expect.poll(() => streams).toEqual([first, second]);
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'One' });
  await expect(second.messages).toHaveCount(1);
  await expect(third.messages).toHaveCount(1);
  await expect(first.messages).toHaveCount(0); // hidden
  await second.page.close();
  await expect.poll(() => streams).toEqual([first, second, third]);
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Two' });
  await expect(third.messages).toHaveCount(2);
  await service.stop();
  await expect(third.page.getByText('No connection to the service')).toBeVisible();
});

test('windows: all show that the connection is lost, and reconnect', async ({ phone, context, service }) => {
  const { phones } = await openWindows(phone, context, 3);
  await service.stop();
  for (const p of phones) await expect(p.page.getByText('No connection to the service')).toBeVisible();
  await service.start();
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  for (const p of phones) {
    await expect(p.page.locator('#signal')).toHaveText('Connected');
    await expect(p.messages).toContainText('【Shop】');
  }
});

// A page at another host name is no secure context, so it has no navigator.locks.
test('windows: without locks each has a stream, and explains why a call waits', async ({ phone, context, service }) => {
  await context.addInitScript(() => Object.defineProperty(navigator, 'locks', { value: undefined }));
  const { phones, streams } = await openWindows(phone, context, 6);
  expect(streams).toEqual(phones);
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  for (const p of phones) await expect(p.messages).toContainText('【Shop】');
  await phones[5].page.getByRole('button', { name: 'Send code' }).click();
  await expect(phones[5].sendResponse).toContainText('If more than five windows of this page are open, close some');
  await phones[0].page.close();
  await expect(phones[5].sendResponse).toContainText('OK · HTTP 200');
});

test('failures: those of the page do not change those of other numbers', async ({ phone, service }) => {
  for (const n of [1, 2, 3, 4]) await service.fail({ phone_number: `1860000000${n}`, kind: 'limit_day' });
  await service.fail({ kind: 'no_balance', times: 3 });
  await phone.open();
  await expect(phone.failure).toHaveValue('no_balance');
  await expect(phone.page.getByLabel('For sends')).toHaveValue('3');
  await expect(phone.send).toContainText('The next 3 sends fail: No balance. Sends to +86 186 0000 0001 fail: Limit by day.');
  await expect(phone.send).toContainText('Failures are set for 1 more numbers.');
  await phone.failure.selectOption('OK, SMS arrives');
  await expect(phone.send).not.toContainText('The next 3 sends');
  await expect(phone.send).toContainText('Sends to +86 186 0000 0001 fail: Limit by day.');
  await phone.sendCode();
  expect((await service.call('SendSMS', { phone_number: '18600000001' })).code).toBe('resource_exhausted');
});

test('failures: the last choice wins, even if choices follow fast', async ({ phone, service }) => {
  await phone.open();
  for (let round = 0; round < 5; round++) {
    await phone.failure.focus();
    for (let i = 0; i < 7; i++) await phone.page.keyboard.press('ArrowDown', { delay: 5 });
    await expect(phone.send).toContainText('Every send fails: Time-out, arrives.');
    await expect(phone.failure).toHaveValue('timeout_delivered');
    await phone.failure.selectOption('OK, SMS arrives');
    await expect(phone.page.locator('#failing')).toBeEmpty();
  }
  const times = phone.page.getByLabel('For sends');
  await times.fill('3');
  await phone.failure.selectOption('Limit by day');
  await expect(phone.send).toContainText('The next 3 sends fail: Limit by day.');
  await times.fill('1');
  await times.press('Enter'); // first stores the change, then sends
  await expect(phone.sendResponse).toContainText('HTTP 429');
  await expect(phone.failure).toHaveValue('none');
  await expect(times).toHaveValue('1'); // kept while it has the focus
  await phone.failure.focus();
  await expect(times).toHaveValue('');
  for (const invalid of ['0', '1001', '1.5']) {
    await times.fill(invalid);
    await phone.failure.selectOption('Limit by day');
    await expect(phone.send).toContainText('A whole number from 1 to 1,000; empty for all.');
    await expect(times).toHaveAttribute('aria-invalid', 'true');
    expect(await (await fetch(service.url + '/failures.json')).json()).not.toContainEqual(expect.objectContaining({ kind: 'limit_day' }));
  }
});

test('messages: the phone also scrolls to long messages', async ({ phone, service }) => {
  await service.fill(5);
  for (let i = 0; i < 3; i++) await service.call('SendSMS', { phone_number: '18600000000', signature: '签'.repeat(64) });
  await phone.open();
  await expect(phone.messages).toHaveCount(8);
  for (let i = 0; i < 3; i++) {
    await expect(phone.messages.last()).toBeInViewport({ ratio: 1 });
    await service.call('SendSMS', { phone_number: '18600000000', signature: '签'.repeat(64) });
    await expect(phone.messages).toHaveCount(9 + i);
  }
  await expect(phone.messages.last()).toBeInViewport({ ratio: 1 });
});

test('copy: one click copies a code', async ({ phone, context }) => {
  await context.grantPermissions(['clipboard-read', 'clipboard-write']);
  await phone.open();
  const code = await phone.sendCode();
  await phone.page.getByRole('button', { name: `Copy the code ${code}` }).click();
  await expect(phone.messages.getByRole('button')).toHaveAttribute('data-copied', 'Copied');
  expect(await phone.page.evaluate(() => navigator.clipboard.readText())).toBe(code);
});

test('copy: it works if the browser gives no clipboard', async ({ phone, context }) => {
  await context.grantPermissions(['clipboard-read', 'clipboard-write']);
  await phone.page.addInitScript(() => { navigator.clipboard.writeText = () => Promise.reject(new Error('none')); });
  await phone.open();
  const code = await phone.sendCode();
  await phone.messages.getByRole('button').click();
  await expect(phone.messages.getByRole('button')).toBeFocused();
  expect(await phone.page.evaluate(() => navigator.clipboard.readText())).toBe(code);
});

// A sign name that must pass through a shell, JSON and Go without change.
const signature = `Ö'Neil & "Co" $(x) \\ 阿里云`;

test('code examples: they do the same as the forms', async ({ phone, service, context }) => {
  test.slow(); // it compiles Go
  await context.grantPermissions(['clipboard-read', 'clipboard-write']);
  await phone.open();
  await phone.page.getByLabel('Sign name').fill(signature);
  const directory = await mkdtemp(join(tmpdir(), 'lines'));
  const lines = async (card, language) => {
    await card.getByLabel(language, { exact: true }).check();
    await card.getByRole('button', { name: 'Copy' }).click();
    return phone.page.evaluate(() => navigator.clipboard.readText());
  };
  const execute = async (language, text) => {
    if (language !== 'Go') return (await run('bash', ['-c', text], { env: { PATH: `${root}.bin:${process.env.PATH}` } })).stdout;
    const file = join(directory, 'main.go');
    const uses = text.includes('fmt.') ? '"fmt"' : '';
    await writeFile(file, `package main
import (
	"context"
	${uses}
	"log"
	"time"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"github.com/liulinhuai/phone-number-service/phonenumberservice"
)
func do(ctx context.Context) error {
${text}
return nil
}
func main() { if err := do(context.Background()); err != nil { log.Fatal(err) } }`);
    return (await run('go', ['run', file], { cwd: root })).stdout;
  };
  for (const language of ['curl', 'grpcurl', 'Go']) {
    const before = await phone.messages.count();
    await execute(language, await lines(phone.send, language));
    await expect(phone.messages).toHaveCount(before + 1);
    await expect(phone.messages.last()).toContainText(`【${signature}】`);
    const code = await phone.code(before);
    await phone.page.getByRole('button', { name: `From Messages: ${code}` }).click();
    expect(await execute(language, await lines(phone.valid, language))).toContain('true');
    await expect(phone.messages.last()).toContainText('used');
    expect(await execute(language, await lines(phone.valid, language))).toContain('false');
  }
  await rm(directory, { recursive: true });
});

test('suggestion: the newest of several valid codes', async ({ phone, service }) => {
  await service.fail({ kind: 'timeout_delivered' }); // keeps earlier codes
  await phone.open();
  for (const _ of [1, 2]) service.call('SendSMS', { phone_number: '18600000000', signature: 'Acme' }).catch(() => {}); // the call outlasts the test
  await expect(phone.valid).toContainText('2 codes are valid; the newest: 3 attempts');
  await phone.page.getByRole('button', { name: `From Messages: ${await phone.code(1)}` }).click();
});

test('times: from the service, not from the browser\'s clock', async ({ phone }) => {
  await phone.page.clock.install({ time: Date.now() - 3_600_000 });
  await phone.open();
  const code = await phone.sendCode();
  await expect(phone.messages).toContainText(/(10:00|9:5\d) left/);
  await expect(phone.page.locator('#announcement')).toHaveText(`Message to +86 186 0000 0000: code ${[...code].join(' ')}. Acme`);
});

test('messages: fields of a call are shown as text, not HTML', async ({ phone, service }) => {
  await phone.open();
  const hostile = '<img src=x onerror=alert(1)><b>hi</b>';
  await service.call('SendSMS', { phone_number: '18600000000', signature: hostile });
  await expect(phone.messages).toContainText(`【${hostile}】`);
});

test('messages: the last thousand are kept and shown', async ({ phone, service }) => {
  await service.fill(995);
  await phone.open();
  await expect(phone.messages).toHaveCount(995);
  await expect(phone.messages.last()).toBeInViewport();
  const kept = await phone.code(5);
  await service.fill(10);
  await expect(phone.messages).toHaveCount(1000);
  expect(await phone.code(0)).toBe(kept);
  await expect(phone.messages.last()).toBeInViewport(); // the phone scrolls down
  await phone.messages.first().scrollIntoViewIfNeeded();
  await service.fill(5);
  await expect(phone.messages.first()).toContainText('【Acme】');
  await expect(phone.messages.last()).not.toBeInViewport(); // no scrolling while the user reads older messages
  expect(await service.inbox()).toHaveLength(1000);
});

test('reconnect: automatic after the service restarts', async ({ phone, service }) => {
  await phone.open();
  const old = await phone.sendCode();
  await service.stop();
  await expect(phone.page.getByText('No connection to the service')).toBeVisible();
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.sendResponse).toContainText('The service does not answer');
  await phone.send.getByLabel('Phone number').fill('10086'); // the check needs the service
  await expect(phone.send.getByLabel('Phone number')).toHaveAttribute('aria-invalid', 'false');
  await phone.failure.selectOption('Limit by hour');
  await expect(phone.send.locator('#failing')).toHaveText('The service does not answer. Is it still running?');
  await expect(phone.failure).toHaveValue('none');
  await phone.page.route('**/inbox/events', route => route.fulfill({ status: 502, contentType: 'text/html', body: 'a proxy' }), { times: 1 });
  await service.start();
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' }); // with the id of the old message
  await expect(phone.page.getByText('Connected')).toBeAttached();
  await expect(phone.messages).toContainText('【Shop】');
  await expect(phone.messages).toHaveCount(1);
  await expect(phone.messages).not.toContainText(old);
  await expect(phone.page.locator('#announcement')).toContainText('Message to +86 186 0000 0000'); // although its id is not new
  await expect(phone.send.getByLabel('Phone number')).toHaveAttribute('aria-invalid', 'true');
  await phone.send.getByLabel('Phone number').fill('18600000000');
  await phone.sendCode();
});

test('keyboard: it is enough for the whole flow', async ({ phone }) => {
  await phone.open();
  const { keyboard } = phone.page;
  const focused = () => phone.page.evaluate(() => document.activeElement.id || document.activeElement.className || document.activeElement.textContent);
  const order = [];
  for (let i = 0; i < 20; i++) {
    await keyboard.press('Tab');
    order.push(await focused());
    if (order.at(-1) === 'primary' && order.length < 10) {
      await keyboard.press('Enter');
      await expect(phone.messages).toHaveCount(1);
    }
    if (order.at(-1) === 'suggestion') break;
  }
  expect(order.slice(0, 8)).toEqual(['send-number', 'signature', 'template', 'send-context', 'key', 'failure', 'times', 'primary']);
  expect(order).toContain('numbers');
  expect(order).toContain('code');
  await keyboard.press('Enter'); // accepts the suggestion
  await keyboard.press('Enter'); // verifies
  await expect(phone.validResponse).toContainText('{"valid":true}');
  for (const id of ['send-number', 'numbers', 'clear']) {
    await phone.page.locator('#' + id).focus();
    await keyboard.press('Shift+Tab');
    await keyboard.press('Tab');
    expect(await phone.page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle), id).toBe('solid');
  }
});

test.describe('in Chinese', () => {
  test.use({ locale: 'zh-CN' });
  test('language: all texts are Chinese', async ({ page, service }) => {
    await page.goto(service.url);
    await expect(page.getByText('已连接')).toBeAttached();
    await page.getByRole('button', { name: '发送验证码' }).click();
    const message = page.getByRole('region', { name: '短信' }).getByRole('listitem');
    await expect(message).toContainText('【阿里云】您的验证码是');
    await expect(message).toContainText('还可尝试 3 次');
    await page.getByRole('button', { name: /填入短信验证码/ }).click();
    await page.getByRole('button', { name: '验证', exact: true }).click();
    await expect(page.locator('#valid-answer')).toContainText('正确，验证码已被使用。');
    await expect(message).toContainText('已使用');
    expect(await page.locator('html').getAttribute('lang')).toBe('zh-CN');
    await page.locator('#failure').selectOption('小时级流控');
    await page.getByRole('button', { name: '发送验证码' }).click();
    await expect(page.locator('#send-answer .verdict')).toHaveText('已达到阿里云对此签名和号码的发送上限，未发送。');
    await page.getByLabel('手机号码').first().fill('1');
    await expect(page.locator('#send-number-is')).toHaveText('须为一个手机号码，例如 +8618612345678。');
    // The only English left is names of the API, and the code examples.
    const words = await page.evaluate(() => {
      for (const e of document.querySelectorAll('pre, code, h1, .tabs, .status, .detail, #version, summary')) e.remove();
      return document.body.innerText.match(/[A-Za-z]{3,}/g);
    });
    expect(words.filter(w => !['inbox', 'json', 'openapi', 'Code'].includes(w))).toEqual([]);
  });
});

test.describe('in another language', () => {
  test.use({ locale: 'de-DE' });
  test('language: falls back to English', async ({ phone }) => {
    await phone.open();
    await phone.sendCode();
  });
});

const axe = await readFile(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');

for (const colorScheme of ['light', 'dark']) {
  for (const [width, height] of [[1440, 900], [1000, 800], [360, 740]]) {
    for (const locale of ['en-US', 'zh-CN']) {
      test.describe(`${colorScheme}, ${width} wide, ${locale}`, () => {
        test.use({ colorScheme, locale, viewport: { width, height } });
        test('accessibility: axe finds no violation', async ({ page, service }) => {
          await page.goto(service.url);
          await expect(page.locator('#signal')).toHaveAttribute('data-on', 'true');
          const sendAndWait = async () => {
            await page.locator('#send .primary').click();
            await expect(page.locator('#send-answer')).not.toBeEmpty();
          };
          await sendAndWait();
          await page.locator('#code').fill('1');
          await page.locator('#valid .primary').click();
          await expect(page.locator('#valid-answer')).not.toBeEmpty();
          await sendAndWait();
          await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
          await page.locator('#numbers').selectOption('+8618600000000');
          await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
          await expect(page.locator('#other')).toBeVisible();
          await page.locator('#failure').selectOption('limit_hour');
          await expect(page.locator('#failing')).not.toBeEmpty();
          await sendAndWait();
          await expect(page.locator('#send-answer')).toContainText('429');
          await page.locator('#send-number').fill('1');
          await expect(page.locator('#send-number')).toHaveAttribute('aria-invalid', 'true');
          await page.locator('#send-number').fill('18600000000');

          await page.evaluate(axe);
          const { violations, passes } = await page.evaluate(() => window.axe.run(document, {
            runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'],
          }));
          expect(violations.map(v => `${v.id}: ${v.nodes.map(n => n.html + n.failureSummary).join('\n')}`)).toEqual([]);
          expect(passes.map(p => p.id)).toEqual(expect.arrayContaining(['color-contrast', 'label', 'button-name', 'select-name']));
          // The page does not scroll sideways.
          expect(await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth)).toBe(0);
          const dark = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor.match(/\d+/g).every(c => c < 64));
          expect(dark).toBe(colorScheme === 'dark');
        });
      });
    }
  }
}
