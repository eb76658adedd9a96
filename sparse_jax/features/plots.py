"""Plots of features with matplotlib, for notebooks and papers: each call returns a figure and shows nothing.

    figure = activation_map(context.tokens, activations, names=[...])
    figure.savefig("map.pdf")

matplotlib comes with `pip install "sparse-jax[viz]"` and is imported when the first figure is made. In a notebook the
figure that a cell ends with is shown after `%matplotlib inline`.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparse_jax.errors import InputError
from sparse_jax.features.page import _VISIBLE, Context
from sparse_jax.features.panels import Histogram, TokenHistogram
from sparse_jax.features.svg import COLOURS, UNPRINTABLE

_HEAT, _COLD, _REST = "#f59e0b", "#56a0e2", "#aab2bc"
_NEEDED, _HELD_DOWN = "#f06a60", "#6094f0"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'plots need matplotlib ({error}): pip install "sparse-jax[viz]"') from error


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches with one pair of axes. No global state: nothing has to be closed."""
    figure = _import("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _scale(signed: bool, high: str = _HEAT, low: str = _COLD) -> Any:
    """White to the high colour; from the low one for what is below zero."""
    colours = [low, "white", high] if signed else ["white", high]
    return _import("matplotlib.colors").LinearSegmentedColormap.from_list("activation", colours)


def _glyphs() -> set[int]:
    manager = _import("matplotlib.font_manager")
    return set(manager.get_font(manager.findfont(manager.FontProperties())).get_charmap())


def shown(tokens: Sequence[str]) -> list[str]:
    """Tokens as a plot can show them: white space visible, what the font lacks as U+FFFD.

    They go to matplotlib with `parse_math=False`, to which "$" is a sign as any other.
    """
    glyphs = _glyphs()

    def drawable(token: str) -> str:
        text = UNPRINTABLE.sub("\ufffd", token.translate(_VISIBLE)) if token else "∅"
        return "".join(sign if ord(sign) in glyphs else "\ufffd" for sign in text)

    return [drawable(token) for token in tokens]


def activation_map(
    tokens: Sequence[str],
    activations: np.ndarray,
    names: Sequence[str] | None = None,
    *,
    per_feature: bool = True,
    title: str = "",
) -> Any:
    """A text along the side, features along the top, shade: how strongly each fires.

    Args:
        tokens: `[tokens]` as shown.
        activations: `[tokens, features]`; blue where below zero.
        names: `[features]` heads of the columns; their numbers from 0 by default.
        per_feature: shades are shares of each feature's own largest activation here; else of the largest of all.
        title: above.

    Raises:
        InputError: shapes do not fit; matplotlib is not installed.
    """
    values = np.asarray(activations, np.float64)
    if values.ndim != 2 or len(tokens) != len(values) or not values.size:
        raise InputError(f"{len(tokens)} tokens and activations {values.shape}: give [tokens, features], of each one")
    names = [str(i) for i in range(values.shape[1])] if names is None else [str(name) for name in names]
    if len(names) != values.shape[1]:
        raise InputError(f"{len(names)} names of {values.shape[1]} features: give one of each, or none")
    sizes = np.abs(np.where(np.isfinite(values), values, 0))
    largest = sizes.max(axis=0, keepdims=True) if per_feature else sizes.max()
    shares = np.where(np.isfinite(values), values, 0) / np.where(largest > 0, largest, 1)
    figure, axes = _figure(1.8 + 0.42 * len(names), 1.0 + 0.2 * len(tokens))
    signed = bool((shares < 0).any())
    image = axes.imshow(shares, cmap=_scale(signed), vmin=-1 if signed else 0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(tokens)), shown(tokens), parse_math=False)
    axes.set_xticks(range(len(names)), shown(names), rotation=45, ha="left", rotation_mode="anchor", parse_math=False)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    of = "its feature's" if per_feature else "the"
    figure.colorbar(image, ax=axes, label=f"share of {of} largest activation", shrink=0.6)
    axes.set_title(title, parse_math=False)
    return figure


def token_histogram(histogram: TokenHistogram, *, title: str = "", log: bool = False) -> Any:
    """How often a feature fires how strongly: columns in layers, one for each of the commonest tokens and the rest.

    `log`: whether counts are on a logarithmic axis, on which only the height of a whole column can be read.
    """
    figure, axes = _figure(6.4, 3.6)
    edges = np.asarray(histogram.edges, np.float64)
    layers = [*histogram.counts[: len(COLOURS)]]
    beyond = np.sum([histogram.rest, *histogram.counts[len(COLOURS) :]], axis=0)
    labels = [*shown(histogram.tokens[: len(COLOURS)]), "other tokens"]
    below = np.zeros(len(edges) - 1)
    for counts, label, colour in zip([*layers, beyond], labels, [*COLOURS[: len(layers)], _REST]):
        counts = np.asarray(counts, np.float64)
        # A label that begins with an underscore would be left out of a legend that matplotlib makes by itself.
        axes.bar(edges[:-1], counts, np.diff(edges), bottom=below, align="edge", color=colour, gid=label, lw=0)
        below += counts
    if log:
        axes.set_yscale("log")
    legend = axes.legend(axes.containers, labels, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _dressed(figure, axes, title, "activation", "firings")


def logit_drop_histogram(drops: Histogram | np.ndarray, *, bins: int = 40, title: str = "") -> Any:
    """By how much the next token's logit falls where a feature is ablated.

    Args:
        drops: counts in bins; or the drops themselves, which are put into `bins` equal ones.
        bins: how many.
        title: above.

    Raises:
        InputError: none of the drops is a finite number.
    """
    if isinstance(drops, Histogram):
        counts, edges = np.asarray(drops.counts), np.asarray(drops.edges)
    else:
        values = np.asarray(drops, np.float64).ravel()
        values = values[np.isfinite(values)]
        if not len(values):
            raise InputError("no finite drop of a logit to show: give those of at least one place")
        counts, edges = np.histogram(values, bins)
    figure, axes = _figure(5.6, 3.2)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=COLOURS[0], lw=0)
    axes.axvline(0, color="0.4", lw=0.8)
    return _dressed(figure, axes, title, "drop of the next token's logit", "places")


def context_map(contexts: Sequence[Context], *, needs: bool = False, title: str = "", label: str = "") -> Any:
    """Texts as rows of shaded tokens, each row by shares of its own largest value; the peak has a frame.

    Args:
        contexts: one a row; shorter ones end earlier.
        needs: the values are what the activation at the peak loses without each token, as
            `context_ablation.need_contexts` gives them: red where it is needed, blue where it holds the feature down;
            the peak's own value is another thing and is not shaded.
        title, label: above the map, and beside its scale.

    Raises:
        InputError: there is none.
    """
    if not contexts:
        raise InputError("no context to show: give at least one")
    length = max(len(context.tokens) for context in contexts)
    shares = np.full((len(contexts), length), np.nan)
    for row, context in enumerate(contexts):
        values = np.nan_to_num(np.asarray(context.activations, np.float64), posinf=0, neginf=0)
        if needs:
            values[context.peak] = 0
        shares[row, : len(values)] = values / (np.abs(values).max() or 1)
    signed = bool((shares < 0).any())
    figure, axes = _figure(1.5 + 0.62 * length, 1.1 + 0.42 * len(contexts))
    colours = _scale(signed, _NEEDED, _HELD_DOWN) if needs else _scale(signed)
    image = axes.imshow(shares, cmap=colours, vmin=-1 if signed else 0, vmax=1, aspect="auto")
    patches = _import("matplotlib.patches")
    for row, context in enumerate(contexts):
        for column, token in enumerate(shown(context.tokens)):
            axes.text(column, row, token, ha="center", va="center", fontsize=8, clip_on=True, parse_math=False)
        axes.add_patch(patches.Rectangle((context.peak - 0.5, row - 0.5), 1, 1, fill=False, lw=1.2))
    axes.set_yticks(range(len(contexts)), shown([context.label for context in contexts]), parse_math=False)
    axes.set_xticks([])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label=label or "share of the row's largest", shrink=0.8)
    axes.set_title(title, parse_math=False)
    return figure


def _dressed(figure: Any, axes: Any, title: str, x_label: str, y_label: str) -> Any:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    return figure
