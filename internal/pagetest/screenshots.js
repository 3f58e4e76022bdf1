// Makes the images in docs/images/: make screenshots.
import { root } from './build.js';
import { expect, test } from './service.js';

const screenshot = (name, locale, colorScheme, width, height, scene) => test.describe(name, () => {
  test.use({ locale, colorScheme, viewport: { width, height }, deviceScaleFactor: 1.5, port: 50511 });
  test('screenshot', async ({ page, service }) => {
    await page.goto(service.url);
    await expect(page.locator('#signal')).toHaveAttribute('data-on', 'true');
    await page.locator('#send .primary').click();
    await page.locator('#suggestion').click();
    await page.locator('#valid .primary').click();
    await expect(page.locator('#valid-answer')).toContainText('true');
    await service.call('SendSMS', { phone_number: '18600000000', signature: await page.locator('#signature').inputValue() });
    await expect(page.locator('#thread li')).toHaveCount(2);
    await scene(page);
    await page.mouse.click(1, 1); // removes the focus
    await expect(page.locator('#thread li').last()).toHaveCSS('opacity', '1');
    await page.screenshot({ path: `${root}docs/images/${name}.png` });
  });
});

screenshot('page', 'en-US', 'light', 1360, 850, () => {});

screenshot('page-dark-chinese', 'zh-CN', 'dark', 1360, 1010, async page => {
  await page.locator('#code').fill('000000');
  await page.locator('#valid .primary').click();
  await expect(page.locator('#valid-answer')).toContainText('false');
  await page.locator('#failure').selectOption('limit_hour');
  await expect(page.locator('#failing')).not.toBeEmpty();
  await page.locator('#send .primary').click();
  await expect(page.locator('#send-answer')).toContainText('429');
});

screenshot('page-narrow', 'en-US', 'light', 390, 844, page => page.locator('#phone').scrollIntoViewIfNeeded());
