"""Features in a notebook: all that is known is shown, as text, without a script and without touching other output."""

import re
from html.parser import HTMLParser

import pytest

from sparse_jax.features.page import Context, Table
from sparse_jax.features.panel_html import facts_html, panel_html, table_html, titled_html
from sparse_jax.features.panels import Cause, FeaturePanel, Partner, Passage

HOSTILE = (
    "</style><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="x',
    "&amp;",
    "\u202e",
    "$a$",
)


class Pieces(HTMLParser):
    """Elements, each closed, and the text outside of the style."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def full(tokens=(" a", "b")) -> FeaturePanel:
    everything = "".join(tokens)
    valued = tuple((token, 2.0 - i) for i, token in enumerate(tokens))
    context = Context(tuple(tokens), tuple(float(i) for i in range(len(tokens))), 1, everything, everything)
    return FeaturePanel(
        12,
        0.015,
        4.0,
        mean=1.25,
        skew=2.5,
        outlier=True,
        explanation=everything,
        scores=((everything, 0.75), ("fuzzing", None)),
        effect=0.031,
        top_tokens=valued,
        contexts=(Passage(context),),
        needs=(context,),
        raised=valued,
        lowered=valued,
        ablation_raised=valued,
        ablation_lowered=valued,
        coactive=(Partner(77, 1234),),
        causes=(Cause(88, 0.5, 0.25, everything),),
    )


def test_everything_is_shown():
    shown = Pieces(full()._repr_html_()).text
    for piece in ("feature 12 (outlier) — fires on 1.5 % of tokens, max 4, mean 1.25 where it fires", "CE rise 0.031"):
        assert piece in shown
    for piece in (
        "a",
        "0.75",
        "skew 2.5",
        "771,234",
        "880.5",
        "What it needs there",
        "Logits raised a2b1",
        "Less likely where it is ablated",
    ):
        assert piece in shown.replace(" b", "b").replace("  ", " ")
    assert "fuzzing" not in shown
    assert "kurtosis" not in shown


def test_what_is_not_known_is_not_shown():
    text = Pieces(panel_html(FeaturePanel(3, 0.0, 0.0))).text
    assert text == "feature 3 — fires on none of the tokens"


def test_hostile_text_is_text():
    read = Pieces(panel_html(full(HOSTILE)))
    assert {tag for tag, _ in read.elements}.isdisjoint({"script", "img", "iframe", "link"})
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert read.text.count(HOSTILE[0]) >= 8
    assert "\u202e" not in read.text
    table = Table(HOSTILE[0], ("", HOSTILE[1]), ((HOSTILE[2], HOSTILE[0]),))
    read = Pieces(
        titled_html(HOSTILE[0], [table_html(table), facts_html(HOSTILE[0], [(HOSTILE[0], HOSTILE[1])])], HOSTILE[2])
    )
    assert {tag for tag, _ in read.elements}.isdisjoint({"script", "img"})
    assert read.text.count(HOSTILE[0]) == 5


def test_the_style_is_confined():
    (style,) = re.findall("<style>(.*?)</style>", panel_html(full()), re.DOTALL)
    assert style.startswith(".sjf{")
    depth = 0
    for i, sign in enumerate(style):
        depth += (sign == "{") - (sign == "}")
        assert depth > 0 or i < 5 or i == len(style) - 1
    assert not re.search(r"url\(|@import|\bid=", style)


@pytest.mark.browser
def test_in_a_notebook(browser, tmp_path):
    path = tmp_path / "notebook.html"
    output = full(HOSTILE)._repr_html_() + full()._repr_html_()
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><p class="note">other<span style="color:red">s</span>{output}', "utf-8"
    )
    page = browser.new_page(viewport={"width": 700, "height": 600})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.goto(path.as_uri())
    assert page.locator(".sjf").count() == 2
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colours = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color]"
    assert page.locator("p.note").first.evaluate(colours) == ["rgba(0, 0, 0, 0)", "rgb(0, 0, 0)"]
    ground = page.locator(".sjf .tops span").first.evaluate(colours)[0]
    assert ground.startswith("rgba(245, 158, 11")
    assert said == []
    page.close()
