// Runs the built program as dev, one process per test, and a browser page that fails the test on
// errors and on requests to other hosts.
import { spawn } from 'node:child_process';
import { createServer } from 'node:net';
import { once } from 'node:events';
import { test as base, expect } from '@playwright/test';

export { expect };

const calls = '/phonenumberservice.PhoneNumberService/';

export async function freePort() {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

export class Service {
  constructor(port, settings, command = 'dev') {
    this.command = command;
    this.host = `localhost:${port}`;
    this.url = `http://${this.host}`;
    this.environment = { PHONENUMBER_LISTEN: `127.0.0.1:${port}`, ...settings };
    this.output = '';
  }

  async start() {
    this.process = spawn(process.env.PROGRAM, [this.command], { env: this.environment });
    for (const stream of [this.process.stdout, this.process.stderr]) stream.on('data', text => { this.output += text; });
    while (true) {
      if (this.process.exitCode !== null) throw new Error(`exited: ${this.output}`);
      if (await fetch(this.url).then(r => r.ok, () => false)) return this;
      await new Promise(resolve => setTimeout(resolve, 5));
    }
  }

  async stop() {
    this.wasStopped = true;
    this.process.kill('SIGKILL');
    if (this.process.exitCode === null && this.process.signalCode === null) await once(this.process, 'exit');
  }

  // call makes one of the two calls, like another program.
  async call(method, request) {
    const response = await fetch(this.url + calls + method, { method: 'POST', body: JSON.stringify(request) });
    return response.json();
  }

  // fill sends count messages to one number.
  async fill(count) {
    for (let i = 0; i < count; i += 5) { // with more in parallel, some are rejected
      await Promise.all(Array.from({ length: 5 }, () => this.call('SendSMS', { phone_number: '18600000000', signature: 'Acme' })));
    }
  }

  // fail makes sends fail.
  fail(failure) {
    return fetch(this.url + '/failures.json', { method: 'PUT', body: JSON.stringify(failure) });
  }

  async inbox(query = '') {
    return (await fetch(this.url + '/inbox.json' + query)).json();
  }
}

export const test = base.extend({
  settings: [{}, { option: true }],
  port: [0, { option: true }], // 0: any

  service: async ({ settings, port }, use) => {
    const service = await new Service(port || await freePort(), settings).start();
    await use(service);
    await service.stop();
  },

  // Each page fails its test on an error, a violation of the security policy, or another host.
  page: async ({ page, service }, use) => {
    const problems = [];
    let rejected = 0; // calls with an error status, which Chromium also logs as errors
    page.on('response', r => { if (r.status() >= 400 && r.url().startsWith(service.url + calls)) rejected++; });
    page.on('console', m => {
      if (m.type() !== 'error' && m.type() !== 'warning') return;
      if (m.text().startsWith('Failed to load resource') && m.location().url.startsWith(service.url + calls) && rejected-- > 0) return;
      if (service.wasStopped && /net::ERR_|status of 502/.test(m.text())) return; // the test stopped the service
      problems.push(`console: ${m.text()} ${m.location().url}`);
    });
    page.on('pageerror', e => problems.push(`error: ${e.message}`));
    page.on('request', r => {
      const url = new URL(r.url());
      if (url.protocol !== 'data:' && url.host !== service.host) problems.push(`request to ${url}`);
    });
    await page.addInitScript(() => addEventListener('securitypolicyviolation', e => console.error(`policy: ${e.violatedDirective} ${e.blockedURI}`)));
    await use(page);
    expect(problems).toEqual([]);
  },

  phone: async ({ page, service }, use) => use(new Phone(page, service)),
});

// A Phone is the English page, as a user sees it.
export class Phone {
  constructor(page, service) {
    this.page = page;
    this.service = service;
    this.messages = page.getByRole('region', { name: 'Messages' }).getByRole('listitem');
    this.send = page.locator('#send');
    this.valid = page.locator('#valid');
    this.sendResponse = page.locator('#send-answer');
    this.validResponse = page.locator('#valid-answer');
    this.failure = page.getByLabel("Aliyun's answer");
  }

  async open() {
    await this.page.goto(this.service.url);
    await expect(this.page.locator('#signal')).toHaveText('Connected');
    return this;
  }

  // numberChecked waits until the page knows the number's E.164 form. Without it, the page does not
  // notice that a message is the one of its own send.
  numberChecked() {
    return expect(this.page.locator('#send-number-is')).not.toBeEmpty();
  }

  async sendCode() {
    await this.numberChecked();
    const before = await this.messages.count();
    await this.page.getByRole('button', { name: 'Send code' }).click();
    await expect(this.messages).toHaveCount(before + 1);
    return this.code(before);
  }

  async code(index) {
    return this.messages.nth(index).getByRole('button').textContent();
  }

  async verify(code) {
    await this.page.getByLabel('Code', { exact: true }).fill(code);
    await this.page.getByRole('button', { name: 'Verify' }).click();
  }
}
