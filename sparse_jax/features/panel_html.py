"""A feature, or a table, as a piece of HTML for a notebook: no script, no request, all text escaped.

The style is confined to the piece, in the colours of the report, and follows the reader's light or dark setting.
"""

from collections.abc import Iterable

from sparse_jax.features import page
from sparse_jax.features.context_ablation import needs_html
from sparse_jax.features.page import FeatureCard, Table
from sparse_jax.features.panels import FeaturePanel, Valued
from sparse_jax.features.sections import Cells, Line, Section
from sparse_jax.features.svg import escape
from sparse_jax.features.ticks import short_number

_STYLE = """<style>.sjf{color-scheme:light dark;--sheet:#fff;--ink:#1b1f24;--muted:#59626e;--rule:#e1e4e8;
--tint:#eaf2fb;--heat:245 158 11;--cold:86 160 226;max-width:1000px;padding:.2rem 1.1rem .9rem;border:1px solid
var(--rule);border-radius:8px;background:var(--sheet);color:var(--ink);font:14px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word;
@media(prefers-color-scheme:dark){--sheet:#1a1d23;--ink:#e6e8eb;--muted:#9ea7b3;--rule:#2f353e;--tint:#1c2a3a;
--heat:164 88 0;--cold:32 98 164}
.needs{--heat:240 106 96;--cold:96 148 240}
@media(prefers-color-scheme:dark){.needs{--heat:168 40 40;--cold:36 84 190}}
*{box-sizing:border-box}
h3,h4{margin:.8rem 0 0;font-size:1rem;line-height:1.3;font-weight:650;color:inherit}
h4{font-size:.85rem}
.num,.lab,.act,.src,.note,.tops li{color:var(--muted);font-weight:400}
p{margin:.3rem 0 0}
ul,ol{margin:.4rem 0 0;padding:0;list-style:none}
.tops{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.85rem}
.tops span{color:var(--ink);padding:.05rem .2rem;margin-right:.3rem}
.ctx li{display:grid;grid-template-columns:4.8rem 3rem minmax(0,1fr) auto;column-gap:.75rem;padding:.15rem 0;
border-top:1px solid var(--rule);align-items:baseline}
.lab,.act,.src{font-size:.8rem;font-variant-numeric:tabular-nums}
.act{text-align:right}
.src{max-width:10rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.txt{margin:0;unicode-bidi:isolate}
.txt,.tops span{white-space:pre-wrap}
.txt span,.tops span{border-radius:2px}
span[style]{background:rgb(var(--heat)/var(--a))}
span.neg[style]{background:rgb(var(--cold)/var(--a))}
.pk{font-weight:650;box-shadow:inset 0 -2px var(--ink)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;margin:.4rem 0 0;font-size:.85rem;font-variant-numeric:tabular-nums;color:inherit}
th,td{padding:.2rem .9rem .2rem 0;text-align:left;white-space:nowrap;border:0;border-bottom:1px solid var(--rule);
font-weight:400;background:none}
tr{background:none}
thead th{color:var(--muted)}
.n{text-align:right}
dl.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.45rem 1rem;margin:.4rem 0 0}
dl.facts div{min-width:0}
dt{color:var(--muted);font-size:.78rem;font-weight:400;line-height:1.3}
dd{margin:0;font-variant-numeric:tabular-nums}
summary{margin-top:.8rem;cursor:pointer;font-size:.85rem;font-weight:650}
.hl>*{background:var(--tint)}}</style>"""


def _piece(body: str) -> str:
    return f'{_STYLE}<div class="sjf">{body}</div>'


def _tokens(name: str, pairs: Valued, maximum: float | None = None) -> str:
    """A line of tokens, shaded by their values."""
    if not pairs:
        return ""
    largest = maximum or max(abs(value) for _, value in pairs)
    items = "".join(f"<li>{page._span(token, value, largest)}{short_number(value)}</li>" for token, value in pairs)
    return f'<h4>{escape(name)}</h4><ul class="tops">{items}</ul>'


def _figures(panel: FeaturePanel) -> str:
    named = [("CE rise", panel.effect), *panel.scores, ("variance", panel.variance)]
    named += [("skew", panel.skew), ("kurtosis", panel.kurtosis)]
    shown = [f"{escape(name)} {escape(text)}" for name, text in panel.tags]
    shown += [f"{escape(name)} {short_number(value)}" for name, value in named if value is not None]
    return f'<p class="note">{" · ".join(shown)}</p>' if shown else ""


def _coactive(panel: FeaturePanel) -> str:
    items = "".join(f"<li><span>{other.feature}</span>{other.count:,}</li>" for other in panel.coactive)
    return f'<h4>Fires together with</h4><ul class="tops">{items}</ul>' if items else ""


def _causes(panel: FeaturePanel) -> str:
    items = "".join(
        f"<li><span>{escape(cause.where)} {cause.feature}</span>{short_number(cause.drop)}</li>"
        for cause in panel.causes
    )
    return f'<h4>Caused by</h4><ul class="tops">{items}</ul>' if items else ""


def _section(section: Section) -> str:
    note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
    if isinstance(section, Line):
        largest = max((abs(value) for _, value, _ in section.pieces), default=0.0)
        line = " ".join(page._span(text, value, largest) for text, value, _ in section.pieces)
        return f'<h4>{escape(section.title)}</h4>{note}<p class="txt">{line}</p>'
    if isinstance(section, Cells):
        return table_html(Table(section.title, section.columns, section.rows)) + note
    contexts = "".join(page._context(context, section.maximum) for context in section.contexts)
    shown = " open" if section.open else ""
    return f'<details{shown}><summary>{escape(section.title)}</summary>{note}<ol class="ctx">{contexts}</ol></details>'


def panel_html(panel: FeaturePanel) -> str:
    """What is known of a feature, for a notebook: all but its histograms, which `features.plots` draws."""
    card = FeatureCard(panel.index, panel.density, panel.maximum, 0.0, tuple(p.context for p in panel.contexts))
    mean = "" if panel.mean is None else f", mean {short_number(panel.mean)} where it fires"
    habits = f"fires on {page._percent(panel.density)} of tokens, max {short_number(panel.maximum)}{mean}"
    if panel.density == 0:
        habits = "fires on none of the tokens"
    contexts = "".join(page._context(context, card.maximum) for context in card.contexts)
    flag = " (outlier)" if panel.outlier else ""
    return _piece(
        f'<h3>feature {panel.index}{flag} <span class="num">— {habits}</span></h3>'
        + (f"<p>{escape(panel.explanation)}</p>" if panel.explanation else "")
        + _figures(panel)
        + "".join(map(_section, panel.lead))
        + _tokens("Top tokens", panel.top_tokens, panel.maximum)
        + (f'<h4>Texts</h4><ol class="ctx">{contexts}</ol>' if contexts else "")
        + "".join(map(_section, panel.sections))
        + (f"<h4>What it needs there</h4>{needs_html(panel.needs, panel.maximum)}" if panel.needs else "")
        + _tokens("Logits raised", panel.raised)
        + _tokens("Logits lowered", panel.lowered)
        + _tokens("Likelier where it is ablated", panel.ablation_raised)
        + _tokens("Less likely where it is ablated", panel.ablation_lowered)
        + _coactive(panel)
        + _causes(panel)
    )


def titled_html(title: str, parts: Iterable[str], note: str = "") -> str:
    """Pieces made by `table_html` and `facts_html` under a title, for a notebook."""
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return _piece(f"<h3>{escape(title)}</h3>{note}{''.join(parts)}")


def table_html(table: Table) -> str:
    """A table of measures. Without the report's id, which two outputs of a notebook would share."""
    columns = [page._column(list(cells)) for cells in zip(*table.rows)]
    head = "".join(
        f'<th scope="col"{" class=n" if i else ""}>{escape(name)}</th>' for i, name in enumerate(table.columns)
    )
    rows = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td class=n>{cell}</td>" for cell in others)}</tr>'
        for first, *others in zip(*columns)
    )
    title = f"<h4>{escape(table.title)}</h4>" if table.title else ""
    return f'{title}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def facts_html(title: str, facts: Iterable[tuple[str, str]], *, folded: bool = False) -> str:
    """Names and values in columns; `folded` behind its title."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    facts = f'<dl class="facts">{shown}</dl>'
    return (
        f"<details><summary>{escape(title)}</summary>{facts}</details>"
        if folded
        else f"<h4>{escape(title)}</h4>{facts}"
    )
