/** Training killed at random moments and resumed, against a run that was left alone. */
import assert from 'node:assert/strict';
import { type FSWatcher, watch as watchFolder } from 'node:fs';
import { mkdir, readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { exists } from '../../src/data/files.js';
import { RandomStream } from '../../src/data/random.js';
import { checkpointName } from '../../src/train/checkpoint.js';
import { watch } from './children.js';
import { checkpointHashes } from './small-training.js';

export interface KillPlan {
  /** The .rec to train on: 12 steps of 8 images an epoch. */
  data: string;
  /** Where runs go. */
  folder: string;
  /** A multiple of 12. */
  steps: number;
  checkpointEvery: number;
  kills: number;
  /** Of the kills, how many at least come while a checkpoint is written. */
  inSaves: number;
  /** Kills of one run at most: the next one meets what the last one left. */
  killsPerRun: number;
  /** A kill comes at most so long after the first step that is logged. */
  longestMs: number;
  seed: number;
}

export interface KillFigures {
  /** Runs that came to their end, and how many of them with the weights expected. */
  runs: number;
  equal: number;
  kills: number;
  /** Kills that left a checkpoint half written. */
  inSaves: number;
}

const STEPS_PER_EPOCH = 12;
/** A kill within a save comes so long after its folder appears at most: a save takes 0.2 s or more. */
const SAVE_MS = 150;

/**
 * Kills runs until there were `kills` kills, `inSaves` of them while the folder of a checkpoint stood half
 * written; each run is killed and resumed up to `killsPerRun` times, let go on to its end, and its last checkpoint
 * compared: a single bit that any of the restarts lost would show there.
 */
export async function killAndResume(
  plan: KillPlan,
  say: (line: string) => void,
): Promise<KillFigures> {
  const random = new RandomStream(plan.seed, 0);
  const argv = (out: string) => [
    ...['train', '--data', plan.data, '--out', out, '--validation', 'none', '--device', 'cpu'],
    ...['--batch', '8', '--embedding', '32', '--scale', '16', '--lr', '0.02', '--deterministic'],
    ...['--epochs', String(plan.steps / STEPS_PER_EPOCH), '--validate-every', '1000'],
    ...['--checkpoint-every', String(plan.checkpointEvery)],
  ];
  const hashesOf = (out: string) =>
    checkpointHashes(join(out, 'checkpoints', checkpointName(plan.steps)));
  const whole = join(plan.folder, 'whole');
  const reference = await watch(argv(whole), () => undefined).ended;
  assert.equal(reference.code, 0, reference.stderr);
  const expected = await hashesOf(whole);
  say(`SHA-256 after ${plan.steps} steps: ${JSON.stringify(expected)}`);

  const figures: KillFigures = { runs: 0, equal: 0, kills: 0, inSaves: 0 };
  while (figures.kills < plan.kills || figures.inSaves < plan.inSaves) {
    const out = join(plan.folder, `run-${figures.runs}`);
    const checkpoints = join(out, 'checkpoints');
    await mkdir(checkpoints, { recursive: true });
    for (let attempt = 0; ; attempt++) {
      const wantsSave = figures.inSaves < plan.inSaves && random.chance(0.6);
      const afterMs = random.uniform(0, wantsSave ? SAVE_MS : plan.longestMs);
      const isWanted = figures.kills < plan.kills || figures.inSaves < plan.inSaves;
      const resume = await exists(join(out, 'config.json'));
      let armed = !isWanted || attempt >= plan.killsPerRun;
      let watcher: FSWatcher | null = null;
      const kill = async (): Promise<void> => {
        if (armed) return;
        armed = true;
        await setTimeout(afterMs);
        run.child.kill('SIGKILL');
      };
      const run = watch(resume ? [...argv(out), '--resume'] : argv(out), ({ event }) => {
        if (event === 'step' && !wantsSave) void kill();
      });
      if (wantsSave) {
        watcher = watchFolder(checkpoints, (_, name) => {
          if (name?.includes('.tmp-')) void kill();
        });
      }
      const { code, signal, stderr } = await run.ended;
      watcher?.close();
      if (signal === 'SIGKILL') {
        figures.kills++;
        const halves = (await readdir(checkpoints)).filter((name) => name.includes('.tmp-'));
        if (halves.length > 0) figures.inSaves++;
        continue;
      }
      assert.equal(code, 0, stderr);
      break;
    }
    for (const name of await readdir(checkpoints)) assert.match(name, /^step-\d{8}$/);
    figures.runs++;
    const hashes = await hashesOf(out);
    if (JSON.stringify(hashes) === JSON.stringify(expected)) figures.equal++;
    else say(`${out} differs: ${JSON.stringify(hashes)}`);
    say(
      `run ${figures.runs}: ${figures.kills} kills so far, ${figures.inSaves} inside a save, ${figures.equal} of ${figures.runs} runs with equal weights`,
    );
  }
  return figures;
}
