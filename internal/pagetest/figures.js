// Measures the speed of the page: make page-figures. No figure makes a test fail.
import { test } from './service.js';

const median = values => values.sort((a, b) => a - b)[values.length >> 1];

test('first paint', async ({ page, service }) => {
  const paints = [];
  for (let i = 0; i < 30; i++) {
    await page.goto(service.url);
    paints.push(await page.evaluate(() => new Promise(resolve => {
      new PerformanceObserver(list => resolve(list.getEntriesByName('first-contentful-paint')[0]?.startTime)).observe({ type: 'paint', buffered: true });
    })));
  }
  console.log(`first paint with content: first ${paints[0]} ms, median ${median(paints.slice(1))} ms of 29 more`);
});

test('1,000 messages', async ({ page, service }) => {
  await service.fill(1000);
  const began = Date.now();
  await page.goto(service.url);
  await page.locator('#thread li').nth(999).waitFor();
  console.log(`1,000 messages to one number: shown ${Date.now() - began} ms after the request for the page`);
  await page.evaluate(() => {
    window.frames_ = [];
    let last = performance.now();
    requestAnimationFrame(function frame(now) {
      window.frames_.push(now - last);
      last = now;
      requestAnimationFrame(frame);
    });
  });
  await page.waitForTimeout(2000);
  const printFrames = async phase => {
    const f = (await page.evaluate(() => window.frames_.splice(0))).slice(1).sort((a, b) => a - b);
    console.log(`${phase}: ${f.length} frames, median ${f[f.length >> 1].toFixed(1)}, p99 ${f[Math.floor(f.length * 0.99)].toFixed(1)}, longest ${f.at(-1).toFixed(1)} ms`);
  };
  await printFrames('at rest, 2 s');
  for (let i = 0; i < 40; i++) {
    await service.call('SendSMS', { phone_number: '18600000000', signature: 'Acme' });
    await page.waitForTimeout(50);
  }
  await printFrames('20 messages a second, 2 s');
  const burst = Date.now();
  await service.fill(2000);
  await printFrames(`2,000 messages in ${Date.now() - burst} ms`);
  await page.locator('#thread').evaluate(async t => {
    for (let i = 0; i < 100; i++) {
      t.scrollTop = t.scrollHeight * Math.abs(Math.sin(i / 10));
      await new Promise(requestAnimationFrame);
    }
  });
  await printFrames('scrolling through them');
  const heap = await (await page.context().newCDPSession(page)).send('Runtime.getHeapUsage');
  console.log(`${await page.locator('#thread li').count()} bubbles, heap ${(heap.usedSize / 1e6).toFixed(1)} MB`);
});
