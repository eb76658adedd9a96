"""Curves through measured points with error bars in both directions, as SVG text like that of `svg.py`.

    svg = curve_chart([Curve("8x", l0, fvu, x_range=(low, high))], title="FVU", x_label="L0", y_label="FVU", log_x=True)

Hue and shape of the mark tell curves apart; floors are grey, dashed and hollow. Curves may be faint: what came before.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sparse_jax.errors import InputError
from sparse_jax.features.svg import (
    _LARGEST,
    COLOURS,
    _axes,
    _document,
    _frame,
    _legend,
    _no_data,
    _numbers,
    _runs,
    _y_axis,
    escape,
)
from sparse_jax.features.ticks import short_number

# Around (0, 0): circle, square, diamond, triangle, triangle on its point, cross.
_MARKS = (
    "m-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    "m-3 -3h6v6h-6z",
    "m0 -4.4l4.4 4.4l-4.4 4.4l-4.4 -4.4z",
    "m0 -4.2l4 7h-8z",
    "m0 4.2l4 -7h-8z",
    "m-3.2 -3.2l6.4 6.4m0 -6.4l-6.4 6.4",
)
_FLOOR_DASHES = ("6 3", "2 3", "9 3 2 3")
# Of lines that have the colours for the first time, for the second, ...
_DASHES_AGAIN = ("", "6 3", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Curve:
    """Points joined in their order.

    Attributes:
        name: in the legend and beside each point; curves of one name, hue and kind have one place in the legend.
        x, y: `[n]`.
        x_range, y_range: lowest and highest, each `[n]`; None: no error bars in this direction.
        hue: which colour and which mark, counted from 0; where colours begin again, lines are dashed and marks others.
        strength: opacity, more than 0 and at most 1.
        floor: grey and dashed: what the other curves are compared with.
    """

    name: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    x_range: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]] | None = None
    y_range: tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]] | None = None
    hue: int = 0
    strength: float = 1.0
    floor: bool = False

    def __post_init__(self):
        arrays = (self.x, self.y, *(self.x_range or ()), *(self.y_range or ()))
        if len({np.shape(values) for values in arrays}) > 1 or np.ndim(self.x) != 1:
            shapes = [np.shape(values) for values in arrays]
            raise InputError(f"curve {self.name!r} has values and ranges of shapes {shapes}; give equal lists")
        if not 0 < self.strength <= 1:
            raise InputError(f"curve {self.name!r} has strength {self.strength}: give more than 0 and at most 1")


def curve_chart(
    curves: list[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    width: float = 540,
    height: float = 380,
) -> str:
    """The curves as one `<svg>` element, `width` pixels wide and `height` high (more with a long legend).

    Points that cannot be drawn (nan, infinities, zero or less on a log axis) leave a gap; ends of error bars that
    cannot be drawn are left out.
    """
    shown = [_drawable(curve, log_x, log_y) for curve in curves]
    first = {_look(curve): curve for curve in reversed(curves)}  # one curve for each place in the legend
    entries = list(dict.fromkeys(_look(curve) for curve in curves))
    legend, top = "", 40.0
    if len(entries) > 1:
        legend, top = _legend(
            [name for name, *_ in entries], width, 40, lambda i, x, y: _sample(first[entries[i]], x, y)
        )
        height += top - 60
    xs, ys = (_extent(shown, axis) for axis in ("x", "y"))
    if not len(ys):
        return _no_data(title, "", y_label, legend, width, height)
    x_axis, y_axis = _y_axis(xs, log_x), _y_axis(ys, log_y)
    frame = _frame(top + 6, y_axis.labels, width, height)

    def place(x, y):
        return frame.x(x_axis.place(x)), frame.y(y_axis.place(y))

    # Floors lie below, and what is faint below what is strong.
    order = sorted(shown, key=lambda curve: (not curve.floor, curve.strength))
    body = (
        legend
        + _axes(frame, x_axis, y_axis, x_label, upright=True)
        + "".join(_drawn(curve, place, width) for curve in order)
    )
    return _document(title, " ".join(_described(curve) for curve in shown), y_label, body, width, height)


def _look(curve: Curve) -> tuple[str, int, bool]:
    return curve.name, curve.hue, curve.floor


def _drawable(curve: Curve, log_x: bool, log_y: bool) -> Curve:
    """The curve as float64, nan in x and y where a point cannot be drawn, and at ends of bars that cannot."""
    x, y = _numbers(curve.x), _numbers(curve.y)
    usable = (np.abs(x) < _LARGEST) & (np.abs(y) < _LARGEST)
    usable &= (~np.array(log_x) | (x > 0)) & (~np.array(log_y) | (y > 0))

    def ends(pair, log):
        made = []
        for values in pair or ():
            values = _numbers(values)
            values[~(usable & (np.abs(values) < _LARGEST)) | (log & (values <= 0))] = np.nan
            made.append(values)
        return tuple(made) or None

    x[~usable] = y[~usable] = np.nan
    ranges = ends(curve.x_range, log_x), ends(curve.y_range, log_y)
    return Curve(curve.name, x, y, *ranges, curve.hue, curve.strength, curve.floor)


def _extent(curves: list[Curve], axis: str) -> np.ndarray:
    """Every number that is to lie within the axis."""
    parts = [part for c in curves for part in (getattr(c, axis), *(getattr(c, f"{axis}_range") or ()))]
    values = np.concatenate([np.zeros(0), *parts])
    return values[~np.isnan(values)]


def _stroke(curve: Curve) -> str:
    """The end of a class attribute, and dashes."""
    if curve.floor:
        return f'o" stroke-dasharray="{_FLOOR_DASHES[curve.hue % len(_FLOOR_DASHES)]}"'
    dashes = _DASHES_AGAIN[curve.hue // len(COLOURS) % len(_DASHES_AGAIN)]
    return f's{curve.hue % len(COLOURS)}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")


def _mark(curve: Curve, x: float, y: float, words: str = "") -> str:
    filled = "o" if curve.floor else f"s{curve.hue % len(COLOURS)} f{curve.hue % len(COLOURS)}"
    said = f"<title>{escape(words)}</title>" if words else ""
    mark = _MARKS[(curve.hue + curve.hue // len(COLOURS)) % len(_MARKS)]
    return f'<path class="m {filled}" d="M{x:.1f} {y:.1f}{mark}">{said}</path>'


def _sample(curve: Curve, x: float, y: float) -> str:
    return f'<path class="l {_stroke(curve)} d="M{x + 1:.1f} {y:.1f}h17"/>' + _mark(curve, x + 9.5, y)


def _drawn(curve: Curve, place, pieces: float) -> str:
    out = []
    for x, y in _runs(curve.x, curve.y, int(pieces)):
        if len(x) > 1:
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(*place(x, y)))
            out.append(f'<path class="l {_stroke(curve)} d="M{path}"/>')
    for i in np.flatnonzero(~np.isnan(curve.y)):
        x, y = (float(value) for value in place(curve.x[i], curve.y[i]))
        out.append(_bars(curve, i, x, y, place))
        out.append(_mark(curve, x, y, f"{curve.name}: {_said(curve, 'x', i)}, {_said(curve, 'y', i)}"))
    opacity = f' opacity="{curve.strength:.3g}"' if curve.strength < 1 else ""
    return f"<g{opacity}>{''.join(out)}</g>"


def _bars(curve: Curve, i: int, x: float, y: float, place) -> str:
    """Error bars of one point, with small caps."""
    d = ""
    if curve.x_range:
        for end in (float(place(values[i], curve.y[i])[0]) for values in curve.x_range):
            if np.isfinite(end):
                d += f"M{x:.1f} {y:.1f}H{end:.1f}m0 -3v6"
    if curve.y_range:
        for end in (float(place(curve.x[i], values[i])[1]) for values in curve.y_range):
            if np.isfinite(end):
                d += f"M{x:.1f} {y:.1f}V{end:.1f}m-3 0h6"
    colour = "o" if curve.floor else f"s{curve.hue % len(COLOURS)}"
    return f'<path class="e {colour}" d="{d}"/>' if d else ""


def _said(curve: Curve, axis: str, i: int) -> str:
    value, pair = short_number(getattr(curve, axis)[i]), getattr(curve, f"{axis}_range")
    return value if pair is None else f"{value} ({short_number(pair[0][i])} to {short_number(pair[1][i])})"


def _described(curve: Curve) -> str:
    at = np.flatnonzero(~np.isnan(curve.y))
    if not len(at):
        return f"{curve.name}: no data."
    ends = [f"{short_number(curve.x[i])}, {short_number(curve.y[i])}" for i in (at[0], at[-1])]
    return f"{curve.name}: {len(at)} points from ({ends[0]}) to ({ends[1]})."
