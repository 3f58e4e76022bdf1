import { defineConfig } from '@playwright/test';

// Debian's chromium. The arguments let it run as root in a container, and turn off its own requests
// to the internet.
export default defineConfig({
  testDir: '.',
  globalSetup: './build.js',
  forbidOnly: true,
  fullyParallel: true,
  workers: 2,
  timeout: 60_000,
  reporter: 'list',
  projects: [
    { name: 'tests', testMatch: '*.spec.js' },
    { name: 'figures', testMatch: 'figures.js' },
    { name: 'screenshots', testMatch: 'screenshots.js' },
  ],
  use: {
    actionTimeout: 15_000,
    launchOptions: {
      executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
      args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'],
    },
  },
});
