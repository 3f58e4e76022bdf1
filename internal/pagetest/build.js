import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

export const root = new URL('../..', import.meta.url).pathname;

// build builds the program once for all tests.
export default function build() {
  const directory = mkdtempSync(join(tmpdir(), 'phone-number-service'));
  process.env.PROGRAM = join(directory, 'phone-number-service');
  execFileSync('go', ['build', '-o', process.env.PROGRAM, '.'], { cwd: root, stdio: 'inherit' });
  return () => rmSync(directory, { recursive: true });
}
