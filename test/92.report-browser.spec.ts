/** The report in a browser: nothing in it runs or is asked for, and it fits desktops and phones. */
import assert from 'node:assert/strict';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { renderComparison } from '../src/report/comparison.js';
import { renderReport } from '../src/report/report.js';
import { findBrowser, openPages } from './helpers/browser.js';
import { comparedRun, HOSTILE, reportData } from './helpers/report-data.js';
import { skip } from './helpers/skip.js';

/** A small phone's and a desktop's. */
const WIDTHS = [360, 1280];
/** Has no place to break. */
const LONG = 'W'.repeat(90);

/** What a frame turned out to hold. */
interface Frame {
  page: string;
  width: number;
  /** Pixels by which the page is wider than its frame. */
  over: number;
  /** Pictures that do not show. */
  broken: number;
  pictures: number;
  title: string;
}

/** A page of other pages in frames, that writes into itself what they hold. */
function frames(pages: readonly string[]): string {
  const tags = pages.flatMap((page) =>
    WIDTHS.map((width) => `<iframe src="${page}" width="${width}" height="800"></iframe>`),
  );
  return `<!doctype html><link rel="icon" href="data:,"><body>${tags.join('')}<pre></pre><script>
addEventListener('load', () => {
  const found = [...document.querySelectorAll('iframe')].map((frame) => {
    const { documentElement, images, title } = frame.contentDocument;
    return {
      page: new URL(frame.src).pathname,
      width: frame.clientWidth,
      over: documentElement.scrollWidth - documentElement.clientWidth,
      broken: [...images].filter((image) => image.naturalWidth === 0).length,
      pictures: images.length,
      title,
    };
  });
  document.querySelector('pre').textContent = JSON.stringify(found);
});
</script>`;
}

describe('report in a browser', function () {
  this.timeout(60_000); // a browser's first start on a busy machine
  let browser: string;
  let folder: string;
  before(async function () {
    const found = findBrowser();
    if (!found) return skip(this, 'no chromium or chrome in PATH');
    browser = found;
    folder = await mkdtemp(join(tmpdir(), 'hardmine-browser-'));
  });
  after(async () => {
    if (folder) await rm(folder, { recursive: true, force: true, maxRetries: 5 });
  });

  it('has no complaint, asks for nothing and is nowhere wider than the screen', async () => {
    const data = await reportData();
    const html = renderReport({
      ...data,
      title: `${data.title} ${LONG}`,
      config: { ...data.config, [LONG]: LONG },
      evaluatedOn: LONG,
    });
    const comparison = renderComparison(
      [comparedRun(HOSTILE, 0), comparedRun(LONG, 12, { [LONG]: LONG })],
      'now',
    );
    const pages = { '/report.html': html, '/comparison.html': comparison };
    const { dom, complaints, requests } = await openPages(browser, join(folder, 'clean'), {
      '/': frames(Object.keys(pages)),
      ...pages,
    });
    assert.deepEqual(complaints, []);
    const twice = [...Object.keys(pages), ...Object.keys(pages)];
    assert.deepEqual(requests, ['/', ...twice].sort());
    const text = /<pre>(.*)<\/pre>/.exec(dom)![1]!;
    const found = JSON.parse(
      text.replaceAll('&lt;', '<').replaceAll('&gt;', '>').replaceAll('&amp;', '&'),
    ) as Frame[];
    assert.equal(found.length, 4);
    for (const { page, width, over, broken, pictures, title } of found) {
      assert.equal(over, 0, `${page} is ${over} pixels too wide at ${width}`);
      assert.equal(broken, 0);
      assert.equal(pictures, page === '/report.html' ? 6 : 0);
      assert.ok(title.includes("<script>document.title='owned'</script>"), title);
    }
  });

  it('runs no script, wherever one came from', async () => {
    // So the test above can fail: a page with a script meets the policy, and says so.
    const html = renderReport(await reportData());
    const planted = html.replace('</main>', "<script>document.title='owned'</script></main>");
    const { dom, complaints } = await openPages(browser, join(folder, 'dirty'), { '/': planted });
    assert.ok(complaints.length > 0);
    assert.ok(!dom.includes('<title>owned'));
  });
});
