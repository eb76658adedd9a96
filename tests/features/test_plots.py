"""Figures hold the data they were given; they can be saved, whatever the tokens are; without matplotlib it is said."""

import io
import subprocess
import sys

import numpy as np
import pytest

from sparse_jax.errors import InputError
from sparse_jax.features import plots
from sparse_jax.features.page import Context
from sparse_jax.features.panels import Histogram, TokenHistogram

HOSTILE = ("$a$", "$", "_x", "\\frac{", "漢字", "\u202e", "\x00", "\ud800", "🙂", "", "\n", " b", "{}")


@pytest.fixture(autouse=True)
def _matplotlib():
    pytest.importorskip("matplotlib").use("Agg")


def saved(figure) -> int:
    """The size of the picture; a warning (of a sign that the font lacks) would be an error."""
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=50)
    return len(held.getvalue())


def names(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_activation_map():
    values = np.array([[0.0, -2.0], [4.0, 1.0], [1.0, np.nan]])
    figure = plots.activation_map(("a", " b", "c"), values, names=("f7", "f9"), title="T")
    axes, bar = figure.axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0, -1], [1, 0.5], [0.25, 0]])
    assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (-1, 1)
    assert names(axes.get_yticklabels()) == ["a", " b", "c"]
    assert names(axes.get_xticklabels()) == ["f7", "f9"]
    assert axes.get_title() == "T"
    assert "largest" in bar.get_ylabel()
    together = plots.activation_map(("a", " b", "c"), np.abs(values), per_feature=False)
    np.testing.assert_allclose(together.axes[0].images[0].get_array(), [[0, 0.5], [1, 0.25], [0.25, 0]])
    assert together.axes[0].images[0].norm.vmin == 0
    assert names(together.axes[0].get_xticklabels()) == ["0", "1"]
    assert saved(figure) > 1000


def test_token_histogram():
    counts = ((3, 1, 0), (1, 2, 1))
    figure = plots.token_histogram(TokenHistogram((0.0, 1.0, 2.0, 4.0), ("$a", "b"), counts, (4, 0, 1)))
    (axes,) = figure.axes
    layers = [[(p.get_x(), p.get_width(), p.get_y(), p.get_height()) for p in bars] for bars in axes.containers]
    assert layers == [
        [(0, 1, 0, 3), (1, 1, 0, 1), (2, 2, 0, 0)],
        [(0, 1, 3, 1), (1, 1, 1, 2), (2, 2, 0, 1)],
        [(0, 1, 4, 4), (1, 1, 3, 0), (2, 2, 1, 1)],
    ]
    assert names(axes.get_legend().get_texts()) == ["$a", "b", "other tokens"]
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == 3
    assert saved(figure) > 1000
    many = TokenHistogram((0.0, 1.0), tuple("abcdefgh"), ((1,),) * 8, (10,))
    bars = plots.token_histogram(many, log=True).axes[0].containers
    assert [bar[0].get_height() for bar in bars] == [1, 1, 1, 1, 1, 1, 12]


def test_logit_drops():
    (axes,) = plots.logit_drop_histogram(Histogram((-1.0, 0.0, 2.0), (3, 5))).axes
    assert [(p.get_x(), p.get_width(), p.get_height()) for p in axes.containers[0]] == [(-1, 1, 3), (0, 2, 5)]
    figure = plots.logit_drop_histogram(np.array([0.0, 0.1, 0.9, 1.0, np.nan, np.inf]), bins=2)
    assert [p.get_height() for p in figure.axes[0].containers[0]] == [2, 2]
    assert saved(figure) > 1000


def test_context_map():
    contexts = (
        Context(("a", "b", "c"), (-2.0, 0.0, 8.0), 2, "top"),
        Context(("d", "e"), (1.0, 4.0), 1, "60–80 %"),
    )
    (axes, _) = plots.context_map(contexts).axes
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), [[-0.25, 0, 1], [0.25, 1, np.nan]])
    assert names(axes.texts) == ["a", "b", "c", "d", "e"]
    assert names(axes.get_yticklabels()) == ["top", "60–80 %"]
    assert [(p.get_x(), p.get_y()) for p in axes.patches] == [(1.5, -0.5), (0.5, 0.5)]
    # What the peak itself has is another thing than what it loses: it is not shaded then.
    (axes, _) = plots.context_map(contexts, needs=True).axes
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), [[-1, 0, 0], [1, 0, np.nan]])
    red, blue = axes.images[0].cmap(1.0), axes.images[0].cmap(0.0)
    assert red[0] > red[2]
    assert blue[2] > blue[0]


def test_any_token_can_be_drawn():
    n = len(HOSTILE)
    context = Context(HOSTILE, tuple(float(i) for i in range(n)), 0, "$t$")
    figures = (
        plots.activation_map(HOSTILE, np.ones((n, n)), HOSTILE, title="$x"),
        plots.token_histogram(TokenHistogram((0.0, 1.0), HOSTILE, ((1,),) * n, (1,)), title="$x_"),
        plots.context_map([context], title="{$}", label="l"),
    )
    for figure in figures:
        assert saved(figure) > 1000
    assert plots.shown(["a\n", "\ud800", "", "$"]) == ["a↵", "\ufffd", "∅", "$"]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match=r"2 tokens and activations \(3, 1\)"):
        plots.activation_map(("a", "b"), np.ones((3, 1)))
    with pytest.raises(InputError, match="1 names of 2"):
        plots.activation_map(("a",), np.ones((1, 2)), names=("x",))
    with pytest.raises(InputError, match="no finite drop"):
        plots.logit_drop_histogram(np.array([np.nan]))
    with pytest.raises(InputError, match="no context"):
        plots.context_map([])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r'pip install "sparse-jax\[viz\]"'):
        plots.logit_drop_histogram(np.ones(3))


def test_matplotlib_is_imported_when_a_figure_is_made():
    code = "import sys, sparse_jax.features.plots; print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
