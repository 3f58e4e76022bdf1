import { defineConfig } from '@playwright/test';

const timeout = 300_000; // the first go run compiles everything

export default defineConfig({
  use: {
    baseURL: 'http://localhost:8080',
    launchOptions: { executablePath: process.env.CHROMIUM }, // if unset, Playwright's own browser
  },
  webServer: [
    { command: 'go run github.com/liulinhuai/phone-number-service dev', url: 'http://localhost:50511/inbox.json', reuseExistingServer: !process.env.CI, timeout },
    { command: 'go run .', url: 'http://localhost:8080/', reuseExistingServer: !process.env.CI, timeout },
  ],
});
