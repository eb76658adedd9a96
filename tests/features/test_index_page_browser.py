"""The pages of features in a browser, opened from the disk: table, search, keys, panels; hostile tokens are text."""

import re
import time

import numpy as np
import pytest

from sparse_jax.features.index_page import write_pages
from sparse_jax.features.page import Context
from sparse_jax.features.panels import Cause, FeaturePanel, Histogram, Partner, Passage, TokenHistogram

pytestmark = pytest.mark.browser

HOSTILE = ("</script><script>document.title='taken'</script>", "<img src=x onerror=\"document.title='taken'\">")
HOSTILE += ("&amp;", '"', "'", "\\", "</span></p>", "<!--", "<style>body{display:none}</style>", "x" * 200)
HOSTILE += ("\n", "\r", "\t", "", "\x00", "\x1b[31m", "\u2028", "\u202e", "\u200f", "\u2067", "\ufffd", "\ufffd\ufffd")
HOSTILE += ("\udc00", "\ud800", "🙂", "👩‍👩‍👧", "ﷺ", "שלום", "__proto__", "constructor", "\u00a0", " spaced")
# Those that are not shown as they are.
SHOWN = {"\n": "↵", "\r": "␍", "\t": "⇥", "": "∅", "\u2028": "↵", "\u00a0": "⍽", "\x1b[31m": "\ufffd[31m"}
SHOWN |= dict.fromkeys(("\x00", "\u202e", "\u200f", "\u2067", "\udc00", "\ud800"), "\ufffd")
EVERYTHING = "".join(HOSTILE)


def context(tokens=HOSTILE, label="top", source="a-long-name" * 9) -> Context:
    return Context(tuple(tokens), tuple(float(i % 9) for i in range(len(tokens))), len(tokens) - 1, label, source)


def full(index: int, tokens=HOSTILE, **changes) -> FeaturePanel:
    """A panel with every part."""
    valued = tuple((token, 2.0 - i / 9) for i, token in enumerate(tokens))
    effects = tuple(float((-1) ** i * (i % 5)) for i in range(len(tokens)))
    signed = context(tokens)
    signed = Context(signed.tokens, effects, signed.peak, EVERYTHING)
    parts = {
        "mean": 2.0,
        "variance": 0.5,
        "skew": 3.0,
        "kurtosis": 1.0,
        "explanation": EVERYTHING,
        "scores": ((EVERYTHING, 0.5), ("__proto__", 0.25), ("detection", 0.75)),
        "effect": 0.01,
        "top_tokens": valued,
        "histogram": TokenHistogram((0.0, 1.0, 2.0, 8.0), tuple(tokens), ((3, 1, 0),) * len(tokens), (4, 0, 1)),
        "contexts": (
            Passage(context(tokens), effects),
            Passage(context(tokens, EVERYTHING, EVERYTHING)),
        ),
        "needs": (signed,),
        "raised": valued,
        "lowered": tuple((token, -value) for token, value in valued),
        "ablation_raised": valued[:3],
        "ablation_lowered": valued[:3],
        "drops": Histogram((-1.0, 0.0, 1.0), (2, 5)),
        "coactive": (Partner(1, 30, 0.25), Partner(7, 3)),
        "causes": (Cause(9, 1.5, 0.5, EVERYTHING), Cause(1, 0.5)),
    }
    return FeaturePanel(index, 0.01, 8.0, **(parts | changes))


def simple(index: int, density: float, **changes) -> FeaturePanel:
    return FeaturePanel(index, density, 10 * density, top_tokens=((f" word{index}", 1.0),), **changes)


# Numbers of features are not their places, and no two columns have one order.
SIMPLE = (
    simple(40, 0.0),
    simple(7, 0.2, explanation="Opens a Clause", effect=0.5),
    simple(300, 0.1, outlier=True, effect=0.25, scores=(("detection", 0.5),)),
    simple(1, 0.3, explanation="closes one", scores=(("detection", 0.75),)),
    simple(22, 0.05, effect=-0.125, contexts=(Passage(Context(("a", "b"), (0.0, 1.0), 1, "top")),)),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_pages(tmp_path_factory.mktemp("small") / "pages", "Five", SIMPLE, per_shard=2)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Hostile text wherever there is text."""
    panels = (full(5), simple(1, 0.5), full(3, tokens=("a", " b"), explanation="x-without-a-space-" * 40))
    folder = tmp_path_factory.mktemp("hostile") / "pages#1 ? ü"
    facts = ((EVERYTHING, EVERYTHING), ("tokens", "1"))
    return write_pages(
        folder, EVERYTHING, panels, subtitle=EVERYTHING, facts=facts, effect_name=EVERYTHING, effect_hint=EVERYTHING
    )


class Tab:
    """An open page, and what it said and asked for."""

    def __init__(self, browser, path, width=1200, scheme="light", fragment=""):
        self.context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.context.set_default_timeout(10_000)
        self.tab = self.context.new_page()
        self.said, self.asked = [], []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("request", lambda sent: self.asked.append(sent.url))
        self.tab.goto(path.as_uri() + fragment)
        self.tab.wait_for_selector("tbody tr[aria-rowindex], .empty:not([hidden])", state="attached")

    def numbers(self) -> list[int]:
        return [int(text) for text in self.tab.locator("tbody th").all_text_contents()]

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def waits_for(self, number: int) -> None:
        self.tab.locator("#panel-name", has_text=re.compile(f"^Feature {number}$")).wait_for()

    def focused(self) -> str:
        return self.tab.evaluate("document.activeElement.textContent || document.activeElement.id")


@pytest.fixture
def opening(browser):
    """Opens pages; afterwards the console must have been silent, and nothing asked of the network."""
    tabs = []

    def open_page(*args, **kwargs) -> Tab:
        tabs.append(Tab(browser, *args, **kwargs))
        return tabs[-1]

    yield open_page
    for tab in tabs:
        assert tab.said == []
        assert [url for url in tab.asked if not url.startswith(("file:", "data:"))] == []
        tab.context.close()


# Table


ORDERS = {  # by column: after the first press and after the second
    "Feature": ([300, 40, 22, 7, 1], [1, 7, 22, 40, 300]),
    "Density": ([1, 7, 300, 22, 40], [40, 22, 300, 7, 1]),
    "Max": ([1, 7, 300, 22, 40], [40, 22, 300, 7, 1]),
    # Those that have none are last either way, in their own order.
    "CE rise": ([7, 300, 22, 40, 1], [22, 300, 7, 40, 1]),
    "detection": ([1, 300, 40, 7, 22], [300, 1, 40, 7, 22]),
    "Top tokens": ([1, 22, 300, 40, 7], [7, 40, 300, 22, 1]),
    "Explanation": ([1, 7, 40, 300, 22], [7, 1, 40, 300, 22]),
    "Outlier": ([300, 40, 7, 1, 22], [40, 7, 1, 22, 300]),
}


@pytest.mark.parametrize("by", ["click", "keyboard"])
def test_columns_sort(opening, small, by):
    page = opening(small)
    for column, orders in ORDERS.items():
        cell = page.tab.locator("thead th", has_text=re.compile(f"^{column}$"))
        rising_first = column in ("Top tokens", "Explanation")
        for expected, down in zip(orders, (not rising_first, rising_first)):
            if by == "click":
                cell.locator("button").click()
            else:
                cell.locator("button").focus()
                page.press("Enter" if down else "Space")
            assert page.numbers() == expected, column
            assert cell.get_attribute("aria-sort") == ("descending" if down else "ascending")
            assert page.tab.locator("[aria-sort]").count() == 1


def test_the_table_starts_by_number(opening, small):
    page = opening(small)
    assert page.numbers() == [1, 7, 22, 40, 300]
    assert page.tab.locator("thead th").first.get_attribute("aria-sort") == "ascending"
    row = page.tab.locator("tbody tr[aria-rowindex]").nth(1)
    assert row.locator("td").all_text_contents() == [" word7", "Opens a Clause", "20 %", "2.00", "0.500", "–", ""]
    assert page.tab.locator("tbody tr[aria-rowindex]").nth(3).locator("td").nth(2).text_content() == "never"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("7", [7]),
        ("#22", [22]),
        ("f300", [300]),
        ("WORD", [1, 7, 22, 40, 300]),
        ("word4", [40]),
        ("clause opens", [7]),
        ("one", [1]),
        ("nothing of this", []),
        ("30", [300]),
    ],
)
def test_search(opening, small, asked, expected):
    page = opening(small)
    page.press("/")
    page.tab.keyboard.type(asked)
    assert page.numbers() == expected
    some = "5 features" if len(expected) == 5 else f"{len(expected)} of 5 features"
    assert page.tab.locator("#count").text_content() == some
    assert page.tab.locator("#empty").is_visible() == (not expected)
    page.press("Escape")
    assert page.numbers() == [1, 7, 22, 40, 300]


def test_the_feature_of_the_number_stands_first(opening, tmp_path):
    panels = [simple(i, 0.5, explanation="the 2nd") for i in range(4)]
    page = opening(write_pages(tmp_path / "pages", "t", panels))
    page.press("/", "2")
    assert page.numbers() == [2, 0, 1, 3]


def test_toggles(opening, small, tmp_path):
    page = opening(small)
    page.tab.get_by_label("firing only").check()
    assert page.numbers() == [1, 7, 22, 300]
    page.tab.get_by_label("no outliers").check()
    assert page.numbers() == [1, 7, 22]
    page.tab.get_by_label("firing only").uncheck()
    assert page.numbers() == [1, 7, 22, 40]
    plain = opening(write_pages(tmp_path / "pages", "t", [simple(1, 0.5)]))
    assert plain.tab.locator(".tick:visible").count() == 0
    assert plain.tab.locator("thead button").all_text_contents() == ["Feature", "Top tokens", "Density", "Max"]


# Panels and keys


def test_a_click_opens_a_feature(opening, small):
    page = opening(small)
    page.tab.locator("tbody td", has_text="30 %").click()
    page.waits_for(1)
    assert page.tab.title() == "1 · Five"
    assert page.tab.locator(".explained").text_content() == "closes one"
    assert page.tab.evaluate("location.hash") == "#f1"
    assert page.tab.locator("[aria-current]").locator("th").text_content() == "1"
    page.tab.get_by_label("close").click()
    page.tab.wait_for_selector("#panel", state="hidden")
    assert page.tab.title() == "Five"
    page.tab.go_back()
    page.waits_for(1)


def test_an_address_opens_a_feature(opening, small):
    page = opening(small, fragment="#f300")
    page.waits_for(300)
    assert page.tab.locator("#panel .flag").all_text_contents() == ["outlier"]
    page = opening(small, fragment="#f40")
    page.waits_for(40)
    assert page.tab.locator("#panel .flag").all_text_contents() == ["never fires"]
    page = opening(small, fragment="#f99")
    page.waits_for(99)
    assert "no such feature" in page.tab.locator("#panel").text_content()


def test_all_by_keyboard(opening, small):
    page = opening(small)
    page.press("j")
    assert page.focused() == "1"
    page.press("j", "j", "ArrowDown", "k", "ArrowUp")
    assert page.focused() == "7"
    page.press("Enter")
    page.waits_for(7)
    assert page.focused() == "Feature 7"
    page.press("]")
    page.waits_for(22)
    page.press("[", "[", "[")
    page.waits_for(1)
    page.press("Escape")
    page.tab.wait_for_selector("#panel", state="hidden")
    assert page.focused() == "1"
    page.press("End")
    assert page.focused() == "300"
    page.press("j", "Home")
    assert page.focused() == "1"
    page.press("/")
    assert page.focused() == "search"
    page.tab.keyboard.type("word")
    page.press("j")  # in the search it is a letter
    assert page.numbers() == []
    page.press("Backspace", "ArrowDown", "ArrowDown", "Enter")
    page.waits_for(7)


def test_steps_follow_fast_keys(opening, tmp_path):
    page = opening(write_pages(tmp_path / "pages", "t", [simple(i, 0.5) for i in range(100)], per_shard=8))
    page.press("j", "Enter")
    # All before the browser comes to tell of a new address.
    page.tab.evaluate("""() => { for (let i = 0; i < 60; i++)
        document.body.dispatchEvent(new KeyboardEvent('keydown', {key: ']', bubbles: true})); }""")
    page.waits_for(60)
    assert page.tab.evaluate("location.hash") == "#f60"
    assert page.tab.locator("#panel .tops").text_content() == " word601.00"


def test_steps_follow_the_order_that_is_shown(opening, small):
    page = opening(small)
    page.tab.locator("thead button", has_text="Density").click()
    page.press("j", "Enter")
    page.waits_for(1)
    before, after = page.tab.get_by_label("previous feature"), page.tab.get_by_label("next feature")
    assert before.is_disabled()
    after.click()
    page.waits_for(7)
    page.tab.get_by_label("firing only").check()
    for expected in (300, 22):
        page.tab.get_by_label("next feature").click()
        page.waits_for(expected)
    assert after.is_disabled()
    page.tab.locator("#search").fill("word1")
    assert before.is_disabled() is False  # from a feature that is not in the list a step leads into it
    page.tab.get_by_label("previous feature").click()
    page.waits_for(1)


def test_keys_of_the_browser_are_left_alone(opening, small):
    page = opening(small)
    for key in ("Control+/", "Alt+j", "Meta+k"):
        page.press(key)
    assert page.tab.evaluate("document.activeElement === document.body")


def test_every_part_is_shown(opening, tmp_path):
    page = opening(write_pages(tmp_path / "pages", "t", [full(3, (" a", "b"), explanation="says"), simple(1, 0.5)]))
    page.tab.goto(page.tab.url + "#f3")
    page.waits_for(3)
    panel = page.tab.locator("#panel")
    heads = ["Top tokens", "Activations", "Logits", "Texts", "Ablated", "Logit drops", "What of the context it needs"]
    assert panel.locator("h3").all_text_contents() == [*heads, "Fires together with", "Caused by"]
    names = panel.locator(".facts dt").all_text_contents()
    assert names[:4] == ["fires on", "maximum", "mean where it fires", "CE rise"]
    assert names[-3:] == ["variance", "skew", "kurtosis"]
    assert panel.locator(".facts dd").all_text_contents()[:4] == ["1 % of tokens", "8", "2", "0.01"]
    assert panel.locator(".tops li").all_text_contents() == [" a2.00", "b1.89"]
    raised = panel.get_by_label("Logits: raised").locator("li")
    assert raised.all_text_contents() == [" a+2.00", "b+1.89"]
    assert panel.get_by_label("Logits: lowered").locator("li").all_text_contents() == [" a−2.00", "b−1.89"]
    # Of the columns the first is the highest; its layers are as high as their counts.
    pieces = "columns => columns.map(c => [...c.children].map(i => [i.className, i.style.height]))"
    shown = panel.locator(".part", has_text="Activations").locator(".column").evaluate_all(pieces)
    assert shown == [[["s0", "30%"], ["s1", "30%"], ["rest", "40%"]], [["s0", "10%"], ["s1", "10%"]], [["rest", "10%"]]]
    panel.get_by_text("shares", exact=True).click()
    shown = panel.locator(".part", has_text="Activations").locator(".column").evaluate_all(pieces)
    assert shown[1:] == [[["s0", "50%"], ["s1", "50%"]], [["rest", "100%"]]]
    assert panel.locator(".part", has_text="Fires together").locator("li").all_text_contents() == [
        "1 word1∠ 0.2530",
        "73",
    ]
    causes = panel.locator(".part", has_text="Caused by").locator("li").all_text_contents()
    assert causes[1] == "1 word10.50"
    assert causes[0].endswith(" 9∠ 0.51.50")
    panel.locator(".part", has_text="Caused by").locator("a").click()
    page.waits_for(1)
    assert panel.locator("h3").all_text_contents() == ["Top tokens"]
    assert panel.locator(".facts dt").all_text_contents() == ["fires on", "maximum"]


def test_shades_are_activations_or_effects(opening, tmp_path):
    shown = Passage(Context(("a", "b", "c", "d"), (0.0, 4.0, 8.0, -2.0), 2, "top"), (0.5, 0.0, -2.0, 1.0))
    page = opening(write_pages(tmp_path / "pages", "t", [FeaturePanel(0, 0.5, 8.0, contexts=(shown,))]), fragment="#f0")
    page.waits_for(0)
    read = "spans => spans.map(s => [s.className, s.style.getPropertyValue('--a')])"
    spans = page.tab.locator("#panel .txt span")
    assert spans.evaluate_all(read) == [["", ""], ["pos", "0.50"], ["pos pk", "0.90"], ["neg", "0.30"]]
    assert page.tab.locator("#panel .act").text_content() == "8.00"
    page.tab.get_by_text("effect of ablating").click()
    assert spans.evaluate_all(read) == [["pos", "0.30"], ["", ""], ["neg pk", "0.90"], ["pos", "0.50"]]
    assert page.tab.locator("#panel .act").text_content() == "−2.00"
    assert "−2 nats" in spans.nth(2).get_attribute("title")


def test_a_missing_file_is_said(browser, tmp_path):
    path = write_pages(tmp_path / "pages", "t", SIMPLE, per_shard=2)
    (tmp_path / "pages" / "shard-001.js").unlink()
    page = Tab(browser, path, fragment="#f1")
    page.waits_for(1)
    assert "Not shown: shard-001.js is missing" in page.tab.locator("#panel").text_content()
    page.press("Escape", "Home", "j", "Enter")
    page.waits_for(7)
    assert "Opens a Clause" in page.tab.locator("#panel").text_content()
    # Pages that are rewritten while one is open: no other feature is shown in its place.
    write_pages(tmp_path / "pages", "t", [simple(i, 0.5) for i in range(50, 60)], per_shard=2)
    page.press("]")
    page.waits_for(22)
    assert "newer" in page.tab.locator("#panel").text_content()
    (tmp_path / "pages" / "index-data.js").unlink()
    page.tab.reload()
    page.tab.wait_for_selector("#empty:not([hidden])")
    assert "index-data.js is missing" in page.tab.locator("#empty").text_content()
    page.context.close()


# Hostile text


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_hostile_text_is_text(opening, hostile, width, scheme):
    page = opening(hostile, width, scheme, "#f5")
    page.waits_for(5)
    expected = [SHOWN.get(token, token) for token in HOSTILE]
    shown = page.tab.locator("#panel .ctx").first.locator(".txt").first.locator("span")
    assert shown.all_text_contents() == expected
    assert page.tab.locator("#panel .tops bdi").all_text_contents() == expected
    raised = page.tab.locator("#panel [aria-label='Logits: raised'] .tok")
    assert raised.all_text_contents() == expected
    assert page.tab.evaluate("document.querySelectorAll('script, img, iframe, style').length") == 2  # its own
    assert page.tab.title().startswith("5 · </script><script>document.title='taken'")
    explained = page.tab.locator(".explained").text_content()
    assert explained.startswith(EVERYTHING[:150])
    assert not re.search("[\x00\x1b\u202e\u200f\u2067\ud800\udc00]", explained)
    assert page.tab.locator("h1").is_visible()
    assert not page.tab.evaluate(
        "[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))"
    )
    page.press("Escape")
    page.tab.locator("#search").fill("document.title='taken'</script>")
    assert page.numbers() == [5]


def test_the_policy_forbids_markup_and_scripts_inside(browser, small):
    page = Tab(browser, small)
    tried = page.tab.evaluate("""() => { const said = [];
        try { document.body.innerHTML = '<b>x</b>'; said.push('markup'); } catch { said.push('refused'); }
        try { const s = document.createElement('script'); s.textContent = 'window.taken = 1';
              document.body.append(s); } catch { }
        return [...said, window.taken ?? 'untaken']; }""")
    assert tried == ["refused", "untaken"]
    page.context.close()


@pytest.mark.parametrize(
    ("width", "scheme"), [(1440, "light"), (1200, "dark"), (640, "light"), (390, "dark"), (320, "light")]
)
def test_nothing_overflows_sideways(opening, hostile, width, scheme):
    page = opening(hostile, width, scheme)
    wide = """() => [...document.querySelectorAll('body *')].filter(e => { // not what is cut off on purpose
        for (let a = e; a; a = a.parentElement) {
            if (a.id === 'rows' || a !== e && getComputedStyle(a).overflowX === 'hidden') return false; }
        return e.getBoundingClientRect().right > window.innerWidth + 0.5; }).map(e => e.outerHTML.slice(0, 80))"""
    for feature in (None, 5, 3):
        if feature is not None:
            page.tab.evaluate(f"location.hash = '#f{feature}'")
            page.waits_for(feature)
            assert page.tab.evaluate(
                "document.querySelector('#panel').scrollWidth <= document.querySelector('#panel').clientWidth"
            )
            assert page.tab.locator("#list").is_visible() == (width > 900)
        assert page.tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.tab.evaluate(wide) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_background(opening, hostile, scheme):
    page = opening(hostile, 1200, scheme, "#f5")
    page.waits_for(5)
    styles = """() => [...document.querySelectorAll('#panel *, .tools *, thead *, tbody *')]
        .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
        const layers = []; for (let a = e; a; a = a.parentElement) layers.push(getComputedStyle(a).backgroundColor);
        return [getComputedStyle(e).color, layers, e.className]; })"""
    seen = page.tab.evaluate(styles)
    assert len(seen) > 200
    for ink, layers, name in seen:
        ground = [255.0, 255.0, 255.0]
        for layer in reversed(layers):
            ground = over(rgb(layer), ground)
        assert contrast(rgb(ink), ground) >= 4.4, name


# Many features


def test_sixteen_thousand_features(opening, tmp_path):
    n, rng = 16_000, np.random.default_rng(0)
    shown = Passage(context(("a",) * 21, source=""))
    density = rng.random(n) ** 4 / 10

    def panels():
        for i in range(n):
            yield FeaturePanel(
                i,
                float(density[i]),
                float(rng.random()),
                explanation=f"explanation of feature {i}",
                effect=float(rng.normal()),
                scores=(("detection", float(rng.random())),),
                top_tokens=((f" w{i % 977}", 1.0), (" the", 0.5), ("ing", 0.25)),
                contexts=(shown,) * 4,
            )

    path = write_pages(tmp_path / "pages", "many", panels())
    assert (tmp_path / "pages" / "index-data.js").stat().st_size < 3_000_000
    started = time.perf_counter()
    page = opening(path)
    loaded = time.perf_counter() - started
    assert page.tab.locator("#count").text_content() == "16,000 features"
    assert page.tab.locator("tbody tr").count() < 80
    assert len([url for url in page.asked if "shard" in url]) == 0
    started = time.perf_counter()
    page.tab.locator("thead button", has_text="Density").click()
    assert page.numbers()[:5] == [int(i) for i in np.argsort(-density, kind="stable")[:5]]
    sorting = time.perf_counter() - started
    page.press("j", "End")
    last = int(np.argsort(-density, kind="stable")[-1])
    assert page.focused() == str(last)
    page.press("Enter")
    page.waits_for(last)
    assert [url.rsplit("/", 1)[1] for url in page.asked if "shard" in url] == [f"shard-{last // 64:03d}.js"]
    started = time.perf_counter()
    page.tab.locator("#search").fill("feature 1234")
    assert sorted(page.numbers()) == [i for i in range(n) if "1234" in str(i)]
    searching = time.perf_counter() - started
    # Generous, for a busy machine; measured: 0.5 s, 0.1 s, 0.1 s.
    assert max(loaded, sorting, searching) < 10, (loaded, sorting, searching)
    print(f"loading {loaded:.2f} s, sorting {sorting:.2f} s, searching {searching:.2f} s")


def test_rows_follow_the_scrolling(opening, tmp_path):
    page = opening(write_pages(tmp_path / "pages", "t", [simple(i, 0.5) for i in range(1000)]))
    for share in (0.5, 0.99, 0.1):
        page.tab.evaluate(f"rows => rows.scrollTop = {share} * rows.scrollHeight", page.tab.query_selector("#rows"))
        page.tab.wait_for_timeout(100)
        inside = """() => { const box = document.querySelector('#rows').getBoundingClientRect();
            const head = document.querySelector('thead').getBoundingClientRect();
            return [...document.querySelectorAll('tbody tr[aria-rowindex]')].filter(r => {
                const b = r.getBoundingClientRect(); return b.bottom > head.bottom && b.top < box.bottom; })
                .map(r => [Number(r.cells[0].textContent), r.ariaRowIndex - 2, r.getBoundingClientRect().height]); }"""
        seen = page.tab.evaluate(inside)
        assert len(seen) >= 14
        assert [number for number, _, _ in seen] == [row for _, row, _ in seen]
        assert [row for _, row, _ in seen] == list(range(seen[0][1], seen[0][1] + len(seen)))
        assert abs(seen[0][1] - share * 1000) < 25
    page.press("j")  # back to where the list stands
    assert page.focused() == "0"


def rgb(text: str) -> list[float]:
    """Red, green, blue (0 to 255) and, where there is one, opacity."""
    return [float(part) for part in text[text.index("(") + 1 : -1].replace("/", ",").split(",")]


def over(top: list[float], below: list[float]) -> list[float]:
    opacity = top[3] if len(top) > 3 else 1.0
    return [opacity * a + (1 - opacity) * b for a, b in zip(top[:3], below[:3])]


def contrast(a: list[float], b: list[float]) -> float:
    """The contrast ratio of WCAG 2, 1 to 21."""

    def luminance(colour):
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
