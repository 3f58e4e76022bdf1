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

test('a newcomer sends a code, sees it arrive and verifies it', async ({ phone }) => {
  await phone.open();
  const code = await phone.sendCode();
  await expect(phone.messages).toContainText(`【Acme】Your code is ${code}`);
  await expect(phone.messages).toContainText('3 attempts');
  await expect(phone.sendAnswer).toContainText('OK · HTTP 200');
  await expect(phone.valid).toContainText('A code is valid: 3 attempts');
  await phone.page.getByRole('button', { name: `From Messages: ${code}` }).click();
  await expect(phone.page.getByLabel('Code', { exact: true })).toHaveValue(code);
  await phone.page.keyboard.press('Enter'); // Verify has the focus
  await expect(phone.validAnswer).toContainText('{"valid":true}');
  await expect(phone.messages).toContainText('used');
  await expect(phone.valid).toContainText('The phone has no valid code for this number.');
  await phone.page.getByRole('button', { name: 'Verify' }).click();
  await expect(phone.validAnswer).toContainText('{"valid":false}');
});

test('three wrong codes spend the attempts', async ({ phone }) => {
  await phone.open();
  const code = await phone.sendCode();
  for (const left of ['2 attempts', '1 attempt,', 'no attempts left']) {
    await phone.verify(wrong(code));
    await expect(phone.messages).toContainText(left);
    await expect(phone.validAnswer).toContainText('{"valid":false}');
  }
  await phone.verify(code);
  await expect(phone.validAnswer).toContainText('{"valid":false}');
  await expect(phone.messages).toContainText('no attempts left');
});

test('a newer code replaces the older one, and what other programs do is seen too', async ({ phone, service }) => {
  await phone.open();
  await phone.sendCode();
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  await expect(phone.messages).toHaveCount(2);
  await expect(phone.messages.nth(0)).toContainText('replaced by a newer code');
  await expect(phone.messages.nth(1)).toContainText('【Shop】');
  await service.call('Valid', { phone_number: '18600000000', code: await phone.code(1) });
  await expect(phone.messages.nth(1)).toContainText('used');
});

test.describe('with a short life', () => {
  test.use({ settings: { PHONENUMBER_CODE_TTL: '2s' } });
  test('a code is seen to expire', async ({ phone }) => {
    await phone.open();
    await phone.sendCode();
    await expect(phone.messages).toContainText('valid for 2 s');
    await expect(phone.messages).toContainText(/0:0[12] left/);
    await expect(phone.messages).toContainText('expired');
    await expect(phone.valid).toContainText('The phone has no valid code for this number.');
  });
});

test('sends fail as at Aliyun, once or until they shall succeed again', async ({ phone }) => {
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
      await expect(phone.sendAnswer).toContainText(status);
      await expect(phone.sendAnswer).toContainText(`Reason: ${reason} · aliyun.com`);
      await expect(phone.sendAnswer).toContainText(wait);
    }
  }
  await expect(phone.sendAnswer).not.toContainText('Wait');
  await phone.failure.selectOption('Limit by minute');
  await button.click();
  await expect(phone.sendAnswer).toContainText('Wait 0:5'); // it counts down
  await phone.failure.selectOption('No balance');
  await phone.page.getByLabel('For sends').fill('1');
  await phone.page.keyboard.press('Tab');
  await expect(phone.send).toContainText('The next send fails: No balance.');
  await button.click();
  await expect(phone.failure).toHaveValue('none');
  await expect(phone.messages).toHaveCount(0);
  await phone.sendCode();
  await expect(phone.sendAnswer).toContainText('OK · HTTP 200');
});

test.describe('with an impatient service', () => {
  test.use({ settings: { PHONENUMBER_SMS_TIMEOUT: '1s', PHONENUMBER_FAIL_SENDS: 'timeout_delivered:1' } });
  test('a time-out may hide an SMS that arrives, and its code works', async ({ phone }) => {
    await phone.open();
    await expect(phone.send).toContainText('The next send fails: Time-out, arrives.');
    await phone.page.getByRole('button', { name: 'Send code' }).dblclick(); // makes one send
    await expect(phone.messages).toContainText('3 attempts');
    await expect(phone.sendAnswer).toHaveText('Under way…');
    const code = await phone.code(0);
    await expect(phone.sendAnswer).toContainText('DEADLINE_EXCEEDED · HTTP 504');
    expect(await phone.service.inbox()).toHaveLength(1);
    await expect(phone.sendAnswer).toContainText('SMS_TIMEOUT');
    await phone.verify(code);
    await expect(phone.validAnswer).toContainText('{"valid":true}');
    await phone.failure.selectOption('Time-out');
    await phone.page.getByRole('button', { name: 'Send code' }).click();
    await expect(phone.sendAnswer).toHaveText('Under way…'); // instead of the previous answer
    await expect(phone.sendAnswer).toContainText('DEADLINE_EXCEEDED');
    await expect(phone.messages).toHaveCount(1);
  });
});

test('numbers are checked while they are typed', async ({ phone }) => {
  await phone.open();
  const number = phone.send.getByLabel('Phone number');
  await number.fill('+852 9123-4567');
  await expect(phone.send).toContainText('+85291234567');
  await expect(number).toHaveAttribute('aria-invalid', 'false');
  await expect(phone.valid.getByLabel('Phone number')).toHaveValue('+852 9123-4567'); // follows the other field
  await number.fill('01012345678');
  await expect(phone.send).toContainText('must be one mobile number, for example "+8618612345678"');
  await expect(number).toHaveAttribute('aria-invalid', 'true');
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.sendAnswer).toContainText('INVALID_ARGUMENT · HTTP 400');
  await expect(phone.sendAnswer).toContainText('phone_number must be one mobile number');
  await phone.valid.getByLabel('Phone number').fill('10086');
  await expect(phone.valid).toContainText('must be one mobile number');
  await number.fill('18600000000');
  await expect(phone.valid.getByLabel('Phone number')).toHaveValue('10086'); // no longer follows
});

test('several numbers are listed newest first and can be switched', async ({ phone, service }) => {
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
  await expect(phone.messages).toHaveCount(0); // and no messages of another number
  await expect(numbers).toHaveValue('+8618600000002');
  expect(await service.inbox('?phone_number=18600000002')).toEqual([]);
  expect(await service.inbox()).toHaveLength(2);
});

test('the phone stays with the number that was sent to from here', async ({ phone, service }) => {
  await phone.open();
  await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
  await expect(phone.messages).toContainText('【Shop】'); // this page has not sent yet
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.messages).toContainText('【Acme】');
  await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
  await expect(phone.page.getByRole('button', { name: 'New: +86 186 0000 0001' })).toBeVisible();
  await expect(phone.messages).toContainText('【Acme】');
});

test('a tab that nobody sees listens no more, and tells what it missed when it is seen', async ({ phone, service }) => {
  await phone.open();
  await phone.sendCode();
  const see = hidden => phone.page.evaluate(hidden => {
    Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
    document.dispatchEvent(new Event('visibilitychange'));
  }, hidden);
  const given = phone.page.waitForEvent('requestfailed', r => r.url().endsWith('/inbox/events')); // its connection is closed
  await see(true);
  await given;
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
  await expect(phone.messages).toHaveCount(1);
  await see(false);
  await expect(phone.messages).toHaveCount(2);
  await expect(phone.page.getByRole('button', { name: 'New: +86 186 0000 0001' })).toBeVisible();
});

// together opens windows until there are count, and returns them and those that requested the stream.
async function together(phone, context, count) {
  const streams = [];
  const phones = [phone];
  while (phones.length < count) phones.push(new Phone(await context.newPage(), phone.service));
  for (const p of phones) p.page.on('request', r => { if (r.url().endsWith('/inbox/events')) streams.push(p); });
  for (const p of phones) await p.open();
  return { phones, streams };
}

test('more windows than a browser has connections are told everything by one stream', async ({ phone, context, service }) => {
  await service.fail({ phone_number: '18600000009', kind: 'limit_day' });
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  const { phones, streams } = await together(phone, context, 9);
  for (const p of phones) {
    await expect(p.messages).toHaveCount(1); // from before
    await expect(p.send).toContainText('Sends to +86 186 0000 0009 fail: Limit by day.');
  }
  const code = await phones.at(-1).sendCode();
  for (const p of phones) {
    await expect(p.messages).toHaveCount(2);
    await expect(p.messages.nth(1)).toContainText(code);
    await expect(p.messages.nth(1)).toContainText(/3 attempts, (10:00|9:5\d) left/);
  }
  await phones.at(3).verify(code);
  await expect(phones.at(3).validAnswer).toContainText('{"valid":true}');
  for (const p of phones) await expect(p.messages.nth(1)).toContainText('used');
  expect(streams).toEqual([phone]);
});

test('a window that goes leaves the stream to another one', async ({ phone, context, service }) => {
  const { phones, streams } = await together(phone, context, 3);
  const [first, second, third] = phones;
  await first.page.evaluate(() => {
    Object.defineProperty(document, 'hidden', { value: true, configurable: true });
    document.dispatchEvent(new Event('visibilitychange'));
  });
  await expect.poll(() => streams).toEqual([first, second]);
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'One' });
  await expect(second.messages).toHaveCount(1);
  await expect(third.messages).toHaveCount(1);
  await expect(first.messages).toHaveCount(0); // it is hidden
  await second.page.close();
  await expect.poll(() => streams).toEqual([first, second, third]);
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Two' });
  await expect(third.messages).toHaveCount(2);
  await service.stop();
  await expect(third.page.getByText('No connection to the service')).toBeVisible();
});

test('all windows say that the service is away, and come back', async ({ phone, context, service }) => {
  const { phones } = await together(phone, context, 3);
  await service.stop();
  for (const p of phones) await expect(p.page.getByText('No connection to the service')).toBeVisible();
  await service.start();
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  for (const p of phones) {
    await expect(p.page.locator('#signal')).toHaveText('Connected');
    await expect(p.messages).toContainText('【Shop】');
  }
});

// As under a name in the network, which is not a secure context.
test('without locks each window has a stream, and says why a call waits', async ({ phone, context, service }) => {
  await context.addInitScript(() => Object.defineProperty(navigator, 'locks', { value: undefined }));
  const { phones, streams } = await together(phone, context, 6);
  expect(streams).toEqual(phones);
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' });
  for (const p of phones) await expect(p.messages).toContainText('【Shop】');
  await phones[5].page.getByRole('button', { name: 'Send code' }).click();
  await expect(phones[5].sendAnswer).toContainText('If more than five windows of this page are open, close some');
  await phones[0].page.close();
  await expect(phones[5].sendAnswer).toContainText('OK · HTTP 200');
});

test('what the page lets fail or succeed leaves other numbers alone', async ({ phone, service }) => {
  for (const n of [1, 2, 3, 4]) await service.fail({ phone_number: `1860000000${n}`, kind: 'limit_day' });
  await service.fail({ kind: 'no_balance', times: 3 });
  await phone.open();
  await expect(phone.failure).toHaveValue('no_balance');
  await expect(phone.page.getByLabel('For sends')).toHaveValue('3');
  await expect(phone.send).toContainText('The next 3 sends fail: No balance. Sends to +86 186 0000 0001 fail: Limit by day.');
  await expect(phone.send).toContainText('So for 1 more numbers.');
  await phone.failure.selectOption('OK, SMS arrives');
  await expect(phone.send).not.toContainText('The next 3 sends');
  await expect(phone.send).toContainText('Sends to +86 186 0000 0001 fail: Limit by day.');
  await phone.sendCode();
  expect((await service.call('SendSMS', { phone_number: '18600000001' })).code).toBe('resource_exhausted');
});

test('what is chosen last is what happens, however fast', async ({ phone, service }) => {
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
  await times.press('Enter'); // sends after the change
  await expect(phone.sendAnswer).toContainText('HTTP 429');
  await expect(phone.failure).toHaveValue('none');
  await expect(times).toHaveValue('1'); // cleared when it loses the focus
  await phone.failure.focus();
  await expect(times).toHaveValue('');
  for (const wrong of ['0', '1001', '1.5']) {
    await times.fill(wrong);
    await phone.failure.selectOption('Limit by day');
    await expect(phone.send).toContainText('A whole number from 1 to 1,000; empty for all.');
    await expect(times).toHaveAttribute('aria-invalid', 'true');
    expect(await (await fetch(service.url + '/failures.json')).json()).not.toContainEqual(expect.objectContaining({ kind: 'limit_day' }));
  }
});

test('the phone follows long messages too', async ({ phone, service }) => {
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

test('a code is copied by one click', async ({ phone, context }) => {
  await context.grantPermissions(['clipboard-read', 'clipboard-write']);
  await phone.open();
  const code = await phone.sendCode();
  await phone.page.getByRole('button', { name: `Copy the code ${code}` }).click();
  await expect(phone.messages.getByRole('button')).toHaveAttribute('data-copied', 'Copied');
  expect(await phone.page.evaluate(() => navigator.clipboard.readText())).toBe(code);
});

test('a code is copied where the browser gives no clipboard', async ({ phone, context }) => {
  await context.grantPermissions(['clipboard-read', 'clipboard-write']);
  await phone.page.addInitScript(() => { navigator.clipboard.writeText = () => Promise.reject(new Error('none')); });
  await phone.open();
  const code = await phone.sendCode();
  await phone.messages.getByRole('button').click();
  await expect(phone.messages.getByRole('button')).toBeFocused();
  expect(await phone.page.evaluate(() => navigator.clipboard.readText())).toBe(code);
});

// The snippets must escape these characters for a shell, JSON and Go.
const signature = `Ö'Neil & "Co" $(x) \\ 阿里云`;

test('the lines to copy do what the forms do', async ({ phone, service, context }) => {
  test.slow(); // compiles
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

test('of several valid codes the newest is offered', async ({ phone, service }) => {
  await service.fail({ kind: 'timeout_delivered' }); // replaces no earlier code
  await phone.open();
  for (const _ of [1, 2]) service.call('SendSMS', { phone_number: '18600000000', signature: 'Acme' }).catch(() => {}); // may end after the test
  await expect(phone.valid).toContainText('2 codes are valid; the newest: 3 attempts');
  await phone.page.getByRole('button', { name: `From Messages: ${await phone.code(1)}` }).click();
});

test('times are the service\'s, whatever the clock here says', async ({ phone }) => {
  await phone.page.clock.install({ time: Date.now() - 3_600_000 });
  await phone.open();
  const code = await phone.sendCode();
  await expect(phone.messages).toContainText(/(10:00|9:5\d) left/);
  await expect(phone.page.locator('#heard')).toHaveText(`Message to +86 186 0000 0000: code ${[...code].join(' ')}. Acme`);
});

test('what callers send is shown as text', async ({ phone, service }) => {
  await phone.open();
  const hostile = '<img src=x onerror=alert(1)><b>hi</b>';
  await service.call('SendSMS', { phone_number: '18600000000', signature: hostile });
  await expect(phone.messages).toContainText(`【${hostile}】`);
});

test('the last thousand messages are kept and shown', async ({ phone, service }) => {
  await service.fill(995);
  await phone.open();
  await expect(phone.messages).toHaveCount(995);
  await expect(phone.messages.last()).toBeInViewport();
  const kept = await phone.code(5);
  await service.fill(10);
  await expect(phone.messages).toHaveCount(1000);
  expect(await phone.code(0)).toBe(kept);
  await expect(phone.messages.last()).toBeInViewport(); // the list follows
  await phone.messages.first().scrollIntoViewIfNeeded();
  await service.fill(5);
  await expect(phone.messages.first()).toContainText('【Acme】');
  await expect(phone.messages.last()).not.toBeInViewport(); // a scrolled list does not move
  expect(await service.inbox()).toHaveLength(1000);
});

test('it comes back by itself after the service was away', async ({ phone, service }) => {
  await phone.open();
  const old = await phone.sendCode();
  await service.stop();
  await expect(phone.page.getByText('No connection to the service')).toBeVisible();
  await phone.page.getByRole('button', { name: 'Send code' }).click();
  await expect(phone.sendAnswer).toContainText('The service does not answer');
  await phone.send.getByLabel('Phone number').fill('10086'); // cannot be checked without the service
  await expect(phone.send.getByLabel('Phone number')).toHaveAttribute('aria-invalid', 'false');
  await phone.failure.selectOption('Limit by hour');
  await expect(phone.send.locator('#failing')).toHaveText('The service does not answer. Is it still running?');
  await expect(phone.failure).toHaveValue('none');
  await phone.page.route('**/inbox/events', route => route.fulfill({ status: 502, contentType: 'text/html', body: 'a proxy' }), { times: 1 });
  await service.start();
  await service.call('SendSMS', { phone_number: '18600000000', signature: 'Shop' }); // gets the id of the old message
  await expect(phone.page.getByText('Connected')).toBeAttached();
  await expect(phone.messages).toContainText('【Shop】');
  await expect(phone.messages).toHaveCount(1);
  await expect(phone.messages).not.toContainText(old);
  await expect(phone.page.locator('#heard')).toContainText('Message to +86 186 0000 0000'); // although its id is not new
  await expect(phone.send.getByLabel('Phone number')).toHaveAttribute('aria-invalid', 'true');
  await phone.send.getByLabel('Phone number').fill('18600000000');
  await phone.sendCode();
});

test('the keyboard alone is enough', async ({ phone }) => {
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
  expect(order.slice(0, 6)).toEqual(['send-number', 'signature', 'template', 'failure', 'times', 'primary']);
  expect(order).toContain('numbers');
  expect(order).toContain('code');
  await keyboard.press('Enter'); // accepts the suggestion
  await keyboard.press('Enter'); // verifies
  await expect(phone.validAnswer).toContainText('{"valid":true}');
  for (const id of ['send-number', 'numbers', 'clear']) {
    await phone.page.locator('#' + id).focus();
    await keyboard.press('Shift+Tab');
    await keyboard.press('Tab');
    expect(await phone.page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle), id).toBe('solid');
  }
});

test.describe('in Chinese', () => {
  test.use({ locale: 'zh-CN' });
  test('all that the page says is Chinese', async ({ page, service }) => {
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
    // The only English words are names of the API, and the snippets.
    const words = await page.evaluate(() => {
      for (const e of document.querySelectorAll('pre, code, h1, .tabs, .status, .detail, #version, summary')) e.remove();
      return document.body.innerText.match(/[A-Za-z]{3,}/g);
    });
    expect(words.filter(w => !['inbox', 'json', 'openapi', 'Code'].includes(w))).toEqual([]);
  });
});

test.describe('another language', () => {
  test.use({ locale: 'de-DE' });
  test('falls back to English', async ({ phone }) => {
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
        test('everybody can read and use it', async ({ page, service }) => {
          await page.goto(service.url);
          await expect(page.locator('#signal')).toHaveAttribute('data-on', 'true');
          const answers = async () => {
            await page.locator('#send .primary').click();
            await expect(page.locator('#send-answer')).not.toBeEmpty();
          };
          await answers();
          await page.locator('#code').fill('1');
          await page.locator('#valid .primary').click();
          await expect(page.locator('#valid-answer')).not.toBeEmpty();
          await answers();
          await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
          await page.locator('#numbers').selectOption('+8618600000000');
          await service.call('SendSMS', { phone_number: '18600000001', signature: 'Shop' });
          await expect(page.locator('#other')).toBeVisible();
          await page.locator('#failure').selectOption('limit_hour');
          await expect(page.locator('#failing')).not.toBeEmpty();
          await answers();
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
          // Nothing is cut off, and the page does not scroll sideways.
          expect(await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth)).toBe(0);
          const dark = await page.evaluate(() => getComputedStyle(document.documentElement).backgroundColor.match(/\d+/g).every(c => c < 64));
          expect(dark).toBe(colorScheme === 'dark');
        });
      });
    }
  }
}
