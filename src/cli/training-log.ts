/** A run as people see it: a progress bar on a terminal, JSON lines elsewhere, both on stderr. */
import { MultiBar, Presets, type SingleBar } from 'cli-progress';
import type { DataProgress } from '../data/dataset.js';
import type { FinalResult } from '../train/evaluation.js';
import type {
  EpochEvent,
  StepEvent,
  TrainerEvent,
  TrainingPlan,
  ValidationEvent,
} from '../trainer.js';
import { colours, output, percent } from './command.js';
import type { Restart } from './supervisor.js';

/** A step's line on a log that is no terminal, at most this often. */
const LINE_MS = 1000;

/** The progress line without its bar; with a run of hours, or an accuracy of 100%, it still fits. */
const BESIDE_BAR = 74;
const [SHORTEST_BAR, LONGEST_BAR] = [6, 24];

/** "1:02:03", or "2:03" below an hour. */
export function duration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  const rest = String(whole % 60).padStart(2, '0');
  return hours > 0 ? `${hours}:${String(minutes).padStart(2, '0')}:${rest}` : `${minutes}:${rest}`;
}

export class TrainingLog {
  lastEpoch: Omit<EpochEvent, 'type'> | null = null;
  bestValidation: Omit<ValidationEvent, 'type' | 'best'> | null = null;
  readonly evaluations: FinalResult[] = [];
  private readonly terminal = process.stderr.isTTY === true;
  // A MultiBar of one: a SingleBar restores the cursor of its start when it stops, over whatever was
  // written meanwhile.
  private bars: MultiBar | null = null;
  private bar: SingleBar | null = null;
  private plan: TrainingPlan | null = null;
  private lastLineMs = Number.NEGATIVE_INFINITY;
  /** The first steps that were told: since then is measured what is left. */
  private first: { step: number; time: number } | null = null;

  preparing({ phase, done, total }: DataProgress): void {
    if (this.terminal) process.stderr.write(`\r\x1b[K${phase} ${done} of ${total}`);
    else if (this.isDue(done === total)) this.line('data', { phase, done, total });
  }

  /** @param report the page that follows the run */
  start(plan: TrainingPlan, step: number, report?: string): void {
    this.plan = plan;
    this.first = null;
    if (!this.terminal) {
      this.line('start', { step, ...plan });
      return;
    }
    process.stderr.write(
      `\r\x1b[K${plan.images} images of ${plan.identities} identities, ${plan.totalSteps} steps on ${plan.device}, ${plan.precision}, ${plan.threads} threads\n${report === undefined ? '' : `report: ${report}\n`}`,
    );
    this.bars = new MultiBar(
      {
        stream: process.stderr,
        format:
          // On a narrow terminal the end is cut off, so what matters least stands there.
          'epoch {epoch} |{bar}| {percentage}% | {left} left | loss {loss} | accuracy {accuracy} | {speed} img/s',
        hideCursor: true,
        gracefulExit: false, // Ctrl-C is ours: the bar runs on until the checkpoint is written
        barsize: Math.max(
          SHORTEST_BAR,
          Math.min(LONGEST_BAR, (process.stderr.columns || 80) - BESIDE_BAR),
        ),
      },
      Presets.shades_classic,
    );
    this.bar = this.bars.create(plan.totalSteps, step, {
      epoch: '-',
      loss: '-',
      accuracy: '-',
      speed: '-',
      left: '-',
    });
  }

  /** By the pace of the run so far, validations and checkpoints in it: that of the last steps jumps. */
  private secondsLeft(event: StepEvent): number {
    const { images = 0, stepsPerEpoch = 1, totalSteps = 0 } = this.plan ?? {};
    this.first ??= event;
    const steps = event.step - this.first.step;
    const secondsPerStep =
      steps > 0
        ? (event.time - this.first.time) / steps
        : images / stepsPerEpoch / event.imagesPerSecond;
    return (totalSteps - event.step) * secondsPerStep;
  }

  event(event: TrainerEvent): void {
    switch (event.type) {
      case 'step': {
        const { type, ...figures } = event;
        if (!this.terminal) {
          if (this.isDue(event.step === this.plan?.totalSteps)) this.line(type, figures);
          return;
        }
        this.bar?.update(event.step, {
          epoch: String(event.epoch),
          loss: event.baseLoss.toFixed(3),
          accuracy: percent(event.accuracy),
          speed: event.imagesPerSecond.toFixed(0),
          left: duration(this.secondsLeft(event)),
        });
        return;
      }
      case 'epoch': {
        const { type, ...figures } = event;
        this.lastEpoch = figures;
        this.say(type, figures, () => {
          const gate = `silenced ${percent(event.silenced)}, kept ${percent(event.kept)}, amplified ${percent(event.amplified)}`;
          return `epoch ${event.epoch}: loss ${event.baseLoss.toFixed(3)}, accuracy ${percent(event.accuracy)}, ${gate}`;
        });
        return;
      }
      case 'validation': {
        const { type, best, ...figures } = event;
        if (best) this.bestValidation = figures;
        this.say(
          type,
          { ...figures, best },
          () =>
            `epoch ${event.epoch}: validation ${percent(event.accuracy)}${best ? ' (best)' : ''}`,
        );
        return;
      }
      case 'evaluation': {
        const { details: _, ...figures } = event.result;
        this.evaluations.push(event.result);
        this.say(event.type, figures, () => `evaluated on ${figures.dataset}`);
        return;
      }
      case 'checkpoint': {
        const { type, ...figures } = event;
        if (!this.terminal) this.line(type, figures);
        return;
      }
      case 'skipped': {
        const { type, ...figures } = event;
        this.say(
          type,
          figures,
          () => `${colours.yellow('skipped')}: an image of ${event.identity}: ${event.reason}`,
        );
        return;
      }
      case 'warning': {
        const { type, ...figures } = event;
        this.say(type, figures, () => `${colours.yellow('warning')}: ${event.message}`);
        return;
      }
    }
  }

  /** Of the supervisor of a run, which goes on after `figures.pauseSeconds`. */
  restart(figures: Restart): void {
    const { restart, restarts, reason, step, pauseSeconds } = figures;
    this.say('restart', figures, () => {
      const from = step === 0 ? 'the start' : `the checkpoint of step ${step}`;
      return `${colours.yellow('restart')} ${restart} of ${restarts} in ${pauseSeconds} s, because ${reason}: training goes on from ${from}`;
    });
  }

  end(): void {
    this.bars?.stop();
    this.bars = null;
    this.bar = null;
  }

  private isDue(last: boolean): boolean {
    const now = performance.now();
    if (!last && now - this.lastLineMs < LINE_MS) return false;
    this.lastLineMs = now;
    return true;
  }

  private line(event: string, figures: object): void {
    output.note(JSON.stringify({ ts: new Date().toISOString(), event, ...figures }));
  }

  /** A sentence above the bar, or a line of JSON. */
  private say(event: string, figures: object, sentence: () => string): void {
    if (!this.terminal) {
      this.line(event, figures);
      return;
    }
    process.stderr.write(`\r\x1b[K${sentence()}\n`);
  }
}
