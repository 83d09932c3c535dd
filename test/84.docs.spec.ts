// README and docs/ say what is true: links lead somewhere, commands and their options exist, programs run as
// pasted.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { cp, mkdir, mkdtemp, readdir, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { resolveConfig } from '../src/config.js';
import { readConfigFile } from '../src/config-file.js';
import { MAIN } from './helpers/built.js';
import { drawFaces, writeFolder } from './helpers/small-training.js';

const ROOT = fileURLToPath(new URL('..', import.meta.url));
const run = promisify(execFile);

const PAGES = [
  ...['README.md', 'CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md'],
  ...readdirSync(join(ROOT, 'docs'))
    .filter((name) => name.endsWith('.md'))
    .map((name) => join('docs', name)),
];

interface Block {
  page: string;
  language: string;
  text: string;
}

const textOf = (page: string): string => readFileSync(join(ROOT, page), 'utf8');

const BLOCKS: Block[] = PAGES.flatMap((page) =>
  [...textOf(page).matchAll(/^```(\w*)\n(.*?)^```$/gms)].map(([, language, text]) => ({
    page,
    language: language!,
    text: text!,
  })),
);

/** The command lines of a block, each with its continuation lines and without its comment. */
function commandLines({ text }: Block): string[][] {
  return text
    .replace(/\\\n/g, ' ')
    .split('\n')
    .map((line) => line.replace(/(^|\s)#.*$/, '').trim())
    .filter((line) => line !== '')
    .map((line) => line.split(/\s+/));
}

const shell = BLOCKS.filter(({ language }) => language === 'sh');
/** Command lines in sentences, too: `hardmine pack ...`. */
const inline: [page: string, words: string[]][] = PAGES.flatMap((page) =>
  [
    ...textOf(page)
      .replace(/^```.*?^```$/gms, '')
      .matchAll(/`(?:npx )?(hardmine [a-z][^`]*)`/g),
  ].map(([, words]): [string, string[]] => [page, words!.split(/\s+/)]),
);

describe('the documentation', function () {
  this.timeout(300_000);
  const helps = new Map<string, string>();

  /** What `hardmine COMMAND --help` prints. */
  async function helpOf(command: readonly string[]): Promise<string> {
    const key = command.join(' ');
    const known = helps.get(key);
    if (known !== undefined) return known;
    const { stdout } = await run(process.execPath, [MAIN, ...command, '--help']);
    helps.set(key, stdout);
    return stdout;
  }

  it('links to what is there', () => {
    let links = 0;
    for (const page of PAGES) {
      for (const [, target] of textOf(page).matchAll(/\]\(([^)#\s]+)[^)]*\)/g)) {
        if (/^https?:/.test(target!)) continue;
        links += 1;
        assert.ok(existsSync(resolve(ROOT, dirname(page), target!)), `${page}: ${target}`);
      }
      // Paths of the repository in code spans.
      const names =
        /`((?:docs|src|test|examples|scripts|bench|binding|core|cpu|cuda)\/[\w./-]*\w)`/g;
      for (const [, target] of textOf(page).matchAll(names)) {
        links += 1;
        const there = existsSync(join(ROOT, target!));
        // `test/61` is short for its spec.
        const short = readdirSync(join(ROOT, 'test')).some((name) =>
          `test/${name}`.startsWith(`${target}.`),
        );
        assert.ok(there || short, `${page}: ${target}`);
      }
    }
    assert.ok(links > 40, `${links} links were found`);
  });

  it('names commands and options that exist', async () => {
    const { scripts } = JSON.parse(textOf('package.json')) as { scripts: Record<string, string> };
    let commands = 0;
    const lines = [
      ...shell.flatMap((block) =>
        commandLines(block).map((words) => ({ page: block.page, words })),
      ),
      ...inline.map(([page, words]) => ({ page, words })),
    ];
    for (const { page, words } of lines) {
      const shown = `${page}: ${words.join(' ')}`;
      if (words[0] === 'npm' && words[1] === 'run') assert.ok(scripts[words[2]!], shown);
      if (words[0] === 'node' || words[0] === 'python3') {
        assert.ok(existsSync(join(ROOT, words.find((word) => /\.(mjs|py)$/.test(word))!)), shown);
      }
      const at = words.indexOf('hardmine');
      if (at < 0 || at > 1) continue;
      commands += 1;
      const rest = words.slice(at + 1);
      const command = rest[0] === 'bench' && rest[1] ? rest.slice(0, 2) : rest.slice(0, 1);
      const help = await helpOf(command[0]!.startsWith('-') ? [] : command);
      assert.match(
        help,
        new RegExp(
          `^Usage: hardmine${command[0]!.startsWith('-') ? '' : ` ${command.join(' ')}`}\\b`,
        ),
        shown,
      );
      for (const option of rest.filter((word) => /^--\w/.test(word))) {
        assert.match(help, new RegExp(`(^|[\\s,])${option}\\b(?!-)`, 'm'), `${shown}: ${option}`);
      }
    }
    assert.ok(commands > 25, `${commands} commands were found`);
  });

  it('names options that exist in its sentences', async () => {
    const known = new Set<string>();
    const { stdout } = await run(process.execPath, [MAIN, '--help']);
    const names = [...stdout.matchAll(/^ {2}([a-z-]+) /gm)].map(([, name]) => name!);
    for (const command of [...names, 'bench head', 'bench step', 'bench data']) {
      const help = await helpOf(command.split(' '));
      for (const [option] of help.matchAll(/--[a-zA-Z][\w-]*/g)) known.add(option);
    }
    // npm's and node's own, and those of scripts.
    for (const option of ['--omit', '--no-addons', '--ignore-scripts', '--headers-only'])
      known.add(option);
    for (const page of PAGES) {
      for (const [, span] of textOf(page)
        .replace(/^```.*?^```$/gms, '')
        .matchAll(/`([^`\n]+)`/g)) {
        if (/^(npm|node|bash) |\.sh |scripts\/|bench\//.test(span!)) continue;
        for (const [, option] of span!.matchAll(/(?:^|\s|\|)(--[a-zA-Z][\w-]*)/g)) {
          assert.ok(known.has(option!), `${page}: \`${span}\``);
        }
      }
    }
  });

  describe('programs and settings', () => {
    let folder: string;

    before(async () => {
      folder = await mkdtemp(join(tmpdir(), 'hardmine-docs-'));
      // More images than the default batch of 64.
      await writeFolder(await drawFaces(join(folder, 'drawn')), join(folder, 'faces'));
      const person = join(folder, 'faces', (await readdir(join(folder, 'faces')))[0]!);
      const [first, second] = await readdir(person);
      await cp(join(person, first!), join(folder, 'a.jpg'));
      await cp(join(person, second!), join(folder, 'b.jpg'));
      await writeFile(join(folder, 'package.json'), '{"private": true}');
      // As if it were installed there.
      await mkdir(join(folder, 'node_modules'));
      await symlink(ROOT, join(folder, 'node_modules', 'hardmine'));
    });
    after(() => rm(folder, { recursive: true, force: true }));

    it('run as they are pasted', async () => {
      const programs = BLOCKS.filter(({ language }) => language === 'js');
      assert.ok(programs.length > 0);
      for (const [i, { page, text }] of programs.entries()) {
        const file = join(folder, `program-${i}.mjs`);
        await writeFile(file, text);
        const { stdout, stderr } = await run(process.execPath, [file], {
          cwd: folder,
        });
        assert.equal(stderr, '', page);
        assert.notEqual(stdout, '', page);
      }
    });

    it('are configurations that train takes', async () => {
      const configs = BLOCKS.filter(
        ({ language, text }) => language === 'json' && !text.includes('"rows"'),
      );
      assert.ok(configs.length > 0);
      for (const { text } of configs) {
        const file = join(folder, 'config.json');
        await writeFile(file, text);
        resolveConfig(await readConfigFile(file));
      }
    });
  });
});
