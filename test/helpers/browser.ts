/** A page in headless Chromium: what it says to the console, what it asks the network for, what it holds. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { accessSync, constants } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { delimiter, join } from 'node:path';

/** Where Chromium or Chrome is, if anywhere in PATH. */
export function findBrowser(): string | undefined {
  const folders = (process.env['PATH'] ?? '').split(delimiter);
  const names = ['chromium', 'chromium-browser', 'google-chrome'];
  return names
    .flatMap((name) => folders.map((folder) => join(folder, name)))
    .find((path) => {
      try {
        accessSync(path, constants.X_OK);
        return true;
      } catch {
        return false;
      }
    });
}

export interface Opened {
  /** The document after its load event, as HTML. */
  dom: string;
  /** Lines of the console, refusals of a security policy among them. */
  complaints: string[];
  /** Paths that were asked for, in the order of their names. */
  requests: string[];
}

/** Serves `pages` (HTML by path) and opens the first. `profile` is an empty folder. */
export async function openPages(
  browser: string,
  profile: string,
  pages: Readonly<Record<string, string>>,
): Promise<Opened> {
  const requests: string[] = [];
  const server = createServer((request, response) => {
    const path = request.url ?? '';
    requests.push(path);
    const html = pages[path];
    response.writeHead(html === undefined ? 404 : 200, {
      'content-type': 'text/html; charset=utf-8',
      'cache-control': 'no-store',
    });
    response.end(html);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  try {
    const [first] = Object.keys(pages);
    const { dom, log } = await dump(browser, profile, `http://127.0.0.1:${port}${first}`);
    const complaints = log.split('\n').filter((line) => line.includes('CONSOLE'));
    return { dom, complaints, requests: requests.sort() };
  } finally {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}

async function dump(browser: string, profile: string, url: string) {
  const child = spawn(
    browser,
    [
      '--headless',
      '--no-sandbox', // the suite may run as root, where the sandbox cannot start
      '--disable-gpu',
      '--disable-quic',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
      '--no-proxy-server',
      `--user-data-dir=${profile}`,
      '--enable-logging=stderr',
      '--dump-dom',
      url,
    ],
    { stdio: ['ignore', 'pipe', 'pipe'] },
  );
  let dom = '';
  let log = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    dom += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    log += text;
  });
  const code = await new Promise<number | null>((resolve, reject) => {
    child.on('close', resolve).on('error', reject);
  });
  assert.equal(code, 0, log);
  return { dom, log };
}
