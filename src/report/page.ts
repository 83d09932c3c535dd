/** The HTML page around a report: its style sheet and its security policy. */

import { createHash } from 'node:crypto';
import { type ChartPalette, chartStyle, DARK, escapeText, LIGHT } from './svg.js';

const palette: ChartPalette = {
  ink: 'var(--ink)',
  muted: 'var(--muted)',
  rule: 'var(--rule)',
  surface: 'var(--surface)',
  series: ['var(--s1)', 'var(--s2)', 'var(--s3)'],
};

const variables = ({ ink, muted, rule, surface, series }: ChartPalette) =>
  `--ink:${ink};--muted:${muted};--rule:${rule};--surface:${surface};--s1:${series[0]};--s2:${series[1]};--s3:${series[2]}`;

/** Shadows at the edges beyond which a table goes on: covers that scroll along hide them at its ends. */
const SHADOWS = [
  'background:linear-gradient(90deg,var(--surface) 40%,transparent) left/48px 100% no-repeat local',
  'linear-gradient(270deg,var(--surface) 40%,transparent) right/48px 100% no-repeat local',
  'linear-gradient(90deg,var(--shade),transparent) left/12px 100% no-repeat',
  'linear-gradient(270deg,var(--shade),transparent) right/12px 100% no-repeat var(--surface)',
].join();

const STYLE = `
:root{color-scheme:light dark;--page:#f5f6f8;--shade:#00000026;${variables(LIGHT)}}
@media (prefers-color-scheme:dark){:root{--page:#121418;--shade:#000000a0;${variables(DARK)}}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main{max-width:1280px;margin:0 auto;padding:40px 20px 64px}
h1{overflow-wrap:anywhere;font-size:clamp(1.6rem,1.2rem + 1.8vw,2.3rem);line-height:1.2;letter-spacing:-.015em;margin:.2rem 0 .7rem}
h2{font-size:1.25rem;letter-spacing:-.005em;margin:2.8rem 0 .4rem}
h3{font-size:1rem;margin:0 0 .5rem}
.pairs+h3{margin-top:2rem}
p{margin:.3rem 0 1rem;max-width:46rem}
.kind{color:var(--muted);margin:0;font-size:.9rem}
.lead{font-size:1.1rem}
.note{color:var(--muted);font-size:.9rem}
.cards{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,370px),1fr));margin:1rem 0}
.top{align-items:start}
.card{background:var(--surface);border:1px solid var(--rule);border-radius:12px;padding:18px 18px 14px;margin:0;min-width:0}
.card p{margin:.4rem 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));background:var(--surface);border:1px solid var(--rule);border-radius:12px;overflow:hidden;margin:1.4rem 0}
.tiles div{box-shadow:1px 1px 0 var(--rule);padding:14px 18px}
.tiles dt{color:var(--muted);font-size:.85rem}
.tiles dd{margin:0;font-size:1.35rem;font-weight:600;letter-spacing:-.01em}
.tiles small{display:block;color:var(--muted);font-size:.8rem;font-weight:400;letter-spacing:0}
.chart{display:block;width:100%;height:auto;max-width:520px;margin:0 auto;overflow:visible}
.scroll{overflow-x:auto;${SHADOWS};border:1px solid var(--rule);border-radius:12px;margin:1rem 0}
.narrow{max-width:46rem}
.left td,.left th{text-align:left;white-space:normal}
.prose{text-align:left;white-space:normal;min-width:22rem}
.scroll:focus-visible{outline:2px solid var(--s1);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.93rem}
caption{text-align:left;padding:12px 16px 4px;font-weight:600}
th,td{padding:8px 16px;text-align:right;white-space:nowrap;border-top:1px solid var(--rule);vertical-align:top}
thead th{border-top:0;color:var(--muted);font-weight:500;font-size:.85rem;white-space:normal;vertical-align:bottom}
th:first-child{text-align:left}
tbody th{font-weight:600}
tbody tr:first-child.first th,tbody tr:first-child.first td{background:color-mix(in srgb,var(--s1) 9%,transparent)}
.facts td,.facts th{white-space:normal;text-align:left;overflow-wrap:anywhere}
.facts th{font-weight:500;color:var(--muted);width:40%}
.facts tr:first-child>*{border-top:0}
.facts th:first-child{padding-left:0}
.pairs{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,180px),1fr));margin:.8rem 0 0;padding:0;list-style:none}
.pair{background:var(--surface);border:1px solid var(--rule);border-radius:12px;overflow:hidden}
.pair .faces{display:grid;grid-template-columns:1fr 1fr;gap:2px}
.pair img{display:block;width:100%;height:auto;aspect-ratio:1;background:var(--rule)}
.pair figure{margin:0;min-width:0}
.pair figcaption{padding:6px 10px 0;font-size:.8rem;line-height:1.35;color:var(--muted);overflow-wrap:anywhere}
.pair p{margin:0;padding:6px 10px 10px;font-size:.85rem;line-height:1.45;overflow-wrap:anywhere}
.pair .verdict{font-weight:600}
.wrong .verdict{color:var(--s2)}
.right .verdict{color:var(--s3)}
.pair .absent{margin:0;padding:0;aspect-ratio:1;display:grid;place-items:center;background:var(--page);color:var(--muted)}
.progress{margin:0 0 1.2rem}
.progress p{margin:.3rem 0 0;color:var(--muted);font-size:.9rem}
progress{display:block;width:100%;height:8px;border:0;border-radius:4px;overflow:hidden;background:var(--rule);color:var(--s1);appearance:none}
progress::-webkit-progress-bar{background:var(--rule)}
progress::-webkit-progress-value{background:var(--s1)}
progress::-moz-progress-bar{background:var(--s1)}
footer{margin-top:3rem;color:var(--muted);font-size:.85rem}
@media (max-width:520px){main{padding:24px 14px 48px}.card{padding:14px 10px 12px}th,td{padding:8px 10px}.scroll thead th{white-space:nowrap}.pairs{grid-template-columns:1fr 1fr;gap:10px}.pair figcaption{font-size:.72rem;padding:6px 6px 0 10px}}
@media print{main{padding:0}.card,.pair,.scroll{break-inside:avoid}}
${chartStyle(palette)}
`;

/**
 * A page that asks for nothing: no script, no request, and only the one style sheet, which the policy
 * knows by its hash. `body` is HTML. With `reloadSeconds` a browser that has it open reads the file
 * again that often.
 */
export function page(title: string, body: string, reloadSeconds?: number): string {
  const hash = createHash('sha256').update(STYLE).digest('base64');
  const policy = `default-src 'none'; style-src 'sha256-${hash}'; img-src data:; base-uri 'none'; form-action 'none'`;
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="${policy}">
${reloadSeconds === undefined ? '' : `<meta http-equiv="refresh" content="${reloadSeconds}">\n`}<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>${escapeText(title)}</title>
<link rel="icon" href="data:,">
<style>${STYLE}</style>
</head>
<body>
<main>
${body}
</main>
</body>
</html>
`;
}

/** A moment to the second, the same in every locale and zone: "2026-01-31 23:59:59 UTC". */
export function timeText(moment: Date): string {
  return `${moment.toISOString().slice(0, 19).replace('T', ' ')} UTC`;
}

/** A wide table scrolls in its own box, which the keyboard can reach. `table` is HTML. */
export function scroll(label: string, table: string, narrow = false): string {
  return `<div class="scroll${narrow ? ' narrow' : ''}" tabindex="0" role="region" aria-label="${escapeText(label)}">${table}</div>`;
}
