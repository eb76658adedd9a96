"""The page: everything given is shown, as given; nothing given is ever markup; the file is whole or absent."""

import os
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_jax.errors import InputError
from sparse_jax.features import page
from sparse_jax.features.page import Context, FeatureCard, Report, Table, render, write
from sparse_jax.features.svg import line_chart

HOSTILE = ("<script>alert(1)</script>", "&amp;", '"', "'", "<|endoftext|>", "</span></p>", "<!--", "]]>", "<img src=x>")
VOID = {"meta", "link"}


class Document(HTMLParser):
    """Checks that elements nest and keeps what a reader sees and what the elements are."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.pieces = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.pieces.append(data)

    def all(self, tag: str, **attributes) -> list[dict]:
        attributes = {name.rstrip("_"): value for name, value in attributes.items()}
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def context(tokens=("a", " b", " c"), activations=(0.0, 2.0, 1.0), peak=1, label="top", source="") -> Context:
    return Context(tuple(tokens), tuple(activations), peak, label, source)


def card(*contexts: Context, index=123, density=0.012, maximum=8.3, mean=2.1, top_tokens=()) -> FeatureCard:
    return FeatureCard(index, density, maximum, mean, contexts, top_tokens)


@pytest.fixture
def report() -> Report:
    return Report(
        title="pythia-70m",
        subtitle="TopK & friends",
        facts=(("tokens", "2,000,000"),),
        tables=(Table("Measures", ("", "FVU", "L0"), (("ours", 0.1824, 32.0), ("mean", 0.5, None)), "Note.", 0),),
        figures=((line_chart({"b": ([0, 1], [2, 3])}, title="FVU", x_label="L0", y_label=""), "A large one."),),
        charts=((line_chart({"a": ([0, 1], [2, 3])}, title="Loss", x_label="x", y_label="y"), "A caption."),),
        cards=(card(context(), top_tokens=((" the", 3.5),)), card(context(), index=7)),
        cards_note="Drawn at random.",
        details='{"k": 32}',
    )


def test_everything_is_shown(report):
    text = Document(render(report)).text
    for piece in (
        "pythia-70m",
        "TopK & friends",
        "2,000,000",
        "0.182",
        "0.500",
        "32",
        "–",
        "Note.",
        "caption.",
        "large one.",
    ):
        assert piece in text
    for piece in ("Drawn at random.", '{"k": 32}', "feature 123", "fires on 1.2 % of tokens", "max 8.3", "mean 2.1"):
        assert piece in text
    assert " the3.50" in text


def test_page_asks_for_nothing(report):
    html = render(report)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "url(" not in html
    document = Document(html)
    assert {tag for tag, _ in document.elements}.isdisjoint({"script", "iframe", "img", "object", "form", "base"})
    assert [a["href"] for _, a in document.elements if "href" in a and not a["href"].startswith("#")] == ["data:,"]
    (policy,) = document.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")


def test_page_is_accessible(report):
    document = Document(render(report))
    assert document.all("html", lang="en")
    assert document.all("meta", name="viewport")
    levels = [int(tag[1]) for tag, _ in document.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(document.all("th", scope="col")) == 3
    assert len(document.all("th", scope="row")) == 2
    ids = [a["id"] for _, a in document.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    links = [a["href"][1:] for a in document.all("a")]
    assert set(links) <= set(ids)
    assert {a["aria-labelledby"] for _, a in document.elements if "aria-labelledby" in a} <= set(ids)


def test_hostile_text_shows_as_it_is_everywhere():
    everything = "".join(HOSTILE)
    report = Report(
        title=everything,
        subtitle=everything,
        facts=((everything, everything),),
        tables=(Table(everything, (everything, everything), ((everything, everything),), everything),),
        charts=((line_chart({}, title=everything, x_label=everything, y_label=everything), everything),),
        cards=(
            card(context(HOSTILE, range(len(HOSTILE)), 3, everything, everything), top_tokens=((everything, 1.0),)),
        ),
        cards_note=everything,
        details=everything,
    )
    html = render(report)
    document = Document(html)
    assert document.text.count(everything) >= 15
    assert not document.all("script")
    assert not document.all("img")
    assert "<!--" not in html
    assert not [name for _, attributes in document.elements for name in attributes if name.startswith("on")]


def test_white_space_and_unprintable_tokens_are_seen():
    tokens = ("\n", " \n", "\t", "\r", "", "  two  ", "\x00", "\u202e", "\ud800", "\u00a0")
    html = render(Report("t", cards=(card(context(tokens, [1.0] * len(tokens), 0)),)))
    text = re.search('<p class="txt">(.*?)</p>', html)[1]
    assert re.findall("<span[^>]*>([^<]*)</span>", text) == ["↵", " ↵", "⇥", "␍", "∅", "  two  ", "�", "�", "�", "⍽"]
    assert re.search(r"\.txt[^{}]*\{white-space:pre-wrap", html)
    html.encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=6), st.floats()), min_size=1, max_size=6), st.floats())
def test_any_tokens_and_numbers_give_a_whole_page(pairs, maximum):
    tokens, activations = zip(*pairs)
    shown = context(tokens, activations, 0, tokens[0], tokens[0])
    html = render(Report(tokens[0], cards=(card(shown, maximum=maximum, mean=maximum, density=maximum),)))
    Document(html)
    html.encode("utf-8")
    spans = re.search('<p class="txt">(.*?)</p>', html, re.DOTALL)[1]
    assert spans.count("<span") == spans.count("</span>") == len(pairs)
    assert all(0 <= float(alpha) <= 1 for alpha in re.findall('--a:([^"]*)"', spans))


def spans(html: str) -> list[dict]:
    return [attributes for attributes in Document(html).all("span") if "title" in attributes]


def test_shade_follows_activation():
    shown = context(("a", "b", "c", "d", "e"), (0.0, 0.01, 4.15, 8.3, -8.3), 3)
    silent, weak, half, full, negative = spans(render(Report("t", cards=(card(shown),))))
    assert [a["title"] for a in (silent, weak, half, full, negative)] == ["0", "0.01", "4.15", "8.3", "−8.3"]
    assert "style" not in silent
    assert [a["style"] for a in (weak, half, full, negative)] == ["--a:0.10", "--a:0.50", "--a:0.90", "--a:0.90"]
    assert full["class"] == "pk"
    assert negative["class"] == "neg"
    assert "class" not in half


@pytest.mark.parametrize("maximum", [0.0, float("nan"), float("inf")])
def test_a_maximum_of_no_use_gives_no_shade(maximum):
    html = render(Report("t", cards=(card(context(), maximum=maximum),)))
    assert all("style" not in span for span in spans(html))


def test_contexts_run_from_strongest_to_weakest():
    order = (context(label="weak", activations=(0, 1, 0)), context(label="nan", activations=(0, float("nan"), 0)))
    order += (context(label="strong", activations=(9, 8, 0)), context(label="middle", activations=(0, 4, 9)))
    html = render(Report("t", cards=(card(*order),)))
    assert re.findall('class="lab">([^<]*)<', html) == ["strong", "middle", "weak", "nan"]
    assert re.findall('class="act">([^<]*)<', html) == ["8.00", "4.00", "1.00", "nan"]


def test_a_silent_feature_says_so():
    text = Document(render(Report("t", cards=(card(density=0.0, maximum=0.0),)))).text
    assert "fires on none of the tokens" in text
    assert "No text to show." in text


def test_empty_parts_are_left_out():
    document = Document(render(Report("only a title")))
    assert not document.all("h2")
    assert not document.all("nav")
    assert Document(render(Report("t", tables=(Table("none", ("a", "b"), ()),)))).all("th", scope="col")


@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        ((0.18243, 0.43, 1.02), ["0.182", "0.430", "1.020"]),
        ((0.0312, 2.41, None), ["0.0312", "2.4100", "–"]),
        ((32.0, 512, 0), ["32", "512", "0"]),
        ((28.71, 32.0), ["28.7", "32.0"]),
        ((1234567, 12.0), ["1,234,567", "12"]),
        ((0.5, 3.1e-6, 0.0), ["0.500", "3.1e-6", "0.000"]),
        ((-0.25, float("nan"), float("inf")), ["−0.250", "nan", "∞"]),
        (("a", 1.5), ["a", "1.50"]),
        ((np.float32(0.5), np.int64(3)), ["0.500", "3.000"]),
        ((None, None), ["–", "–"]),
        ((4e12, 1.5), ["4e12", "1.50"]),
    ],
)
def test_numbers_of_a_column(cells, texts):
    html = render(Report("t", tables=(Table("t", ("", "x"), tuple(("row", cell) for cell in cells)),)))
    assert re.findall('<td class="n">([^<]*)</td>', html) == texts


def test_highlighted_row(report):
    html = render(report)
    assert len(re.findall('<tr class=hl><th scope="row"><div>ours', html)) == 1


def test_input_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="3 tokens, 2 activations"):
        context(activations=(0.0, 1.0))
    with pytest.raises(InputError, match="peak at 3"):
        context(peak=3)
    with pytest.raises(InputError, match="2 columns but a row of 3"):
        Table("t", ("a", "b"), (("x", 1.0, 2.0),))
    with pytest.raises(InputError, match="highlights row 1 of 1"):
        Table("t", ("a",), (("x",),), highlight=1)


def test_write_replaces_the_file_whole(report, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    write(report, path)
    assert path.read_text("utf-8") == render(report)
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_failed_write_changes_nothing(report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(page.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(report, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]
