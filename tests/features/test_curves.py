"""Curves with error bars: marks where the points are, bars as long as the ranges, gaps where nothing can be drawn."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.errors import InputError
from sparse_jax.features.curves import Curve, curve_chart
from tests.features.test_svg import SVG, lines, parse, texts

LABELS = {"title": "FVU", "x_label": "L0", "y_label": "share"}


def of_class(root, name):
    return [path for path in root.iter(f"{SVG}path") if path.get("class", "").split()[:1] == [name]]


def marks(root) -> np.ndarray:
    """Where the marks of points are: those with words beside them (the legend's have none)."""
    paths = [path for path in of_class(root, "m") if path.find(f"{SVG}title") is not None]
    return np.array([re.match(r"M([\d.]+) ([\d.]+)m", path.get("d")).groups() for path in paths], float)


def bars(root) -> list[dict[str, list[float]]]:
    """For each point with error bars, where they end."""
    return [
        {axis: [float(end) for end in re.findall(axis + r"([\d.]+)", path.get("d"))] for axis in "HV"}
        for path in of_class(root, "e")
    ]


def test_equal_ratios_are_equal_distances_on_log_axes():
    curve = Curve("a", [1, 10, 100], [0.1, 0.2, 0.4])
    root = parse(curve_chart([curve], log_x=True, log_y=True, **LABELS))
    steps = np.diff(marks(root), axis=0)
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert steps[0][0] > 0 > steps[0][1]
    (line,) = lines(root)
    np.testing.assert_array_equal(line, marks(root))


def test_bars_end_where_the_ranges_do():
    """A bar that reaches to another point's value ends at that point's place."""
    curve = Curve("a", [10, 20], [1.0, 3.0], x_range=([10, 10], [20, 20]), y_range=([1, 1], [3, 3]))
    root = parse(curve_chart([curve], **LABELS))
    (x0, y0), (x1, y1) = marks(root)
    assert bars(root) == [{"H": [x0, x1], "V": [y0, y1]}] * 2


def test_ends_that_a_log_axis_cannot_show_are_left_out():
    curve = Curve("a", [1, 2], [1, 2], y_range=([0, 1], [2, 3]))
    found = bars(parse(curve_chart([curve], log_y=True, **LABELS)))
    assert [len(bar["V"]) for bar in found] == [1, 2]


def test_points_that_cannot_be_drawn_leave_a_gap():
    curve = Curve("a", [1, 2, 3, 0, 5], [1, 2, float("nan"), 4, 5])
    root = parse(curve_chart([curve], log_x=True, **LABELS))
    assert [len(line) for line in lines(root)] == [2]
    assert len(marks(root)) == 3


def test_floors_lie_below_and_faint_curves_below_strong_ones():
    curves = [
        Curve("a", [1, 2], [1, 2]),
        Curve("a", [1, 2], [2, 3], strength=0.4),
        Curve("PCA", [1, 2], [3, 4], floor=True),
    ]
    root = parse(curve_chart(curves, **LABELS))
    groups = root.findall(f"{SVG}g")
    assert [group.get("opacity") for group in groups] == [None, "0.4", None]
    assert "stroke-dasharray" in groups[0].find(f"{SVG}path").attrib
    assert "stroke-dasharray" not in groups[2].find(f"{SVG}path").attrib
    assert texts(root).count("a") == 1  # one place in the legend for both
    assert texts(root).count("PCA") == 1


def test_curves_differ_in_more_than_their_colour():
    curves = [Curve(f"curve {i}", [1, 2], [i, i + 1], hue=i) for i in range(6)]
    root = parse(curve_chart(curves, **LABELS))
    shapes = {path.get("d").split("m", 1)[1] for path in of_class(root, "m")}
    assert len(shapes) == 6


def test_a_point_says_what_it_is():
    curve = Curve("<8x>", [32.0], [0.125], x_range=([30.0], [34.0]))
    svg = curve_chart([curve], **LABELS)
    assert "&lt;8x&gt;: 32 (30 to 34), 0.125</title>" in svg
    parse(svg)


def test_no_data_is_said():
    assert "no data" in texts(parse(curve_chart([], **LABELS)))
    assert "no data" in texts(parse(curve_chart([Curve("a", [0.0], [1.0])], log_x=True, **LABELS)))


def test_marks_and_bars_stay_inside_the_picture():
    rng = np.random.default_rng(0)
    curves = []
    for i in range(9):
        x, y = rng.lognormal(size=(2, 7))
        ranges = {"x_range": (x / 3, x * 3), "y_range": (y / 5, y * 5)}
        curves.append(Curve(f"curve {i} with a long name", x, y, **ranges, hue=i))
    root = parse(curve_chart(curves, log_x=True, log_y=True, width=500, height=300, **LABELS))
    assert float(root.get("height")) > 300  # the legend has rows of its own
    assert (marks(root) > 0).all()
    assert (marks(root) < [500, float(root.get("height"))]).all()
    for bar in bars(root):
        assert all(0 < end < 500 for end in bar["H"])
        assert all(0 < end < float(root.get("height")) for end in bar["V"])


def test_wrong_curves_are_refused():
    with pytest.raises(InputError, match="equal lists"):
        Curve("a", [1, 2], [1])
    with pytest.raises(InputError, match="equal lists"):
        Curve("a", [1], [1], x_range=([1], [1, 2]))
    with pytest.raises(InputError, match="strength"):
        Curve("a", [1], [1], strength=0.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats(), st.floats()), max_size=8), st.booleans())
def test_any_numbers_give_a_well_formed_chart(points, log):
    x, y, low, high = (np.array(column, float) for column in (zip(*points) if points else ((), (), (), ())))
    curve = Curve("a", x, y, x_range=(low, high), y_range=(high, low))
    root = parse(curve_chart([curve], log_x=log, log_y=log, **LABELS))
    assert "inf" not in "".join(path.get("d") for path in root.iter(f"{SVG}path"))


def test_twenty_curves_look_different():
    curves = [Curve(f"curve {i}", [1, 2], [i, i + 1], hue=i) for i in range(20)]
    root = parse(curve_chart(curves, **LABELS))
    drawn = [path for path in of_class(root, "l") if "h17" not in path.get("d")]
    shapes = [path.get("d").split("m", 1)[1] for path in of_class(root, "m") if path.find(f"{SVG}title") is not None]
    looks = {
        (path.get("class"), path.get("stroke-dasharray"), shape) for path, shape in zip(drawn, shapes[::2], strict=True)
    }
    assert len(looks) == 20
