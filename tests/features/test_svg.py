"""Charts: ticks people would choose, marks where the values are, gaps where there are none, nothing unescaped."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.errors import InputError
from sparse_jax.features.svg import escape, histogram, line_chart
from sparse_jax.features.ticks import linear_ticks, log_ticks, short_number, tick_labels

SVG = "{http://www.w3.org/2000/svg}"
NAN, INF = float("nan"), float("inf")
LABELS = {"title": "Loss", "x_label": "tokens", "y_label": "per row"}


def parse(svg: str) -> ET.Element:
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root[0].tag == f"{SVG}title"
    assert "nan" not in re.sub(r"<(title|desc)>.*?</\1>", "", svg)
    return root


def texts(root: ET.Element) -> list[str]:
    return [element.text for element in root.iter(f"{SVG}text")]


def lines(root: ET.Element) -> list[np.ndarray]:
    """The points of each data line, without the samples in the legend (those use a relative `h`)."""
    paths = [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class", "").startswith("l ")]
    return [np.array([point.split() for point in d[1:].split("L")], float) for d in paths if "h" not in d]


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0, 500_000, 1_000_000, 1_500_000], ["0", "500k", "1M", "1.5M"]),
        ([0.1, 0.2, 0.30000000000000004], ["0.1", "0.2", "0.3"]),
        ([0, 1e-4, 2e-4], ["0", "1e-4", "2e-4"]),
        ([0, 5e-4, 1e-3], ["0", "0.0005", "0.001"]),
        ([-2000, 0, 2e9], ["−2k", "0", "2B"]),
        ([1e18], ["1e18"]),
    ],
)
def test_tick_labels(ticks, labels):
    assert tick_labels(ticks) == labels


def test_log_tick_labels_keep_powers_below_a_thousandth():
    assert tick_labels([1e-5, 1e-4, 1e-3, 0.01, 1, 1000], log=True) == ["1e-5", "1e-4", "0.001", "0.01", "1", "1k"]


def test_ticks_by_hand():
    assert linear_ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert linear_ticks(-3, 7) == [-2, 0, 2, 4, 6]
    assert log_ticks(1e-5, 0.2) == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert log_ticks(1e-12, 1) == [1e-12, 1e-9, 1e-6, 1e-3, 1]
    assert log_ticks(0.8, 6) == [1, 2, 5]
    assert log_ticks(0.13, 0.76) == [0.2, 0.3, 0.5, 0.7]
    assert log_ticks(0.14, 0.45) == [0.15, 0.2, 0.3, 0.4]
    assert log_ticks(3.0, 4.0) == linear_ticks(3.0, 4.0, 4)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12))
def test_linear_ticks_lie_inside_and_are_few(low, span):
    span = max(span, abs(low) * 1e-6)
    ticks = linear_ticks(low, low + span)
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-5 * span <= tick <= low + span * (1 + 1e-5) for tick in ticks)
    assert len(set(tick_labels(ticks))) == len(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (8.3, "8.3"),
        (0.03124, "0.0312"),
        (12480, "12,480"),
        (3.14e-5, "3.14e-5"),
        (2e12, "2e12"),
        (-0.5, "−0.5"),
        (NAN, "nan"),
        (INF, "∞"),
        (-INF, "−∞"),
        (np.float32(1.5), "1.5"),
    ],
)
def test_short_number(value, text):
    assert short_number(value) == text


def test_line_goes_from_corner_to_corner():
    (line,) = lines(parse(line_chart({"a": ([0, 1, 2], [0, 5, 10])}, **LABELS)))
    steps = np.diff(line, axis=0)
    assert steps[0] == pytest.approx(steps[1])
    assert steps[0][0] > 0 > steps[0][1]  # up the page is a smaller y


def test_values_that_cannot_be_drawn_leave_a_gap():
    svg = line_chart({"a": (range(9), [1, 2, NAN, 3, INF, 4, 5, -INF, NAN])}, **LABELS)
    root = parse(svg)
    assert [len(line) for line in lines(root)] == [2, 2]
    assert len(root.findall(f"{SVG}circle")) == 1  # the lone 3


def test_log_axis_leaves_out_what_is_not_positive():
    root = parse(line_chart({"a": (range(5), [1e-4, 0, 1e-2, 1, 100])}, log_y=True, **LABELS))
    (line,) = lines(root)
    assert np.ptp(np.diff(line[:, 1])) < 0.2  # equal ratios, equal steps (rounded to a tenth of a pixel)
    assert "1e-4" in texts(root)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("values", [[], [NAN, NAN], [INF, -INF]])
def test_no_data_is_said(values, log_y):
    root = parse(line_chart({"a": (range(len(values)), values)}, log_y=log_y, **LABELS))
    assert "no data" in texts(root)
    assert "no data" in texts(parse(line_chart({}, **LABELS)))
    assert "no data" in texts(parse(histogram(values, log_x=log_y, **LABELS)))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-12, 1e99, 1e150, 5e-324, 1 + 1e-16])
def test_constant_series_and_extreme_sizes(value, log):
    root = parse(line_chart({"a": ([0, 1, 2], [value] * 3), "one point": ([1], [value])}, log_y=log, **LABELS))
    assert all(np.isfinite(line).all() for line in lines(root))
    parse(histogram([value] * 3, log_x=log, **LABELS))


def test_long_series_are_thinned_but_keep_their_extremes():
    y = np.sin(np.arange(100_000) / 5000)
    y[31_234], y[77_777] = 9.0, -9.0
    svg = line_chart({"a": (np.arange(y.size), y)}, **LABELS)
    (line,) = lines(parse(svg))
    assert len(svg) < 20_000
    whole = lines(parse(line_chart({"a": ([0, 31_234, 77_777, 99_999], [0, 9, -9, 0])}, **LABELS)))[0]
    assert line[:, 1].min() == whole[:, 1].min()
    assert line[:, 1].max() == whole[:, 1].max()


def test_marks_stay_inside_the_picture():
    rng = np.random.default_rng(0)
    series = {f"series {i} with a long name": (np.arange(50), rng.normal(size=50) * 10.0**i) for i in range(8)}
    root = parse(line_chart(series, width=300, height=260, **LABELS))
    points = np.concatenate(lines(root))
    assert (points >= 0).all()
    assert (points <= [300, 260]).all()
    assert (
        len({(p.get("class"), p.get("stroke-dasharray")) for p in root.iter(f"{SVG}path") if "h17" in p.get("d")}) == 8
    )


def test_labels_are_escaped():
    hostile = '</text><script>alert("1")</script>&amp;\x00\ud800\u202e'
    svg = line_chart({hostile: ([0, 1], [0, 1]), "b": ([0], [0])}, title=hostile, x_label=hostile, y_label=hostile)
    root = parse(svg)
    assert "<script" not in svg
    assert root[0].text == '</text><script>alert("1")</script>&amp;���'
    svg.encode("utf-8")


def test_escape_is_for_attributes_too():
    assert escape("<a b=\"c\" d='e'>&\n") == "&lt;a b=&quot;c&quot; d=&#x27;e&#x27;&gt;&amp;\n"


def test_lengths_must_agree():
    with pytest.raises(InputError, match="two equal lists"):
        line_chart({"a": ([0, 1], [0])}, **LABELS)
    with pytest.raises(InputError, match="3 finite, ascending edges"):
        histogram([1, 2], [0, 1], **LABELS)


def bars(root: ET.Element) -> list[tuple[float, float, str]]:
    rects = root.findall(f"{SVG}rect")
    return [(float(r.get("width")), float(r.get("height")), r.find(f"{SVG}title").text) for r in rects]


def test_histogram_of_counts():
    drawn = bars(parse(histogram([1, 0, 2, 4], [0, 1, 2, 3, 4], **LABELS)))
    assert [title for *_, title in drawn] == ["0 to 1: 1", "2 to 3: 2", "3 to 4: 4"]
    assert drawn[2][1] == pytest.approx(4 * drawn[0][1], abs=0.3)
    assert drawn[1][1] == pytest.approx(2 * drawn[0][1], abs=0.3)


def test_histogram_of_values_counts_them_all():
    values = np.random.default_rng(0).lognormal(size=1000)
    for log_x in (False, True):
        counts = [
            float(title.split(": ")[1].replace(",", ""))
            for *_, title in bars(parse(histogram(values, log_x=log_x, **LABELS)))
        ]
        assert sum(counts) == 1000


def test_log_histogram_says_what_it_leaves_out():
    root = parse(histogram([0.0, 0.0, -1.0, NAN, 1e-5, 1e-3, 0.1], log_x=True, bins=4, **LABELS))
    assert "3 at zero or below, 1 not finite" in texts(root)
    assert len(bars(root)) == 3
    root = parse(histogram([7, 1, 2], [0, 1e-4, 1e-2, 1], log_x=True, **LABELS))
    assert "7 at zero or below" in texts(root)
    widths = [width for width, *_ in bars(root)]
    assert widths[0] == pytest.approx(widths[1], abs=0.2)  # two powers of ten each


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=12), st.booleans())
def test_any_numbers_give_a_well_formed_chart(points, log):
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    root = parse(line_chart({"a": (xs, ys)}, log_y=log, **LABELS))
    for line in lines(root):
        assert np.isfinite(line).all()
    parse(histogram(ys, log_x=log, **LABELS))
