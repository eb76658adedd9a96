"""Pages of connections in a browser, opened from the disk: the table sorts and is searched, a formula opens texts."""

import re

import pytest

from sparse_jax.connectors.code_panels import column_panels
from sparse_jax.connectors.connection_pages import write_connection_pages
from tests.connectors.connection_texts import input_panels, made

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    m = made()
    return write_connection_pages(
        tmp_path_factory.mktemp("connections") / "pages", "From <i>in</i> to out",
        zip(column_panels(m.fires, m.read), m.connections), input_panels(), read=m.read, fires=m.fires,
    )  # fmt: skip


@pytest.fixture
def opening(browser, pages):
    """Opens the pages; afterwards the console must have been silent, and nothing asked of the network."""
    said, asked, contexts = [], [], []

    def opened(fragment="", width=1200, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        contexts[-1].set_default_timeout(20_000)
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda sent: asked.append(sent.url))
        tab.goto(pages.as_uri() + fragment)
        tab.wait_for_selector("tbody tr[aria-rowindex]", state="attached")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def numbers(tab):
    return [int(text) for text in tab.locator("#table tbody th").all_text_contents()]


def test_the_table_sorts_and_is_searched(opening):
    tab = opening()
    heads = [text.strip() for text in tab.locator("#table thead th").all_text_contents()]
    assert heads[:5] == ["Target", "label", "class", "R²", "g"]
    assert tab.locator("#count").text_content() == "4 targets"
    for column, order in (("label", [1, 2, 0, 3]), ("R²", [0, 1, 3, 2]), ("g", [1, 0, 2, 3]), ("class", [0, 1, 2, 3])):
        tab.locator("#table thead th", has_text=re.compile(f"^{re.escape(column)}$")).locator("button").click()
        assert numbers(tab) == order, column
    inputs = tab.locator("#table thead th").all_text_contents().index("inputs")
    assert tab.locator("#table tbody tr").first.locator("td").nth(inputs - 1).text_content() == "2"
    for asked, found in (("and-not", [1]), ("mlp", [0]), ("unexplained", [2]), ("weighted sum", [3]), ("nothing", [])):
        tab.locator("#search").fill(asked)
        assert numbers(tab) == found, asked


def test_a_page_of_a_target(opening):
    tab = opening("#f1")
    tab.locator("#panel-name", has_text="Target 1").wait_for()
    panel = tab.locator("#panel")
    titles = panel.locator("h3").all_text_contents()
    assert titles[:2] == ["Formula", "Label: AND-NOT"]
    assert "Inputs" in titles
    line = panel.locator(".line")
    assert line.text_content() == "OF 1 = − 5.00 resid_pre.3 IF 2 + 1.50 resid_pre.3 IF 1 − 0.20"
    assert line.locator(".neg").text_content() == "− 5.00 resid_pre.3 IF 2"
    evidence = panel.locator("table.cells").first
    assert evidence.locator("tbody tr").first.locator("th, td").all_text_contents()[0] == "no positive input"
    folds = panel.locator("details.fold")
    assert folds.count() == len(made().connections[1].clusters.clusters) + 2
    assert tab.title() == "1 · From <i>in</i> to out"
    assert panel.locator("img, script, i:not([class])").count() == 0


def test_a_term_opens_the_texts_of_its_input(opening):
    tab = opening("#f1")
    fold = tab.locator("details.fold", has_text="Texts of resid_pre.3 IF 2")
    fold.locator("summary").click()
    assert fold.get_attribute("open") is None
    tab.locator("button.piece").first.click()
    assert fold.get_attribute("open") is not None
    assert fold.locator("li").count() == 4
    shades = fold.locator(".pk.pos")
    assert shades.count() == 4
    assert tab.evaluate("document.activeElement.tagName") == "SUMMARY"
    # A cluster's texts are drawn when they are opened.
    way = tab.locator("details.fold", has_text="Way 1").first
    assert way.locator("li").count() == 0
    way.locator("summary").focus()
    tab.keyboard.press("Enter")
    way.locator("li").first.wait_for()
    assert way.locator("li").count() == 3


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(opening, width, scheme):
    tab = opening("#f1", width, scheme)
    tab.locator("#panel-name").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("(p => p.scrollWidth <= p.clientWidth)(document.querySelector('#panel'))")
    position = tab.locator("table.cells thead th").first.evaluate("e => getComputedStyle(e).position")
    assert position == "static"
