"""The pages of features: data that come back as they went in, inert whatever they hold; folders whole or absent."""

import json
import math
import os
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_jax.errors import InputError
from sparse_jax.features import index_page
from sparse_jax.features.index_page import write_pages
from sparse_jax.features.page import _STYLE as PAGE_STYLE
from sparse_jax.features.page import Context
from sparse_jax.features.panel_data import COLOURED, Strings, number, pack, script
from sparse_jax.features.panels import Cause, FeaturePanel, Histogram, Partner, Passage, TokenHistogram, index_row

HOSTILE = ("</script><script>alert(1)</script>", "<!--", "]]>", "\u2028", "\u2029", "\udc00", "\ud800", '"', "'", "\\")
HOSTILE += ("\x00", "\x1b[31m", "\u202e", "\u200f", "\ufffd", "🙂", "__proto__", "constructor", "", "\n", "{{title}}")


def panel(index=5, tokens=(" a", "b"), **changes) -> FeaturePanel:
    """A panel with every part."""
    n = len(tokens)
    context = Context(tuple(tokens), tuple(float(i) for i in range(n)), n - 1, "top", "a book")
    valued = tuple((token, 1.5 - i) for i, token in enumerate(tokens))
    parts = {
        "mean": 2.0,
        "variance": 0.5,
        "skew": 3.0,
        "kurtosis": -1.25,
        "outlier": True,
        "explanation": "opens a clause",
        "scores": (("detection", 0.75), ("fuzzing", None)),
        "effect": 0.012,
        "top_tokens": valued,
        "histogram": TokenHistogram((0.0, 1.0, 2.0), tuple(tokens), ((3, 1),) * n, (4, 0)),
        "contexts": (Passage(context, tuple(-float(i) for i in range(n))), Passage(context)),
        "needs": (context,),
        "raised": valued,
        "lowered": valued,
        "ablation_raised": valued,
        "ablation_lowered": valued,
        "drops": Histogram((-1.0, 0.0, 1.0), (2, 5)),
        "coactive": (Partner(7, 30, 0.25), Partner(8, 3)),
        "causes": (Cause(9, 1.5, 0.5, "resid_post.2"), Cause(10, 0.5)),
    }
    return FeaturePanel(index, 0.01, 8.3, **(parts | changes))


def called(path) -> tuple[str, list]:
    """The function that a data file calls and its arguments, read as JSON."""
    text = path.read_text("ascii")
    match = re.fullmatch(r"(\w+)\((.*)\);\n", text)
    return match[1], json.loads(f"[{match[2]}]")


def read_shard(path) -> list[dict]:
    """Panels of a shard."""
    name, (_, strings, panels) = called(path)
    assert name == "sparseJaxShard"
    return [panel | {"strings": strings} for panel in panels]


# Data


def test_a_panel_comes_back(tmp_path):
    write_pages(tmp_path / "pages", "t", [panel()])
    (read,) = read_shard(tmp_path / "pages" / "shard-000.js")
    texts = read.pop("strings")

    def shown(pairs):
        return [(texts[token], value) for token, value in pairs]

    assert (read["index"], read["density"], read["maximum"], read["mean"]) == (5, 0.01, 8.3, 2)
    assert (read["variance"], read["skew"], read["kurtosis"]) == (0.5, 3, -1.25)
    assert (read["outlier"], read["explanation"], read["effect"]) == (True, "opens a clause", 0.012)
    assert shown(read["scores"]) == [("detection", 0.75), ("fuzzing", None)]
    for part in ("tops", "raised", "lowered", "ablationRaised", "ablationLowered"):
        assert shown(read[part]) == [(" a", 1.5), ("b", 0.5)]
    assert read["histogram"]["edges"] == [0, 1, 2]
    assert [texts[token] for token in read["histogram"]["tokens"]] == [" a", "b"]
    assert read["histogram"]["counts"] == [[3, 1], [3, 1]]
    assert read["histogram"]["rest"] == [4, 0]
    first, second = read["contexts"]
    label, peak, tokens, values, source, effects = first
    assert (texts[label], peak, texts[source]) == ("top", 1, "a book")
    assert [texts[token] for token in tokens] == [" a", "b"]
    assert (values, effects) == ([0, 1], [0, -1])
    assert second == first[:5] == read["needs"][0]
    assert read["drops"] == {"edges": [-1, 0, 1], "counts": [2, 5]}
    assert read["coactive"] == [[7, 30, 0.25], [8, 3, None]]
    assert [[*cause[:3], texts[cause[3]]] for cause in read["causes"]] == [
        [9, 1.5, 0.5, "resid_post.2"],
        [10, 0.5, None, ""],
    ]


def test_what_was_not_measured_is_absent():
    assert pack(FeaturePanel(3, 0.0, 0.0), Strings()) == {"index": 3, "density": 0, "maximum": 0}


def test_tokens_beyond_the_colours_are_counted_with_the_rest():
    tokens = tuple(f"t{i}" for i in range(COLOURED + 2))
    histogram = TokenHistogram((0.0, 1.0, 2.0), tokens, tuple((i, 10 * i) for i in range(COLOURED + 2)), (100, 200))
    packed = pack(panel(histogram=histogram), Strings())["histogram"]
    assert len(packed["tokens"]) == len(packed["counts"]) == COLOURED
    assert packed["rest"] == [100 + 6 + 7, 200 + 60 + 70]


@pytest.mark.parametrize(
    ("value", "short"),
    [(1 / 3, 0.3333), (2.0, 2), (-12345.6, -12350), (1e-30, 1e-30), (0, 0), (None, None), (np.float32(0.5), 0.5)],
)
def test_numbers_are_short(value, short):
    assert number(value) == short
    assert type(number(value)) in (int, float, type(None))
    assert len(json.dumps(number(value))) <= 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -math.inf, np.float32("nan")])
def test_what_is_no_number_is_null(value):
    assert number(value) is None


def test_the_index_has_a_row_of_each_in_its_order(tmp_path):
    plain = FeaturePanel(9, 0.5, 1.0, top_tokens=((" the", 1.0), ("b", 0.5), ("c", 0.2), ("d", 0.1)))
    scored = FeaturePanel(1, 0.25, 3.0, scores=(("late", 0.5),))
    write_pages(tmp_path / "pages", "t", [plain, panel(2, outlier=False), scored, panel(4)], per_shard=3)
    name, (index,) = called(tmp_path / "pages" / "index-data.js")
    assert name == "sparseJaxIndex"
    assert index["numbers"] == [9, 2, 1, 4]
    assert index["density"] == [0.5, 0.01, 0.25, 0.01]
    assert index["maximum"] == [1, 8.3, 3, 8.3]
    assert index["effect"] == [None, 0.012, None, 0.012]
    assert [[index["strings"][token] for token in tops] for tops in index["tops"]] == [
        [" the", "b", "c"],
        [" a", "b"],
        [],
        [" a", "b"],
    ]
    assert index["explanations"] == ["", "opens a clause", "", "opens a clause"]
    assert index["outliers"] == [3]
    assert dict(index["scores"]) == {
        "detection": [None, 0.75, None, 0.75],
        "fuzzing": [None] * 4,
        "late": [None, None, 0.5, None],
    }
    assert index["perShard"] == 3
    # The panel of the row at a place is in the shard that the page will look in.
    for at, feature in enumerate(index["numbers"]):
        shard = read_shard(tmp_path / "pages" / f"shard-{at // 3:03d}.js")
        assert shard[at % 3]["index"] == feature


def test_columns_of_nothing_are_null(tmp_path):
    write_pages(tmp_path / "pages", "t", [FeaturePanel(0, 0.5, 1.0)])
    _, (index,) = called(tmp_path / "pages" / "index-data.js")
    assert (index["effect"], index["explanations"], index["outliers"], index["scores"]) == (None, None, [], [])


def test_no_features_are_an_empty_index(tmp_path):
    write_pages(tmp_path / "pages", "t", [])
    assert called(tmp_path / "pages" / "index-data.js")[1][0]["numbers"] == []
    assert sorted(os.listdir(tmp_path / "pages")) == ["index-data.js", "index.html"]


def test_the_row_of_a_panel():
    row = index_row(panel(tokens=("a", "b", "c", "d")))
    assert (row.index, row.density, row.maximum, row.effect, row.outlier) == (5, 0.01, 8.3, 0.012, True)
    assert (row.top_tokens, row.explanation, row.scores[0]) == (("a", "b", "c"), "opens a clause", ("detection", 0.75))


# Hostile text


def test_hostile_text_is_inert_and_comes_back(tmp_path):
    everything = "".join(HOSTILE)
    hostile = panel(tokens=HOSTILE, explanation=everything, scores=((everything, 0.5), ("__proto__", 0.25)))
    write_pages(tmp_path / "pages", everything, [hostile], subtitle=everything, facts=[(everything, everything)])
    for name in ("index-data.js", "shard-000.js"):
        text = (tmp_path / "pages" / name).read_bytes()
        assert text.isascii()
        assert not set(b"<>\x00") & set(text)
        assert text.count(b"\n") == 1
    (read,) = read_shard(tmp_path / "pages" / "shard-000.js")
    assert [read["strings"][token] for token in read["contexts"][0][2]] == list(HOSTILE)
    assert read["explanation"] == everything
    _, (index,) = called(tmp_path / "pages" / "index-data.js")
    assert [name for name, _ in index["scores"]] == [everything, "__proto__"]
    page = (tmp_path / "pages" / "index.html").read_text("utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<!--" not in page


@settings(max_examples=50, deadline=None)
@example(texts=[""], value=1.7976e308)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=8), st.floats())
def test_any_text_is_read_back(texts, value):
    text = script("f", texts, number(value))
    assert text.isascii()
    assert not set("<>") & set(text)
    assert json.loads(f"[{text[2:-3]}]") == [texts, number(value)]


# The page


def test_the_page_asks_for_nothing_but_its_data(tmp_path):
    path = write_pages(tmp_path / "pages", "t", [panel()])
    assert path == tmp_path / "pages" / "index.html"
    page = path.read_text("utf-8")
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe" not in policy
    assert re.fullmatch(r"'self' file: 'sha256-[\w+/=]+'", rules["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]+'", rules["style-src"])
    addresses = re.findall(r"\w+://[^\s\"']*", page)
    assert addresses == ["http://www.w3.org/2000/svg"][: len(addresses)]  # a name, which nothing fetches
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", page)
    assert not re.search(r"\son\w+=|style=|url\(|@import|{{", page)


def test_colours_are_those_of_the_report():
    style = index_page._asset("features.css")
    for scheme in re.findall(r":root\{([^}]*)\}", PAGE_STYLE):
        ours = style.replace("\n", "")
        for rule in scheme.replace("\n", "").split(";"):
            assert rule in ours


# Folders


def test_pages_replace_pages(tmp_path):
    write_pages(tmp_path / "pages", "old", [panel(i) for i in range(5)], per_shard=1)
    write_pages(tmp_path / "pages", "new", [panel(1)])
    assert os.listdir(tmp_path) == ["pages"]
    assert sorted(os.listdir(tmp_path / "pages")) == ["index-data.js", "index.html", "shard-000.js"]
    assert "<title>new" in (tmp_path / "pages" / "index.html").read_text()


def contents(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("when", ["panels", "rename"])
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_write_changes_nothing(tmp_path, monkeypatch, when, there):
    if there:
        write_pages(tmp_path / "pages", "old", [panel(0)])
    before = contents(tmp_path / "pages") if there else None

    def panels():
        yield panel(1)
        if when == "panels":
            raise OSError("disk full")

    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".partial") and when == "rename":
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(index_page.os, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        write_pages(tmp_path / "pages", "new", panels(), per_shard=1)
    assert os.listdir(tmp_path) == (["pages"] if there else [])
    if there:
        assert contents(tmp_path / "pages") == before


def test_panels_are_taken_as_they_are_written(tmp_path):
    """Never more of them at once than fit in one file."""
    alive, most = set(), 0

    class Watched(FeaturePanel):
        def __del__(self):
            alive.discard(self.index)

    def panels():
        nonlocal most
        for i in range(20):
            made = Watched(i, 0.5, 1.0)
            alive.add(i)
            most = max(most, len(alive))
            yield made
            del made

    write_pages(tmp_path / "pages", "t", panels(), per_shard=4)
    assert len(list((tmp_path / "pages").glob("shard-*.js"))) == 5
    assert most <= 9  # a file that is made beside the one that was written


def test_other_content_is_refused(tmp_path):
    def never():
        raise AssertionError("panels were asked for before the folder was looked at")
        yield

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"more than pages of features \(thesis.txt\)"):
        write_pages(tmp_path / "mine", "t", never())
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<h1>my site</h1>")
    with pytest.raises(InputError, match="another page"):
        write_pages(tmp_path / "site", "t", never())
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        write_pages(tmp_path / "file", "t", never())
    with pytest.raises(InputError, match="is no folder"):
        write_pages(tmp_path / "absent" / "pages", "t", never())
    with pytest.raises(InputError, match="per_shard is 0"):
        write_pages(tmp_path / "pages", "t", never(), per_shard=0)
    assert sorted(os.listdir(tmp_path)) == ["file", "mine", "site"]


def test_input_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="feature 5 comes twice"):
        write_pages(tmp_path / "pages", "t", [panel(), panel()])
    assert Histogram.open_ended([0.0, 1.0, 3.0], [5, 1, 2, 7]) == Histogram((-1.0, 0.0, 1.0, 3.0, 5.0), (5, 1, 2, 7))
    with pytest.raises(InputError, match="give two or more"):
        Histogram.open_ended([0.0], [1, 2])
    with pytest.raises(InputError, match="2 bins needs 3 finite, ascending edges; got 2"):
        Histogram((0.0, 1.0), (1, 2))
    for edges in ((0.0, 0.0), (1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(InputError, match="ascending"):
            Histogram(edges, (1,))
    with pytest.raises(InputError, match="1 tokens and 2 bins"):
        TokenHistogram((0.0, 1.0, 2.0), ("a",), ((1,),), (1, 2))
    with pytest.raises(InputError, match="3 tokens has 1 effects"):
        Passage(Context(("a", "b", "c"), (0.0, 1.0, 0.0), 1, "top"), (1.0,))
    with pytest.raises(InputError, match="not -1"):
        FeaturePanel(-1, 0.0, 0.0)
    with pytest.raises(InputError, match="several scores of one name"):
        FeaturePanel(1, 0.0, 0.0, scores=(("a", 1.0), ("a", 2.0)))
