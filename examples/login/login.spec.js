import { expect, test } from '@playwright/test';

const sms = 'http://localhost:50511';
// Each test uses another number, so that tests can run in parallel.
const someNumber = () => '186' + Math.floor(1e7 + Math.random() * 9e7);

test('accepts the sent code', async ({ page, request }) => {
  const number = someNumber();
  await page.goto('/');
  await page.getByLabel('Phone number').fill(number);
  await page.getByRole('button', { name: 'Send code' }).click();

  const inbox = await request.get(`${sms}/inbox.json`, { params: { phone_number: number, wait: '5s' } });
  const [{ code }] = await inbox.json();
  await page.getByLabel('Code', { exact: true }).fill(code);
  await page.getByRole('button', { name: 'Log in' }).click();
  await expect(page.getByText(`Welcome, ${number}`)).toBeVisible();
});

test('explains a limit of Aliyun', async ({ page, request }) => {
  const number = someNumber();
  await request.put(`${sms}/failures.json`, { data: { phone_number: number, kind: 'limit_minute', times: 1 } });
  await page.goto('/');
  await page.getByLabel('Phone number').fill(number);
  await page.getByRole('button', { name: 'Send code' }).click();
  await expect(page.getByRole('alert')).toHaveText('Too many codes. Try again in 1m0s.');
});
