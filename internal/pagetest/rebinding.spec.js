// DNS rebinding: the attacker points the name of a page at the address of serve. For the browser,
// page and service then have the same origin. The test serves the page from loopback too, because
// this chromium blocks loopback for pages of the internet; other browsers do not.
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from '@playwright/test';
import config from './playwright.config.js';
import { Service, freePort } from './service.js';

const { launchOptions } = config.use;
test.use({ launchOptions: { ...launchOptions, args: [...launchOptions.args, '--host-resolver-rules=MAP evil.example 127.0.0.1'] } });

const path = '/phonenumberservice.PhoneNumberService/SendSMS';
const message = JSON.stringify({ phone_number: '18600000000', signature: 'Acme', template_code: 'SMS_1' });

// gateway starts a fake of Aliyun that accepts every SMS and counts them.
async function gateway() {
  const server = createServer((_, response) => {
    server.sent++;
    response.end(JSON.stringify({ Code: 'OK', BizId: '1', RequestId: '2' }));
  }).listen(0, '127.0.0.1');
  server.sent = 0;
  await once(server, 'listening');
  return server;
}

// Each attack sends from the page in another way. It returns the status that the page can see.
const attacks = {
  'a call in JSON': ([path, message]) => fetch(path, { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: message }).then(r => r.status),
  'a call without a type': ([path, message]) => fetch(path, { method: 'POST', body: new Blob([message]) }).then(r => r.status),
  'a call as text': ([path, message]) => fetch(path, { method: 'POST', mode: 'no-cors', body: message }).then(r => r.status),
  'a call without a referrer': ([path, message]) => fetch(path, { method: 'POST', referrerPolicy: 'no-referrer', headers: { 'Content-Type': 'application/json' }, body: message }).then(r => r.status),
  'a form': ([path, message]) => new Promise(resolve => {
    const frame = Object.assign(document.createElement('iframe'), { name: 'frame', onload: () => resolve(403) });
    const form = Object.assign(document.createElement('form'), { method: 'POST', action: path, target: 'frame', enctype: 'text/plain' });
    const [start, end] = [message.slice(0, -1) + ',"', '":""}'];
    form.append(Object.assign(document.createElement('input'), { name: start, value: end }));
    document.body.append(frame, form);
    form.submit();
  }),
};

for (const [listed, status] of [[false, 403], [true, 200]]) {
  test(`DNS rebinding: a page ${listed ? 'with a listed origin can call serve' : 'cannot send through serve'}`, async ({ page }) => {
    const [port, directory, aliyun] = [await freePort(), await mkdtemp(join(tmpdir(), 'serve')), await gateway()];
    const origin = `http://evil.example:${port}`;
    const attacker = createServer((_, response) => response.setHeader('Content-Type', 'text/html').end('<title>evil</title><body>')).listen(port, '127.0.0.1');
    await page.goto(origin);
    attacker.closeAllConnections();
    attacker.close();
    await once(attacker, 'close');
    const service = await new Service(port, {
      DATA_SOURCE_NAME: `sqlite:${join(directory, 'codes.db')}`, ALIYUN_ENDPOINT: `http://127.0.0.1:${aliyun.address().port}`,
      ALIYUN_ACCESS_KEY_ID: 'id', ALIYUN_ACCESS_KEY_SECRET: 'secret', PHONENUMBER_METRICS_LISTEN: '127.0.0.1:0', PHONENUMBER_CORS_ORIGINS: listed ? origin : '',
    }, 'serve').start();
    if (listed) {
      expect(await page.evaluate(attacks['a call in JSON'], [path, message])).toBe(status);
      expect(aliyun.sent).toBe(1);
    } else {
      for (const [name, attack] of Object.entries(attacks)) {
        expect(await page.evaluate(attack, [path, message]), name).toBe(status);
        expect(aliyun.sent, name).toBe(0);
      }
    }
    await service.stop();
    aliyun.close();
    await rm(directory, { recursive: true });
  });
}
