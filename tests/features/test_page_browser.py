"""The page in a browser: silent console, no requests, no sideways scrolling, hostile tokens shown as text."""

import pytest

from sparse_jax.features.page import Context, FeatureCard, Report, Table, write
from sparse_jax.features.svg import histogram, line_chart

pytestmark = pytest.mark.browser

HOSTILE = ("<script>document.title='taken'</script>", "<img src=x onerror=\"document.title='taken'\">", "&amp;", '"')
HOSTILE += ("<|endoftext|>", "</span></p></li>", "\n", "x" * 200, " spaced", "<style>body{display:none}</style>")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page with everything on it, long names included."""
    contexts = tuple(
        Context(HOSTILE, tuple(float((i + j) % 9) for j in range(len(HOSTILE))), i, "60-80 %", "a-long-name" * 9)
        for i in range(5)
    )
    columns = ("", *(f"measure number {i}" for i in range(9)))
    labels = {"title": "<b>Loss</b>", "x_label": "tokens", "y_label": "per row"}
    report = Report(
        title="A-title-without-a-space-" * 4,
        subtitle="<i>plain</i>",
        facts=(("a fact", "no-space-" * 12), ("another", "1")),
        tables=(Table("Wide", columns, (("a row with a rather long name", *range(9)),) * 3, "A note.", 1),),
        charts=(
            (line_chart({"a": ([0, 1, 2], [1, float("nan"), 3]), "b": ([0, 1], [2, 1])}, **labels), "caption"),
            (histogram([0, 1e-4, 1e-3, 0.1], log_x=True, **labels), ""),
        ),
        cards=(
            FeatureCard(5, 0.01, 8.0, 1.0, contexts, tuple((token, 1.0) for token in HOSTILE)),
            FeatureCard(6, 0, 0, 0, ()),
        ),
        details='{"line": "' + "long " * 100 + '"}',
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    write(report, path)
    return path


@pytest.fixture(params=[(1200, "light"), (390, "dark")], ids=["1200-light", "390-dark"])
def opened(request, browser, path):
    """The open page, and what it said and asked for while it loaded."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab = context.new_page()
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda sent: asked.append(sent.url))
    tab.goto(path.as_uri())
    tab.wait_for_load_state("networkidle")
    yield tab, said, asked
    context.close()


def test_console_is_silent_and_only_the_file_is_read(opened, path):
    _, said, asked = opened
    assert said == []
    assert asked == [path.as_uri()]


def test_nothing_overflows_the_page(opened):
    tab, _, _ = opened
    tab.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    wide = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg')
        && e.getBoundingClientRect().right > window.innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
    assert tab.evaluate(wide) == []


def test_wide_tables_scroll_in_their_own_box(opened):
    tab, _, _ = opened
    box = tab.locator(".scroll").first
    if tab.viewport_size["width"] < 1000:
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    box.evaluate("box => box.scrollLeft = 200")
    assert box.locator("th[scope=row]").first.bounding_box()["x"] >= 0  # the rows' names stay in sight


def test_hostile_text_is_text(opened):
    tab, _, _ = opened
    assert tab.title() == "A-title-without-a-space-" * 4
    assert tab.evaluate("document.querySelectorAll('script, img, iframe, body style:not(svg style)').length") == 0
    shown = tab.locator(".ctx li").first.locator(".txt span").all_text_contents()
    assert shown == ["↵" if token == "\n" else token for token in HOSTILE]
    assert tab.locator("svg text.h").first.text_content() == "<b>Loss</b>"
    assert tab.locator(".sub").is_visible()


def test_text_can_be_read_on_its_background(opened):
    tab, _, _ = opened
    strongest = """[...document.querySelectorAll('.txt span[style]')].map(e => [getComputedStyle(e).color,
        getComputedStyle(e).backgroundColor, getComputedStyle(e.closest('.sheet')).backgroundColor])"""
    for ink, shade, sheet in tab.evaluate(strongest):
        assert contrast(rgb(ink), over(rgb(shade), rgb(sheet))) >= 4.5


def test_links_lead_to_features(opened):
    tab, _, _ = opened
    tab.locator(".jump a").first.click()
    assert tab.evaluate("document.querySelector(':target').id") == "feature-5"


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
