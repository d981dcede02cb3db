"""Style and script of the page. The script is named by its hash in the page's policy; nothing else runs."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root{color-scheme:light dark;--bg:#f6f7f8;--card:#fff;--ink:#1b1e23;--muted:#59616c;--line:#dadee3;
--accent:#1f5fbf;--good:#1c6dc0;--bad:#c4500c;--mark:#fff3df;--shade:#eef1f4}
@media (prefers-color-scheme:dark){:root{--bg:#121417;--card:#1a1d22;--ink:#e4e7eb;--muted:#a0a8b3;--line:#353b45;
--accent:#8ab6ff;--good:#5aa9f7;--bad:#ff9a5c;--mark:#3a2a15;--shade:#242931}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
overflow-wrap:anywhere}
header,main,footer{max-width:74rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.25rem;margin:0 0 .5rem}
h3{font-size:1.05rem;margin:1.2rem 0 .4rem}
p{margin:.4rem 0}
.sub,.note,figcaption,caption,.legend,footer{color:var(--muted);font-size:.9rem}
a{color:var(--accent)}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;padding:0;margin:.8rem 0}
main>section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.1rem 1.2rem;margin:1rem 0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(11rem,45%),1fr));gap:.7rem 1rem;margin:.4rem 0}
dl.facts div{min-width:0}
dt{color:var(--muted);font-size:.82rem}
dd{margin:0;font-variant-numeric:tabular-nums}
.grid{display:flex;flex-wrap:wrap;gap:1rem 2rem;align-items:flex-start}
.grid>*{flex:1 1 20rem;min-width:0;max-width:100%}
.grid>.wide{flex:2 1 28rem}
figure{margin:0}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--muted);font-size:11px}
svg text.cell{fill:var(--ink);font-size:10.5px}
svg .plain{fill:var(--accent);fill-opacity:.75}
svg .good{fill:var(--good)}
svg .bad{fill:var(--bad)}
svg .none{fill:var(--shade)}
svg .axis,svg .grid{stroke:var(--line)}
svg .cut{stroke:var(--bad);stroke-width:2;stroke-dasharray:5 3}
svg polyline{fill:none;stroke-width:2}
svg .main{stroke:var(--accent);stroke-width:2.5}
svg .ideal{stroke:var(--ink);stroke-dasharray:6 4}
svg .chance{stroke:var(--muted);stroke-dasharray:2 4}
.legend span{display:inline-block;margin-right:1rem}
.legend i{display:inline-block;width:1.6rem;height:0;border-top:3px solid;vertical-align:middle;margin-right:.4rem}
.legend .main{border-color:var(--accent)}
.legend .ideal{border-color:var(--ink);border-top-style:dashed}
.legend .chance{border-color:var(--muted);border-top-style:dotted}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px;margin:.6rem 0}
.scroll:focus-visible,button:focus-visible,summary:focus-visible,input:focus-visible,select:focus-visible,a:focus-visible{
outline:3px solid var(--accent);outline-offset:1px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
table.small{font-size:.9rem}
caption{text-align:left;padding:.5rem .7rem}
caption span{display:block;position:sticky;left:.7rem;max-width:min(70rem,calc(100vw - 5rem))}
th,td{padding:.4rem .7rem;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
thead th{background:var(--shade);border-top:0;white-space:nowrap;font-size:.88rem}
tbody th{font-weight:600}
#ranked td.n{white-space:nowrap}
#ranked tr>th:first-child{position:sticky;left:0;z-index:1}
#ranked tbody th{background:var(--card)}
#ranked .why{min-width:15rem}
#ranked tr.flagged>th{box-shadow:inset 4px 0 var(--bad)}
#ranked tr.differs .suggested{background:var(--mark)}
.sample{display:flex;gap:.6rem;align-items:flex-start;min-width:7rem}
img{image-rendering:pixelated;background:var(--shade);border-radius:4px;object-fit:contain}
.sample img{width:48px;height:48px}
.sample>span:last-child{white-space:nowrap}
tr:has(details[open]) .sample{flex-direction:column}
tr:has(details[open]) .sample img{width:112px;height:112px}
.text{display:block;max-width:22rem;max-height:7.5rem;overflow:auto;font:.8rem/1.4 ui-monospace,monospace;
white-space:pre-wrap;background:var(--shade);border-radius:4px;padding:.2rem .4rem}
.flag{color:var(--bad);font-weight:600;white-space:nowrap}
.harmed{list-style:none;padding:0;margin:.5rem 0;display:flex;flex-wrap:wrap;gap:.6rem 1rem}
.harmed li{display:flex;gap:.5rem;align-items:center;font-size:.88rem}
.harmed img{width:40px;height:40px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.7rem;list-style:none;padding:0;
margin:.4rem 0}
.cards li{border:1px solid var(--line);border-radius:8px;padding:.6rem;font-size:.88rem;min-width:0}
.cards img,.subject img{width:96px;height:96px;display:block;margin-bottom:.3rem}
.subject img{width:128px;height:128px}
.share{display:block;height:5px;border-radius:3px;background:var(--shade);margin:.3rem 0}
.share span{display:block;height:100%;border-radius:3px}
.share .good{background:var(--good)}
.share .bad{background:var(--bad)}
pre{overflow-x:auto;background:var(--shade);border-radius:6px;padding:.6rem .8rem;font-size:.82rem;margin:.4rem 0;
white-space:pre-wrap}
code{font-family:ui-monospace,SFMono-Regular,Consolas,monospace}
summary{cursor:pointer}
.query{margin:.5rem 0}
.query>summary{color:var(--muted);font-size:.85rem}
form{display:flex;flex-wrap:wrap;gap:.6rem 1rem;align-items:end;margin:.6rem 0}
form[hidden],#pager[hidden]{display:none}
form label{display:flex;flex-direction:column;font-size:.85rem;color:var(--muted);gap:.15rem}
form label.check{flex-direction:row;align-items:center;gap:.4rem;padding-bottom:.4rem}
input,select,button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:6px;
padding:.3rem .55rem;max-width:100%}
button{cursor:pointer}
button:disabled{opacity:.45;cursor:default}
thead button{background:none;border:0;padding:.1rem .2rem;font-weight:600}
thead button::after{content:" \\2195";color:var(--muted)}
th[aria-sort=ascending] button::after{content:" \\2191";color:var(--accent)}
th[aria-sort=descending] button::after{content:" \\2193";color:var(--accent)}
#pager{display:flex;gap:.6rem;align-items:center;flex-wrap:wrap}
footer{padding-bottom:2rem}
@media (max-width:40rem){
main>section{padding:.9rem .8rem}
th,td{padding:.35rem .5rem}
.sample{min-width:5.5rem}
.grid>*{flex-basis:100%}
#ranked .why{min-width:13rem}
}
@media print{nav,form,#pager{display:none}main>section{break-inside:avoid-page;border:0}}
"""

SCRIPT = """
"use strict";
(() => {
const table = document.getElementById("ranked");
if (!table) return;
const PAGE = 50, body = table.tBodies[0], rows = Array.from(body.rows);
const said = document.getElementById("said"), form = document.getElementById("filters");
const pager = document.getElementById("pager"), where = document.getElementById("where");
const [back, next, every] = ["back", "next", "every"].map(id => document.getElementById(id));
const texts = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
let order = rows, page = 0, all = false;
const key = (row, at) => {
  const text = row.cells[at].dataset.v, value = Number(text);
  return text === undefined || text === "" || Number.isNaN(value) ? null : value;
};
const wanted = row => (form.given.value === "" || row.dataset.given === form.given.value)
  && (form.suggested.value === "" || row.dataset.suggested === form.suggested.value)
  && (!form.flagged.checked || row.dataset.flagged === "1")
  && texts.get(row).includes(form.text.value.trim().toLowerCase());
const show = () => {
  const left = order.filter(wanted), pages = Math.max(1, Math.ceil(left.length / PAGE));
  page = Math.min(page, pages - 1);
  const from = all ? 0 : page * PAGE, to = all ? left.length : Math.min(left.length, from + PAGE);
  const now = new Set(left.slice(from, to));
  for (const row of rows) row.hidden = !now.has(row);
  where.textContent = left.length ? `${from + 1} to ${to} of ${left.length}` : "no sample";
  back.disabled = all || page === 0;
  next.disabled = all || page >= pages - 1;
  every.textContent = all ? "Show pages" : "Show all";
  return left.length;
};
Array.from(table.tHead.rows[0].cells).forEach((cell, at) => {
  if (cell.dataset.sorts === undefined) return;
  const button = document.createElement("button"), name = cell.textContent;
  button.type = "button";
  button.textContent = name;
  cell.textContent = "";
  cell.append(button);
  button.addEventListener("click", () => {
    const down = cell.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    order = rows.map((row, place) => [key(row, at), place, row]).sort((a, b) =>
      (a[0] === null) - (b[0] === null) || (down ? b[0] - a[0] : a[0] - b[0]) || a[1] - b[1]).map(part => part[2]);
    body.append(...order);
    page = 0;
    show();
    said.textContent = `Sorted by ${name}, ${down ? "descending" : "ascending"}`;
  });
});
const filtered = () => {
  page = 0;
  const left = show();
  said.textContent = `${left} of ${rows.length} samples`;
};
form.addEventListener("input", filtered);
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => setTimeout(filtered));
back.addEventListener("click", () => { page -= 1; show(); });
next.addEventListener("click", () => { page += 1; show(); });
every.addEventListener("click", () => { all = !all; show(); });
form.hidden = false;
pager.hidden = false;
show();
})();
"""


def policy() -> str:
    """Return the page's Content-Security-Policy: nothing is fetched, and no script runs but ours."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
