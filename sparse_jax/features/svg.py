"""Small charts as SVG text: a line chart and a histogram, legible in light and dark and to colour-blind readers.

    svg = line_chart({"training": (tokens, loss)}, title="Loss", x_label="tokens", y_label="loss per row")

Each chart is one `<svg>` element that carries its own style: it may stand in a page or be saved as a file by itself.
Values that cannot be drawn (nan, infinities, zero or less on a log axis) leave a gap; a chart without any value says
"no data". Every label is escaped.
"""

import html
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sparse_jax.errors import InputError
from sparse_jax.features.ticks import linear_ticks, log_ticks, multiples_of, nice_step, short_number, tick_labels

# Six hues that stay apart in the common kinds of colour blindness, at least 3:1 against either background; past the
# third line a dash pattern tells them apart as well.
COLOURS = ("#0072b2", "#d55e00", "#00805e", "#a8487f", "#6257d2", "#7d6200")
_DARK_COLOURS = ("#5ab4ee", "#ff9a4d", "#3ec99b", "#e79ac6", "#a9a4ff", "#d9be4b")
_DASHES = ("", "", "", "7 3", "2 3", "9 3 2 3")
_LARGEST = 1e100  # beyond this, differences and ratios of values may overflow: drawn as a gap
_SMALLEST = 1 / _LARGEST  # below this they may underflow: drawn as zero
_MARGIN = 16.0  # right of the plot, room for half of the last tick's label


def _colours(ink: str, muted: str, grid: str, series: tuple[str, ...]) -> str:
    lines = "".join(f"--s{i}:{colour};" for i, colour in enumerate(series))
    return f"--ink:{ink};--muted:{muted};--grid:{grid};{lines}"


_STYLE = (
    "<style>"
    f".sjc{{{_colours('#1b1f24', '#59626e', '#e4e7ea', COLOURS)}color-scheme:light dark;"
    'font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;'
    "font-variant-numeric:tabular-nums}"
    f"@media(prefers-color-scheme:dark){{.sjc{{{_colours('#e6e8eb', '#9ea7b3', '#2f353e', _DARK_COLOURS)}}}}}"
    ".sjc text{fill:var(--muted)}.sjc .h{fill:var(--ink);font-size:13px;font-weight:600}"
    ".sjc .g{stroke:var(--grid)}.sjc .a{stroke:var(--muted);stroke-opacity:.6}"
    ".sjc .l{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}"
    ".sjc .e{fill:none;stroke-width:1.2}.sjc .m{stroke-width:1.4}.sjc .o{fill:none;stroke:var(--muted)}"
    + "".join(f".sjc .s{i}{{stroke:var(--s{i})}}.sjc .f{i}{{fill:var(--s{i})}}" for i in range(len(COLOURS)))
    + "</style>"
)

# What XML forbids, lone halves of surrogate pairs, and the signs that reverse the text after them.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def escape(text: str) -> str:
    """Text that HTML and XML show as it is, in an element or in a quoted attribute.

    Signs that cannot be shown, or that would change the direction of the text after them, become U+FFFD.
    """
    return html.escape(UNPRINTABLE.sub("\ufffd", text))


@dataclass(frozen=True)
class _Axis:
    low: float  # the value at the left or the bottom
    high: float  # the value at the right or the top
    ticks: list[float]
    log: bool

    def place(self, values) -> np.ndarray:
        """Where values lie, as a share of the axis: 0 at its low end, 1 at its high end."""
        values = np.asarray(values, np.float64)
        if self.log:
            return np.log10(values / self.low) / math.log10(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    @property
    def labels(self) -> list[str]:
        return tick_labels(self.ticks, log=self.log)


def _x_axis(low: float, high: float, log: bool) -> _Axis:
    """An axis that ends exactly where the values end."""
    if log:
        low, high = (low, high) if high > low * (1 + 1e-9) else (low / 3, high * 3)
        return _Axis(low, high, log_ticks(low, high), True)
    low, high = _spread(low, high)
    return _Axis(low, high, linear_ticks(low, high), False)


def _y_axis(values: np.ndarray, log: bool) -> _Axis:
    """An axis with a little air; a linear one begins on a tick, at 0 where the values come near it."""
    low, high = float(values.min()), float(values.max())
    if log:
        air = max((high / low) ** 0.05, 1.05) if high > low * (1 + 1e-9) else 3.0
        return _Axis(low / air, high * air, log_ticks(low / air, high * air, 5), True)
    if 0 < low < 0.4 * high:
        low = 0.0
    low, high = _spread(low, high)
    step = nice_step((high - low) / 4)
    low, high = math.floor(low / step + 1e-6) * step, high + 0.04 * (high - low)
    return _Axis(low, high, multiples_of(step, low, high), False)


def _spread(low: float, high: float) -> tuple[float, float]:
    """The range of the values; around a constant, half its size to either side."""
    size = max(abs(low), abs(high))
    if high - low > 1e-9 * size:
        return low, high
    if size == 0:
        return 0.0, 1.0
    return low - 0.5 * size, high + 0.5 * size


@dataclass(frozen=True)
class _Frame:
    """The rectangle in which values are drawn, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def x(self, share) -> np.ndarray:
        return self.left + np.asarray(share) * (self.right - self.left)

    def y(self, share) -> np.ndarray:
        return self.bottom - np.asarray(share) * (self.bottom - self.top)


def _text_width(text: str, size: float = 11.0) -> float:
    return 0.58 * size * len(text)  # an upper average of the system fonts; nothing here knows the true one


def _shorten(text: str, room: float, size: float = 11.0) -> str:
    count = max(int(room / _text_width("x", size)), 4)
    return text if len(text) <= count else text[: count - 1] + "…"


def _legend(names: list[str], width: float, top: float, sample: Callable | None = None) -> tuple[str, float]:
    """The names beside a sample of their lines, in as many rows as they need, and the y where the last row ends.

    `sample` gives a sample, 19 pixels wide, from a name's number and the x of its left end and the y of its middle.
    """
    sample = sample or (lambda i, x, y: f'<path class="l {_line(i)} d="M{x + 1:.1f} {y:.1f}h17"/>')
    out, x, y = [], 0.0, top
    for i, name in enumerate(names):
        shown = _shorten(name, width - 40)
        room = 24 + _text_width(shown) + 12
        if x > 0 and x + room > width:
            x, y = 0.0, y + 15
        out.append(sample(i, x, y + 7))
        out.append(f'<text x="{x + 24:.1f}" y="{y + 11:.1f}">{escape(shown)}</text>')
        x += room
    return "".join(out), y + 20


def _line(index: int) -> str:
    """The end of a class attribute that gives series `index` its colour, and its dashes."""
    dashes = _DASHES[index % len(_DASHES)] if index < len(_DASHES) else f"{2 + index} 3"
    return f's{index % len(COLOURS)}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _axes(frame: _Frame, x: _Axis, y: _Axis, x_label: str, upright: bool = False) -> str:
    """Grid lines (with `upright` those of the x axis too), axes and labels."""
    out = []
    for tick, label in zip(y.ticks, y.labels):
        at = float(frame.y(y.place(tick)))
        out.append(f'<path class="g" d="M{frame.left:.1f} {at:.1f}H{frame.right:.1f}"/>')
        out.append(f'<text x="{frame.left - 6:.1f}" y="{at + 3.8:.1f}" text-anchor="end">{label}</text>')
    drawn_to = -math.inf
    for tick, label in zip(x.ticks, x.labels):
        at = float(frame.x(x.place(tick)))
        if upright:
            out.append(f'<path class="g" d="M{at:.1f} {frame.top:.1f}V{frame.bottom:.1f}"/>')
        out.append(f'<path class="a" d="M{at:.1f} {frame.bottom:.1f}v4"/>')
        if at - _text_width(label) / 2 > drawn_to:
            out.append(f'<text x="{at:.1f}" y="{frame.bottom + 16:.1f}" text-anchor="middle">{label}</text>')
            drawn_to = at + _text_width(label) / 2 + 4
    out.append(f'<path class="a" d="M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"/>')
    middle, shown = (frame.left + frame.right) / 2, _shorten(x_label, frame.right - frame.left)
    out.append(f'<text x="{middle:.1f}" y="{frame.bottom + 32:.1f}" text-anchor="middle">{escape(shown)}</text>')
    return "".join(out)


def _document(title: str, description: str, y_label: str, body: str, width: float, height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="sjc" role="img" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{_STYLE}"
        f'<text class="h" x="0" y="14">{escape(_shorten(title, width, 13.0))}</text>'
        f'<text x="0" y="31">{escape(_shorten(y_label, width))}</text>{body}</svg>'
    )


def _no_data(title: str, words: str, y_label: str, body: str, width: float, height: float) -> str:
    axis = f'<path class="a" d="M0 {height - 38:.1f}H{width - _MARGIN:.1f}"/>'
    said = f'<text x="{width / 2:.1f}" y="{height / 2:.1f}" text-anchor="middle">no data</text>'
    return _document(title, f"no data {words}".strip(), y_label, body + axis + said, width, height)


def _frame(top: float, labels: list[str], width: float, height: float) -> _Frame:
    left = max((_text_width(label) for label in labels), default=0.0) + 8
    return _Frame(left, top, width - _MARGIN, height - 38)


def _numbers(values) -> np.ndarray:
    """A float64 copy, with 0 for what is too small to work with."""
    numbers = np.array(values, np.float64)
    numbers[np.abs(numbers) < _SMALLEST] = 0.0
    return numbers


def _series(name: str, xs, ys, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    """x and y as float64, nan wherever the pair cannot be drawn."""
    x, y = _numbers(xs), _numbers(ys)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"series {name!r} has x of shape {x.shape} and y of shape {y.shape}; give two equal lists")
    shown = (np.abs(x) < _LARGEST) & (np.abs(y) < _LARGEST)  # false for nan and infinities
    if log_y:
        shown &= y > 0
    x[~shown] = y[~shown] = np.nan
    return x, y


def _runs(x: np.ndarray, y: np.ndarray, pieces: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The stretches between gaps. A long one keeps the lowest and the highest value of each of `pieces` parts."""
    runs = []
    for run in np.ma.clump_unmasked(np.ma.masked_invalid(y)):
        at = np.arange(run.start, run.stop)
        if len(at) > 4 * pieces:
            parts = np.array_split(at, pieces)
            ends = [(part[y[part].argmin()], part[y[part].argmax()]) for part in parts]
            at = np.unique([at[0], *np.ravel(ends), at[-1]])
        runs.append((x[at], y[at]))
    return runs


def line_chart(
    series: dict[str, tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    width: float = 340,
    height: float = 230,
) -> str:
    """Lines over a common x axis, as one `<svg>` element of `width` x `height` pixels.

    `series` gives each name its x and y values, in the order in which they are joined; the last is drawn on top. With
    one series there is no legend. A point between two gaps is a dot.

    Raises `InputError` where x and y differ in length.
    """
    data = {name: _series(name, xs, ys, log_y) for name, (xs, ys) in series.items()}
    x, y = (np.concatenate([np.zeros(0), *(pair[i] for pair in data.values())]) for i in (0, 1))
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    legend, top = _legend(list(data), width, 40) if len(data) > 1 else ("", 40)
    if not len(y):
        return _no_data(title, "", y_label, legend, width, height)
    x_axis, y_axis = _x_axis(float(x.min()), float(x.max()), False), _y_axis(y, log_y)
    frame = _frame(top + 6, y_axis.labels, width, height)
    out, described = [], []
    for i, (name, (xs, ys)) in enumerate(data.items()):
        runs = _runs(xs, ys, int(width))
        for at, values in runs:
            points = zip(frame.x(x_axis.place(at)), frame.y(y_axis.place(values)))
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            if len(at) == 1:
                out.append('<circle class="f{}" cx="{}" cy="{}" r="2.5"/>'.format(i % len(COLOURS), *path.split()))
            else:
                out.append(f'<path class="l {_line(i)} d="M{path}"/>')
        last = f"last {short_number(runs[-1][1][-1])} at {short_number(runs[-1][0][-1])}" if runs else "no data"
        described.append(f"{name}: {last}.")
    body = legend + _axes(frame, x_axis, y_axis, x_label) + "".join(out)
    return _document(title, " ".join(described), y_label, body, width, height)


def histogram(
    data: Float[np.ndarray, " n"],
    edges: Float[np.ndarray, " n_plus_1"] | None = None,
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    bins: int = 40,
    width: float = 340,
    height: float = 230,
) -> str:
    """How many values lie in each bin, as one `<svg>` element of `width` x `height` pixels.

    Without `edges`, `data` are the values, put into `bins` equal bins (equal in the logarithm with `log_x`). With
    `edges`, ascending and one longer, `data` are the counts. What a log axis cannot show (zero or less) and what is not
    finite is counted in words above the bars.

    Raises `InputError` where `edges` do not fit the counts.
    """
    counts, edges, left_out = _binned(data, edges, log_x, bins)
    words = ", ".join(f"{count:,.0f} {what}" for what, count in left_out.items() if count)
    note = f'<text x="{width - _MARGIN:.1f}" y="31" text-anchor="end">{words}</text>' if words else ""
    y_label = _shorten(y_label, width - _MARGIN - _text_width(words)) if words else y_label
    if not counts.sum() > 0:
        return _no_data(title, words, y_label, note, width, height)
    x_axis, y_axis = _x_axis(edges[0], edges[-1], log_x), _y_axis(np.append(counts, 0.0), False)
    frame = _frame(46, y_axis.labels, width, height)
    ends, tops = frame.x(x_axis.place(edges)), frame.y(y_axis.place(counts))
    bars = []
    for i in np.flatnonzero(counts):
        gap = 1.0 if ends[i + 1] - ends[i] > 3 else 0.0
        bars.append(
            f'<rect class="f0" x="{ends[i]:.1f}" y="{tops[i]:.1f}" width="{max(ends[i + 1] - ends[i] - gap, 0.5):.1f}" '
            f'height="{max(frame.bottom - tops[i], 0.5):.1f}"><title>{short_number(edges[i])} to '
            f"{short_number(edges[i + 1])}: {short_number(counts[i])}</title></rect>"
        )
    peak = int(counts.argmax())
    description = (
        f"{counts.sum():,.0f} in {len(counts)} bins from {short_number(edges[0])} to {short_number(edges[-1])}; most, "
        f"{short_number(counts[peak])}, from {short_number(edges[peak])} to {short_number(edges[peak + 1])}."
    )
    body = note + _axes(frame, x_axis, y_axis, x_label) + "".join(bars)
    return _document(title, f"{description} {words}".strip(), y_label, body, width, height)


def _binned(data, edges, log_x: bool, bins: int) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Counts, edges, and what is left out: words -> how many."""
    data = _numbers(data).ravel()
    if edges is None:
        finite = np.abs(data) < _LARGEST
        values = data[finite]
        shown = np.log10(values[values > 0]) if log_x else values
        left_out = {"at zero or below": values.size - shown.size, "not finite": int((~finite).sum())}
        low, high = _spread(float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
        counts, edges = np.histogram(shown, bins, (low, high))
        return counts.astype(np.float64), 10.0**edges if log_x else edges, left_out
    edges = _numbers(edges).ravel()
    if len(edges) != len(data) + 1 or not np.isfinite(edges).all() or not (np.diff(edges) > 0).all():
        raise InputError(f"{len(data)} counts need {len(data) + 1} finite, ascending edges; got {len(edges)}")
    counts = np.where(np.isfinite(data), data, 0.0).clip(0)
    keep = int((edges[:-1] <= 0).sum()) if log_x else 0
    return counts[keep:], edges[keep:], {"at zero or below": counts[:keep].sum()}
