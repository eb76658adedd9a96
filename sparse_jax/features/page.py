"""The report of a run as one HTML page: facts, tables of measures, charts, and features with the texts they fire on.

The page is a single file. It asks the network for nothing and runs no script (its content security policy forbids
both), reads well on a phone and in print, and follows the reader's light or dark setting. Every token, label and name
is escaped: a token `<script>` shows as those eight characters.

    write(Report(title="pythia-70m, resid_post.3", subtitle="TopK, 16,384 features", tables=(...), cards=(...)), path)
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from sparse_jax.errors import InputError
from sparse_jax.features.svg import escape
from sparse_jax.features.ticks import short_number


@dataclass(frozen=True)
class Context:
    """A window of text around one sampled token."""

    tokens: tuple[str, ...]  # the text of each token, as decoded, leading spaces included
    activations: tuple[float, ...]  # the feature's activation at each token; 0 where it is silent
    peak: int  # which token was sampled, an index into `tokens`
    label: str  # the place in the activation range: "top", "60-80 %"
    source: str = ""  # the document the text is from, where it has a name

    def __post_init__(self):
        if len(self.tokens) != len(self.activations) or not 0 <= self.peak < len(self.tokens):
            raise InputError(
                f"a context has {len(self.tokens)} tokens, {len(self.activations)} activations and its peak at "
                f"{self.peak}; it needs as many activations as tokens and a peak among them"
            )


@dataclass(frozen=True)
class FeatureCard:
    """One feature: how often and how strongly it fires, and on what."""

    index: int  # its number in the dictionary
    density: float  # the share of tokens on which it fires, 0 to 1
    maximum: float  # its largest activation on those tokens: full shade
    mean: float  # its mean activation where it fires
    contexts: tuple[Context, ...]  # shown from the strongest peak to the weakest, whatever their order here
    top_tokens: tuple[tuple[str, float], ...] = ()  # tokens, and its mean activation where it fires on them


@dataclass(frozen=True)
class Table:
    """A table of measures. The first column names the rows."""

    title: str
    columns: tuple[str, ...]  # one heading for each cell of a row, the first above the rows' names
    rows: tuple[tuple[str | float | None, ...], ...]  # None: not measured, shown as a dash
    note: str = ""  # a sentence or two below: on which tokens, what is better
    highlight: int | None = None  # the row to point out, an index into `rows`

    def __post_init__(self):
        wrong = [len(row) for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise InputError(f"table {self.title!r} has {len(self.columns)} columns but a row of {wrong[0]} cells")
        if self.highlight is not None and not 0 <= self.highlight < len(self.rows):
            raise InputError(f"table {self.title!r} highlights row {self.highlight} of {len(self.rows)}")


@dataclass(frozen=True)
class Report:
    """All that the page shows, from top to bottom. An empty part is left out."""

    title: str
    subtitle: str = ""  # one line: model, site, dictionary
    facts: tuple[tuple[str, str], ...] = ()  # names and values: ("tokens", "2,000,000")
    tables: tuple[Table, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()  # large charts, two side by side: SVG, and its caption; before the tables
    charts: tuple[tuple[str, str], ...] = ()  # SVG as made by `features.svg`, put in as it is, and its caption
    cards: tuple[FeatureCard, ...] = ()
    cards_note: str = ""  # how the features and their texts were chosen
    details: str = ""  # preformatted text behind a fold: the configuration as JSON


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_STYLE = """
:root{color-scheme:light dark;--page:#f7f7f5;--sheet:#fff;--ink:#1b1f24;--muted:#59626e;--rule:#e1e4e8;--tint:#eaf2fb;
--edge:#0002;--link:#0b5cad;--heat:245 158 11;--cold:86 160 226}
@media(prefers-color-scheme:dark){:root{--page:#121418;--sheet:#1a1d23;--ink:#e6e8eb;--muted:#9ea7b3;--rule:#2f353e;
--tint:#1c2a3a;--edge:#000a;--link:#7ab7ff;--heat:164 88 0;--cold:32 98 164}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:1rem}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
.wrap{max-width:1168px;margin:0 auto;padding:2rem 24px 4rem}
h1,h2,h3{line-height:1.25;margin:0;font-weight:650}
h1{font-size:1.7rem;letter-spacing:-.01em}
h2{font-size:1.2rem;margin:2.5rem 0 .75rem}
h3{font-size:.95rem}
p{margin:.35rem 0 0;max-width:88ch}
a{color:var(--link);text-decoration:none}
a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.sub{color:var(--muted);font-size:1.05rem}
.note{color:var(--muted);font-size:.85rem}
.sheet{background:var(--sheet);border:1px solid var(--rule);border-radius:8px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:.7rem 1.25rem;margin:1.25rem 0 0;
padding:.9rem 1.1rem}
.facts div{min-width:0}
dt{color:var(--muted);font-size:.78rem}
dd{margin:0;font-variant-numeric:tabular-nums}
.table{margin-top:1rem}
.nav{margin-top:.9rem;display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.9rem}
.scroll{overflow-x:auto;margin-top:.5rem;background:linear-gradient(to left,var(--sheet) 30%,transparent) right/40px
100% no-repeat local,linear-gradient(to left,var(--edge),transparent) right/12px 100% no-repeat scroll,var(--sheet)}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.42rem .9rem;text-align:left;white-space:nowrap;border-bottom:1px solid var(--rule)}
tr:last-child>*{border-bottom:0}
thead th{color:var(--muted);font-weight:500;font-size:.82rem;vertical-align:bottom}
tbody tr:last-child>*{border-bottom:0}
thead tr:last-child>*{border-bottom:1px solid var(--rule)}
tbody th{font-weight:400}
th:first-child{position:sticky;left:0;background:var(--sheet)}
.n{text-align:right}
tr.hl>*{background:var(--tint);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem}
.large{grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr))}
figure{margin:0;padding:1rem 1rem .8rem;min-width:0}
figure svg{display:block;width:100%;height:auto}
figcaption{color:var(--muted);font-size:.82rem;line-height:1.4;margin-top:.5rem}
.jump{display:flex;flex-wrap:wrap;gap:.1rem .8rem;max-height:8.5rem;overflow-y:auto;margin:.75rem 0 0;padding:0;
list-style:none;font-size:.85rem;font-variant-numeric:tabular-nums}
.key{display:flex;flex-wrap:wrap;align-items:center;gap:.3rem 1.1rem;margin-top:.6rem;color:var(--muted);
font-size:.82rem}
.key span{color:var(--ink);padding:.05rem .4rem}
.card{margin-top:1rem;padding:.85rem 1.1rem .7rem}
.card:target{border-color:var(--link);box-shadow:0 0 0 1px var(--link)}
.card h3 span{white-space:nowrap}
.card h3 .num{font-weight:400;color:var(--muted)}
.tops{margin:.4rem 0 0;padding:0;list-style:none;display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.82rem}
.tops li{color:var(--muted);font-variant-numeric:tabular-nums;min-width:0}
.tops span{color:var(--ink);padding:.05rem .2rem;margin-right:.3rem}
.ctx{margin:.5rem 0 0;padding:0;list-style:none}
.ctx li{display:grid;grid-template-columns:4.6rem 2.8rem minmax(0,1fr) minmax(0,auto);column-gap:.75rem;
padding:.18rem 0;border-top:1px solid var(--rule);align-items:baseline}
.lab,.act,.src{font-size:.8rem;color:var(--muted);font-variant-numeric:tabular-nums}
.act{text-align:right}
.src{max-width:10rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.txt{margin:0;max-width:none;font-size:.9rem;line-height:1.6;unicode-bidi:isolate}
.txt,.tops span,.key span{white-space:pre-wrap}
.txt span,.tops span,.key span{border-radius:2px;-webkit-box-decoration-break:clone;box-decoration-break:clone}
span[style]{background:rgb(var(--heat)/var(--a))}
span.neg[style]{background:rgb(var(--cold)/var(--a))}
.txt .pk,.key .pk{font-weight:650;box-shadow:inset 0 -2px var(--ink);border-radius:2px 2px 0 0}
summary{cursor:pointer;color:var(--link)}
pre{overflow-x:auto;margin:.75rem 0 0;padding:1rem;font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media(max-width:640px){.wrap{padding:1.25rem 16px 3rem}h1{font-size:1.4rem}.facts{grid-template-columns:1fr 1fr}
.card{padding:.75rem .8rem .6rem}th,td{padding:.42rem .65rem}
th div{white-space:normal;width:max-content;max-width:9rem}
.ctx li{grid-template-columns:auto auto minmax(0,1fr);column-gap:.6rem}.act{text-align:left}.src{max-width:none;order:1;
text-align:right}.txt{order:2;grid-column:1/-1}}
@media print{body{background:none;print-color-adjust:exact;-webkit-print-color-adjust:exact}.jump,.nav{display:none}
.sheet{break-inside:avoid}}
"""

# White space and an empty token would not be seen; a line break would tear the row of text apart.
_VISIBLE = str.maketrans({"\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u200b": "␣", "\u2028": "↵", "\u2029": "↵"})


def _token(text: str) -> str:
    return escape(text.translate(_VISIBLE)) if text else "∅"


def _share(activation: float, maximum: float) -> float:
    """Activation as a share of the feature's maximum, -1 to 1; 0 where either is not a usable number."""
    if not (math.isfinite(activation) and math.isfinite(maximum) and maximum > 0):
        return 0.0
    return max(-1.0, min(1.0, activation / maximum))


def _shade(activation: float, maximum: float) -> tuple[str, str]:
    """The class and the style attribute of a token: the weakest activation is still seen, silence has no shade."""
    share = _share(activation, maximum)
    if not share:
        return "", ""
    return "neg" if share < 0 else "", f' style="--a:{0.10 + 0.80 * abs(share):.2f}"'


def _span(text: str, activation: float, maximum: float, peak: bool = False) -> str:
    kind, style = _shade(activation, maximum)
    kinds = " ".join(filter(None, (kind, "pk" if peak else "")))
    kinds = f' class="{kinds}"' if kinds else ""
    return f'<span{kinds}{style} title="{short_number(activation)}">{_token(text)}</span>'


def _percent(share: float) -> str:
    return f"{short_number(100 * share, 2)} %"


def _activation(value: float, maximum: float) -> str:
    """An activation with as many decimals as give its feature's maximum three digits, so that they align."""
    usable = math.isfinite(maximum) and maximum > 0
    return _cell(value, min(max(2 - math.floor(math.log10(maximum)), 0), 4) if usable else 3)


def _context(context: Context, maximum: float) -> str:
    spans = "".join(
        _span(text, activation, maximum, i == context.peak)
        for i, (text, activation) in enumerate(zip(context.tokens, context.activations))
    )
    source = escape(context.source)
    source = f'<span class="src" title="{source}">{source}</span>' if source else ""
    return (
        f'<li><span class="lab">{escape(context.label)}</span>'
        f'<span class="act">{_activation(context.activations[context.peak], maximum)}</span>'
        f'<p class="txt">{spans}</p>{source}</li>'
    )


def _strength(context: Context) -> float:
    at_peak = context.activations[context.peak]
    return -math.inf if math.isnan(at_peak) else at_peak


def _habits(card: FeatureCard) -> str:
    if card.density == 0:
        return '<span class="num">— fires on none of the tokens</span>'
    # Each piece stays on one line; the page breaks between them.
    pieces = (
        f"— fires on {_percent(card.density)} of tokens,",
        f"max {short_number(card.maximum)},",
        f"mean {short_number(card.mean)} where it fires",
    )
    return " ".join(f'<span class="num">{piece}</span>' for piece in pieces)


def _card(card: FeatureCard) -> str:
    contexts = sorted(card.contexts, key=_strength, reverse=True)
    rows = "".join(_context(context, card.maximum) for context in contexts)
    tops = "".join(
        f"<li>{_span(text, value, card.maximum)}{_activation(value, card.maximum)}</li>"
        for text, value in card.top_tokens
    )
    return (
        f'<article class="card sheet" id="feature-{card.index}">'
        f"<h3><span>feature {card.index}</span> {_habits(card)}</h3>"
        + (f'<ul class="tops" aria-label="top tokens, with the mean activation on each">{tops}</ul>' if tops else "")
        + (f'<ol class="ctx">{rows}</ol>' if rows else '<p class="note">No text to show.</p>')
        + "</article>"
    )


def _key(cards: tuple[FeatureCard, ...]) -> str:
    shades = "".join(f'<span style="--a:{0.10 + 0.80 * s:.2f}">{s:g}</span>' for s in (0.1, 0.25, 0.5, 0.75, 1.0))
    negative = any(
        _share(activation, card.maximum) < 0
        for card in cards
        for context in card.contexts
        for activation in context.activations
    )
    blue = '<div><span class="neg" style="--a:0.50">−0.5</span> below zero</div>' if negative else ""
    return (
        f'<div class="key"><div>{shades} activation, as a share of the feature\'s maximum</div>{blue}'
        '<div><span class="pk">token</span> the sampled one</div><div>↵ line break</div></div>'
    )


def _cards(cards: tuple[FeatureCard, ...], note: str) -> str:
    jump = "".join(f'<li><a href="#feature-{card.index}">{card.index}</a></li>' for card in cards)
    return (
        (f'<p class="note">{escape(note)}</p>' if note else "")
        + (f'{_key(cards)}<ul class="jump" aria-label="features on this page">{jump}</ul>' if cards else "")
        + "".join(map(_card, cards))
    )


def _is_number(cell) -> bool:
    return cell is not None and not isinstance(cell, str)


def _column(cells: list[str | float | None]) -> list[str]:
    """The cells of a column as text: its numbers with equally many decimals, so that they compare at a glance.

    Whole numbers have none; otherwise the smallest keeps three digits, with four decimals at the most.
    """
    sizes = [abs(float(cell)) for cell in cells if _is_number(cell) and cell and math.isfinite(cell)]
    if all(size == int(size) for size in sizes):
        return [_cell(cell, 0) for cell in cells]
    smallest = min((size for size in sizes if size >= 1e-3), default=1e-3)
    decimals = 1 if smallest >= 10 else 2 if smallest >= 1 else 3 if smallest >= 0.1 else 4
    return [_cell(cell, decimals) for cell in cells]


def _cell(cell: str | float | None, decimals: int) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return escape(cell)
    value = float(cell)
    if not math.isfinite(value) or abs(value) >= 1e9 or 0 < abs(value) < 5 * 10.0 ** -(decimals + 1):
        return short_number(value)
    return f"{value:,.{decimals}f}".replace("-", "−")


def _table(table: Table, name: str) -> str:
    texts = list(zip(*(_column(list(cells)) for cells in zip(*table.rows))))
    right = [any(not isinstance(cell, str) for cell in cells) for cells in zip(*table.rows)] or [False] * len(
        table.columns
    )
    right[:1] = [False]
    sides = [' class="n"' if is_right else "" for is_right in right]
    head = "".join(f'<th scope="col"{side}>{escape(column)}</th>' for column, side in zip(table.columns, sides))
    rows = []
    for i, (first, *others) in enumerate(texts):
        cells = "".join(f"<td{side}>{cell}</td>" for cell, side in zip(others, sides[1:]))
        rows.append(
            f'<tr{" class=hl" if i == table.highlight else ""}><th scope="row"><div>{first}</div></th>{cells}</tr>'
        )
    return (
        f'<div class="table"><h3 id="{name}">{escape(table.title)}</h3>'
        f'<div class="scroll sheet" role="region" aria-labelledby="{name}" tabindex="0">'
        f'<table aria-labelledby="{name}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        + (f'<p class="note">{escape(table.note)}</p>' if table.note else "")
        + "</div>"
    )


def _figure(svg: str, caption: str) -> str:
    # Inside HTML the name space is implied; without it the page names no address at all.
    svg = svg.replace(' xmlns="http://www.w3.org/2000/svg"', "")
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="sheet">{svg}{caption}</figure>'


def _header(report: Report, parts: list[str]) -> str:
    links = "".join(f'<a href="#{part}">{part.capitalize()}</a>' for part in parts)
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in report.facts)
    return (
        f"<header><h1>{escape(report.title)}</h1>"
        + (f'<p class="sub">{escape(report.subtitle)}</p>' if report.subtitle else "")
        + (f'<dl class="facts sheet">{facts}</dl>' if facts else "")
        + (f'<nav class="nav" aria-label="parts of this page">{links}</nav>' if len(parts) > 1 else "")
        + "</header>"
    )


def render(report: Report) -> str:
    """The report as one HTML document, UTF-8, that needs no network and no script."""
    title = escape(report.title)
    charts, figures = (
        "".join(_figure(svg, caption) for svg, caption in group) for group in (report.charts, report.figures)
    )
    parts = {
        "figures": figures and f'<div class="charts large">{figures}</div>',
        "measures": "".join(_table(table, f"table-{i}") for i, table in enumerate(report.tables)),
        "charts": charts and f'<div class="charts">{charts}</div>',
        "features": _cards(report.cards, report.cards_note),
        "configuration": report.details
        and f'<details><summary>Show</summary><pre class="sheet">{escape(report.details)}</pre></details>',
    }
    parts = {name: body for name, body in parts.items() if body}
    sections = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{name.capitalize()}</h2>{body}</section>'
        for name, body in parts.items()
    )
    body = f"{_header(report, list(parts))}<main>{sections}</main>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head>\n'
        f'<body><div class="wrap">{body}</div></body></html>\n'
    )


def write(report: Report, path: str | os.PathLike) -> None:
    """Write the page to `path`: readers find the old file or the whole new one, never a part of it.

    The folder must exist. Where writing fails nothing is left behind and a file that was there stays as it was.
    """
    path = Path(path)
    text = render(report)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
