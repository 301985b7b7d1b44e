"""The report in a real browser: it draws, asks the network for nothing, and can be used by keyboard.

Needs Debian's chromium; skipped where there is none.
"""

import shutil
import time
from pathlib import Path

import pytest

from qbert_ray.report.page import write
from tests.reported import EVIL, TITLES, write_run, write_sweep

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WAIT = 120_000  # milliseconds: plotly's script is large, and the machine may be busy
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    return write(write_run(tmp_path_factory.mktemp("run")).uri)[0]


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory):
    return write(write_sweep(tmp_path_factory.mktemp("sweep")).uri)[0]


@pytest.fixture
def visit(browser):
    """Opens a page; at the end nothing may have gone wrong in it, and nothing outside it may have been asked for."""
    wrong, contexts = [], []

    def open_page(path, scheme="light"):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
        page.goto(f"file://{path}")
        page.wait_for_selector("body[data-drawn=light], body[data-drawn=dark]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.mark.parametrize("kind", ["run_page", "sweep_page"])
def test_every_figure_is_drawn_and_fits_a_phone(visit, request, kind):
    page = visit(request.getfixturevalue(kind))
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        deadline = time.monotonic() + WAIT / 1000
        while page.evaluate("document.documentElement.scrollWidth") > width and time.monotonic() < deadline:
            page.wait_for_timeout(100)  # figures follow the window; the page's policy forbids Playwright's own waiting for a condition
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.eval_on_selector_all(".plot", DRAWN)
        assert len(sizes) >= 7 and all(wide > 150 and high > 100 and traces > 0 for wide, high, traces in sizes), sizes


def test_titles_are_shown_and_never_run(visit, run_page):
    page = visit(run_page)
    assert EVIL in page.inner_text("#stage-2") and page.title().endswith("report")
    assert page.locator("img").count() == page.locator("img[src^='data:image/jpeg']").count() > 10
    assert page.eval_on_selector_all("img", "all => all.every(one => one.alt && one.naturalWidth > 0)")


def test_a_script_that_got_in_would_not_run(browser, run_page, tmp_path):
    text = Path(run_page).read_text(encoding="utf-8").replace("</main>", "<script>window.ran = 1</script></main>")
    (tmp_path / "index.html").write_text(text, encoding="utf-8")
    context = browser.new_context()
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.goto(f"file://{tmp_path}/index.html")
    page.wait_for_selector("body[data-drawn=light], body[data-drawn=dark]")
    assert page.evaluate("window.ran") is None
    context.close()


def test_prefixes_are_browsed_by_keyboard(visit, run_page):
    page = visit(run_page)
    page.focus("[role=tree] [role=treeitem][tabindex='0']")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused).startswith("<a_0>, 4 items")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused).startswith("<a_1>")
    assert page.inner_text(".shown") == "<a_1>: 4 items" and page.locator(".gallery .item").count() == 4
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused).startswith("<a_1><b_0>, 1 item")
    assert page.inner_text(".gallery .title") == TITLES[1]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("[role=treeitem][aria-expanded=true]").count() == 0
    page.keyboard.press("End")
    assert page.evaluate(focused).startswith("<a_5>")
    assert page.locator("[role=treeitem][tabindex='0']").count() == 1


def test_prefixes_are_browsed_by_mouse_and_found_by_word(visit, run_page):
    page = visit(run_page)
    page.click("[role=treeitem] >> nth=2 >> .node")
    assert page.locator("[role=treeitem][aria-expanded=true]").count() == 1
    page.fill(".find", "film 2")
    assert page.locator(".gallery .item").count() == 4  # 20 to 23
    page.fill(".find", "<a_1><b_2>")
    assert page.inner_text(".gallery .title") == "Film 13"


def test_the_theme_follows_the_system_until_the_reader_chooses(visit, run_page):
    page = visit(run_page, scheme="dark")
    ink = "getComputedStyle(document.querySelector('.plot .xtitle')).fill"
    bar = "getComputedStyle(document.querySelector('.plot .bars path')).fill"
    dark = [page.evaluate(ink), page.evaluate(bar), page.evaluate("getComputedStyle(document.body).backgroundColor")]
    page.click("#theme")
    page.wait_for_selector("body[data-drawn=light]")
    light = [page.evaluate(ink), page.evaluate(bar), page.evaluate("getComputedStyle(document.body).backgroundColor")]
    assert all(one != other for one, other in zip(dark, light, strict=True))
    assert light[2] == "rgb(255, 255, 255)" and page.get_attribute("#theme", "aria-pressed") == "false"


@pytest.mark.parametrize("kind", ["run_page", "sweep_page"])
def test_headings_labels_and_contrast(visit, request, kind):
    page = visit(request.getfixturevalue(kind))
    levels = page.eval_on_selector_all("h1, h2, h3, h4, h5, h6", "all => all.map(one => +one.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False)), levels
    assert page.eval_on_selector_all(".plot", "all => all.every(one => one.getAttribute('aria-label').length > 20)")
    assert page.eval_on_selector_all("input", "all => all.every(one => one.labels.length)")
    ids = page.eval_on_selector_all("[id]:not(svg [id])", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate(CONTRAST) == []
    page.click("#theme")
    page.wait_for_selector("body[data-drawn=dark]")
    assert page.evaluate(CONTRAST) == []


DRAWN = """all => all.map((one) => {
  const svg = one.querySelector("svg.main-svg"), box = svg ? svg.getBoundingClientRect() : {};
  return [box.width, box.height, one.querySelectorAll(".trace").length];
})"""
CONTRAST = """() => {
  const parts = (colour) => (colour.match(/[\\d.]+/g) || []).map(Number);
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = (element) => { for (let one = element; one; one = one.parentElement) {
    const found = parts(getComputedStyle(one).backgroundColor); if (found.length === 3 || found[3] === 1) return found.slice(0, 3); } return [255, 255, 255]; };
  const poor = [];
  for (const element of document.querySelectorAll("main *, header *, footer *")) {
    if (element.closest("svg, script, style, noscript") || !element.offsetParent) continue;
    if (![...element.childNodes].some((one) => one.nodeType === 3 && one.textContent.trim())) continue;
    const [a, b] = [light(parts(getComputedStyle(element).color).slice(0, 3)), light(back(element))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(element.className + ": " + element.textContent.trim().slice(0, 40));
  }
  return poor;
}"""
