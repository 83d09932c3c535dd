import assert from 'node:assert/strict';
import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { pauseMs, reasonToRestart } from '../src/cli/supervisor.js';
import { isRunning } from '../src/formats/processes.js';
import { checkpointName } from '../src/train/checkpoint.js';
import { childrenOf, type LogLine, type Watched, watch } from './helpers/children.js';
import { checkpointHashes, drawFaces } from './helpers/small-training.js';

describe('train --restarts', function () {
  // Each process starts Node and compiles the sources anew; a busy machine takes many times as long.
  this.timeout(600_000);
  let folder: string;
  let data: string;
  const at = (...names: string[]) => join(folder, ...names);
  /** 24 steps with a checkpoint every 4. */
  const argv = (out: string, ...more: string[]) => [
    ...['train', '--data', data, '--out', at(out), '--validation', 'none', '--device', 'cpu'],
    ...['--batch', '8', '--embedding', '32', '--scale', '16', '--lr', '0.02', '--deterministic'],
    ...['--checkpoint-every', '4', '--epochs', '2', ...more],
  ];
  const pids: number[] = [];
  /** Sends the only child of a supervisor a signal. */
  const signalChild = async (run: Watched, signal: NodeJS.Signals): Promise<void> => {
    const children = await childrenOf(run.child.pid!);
    assert.equal(children.length, 1);
    pids.push(children[0]!);
    process.kill(children[0]!, signal);
  };
  /** Resolves once a process has ended that is no child of ours. */
  const gone = async (pid: number): Promise<void> => {
    while (isRunning(pid)) await setTimeout(20);
  };
  const named = (run: Watched, name: string): LogLine[] =>
    run.events.filter(({ event }) => event === name);

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-supervisor-'));
    data = await drawFaces(at('faces'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('pauses for longer each time, and not for what a restart does not mend', () => {
    const seconds = [1, 2, 3, 6, 7, 8, 1000].map((restart) => pauseMs(restart) / 1000);
    assert.deepEqual(seconds, [1, 2, 4, 32, 60, 60, 60]);
    const failed = { exitCode: 1, signal: null };
    assert.match(
      reasonToRestart({ exitCode: null, signal: 'SIGSEGV', report: null })!,
      /ended by SIGSEGV/,
    );
    assert.match(reasonToRestart({ ...failed, report: null })!, /crashed/);
    assert.match(reasonToRestart({ ...failed, report: { code: 'ERR_DEVICE_LOST' } })!, /lost/);
    for (const code of ['ERR_DATA', 'ERR_NON_FINITE', 'ERR_IO', 'ERR_CHECKPOINT'] as const) {
      assert.equal(reasonToRestart({ ...failed, report: { code } }), null, code);
    }
    for (const exitCode of [0, 2, 130]) {
      assert.equal(reasonToRestart({ exitCode, signal: null, report: null }), null);
    }
  });

  it('goes on after a kill and ends with the weights of a run that was left alone', async () => {
    const whole = watch(argv('whole'), () => undefined);
    const { code, stderr } = await whole.ended;
    assert.equal(code, 0, stderr);

    const run = watch(argv('killed', '--restarts', '2'), ({ event, step }) => {
      // At the second checkpoint of the first child and the first of the second.
      if (event !== 'checkpoint' || (step !== 8 && step !== 12)) return;
      if (pids.length < 2) void signalChild(run, 'SIGKILL');
    });
    const end = await run.ended;
    assert.equal(end.code, 0, end.stderr);
    const restarts = named(run, 'restart');
    console.log(`      ${restarts.map((line) => JSON.stringify(line)).join('\n      ')}`);
    assert.equal(restarts.length, 2);
    for (const [i, { restart, reason, step, pauseSeconds }] of restarts.entries()) {
      assert.deepEqual([restart, pauseSeconds], [i + 1, i + 1]);
      assert.match(String(reason), /SIGKILL/);
      // What is said is what is done.
      assert.equal(named(run, 'start')[i + 1]?.step, step);
      assert.ok(Number(step) >= 8 && Number(step) % 4 === 0);
    }
    const path = join('checkpoints', checkpointName(24));
    assert.deepEqual(
      await checkpointHashes(at('killed', path)),
      await checkpointHashes(at('whole', path)),
    );
    const saved = JSON.parse(await readFile(at('killed', 'config.json'), 'utf8'));
    assert.equal(saved.restarts, 2);
  });

  it('gives up after as many restarts as it was given', async () => {
    const before = pids.length;
    const run = watch(argv('hopeless', '--epochs', '1000', '--restarts', '1'), ({ event }) => {
      if (event === 'checkpoint' && pids.length < before + 2) {
        // One kill for each child.
        if (named(run, 'start').length === pids.length - before + 1) {
          void signalChild(run, 'SIGKILL');
        }
      }
    });
    const { code, stderr } = await run.ended;
    assert.equal(code, 1, stderr);
    assert.equal(named(run, 'restart').length, 1);
    assert.match(stderr, /error: training ended 2 times.*SIGKILL.*restarts is 1.*--resume/);
  });

  it('does not start again what cannot succeed', async () => {
    const none = argv('none', '--restarts', '3');
    none[none.indexOf(data)] = at('nothing');
    const run = watch(none, () => undefined);
    const { code, stderr } = await run.ended;
    assert.equal(code, 1, stderr);
    assert.deepEqual(named(run, 'restart'), []);
    assert.match(stderr, /^error: .*nothing does not exist/m);
    const wrong = watch(argv('none', '--restarts', '3', '--margin', '4'), () => undefined);
    assert.equal((await wrong.ended).code, 2);
    assert.deepEqual(named(wrong, 'restart'), []);
    await assert.rejects(stat(at('none')), { code: 'ENOENT' });
  });

  it('passes Ctrl-C on once: both end, with a checkpoint', async () => {
    let sent = false;
    let pid = 0;
    const run = watch(argv('stopped', '--epochs', '1000', '--restarts', '3'), ({ event }) => {
      if (event !== 'step' || sent) return;
      sent = true;
      void childrenOf(run.child.pid!).then(([child]) => {
        pid = child!;
        run.child.kill('SIGINT');
      });
    });
    const { code, stderr } = await run.ended;
    assert.equal(code, 130, stderr);
    assert.equal(isRunning(pid), false);
    assert.deepEqual(named(run, 'restart'), []);
    assert.match(stderr, /training was stopped after step \d+.*--resume/);
    assert.ok((await readdir(at('stopped', 'checkpoints'))).length > 0);
  });

  it('stops the child when the supervisor itself is killed', async () => {
    let pid = 0;
    const run = watch(argv('orphan', '--epochs', '1000', '--restarts', '3'), ({ event }) => {
      if (event !== 'step' || pid !== 0) return;
      pid = -1;
      void childrenOf(run.child.pid!).then(([child]) => {
        pid = child!;
        run.child.kill('SIGKILL');
      });
    });
    const { stderr } = await run.ended;
    await gone(pid);
    assert.match(stderr, /training was stopped after step \d+.*--resume/);
    for (const name of await readdir(at('orphan', 'checkpoints'))) assert.match(name, /^step-\d+$/);
  });
});
