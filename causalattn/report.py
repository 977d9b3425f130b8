"""One HTML page of an analysis: the scores beside their nulls, the figures, and what each number means.

The page needs nothing from outside, and its size does not grow with the text.
"""

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .analysis import Report
from .plot import Drawing, prettify, strength

ROWS = 1000
EXCERPT = 600

# key of Report.rows(), heading, its formula in one line; the last two columns are of causal layers only
COLUMNS = (
    ("layer", "layer", "the layer's number, from 0"),
    ("head", "head", "the head's number, from 0"),
    ("dag_score", "DAG score", "Σ_{j<i} A_ij / Σ_ij A_ij: the share of the attention mass on earlier tokens"),
    ("null", "null", "mean of that score when each row's weights are permuted over the keys it may attend (exact)"),
    ("z", "z", "(score − null mean) / null standard deviation"),
    ("sink_removed", "no sink", "the DAG score with each row's first real key masked, the rows normalised again"),
    ("sink_removed_z", "no-sink z", "z of the sink-removed score against its own permutation null"),
    ("sink_mass", "sink mass", "mean over rows of A_i,first: the mass that the first real token takes"),
    ("unmasked", "unmasked", "the DAG score of softmax(q·k) with the causal mask taken away"),
    ("unmasked_z", "unmasked z", "z of the unmasked score against its own permutation null"),
    ("asymmetry", "asymmetry", "‖A − Aᵀ‖ / ‖A + Aᵀ‖ in the Frobenius norm: 0 symmetric, 1 one-way"),
    ("score_asymmetry", "score asym.", "‖S − Sᵀ‖ / ‖S + Sᵀ‖ of the scores S = q kᵀ before any mask or softmax"),
    ("entropy", "entropy", "mean over rows of −Σ_j A_ij ln A_ij, in nats"),
)
CAUSAL_ONLY = ("unmasked", "unmasked_z")
CAUSAL_NOTE = (
    "Under a causal mask the masked DAG score is 1 − mean A_ii: the mask fixes it, whatever the model learnt. "
    "The unmasked columns score the same q and k without the mask."
)


class Section(NamedTuple):
    """One analyzed text; tokens_left_out is how many tokens did not fit, drawings may be empty."""

    title: str
    text: str
    report: Report
    drawings: Sequence[Drawing] = ()
    tokens_left_out: int = 0


def columns_of(rows: Sequence[dict]) -> list[tuple[str, str, str]]:
    """The table's columns: those of the unmasked scores only where a layer is causal."""
    causal = any(row["causal"] for row in rows)
    return [column for column in COLUMNS if causal or column[0] not in CAUSAL_ONLY]


def cell(row: dict, name: str) -> str:
    """A number of the table as text: a z with one decimal, other scores with three, a missing one as a dash."""
    value = row[name]
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if name == "z" or name.endswith("_z") else f"{value:.3f}"


def received_text(row: dict) -> str:
    """The tokens that received most, with the mean weight they get from the rows that may attend them."""
    return " · ".join(f"{prettify(str(r['token']))}@{r['index']} {r['mean']:.2g}" for r in row["received"])


def to_html(model: str, sections: Sequence[Section]) -> str:
    """Return one self-contained page: inline style, figures as data, no request to anywhere.

    Args:
        model: the name or path to print.
        sections: one a text; each shows at most 1000 heads, those furthest from their null.
    """
    body = "\n".join(_section(section) for section in sections)
    used = columns_of([row for section in sections for row in section.report.rows(top=0)])
    meaning = "".join(f"<dt>{escape(h)}</dt><dd>{escape(m)}</dd>" for n, h, m in used if n not in ("layer", "head"))
    return PAGE.format(style=STYLE, model=escape(model), body=body, meaning=meaning)


def _section(section: Section) -> str:
    rows = section.report.rows()
    shown = sorted(rows, key=strength, reverse=True)[:ROWS] if len(rows) > ROWS else rows
    used = columns_of(rows)
    causal = any(row["causal"] for row in rows)
    tokens = len(section.report.tokens[0])
    left_out = f" ({section.tokens_left_out} more did not fit)" if section.tokens_left_out else ""
    excerpt = section.text if len(section.text) <= EXCERPT else section.text[:EXCERPT] + " …"
    facts = [
        f"{tokens} tokens{left_out}, {len(section.report.layer_ids)} layers, {len(rows)} heads",
        f"mask: {_mask_type(section.report)}",
        "null: exact mean and variance under permutation of each row's weights; edges: mean at the same distance i − j",
    ]
    if causal:
        facts.append(CAUSAL_NOTE)
    if len(shown) < len(rows):
        facts.append(f"heads in the table, those furthest from their null: {len(shown)}")
    return SECTION.format(
        title=escape(section.title),
        text=escape(excerpt),
        facts="".join(f"<li>{escape(fact)}</li>" for fact in facts),
        figures="\n".join(_figure(drawing) for drawing in section.drawings),
        head="".join(f'<th title="{escape(m)}">{escape(h)}</th>' for _, h, m in used)
        + "<th class=tokens>most received tokens</th>",
        rows="\n".join(_table_row(row, used) for row in shown),
    )


def _mask_type(report: Report) -> str:
    """In words, which keys a query may attend."""
    kinds = set()
    for scores, (start, stop, *_) in zip(report.scores, report.intervals, strict=True):
        widest = int((stop - start).max()) if stop.numel() else 0
        local = widest < stop.shape[1] and bool((start > start.amin()).any())
        kind = "causal" if scores.causal else "bidirectional"
        kinds.add(f"{kind}, at most {widest} keys a query" if local else kind)
    return "; ".join(sorted(kinds))


def _figure(drawing: Drawing) -> str:
    image = "data:image/png;base64," + base64.b64encode(drawing.png(dpi=110)).decode()
    caption = escape(drawing.caption)
    return f'<figure><div><img alt="{caption}" src="{image}"></div><figcaption>{caption}</figcaption></figure>'


def _table_row(row: dict, used: Sequence[tuple[str, str, str]]) -> str:
    cells = []
    for name, _, _ in used:
        far = name == "z" or name.endswith("_z")
        strong = ' class="far"' if far and row[name] is not None and abs(row[name]) > 2 else ""
        cells.append(f"<td{strong}>{cell(row, name)}</td>")
    return f"<tr>{''.join(cells)}<td class=tokens>{escape(received_text(row))}</td></tr>"


STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --paper: #fff; --soft: #5b636d; --line: #d9dde2; --far: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #15181c; --soft: #a3acb6; --line: #343a41; --far: #6cb8ea; }
}
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
blockquote { margin: .5rem 0; padding-left: .8rem; border-left: 3px solid var(--line); color: var(--soft);
  overflow-wrap: anywhere; white-space: pre-line; }
figure { margin: 1.2rem 0; } figure div { overflow-x: auto; }
figcaption, li, dd { color: var(--soft); font-size: .9rem; }
img { width: 100%; min-width: 44rem; max-width: 76rem; display: block; background: #fff; border-radius: 6px; }
.table { overflow: auto; max-height: 34rem; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; width: 100%; }
th { position: sticky; top: 0; background: var(--paper); cursor: pointer; border-bottom: 1px solid var(--line); }
th, td { padding: .2rem .55rem; text-align: right; white-space: nowrap; } tr:nth-child(even) td { background: #8881; }
td.far { color: var(--far); font-weight: 600; } th.tokens, td.tokens { text-align: left; }
dt { font-weight: 600; margin-top: .4rem; } dd { margin: 0; }
"""

SECTION = """<section>
<h2>{title}</h2>
<blockquote>{text}</blockquote>
<ul>{facts}</ul>
{figures}
<div class=table><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>
</section>"""

PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>Attention of {model}</title>
<style>{style}</style>
</head>
<body>
<h1>Attention heads of {model}, each beside its null</h1>
<p>A score is mass, or lift over a null, of one forward pass; none of them is a causal effect. A z beyond ±2 is marked.
Click a heading to sort.</p>
{body}
<h2>What the numbers are</h2>
<dl>{meaning}<dt>most received tokens</dt><dd>token@position and c_j = Σ_i A_ij / #rows that may attend j</dd></dl>
<script>
for (const th of document.querySelectorAll("th")) th.onclick = () => {{
  const body = th.closest("table").tBodies[0], n = th.cellIndex;
  const down = th.dataset.down = th.dataset.down === "1" ? "0" : "1";
  const key = row => {{ const t = row.cells[n].textContent, v = parseFloat(t); return isNaN(v) ? t : v; }};
  const rows = [...body.rows].sort((a, b) => {{ const x = key(a), y = key(b);
    return (typeof x === "number" && typeof y === "number" ? y - x : String(x).localeCompare(String(y))) }});
  if (down === "0") rows.reverse();
  body.append(...rows);
}};
</script>
</body>
</html>
"""
