import assert from 'node:assert/strict';
import { type ChildProcess, spawn } from 'node:child_process';
import {
  cp,
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  rm,
  stat,
  truncate,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import sharp from 'sharp';
import { readSafetensors, writeSafetensors } from '../src/formats/safetensors.js';
import { type Finished, finish, MAIN } from './helpers/built.js';
import { drawFaces, IMAGES, PEOPLE, writeFolder, writeLfw } from './helpers/small-training.js';

function start(...argv: string[]): ChildProcess {
  return spawn(process.execPath, [MAIN, ...argv], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
}

const hardmine = (...argv: string[]): Promise<Finished> => finish(start(...argv));

/** One command line that must succeed with a JSON document on stdout. */
async function json(...argv: string[]): Promise<Record<string, unknown>> {
  const { code, stdout, stderr } = await hardmine(...argv, '--json');
  assert.equal(code, 0, stderr);
  return JSON.parse(stdout) as Record<string, unknown>;
}

/** The sentence with which a command line fails: the only one, and nothing on stdout. */
async function complaint(code: number, ...argv: string[]): Promise<string> {
  const result = await hardmine(...argv);
  const lines = result.stderr
    .trim()
    .split('\n')
    .filter((line) => !line.startsWith('{'));
  assert.equal(result.code, code, result.stderr);
  assert.equal(result.stdout, '');
  assert.equal(lines.length, 1, result.stderr);
  assert.match(lines[0]!, /^error: /);
  return lines[0]!;
}

async function absent(path: string): Promise<void> {
  await assert.rejects(stat(path), { code: 'ENOENT' }, `${path} is there`);
}

describe('command line', function () {
  // Each command starts Node and compiles the sources anew; a busy machine takes many times as long.
  this.timeout(600_000);
  let folder: string;
  let faces: string;
  const at = (...names: string[]) => join(folder, ...names);
  const small = ['--batch', '8', '--embedding', '16', '--scale', '16', '--epochs', '1'];
  const train = (data: string, ...more: string[]) => [
    ...['train', '--data', data, '--out', at('refused'), '--validation', 'none', ...small],
    ...more,
  ];

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'hardmine-cli-'));
    faces = await drawFaces(at('faces'));
    await writeFolder(faces, at('people'));
  });
  after(() => rm(folder, { recursive: true, force: true }));

  it('helps with every command, each with an example', async () => {
    const { code, stdout } = await hardmine('--help');
    assert.equal(code, 0);
    const commands = [
      'doctor',
      'train',
      'evaluate',
      'align',
      'pack',
      'inspect',
      'embed',
      'verify',
      'export',
    ];
    for (const command of [...commands, 'report', 'plot-loss', 'bench', 'demo']) {
      assert.match(stdout, new RegExp(`^  ${command} `, 'm'));
    }
    for (const command of ['train', 'verify']) {
      const help = await hardmine(command, '--help');
      assert.equal(help.code, 0);
      assert.match(help.stdout, new RegExp(`Example:\n {2}\\$ hardmine ${command} `));
    }
  });

  it('answers wrong usage with exit code 2', async () => {
    assert.match(await complaint(2, 'trian'), /unknown command 'trian'/);
    assert.match(await complaint(2, 'train', '--lr', 'fast'), /--lr.*number/);
    assert.match(await complaint(2, 'train', '--epoch', '3'), /--epoch/);
    assert.match(await complaint(2, 'train', '--data', at('people')), /lacks "out".*--out/);
    assert.match(
      await complaint(2, 'bench', 'head', '--shapes', '64x512'),
      /batch x dim x classes/,
    );
  });

  it('says what this machine has', async () => {
    const found = await json('doctor');
    const auto = found['auto'] as { backend: string; why: string };
    assert.match(auto.backend, /^(cpu|cuda)$/);
    assert.match(
      auto.why,
      auto.backend === 'cuda'
        ? /^CUDA found .*\.$/
        : /^The CPU, because .*(NVIDIA driver|lacks libraries|cannot be used).*\.$/,
    );
  });

  it('ends in order when nobody reads what it prints', async () => {
    const child = start('--help');
    child.stdout?.destroy();
    const { code, stderr } = await finish(child);
    assert.deepEqual({ code, stderr }, { code: 0, stderr: '' });
  });

  it('trains on when whoever read its log has left', async () => {
    const child = start(...train(at('people'), '--out', at('unread')));
    child.stderr?.destroy();
    const { code, stdout } = await finish(child);
    assert.equal(code, 0);
    assert.match(stdout, /^model +.*best\.safetensors$/m);
  });

  it('says why a result could not be printed', async () => {
    const full = await open('/dev/full', 'w');
    try {
      const { code, stderr } = await finish(
        spawn(process.execPath, [MAIN, 'doctor'], { stdio: ['ignore', full.fd, 'pipe'] }),
      );
      assert.equal(code, 1);
      assert.match(
        stderr,
        /^error: the result could not be printed \(ENOSPC.*send stdout elsewhere/,
      );
      assert.equal(stderr.trim().split('\n').length, 1, stderr);
    } finally {
      await full.close();
    }
  });

  it('demonstrates nothing where files of others would be lost', async () => {
    await mkdir(at('mine', 'photos'), { recursive: true });
    await writeFile(at('mine', 'photos', 'only.jpg'), 'the only copy');
    assert.match(
      await complaint(2, 'demo', '--out', at('mine'), '--device', 'cpu'),
      /mine holds "photos", which is not of an earlier demo, .*give a new folder as --out/,
    );
    assert.match(await complaint(2, 'demo', '--out', at('mine'), '--device', 'none'), /'none'/);
    assert.equal(await readFile(at('mine', 'photos', 'only.jpg'), 'utf8'), 'the only copy');
  });

  it('asks for a place to write before the work whose result it is to hold', async () => {
    const nowhere = at('nowhere', 'x');
    const refused = /nowhere\/x\S* could not be written \(ENOENT.*choose a folder that exists/;
    const model = ['--model', at('absent.safetensors')];
    const works = [
      ['embed', at('absent.jpg'), ...model, '--out', `${nowhere}.npy`],
      ['evaluate', ...model, '--lfw', at('absent'), '--report', `${nowhere}.html`],
      ['inspect', at('absent'), '--contact-sheet', `${nowhere}.png`],
    ];
    for (const argv of works) assert.match(await complaint(1, ...argv), refused);
    assert.match(
      await complaint(1, 'evaluate', ...model, '--bin', at('absent.bin'), '--report', folder),
      /could not be written \(it is a folder\): give the path of a file/,
    );
  });

  it('says what a run would be and what it would take, without starting it', async () => {
    const config = at('commented.json');
    await writeFile(config, '{\n  // tried first\n  "batch": 8, "lr": 0.5, "loss": "softmax",\n}');
    const argv = ['train', config, '--data', at('people'), '--out', at('dry'), '--embedding', '16'];
    const printed = await hardmine(...argv, '--lr', '0.25', '--print-config');
    assert.deepEqual([printed.code, printed.stderr], [0, '']);
    const shown = JSON.parse(printed.stdout) as Record<string, unknown>;
    assert.deepEqual(
      [shown['batch'], shown['lr'], shown['loss'], shown['momentum'], shown['out']],
      [8, 0.25, 'softmax', 0.9, at('dry')],
    );
    const most = 2 ** 53 - 1; // checkpoints that no disk holds
    const would = await json(...argv, '--epochs', '50', '--keep', String(most), '--dry-run');
    assert.equal(would['totalSteps'], 50 * (would['stepsPerEpoch'] as number));
    const steps = (would['totalSteps'] as number) * 8;
    const seconds = steps / (would['imagesPerSecond'] as number);
    assert.ok(Math.abs((would['seconds'] as number) / seconds - 1) < 1e-9);
    // ResNet18 has 11.2 million weights outside the embedding, and each has a momentum.
    const weights = (would['checkpointBytes'] as number) / 8;
    assert.ok(weights > 11.1e6 && weights < 11.6e6, String(weights));
    assert.ok((would['memoryBytes'] as number) > (would['checkpointBytes'] as number));
    assert.match((would['warnings'] as string[]).join(), /dry needs up to .* TB .* are free there/);
    const people = await hardmine(...argv, '--dry-run');
    assert.equal(people.code, 0, people.stderr);
    for (const row of ['data', 'device', 'time', 'memory', 'disk']) {
      assert.match(people.stdout, new RegExp(`^${row} +\\S`, 'm'));
    }
    await absent(at('dry'));
  });

  describe('given a model', () => {
    let model: string;
    let images: string[];

    before(async () => {
      const config = at('config.json');
      await writeFile(
        config,
        JSON.stringify({ batch: 8, embedding: 16, scale: 64, weighting: 'none', epochs: 9 }),
      );
      const run = await json(
        ...['train', config, '--data', at('people'), '--out', at('run')],
        // Enough steps for the running statistics of the batch-norms to be those of the data.
        ...['--scale', '16', '--epochs', '4', '--seed', '3'],
      );
      assert.equal(run['finished'], true);
      const saved = JSON.parse(await readFile(at('run', 'config.json'), 'utf8'));
      assert.deepEqual(
        [saved.scale, saved.epochs, saved.weighting],
        [16, 4, { kind: 'none' }],
        'options win over the file',
      );
      assert.equal(run['model'], at('run', 'best.safetensors'));
      // The best may be an early one.
      model = at('run', 'last.safetensors');
      const person = at('people', 'Person_00');
      images = (await readdir(person)).sort().map((name) => join(person, name));
    });

    it('says of a finished run that it is finished', async () => {
      const { code, stderr } = await hardmine('train', '--resume', '--out', at('run'));
      assert.equal(code, 0, stderr);
      assert.match(stderr, /is finished/);
    });

    it('compares runs in one page, and names a folder that holds none', async () => {
      const out = at('comparison.html');
      const folders = [at('run'), at('run', '.')];
      assert.deepEqual(await json('report', ...folders, '--out', out), { out, runs: folders });
      const page = await readFile(out, 'utf8');
      assert.match(page, /<caption>\d+ pairs of held-out people<\/caption>/);
      // The same decisions twice: nothing to tell apart, and no setting that differs.
      assert.match(page, /<td>0<\/td><td>0<\/td><td>1\.0000 \(exact\)<\/td><td>not decided</);
      assert.match(page, /<h2>What was set otherwise<\/h2>\n<p>Nothing/);
      const complaintOfNone = await complaint(2, 'report', at('people'), '--out', out);
      assert.match(complaintOfNone, /people holds no run that has begun .*train/);
    });

    it('embeds images into a NumPy array, in order', async () => {
      const out = at('embeddings.npy');
      const result = await json(
        'embed',
        at('people', 'Person_00'),
        images[0]!,
        '--model',
        model,
        '--out',
        out,
      );
      assert.deepEqual(result, { out, images: IMAGES + 1, embedding: 16 });
      const bytes = await readFile(out);
      assert.match(bytes.toString('latin1', 0, 128), /'<f4'.*\(9, 16\)/);
      const rows = bytes.subarray(bytes.length - 9 * 16 * 4);
      // The folder's first image, given once more at the end.
      assert.deepEqual(rows.subarray(0, 64), rows.subarray(8 * 64));
      assert.notDeepEqual(rows.subarray(0, 64), rows.subarray(64, 128));
      const listed = (await readFile(at('embeddings.txt'), 'utf8')).trim().split('\n');
      assert.deepEqual(listed, [...images, images[0]]);
    });

    it('says which files of a folder it leaves out', async () => {
      const folder = at('mixed');
      await mkdir(join(folder, 'sub'), { recursive: true });
      await cp(images[0]!, join(folder, 'sub', 'a.jpg'));
      for (const name of ['b.heic', 'c.webp']) await writeFile(join(folder, name), 'not looked at');
      const argv = ['embed', folder, '--model', model, '--out', at('mixed.npy')];
      const { code, stdout, stderr } = await hardmine(...argv);
      assert.deepEqual([code, stdout], [0, `${at('mixed.npy')}: 1 x 16\n`], stderr);
      assert.match(stderr, /mixed\/b\.heic and 1 more left out, .*convert/);
    });

    it('verifies two images by the threshold of the model or one given', async () => {
      const self = await json('verify', images[0]!, images[0]!, '--model', model);
      assert.equal(self['same'], true);
      assert(Math.abs(Number(self['similarity']) - 1) < 1e-5);
      const strict = await json(
        ...['verify', images[0]!, images[1]!, '--model', model, '--threshold', '1'],
      );
      assert.equal(strict['same'], false);
      assert.equal(strict['threshold'], 1);
    });

    it('evaluates by the protocol of LFW, with a report', async () => {
      await writeLfw(faces, at('lfw'));
      const report = at('lfw.html');
      const result = await json(
        'evaluate',
        '--model',
        model,
        '--lfw',
        at('lfw'),
        '--report',
        report,
      );
      assert.deepEqual(Object.keys(result).sort(), [
        ...['accuracy', 'auc', 'bootstrap95', 'confidence95', 'dataset', 'eer', 'flip', 'missing'],
        ...['model', 'pairs', 'protocol', 'score', 'tarAtFar', 'thresholds', 'valAtFar'],
      ]);
      assert.equal(result['pairs'], 24);
      assert.match(await readFile(report, 'utf8'), /^<!doctype html>/i);
      await rm(at('lfw', 'Person_03'), { recursive: true });
      const message = await complaint(1, 'evaluate', '--model', model, '--lfw', at('lfw'));
      assert.match(message, /missing.*Person_03_0004\.jpg/);
    });

    it('compares two models, identifies, and evaluates by other protocols', async () => {
      await writeLfw(faces, at('lfw'));
      const lfw = ['evaluate', '--model', model, '--lfw', at('lfw')];
      const both = await json(...lfw, '--compare', model, '--protocol', 'sphereface');
      assert.equal(both['protocol'], 'sphereface');
      const { mcnemar, accuracy, model: other } = both['compare'] as Record<string, unknown>;
      assert.deepEqual(mcnemar, {
        onlyFirst: 0,
        onlySecond: 0,
        method: 'exact',
        p: 1,
        distinguishable: false,
      });
      assert.deepEqual([accuracy, other], [both['accuracy'], model]);
      const { code, stdout } = await hardmine(...lfw, '--compare', model);
      assert.equal(code, 0);
      assert.match(stdout, /McNemar's test \(exact\) p = 1\.00: they cannot be told apart\n$/);
      const found = await json(...lfw, '--identification');
      assert.deepEqual([found['gallery'], found['probes']], [PEOPLE, PEOPLE * (IMAGES - 1)]);
    });

    it('refuses what does not go together', async () => {
      const start = ['evaluate', '--model', model];
      const refused: [string[], RegExp][] = [
        [[], /one of --lfw, --ytf, --cfp and --bin, found none/],
        [['--lfw', 'a', '--frames', '3'], /--frames has no meaning with --lfw/],
        [['--lfw', 'a', '--identification', '--report', 'b'], /--report has no meaning/],
      ];
      for (const [options, message] of refused) {
        assert.match(await complaint(2, ...start, ...options), message);
      }
    });

    it('exports it to ONNX, which gives the same embeddings', async () => {
      const out = at('face.onnx');
      const result = await json('export', '--model', model, '--out', out, '--check');
      const check = result['check'] as { passed: boolean; images: number };
      assert.equal(check.passed, true);
      assert.equal(check.images, 64);
    });

    it('refuses one with NaN among its weights', async () => {
      const { tensors, metadata } = await readSafetensors(model);
      tensors.get('layer1.0.conv1.weight')!.data[5] = Number.NaN;
      const broken = at('nan.safetensors');
      await writeSafetensors(broken, tensors, metadata);
      const out = at('never.npy');
      const message = await complaint(1, 'embed', images[0]!, '--model', broken, '--out', out);
      assert.match(message, /nan\.safetensors.*NaN.*layer1\.0\.conv1\.weight/);
      await absent(out);
    });

    it('refuses images that are none, or not 112x112', async () => {
      await writeFile(at('text.jpg'), 'not a picture');
      await sharp({ create: { width: 120, height: 112, channels: 3, background: 'red' } })
        .jpeg()
        .toFile(at('wide.jpg'));
      const out = at('never.npy');
      const embed = (path: string) => complaint(1, 'embed', path, '--model', model, '--out', out);
      assert.match(await embed(at('text.jpg')), /text\.jpg/);
      assert.match(await embed(at('wide.jpg')), /wide\.jpg.*120x112.*align/);
      await absent(out);
    });
  });

  it('packs a folder, and inspects what it packed', async () => {
    const packed = await json('pack', at('people'), at('packed', 'train'));
    assert.equal(packed['images'], PEOPLE * IMAGES);
    const found = await json('inspect', at('packed', 'train.rec'));
    assert.equal(found['identities'], PEOPLE);
    assert.deepEqual(found['damaged'], []);
    assert.match(await complaint(1, 'pack', at('people'), at('packed', 'train')), /train\.rec/);
  });

  it('draws Figure 1', async () => {
    const { code, stdout } = await hardmine('plot-loss', '--out', at('loss.svg'));
    assert.equal(code, 0);
    assert.equal(stdout, `${at('loss.svg')}\n`);
    assert.match(await readFile(at('loss.svg'), 'utf8'), /<svg/);
    assert.match(await complaint(1, 'plot-loss', '--out', at('loss.png')), /is SVG.*loss\.png/);
  });

  it('measures the head, the step and the input', async () => {
    const head = await json(
      ...['bench', 'head', '--shapes', '7x33x129', '--repeats', '2', '--precision', 'fp32'],
    );
    const rows = head['results'] as Record<string, unknown>[];
    assert.deepEqual(
      rows.map(({ implementation, batch, dim, classes }) => [implementation, batch, dim, classes]),
      [
        ['fused', 7, 33, 129],
        ['unfused', 7, 33, 129],
      ],
    );
    for (const row of rows) {
      for (const name of ['forwardBackwardMs', 'stepMs', 'productsMs']) {
        const { median, min, max } = row[name] as { median: number; min: number; max: number };
        assert(min > 0 && min <= median && median <= max);
      }
      assert(Number(row['peakExtraBytes']) > 0);
    }
    const step = await json(
      ...['bench', 'step', '--batch', '4', '--classes', '20', '--repeats', '2', '--data', faces],
    );
    const [one] = step['results'] as Record<string, unknown>[];
    assert.equal(one!['batch'], 4);
    assert((one!['imagesPerSecond'] as { min: number }).min > 0);
    const data = await json('bench', 'data', '--repeats', '2', '--data', faces);
    assert.equal((data['results'] as unknown[]).length, 1);
  });

  describe('refuses to train', () => {
    const refused = async (code: number, argv: readonly string[]): Promise<string> => {
      const message = await complaint(code, ...argv);
      await absent(at('refused'));
      return message;
    };

    it('on a folder with one identity, on none, and on nothing', async () => {
      await cp(at('people', 'Person_00'), at('single', 'Person_00'), { recursive: true });
      assert.match(await refused(1, train(at('single'))), /single.*1 identity.*at least 2/);
      await mkdir(at('empty'));
      assert.match(await refused(1, train(at('empty'))), /empty holds no images/);
      assert.match(await refused(1, train(at('nothing'))), /nothing does not exist/);
    });

    it('on fewer images than a batch', async () => {
      assert.match(
        await refused(1, train(at('people'), '--batch', '97')),
        /96 images.*batch of 97/,
      );
    });

    it('on images of another size and on text called .jpg', async () => {
      await cp(at('people'), at('odd'), { recursive: true });
      const image = at('odd', 'Person_02', 'Person_02_0001.jpg');
      await sharp({ create: { width: 112, height: 96, channels: 3, background: 'red' } })
        .jpeg()
        .toFile(image);
      assert.match(await refused(1, train(at('odd'))), /112x96.*Person_02_0001\.jpg.*align/);
      await writeFile(image, 'not a picture');
      assert.match(await refused(1, train(at('odd'))), /Person_02_0001\.jpg/);
    });

    it('on a .rec that is cut off, and on an index that points outside it', async () => {
      await cp(at('faces'), at('cut'), { recursive: true });
      const rec = at('cut', 'train.rec');
      await truncate(rec, (await stat(rec)).size - 100);
      assert.match(await refused(1, train(rec)), /train\.(rec|idx)/);
      await cp(at('faces'), at('outside'), { recursive: true });
      const idx = at('outside', 'train.idx');
      const lines = (await readFile(idx, 'utf8')).split('\n');
      lines[5] = `5\t${2 ** 40}`;
      await writeFile(idx, lines.join('\n'));
      assert.match(await refused(1, train(at('outside', 'train.rec'))), /index.*outside/);
    });

    it('on a label that is none', async () => {
      await cp(at('faces'), at('label'), { recursive: true });
      const file = await open(at('label', 'train.rec'), 'r+');
      // The label of the record at byte 40: eight bytes of framing, then a u32 and the f32.
      await file.write(Buffer.from([0, 0, 0xc0, 0x7f]), 0, 4, 40 + 8 + 4);
      await file.close();
      assert.match(await refused(1, train(at('label', 'train.rec'))), /train\.rec/);
    });

    it('by a configuration with an unknown key, or none at all', async () => {
      const config = at('unknown.json');
      await writeFile(config, JSON.stringify({ leraning_rate: 1, lr: 0.1 }));
      assert.match(
        await refused(2, ['train', config, ...train(at('people')).slice(1)]),
        /unknown key "leraning_rate".*nearest/,
      );
      await writeFile(config, '{"lr": ');
      assert.match(
        await refused(2, ['train', config, ...train(at('people')).slice(1)]),
        /line 1, column 8: this is no JSON/,
      );
      assert.match(
        await refused(2, ['train', at('none.json'), ...train(at('people')).slice(1)]),
        /none\.json cannot be read/,
      );
    });

    it('that is to go on where no run is', async () => {
      const message = await refused(2, ['train', '--resume', '--out', at('refused')]);
      assert.match(message, /refused holds no run to go on with .*: leave --resume away/);
    });

    it('on a device that is not there', async () => {
      const message = await refused(1, train(at('people'), '--device', 'cuda:99'));
      assert.match(message, /cuda:99/);
    });

    it('into a directory that cannot be written, or that holds a run', async () => {
      await writeFile(at('file'), '');
      const argv = train(at('people'));
      argv[argv.indexOf(at('refused'))] = at('file', 'run');
      assert.match(await complaint(1, ...argv), /file\/run could not be written/);
      argv[argv.indexOf(at('file', 'run'))] = at('run');
      assert.match(await complaint(2, ...argv), /already holds a run.*--resume/);
    });
  });

  describe('interrupted', () => {
    /** A run that would take long, sent SIGINT at its first step. */
    async function interrupt(out: string, times: number): Promise<Finished & { ms: number }> {
      const argv = train(faces, '--epochs', '1000');
      argv[argv.indexOf(at('refused'))] = out;
      const child = start(...argv);
      const done = finish(child);
      await new Promise<void>((resolve) => {
        const lines = createInterface({ input: child.stderr! });
        lines.on('line', (line) => {
          if (line.includes('"event":"step"')) resolve();
        });
      });
      const startMs = performance.now();
      for (let i = 0; i < times; i++) {
        child.kill('SIGINT');
        // Two signals at one moment would arrive as one.
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      return { ...(await done), ms: performance.now() - startMs };
    }

    it('once, leaves a checkpoint and says how to go on', async () => {
      const { code, stderr } = await interrupt(at('stopped'), 1);
      assert.equal(code, 130, stderr);
      const [checkpoint] = await readdir(at('stopped', 'checkpoints'));
      assert.match(checkpoint!, /^step-\d{8}$/);
      assert.match(stderr, new RegExp(`error: .*${checkpoint}.*--resume`));
    });

    it('twice, ends at once', async () => {
      const { code, stderr, ms } = await interrupt(at('killed'), 2);
      assert.equal(code, 130, stderr);
      console.log(`      ended ${ms.toFixed(0)} ms after the first signal`);
    });
  });
});
