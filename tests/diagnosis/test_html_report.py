"""The report in a real browser: headless Chromium, one session for all tests.

Without a Chromium the tests are skipped, unless HF_LNSCALE_REQUIRE_BROWSER=1 says that there must be one.
"""

import base64
import itertools
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from hf_lnscale import Diagnosis, diagnose
from hf_lnscale.diagnosis.html_report import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from oracles import decoder_layers

pytestmark = pytest.mark.xdist_group("browser")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)


def build(**changes):
    model = tiny.model(**changes)
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            if parameter.dim() >= 2:
                parameter.mul_(10)
    return model


@pytest.fixture(scope="module")
def diagnoses() -> list[Diagnosis]:
    """Of a model and of one with fewer layers; the first has massive activations, so that all sentences are there."""
    ids = tiny.tokens(6, 11, seed=1)
    first, second = build(num_hidden_layers=12), build(num_hidden_layers=10, ln_scaling=True)

    def spike(layer, args, output):
        output[:, 0, 7] += 1e3
        return output

    first.model.layers[5].register_forward_hook(spike)
    first.config.name_or_path, second.config.name_or_path = "Pre-LN", "<LNS> & co"
    return [diagnose(model, ids, progress=False) for model in (first, second)]


@pytest.fixture(scope="module")
def pages(diagnoses, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    diagnoses[0].report(folder / "one.html")
    diagnoses[0].report(folder / "two.html", compare=diagnoses[1])
    # Where a notebook puts it.
    (folder / "notebook.html").write_text(
        f"<!doctype html><html lang='en'><title>Notebook</title><body><h1>Cell</h1>{diagnoses[0]._repr_html_()}",
        encoding="utf-8",
    )
    return {path.stem: path.as_uri() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    missing = None
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        missing = "selenium is not installed"
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if missing is None and not (chromium and driver):
        missing = (
            "there is no chromium with chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)"
        )
    if missing:
        if os.environ.get("HF_LNSCALE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"HF_LNSCALE_REQUIRE_BROWSER=1, but {missing}")
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=Service(driver))
    yield session
    session.quit()


@pytest.fixture
def show(browser, pages):
    """Opens a page on a screen of the given kind; at the end of the test nothing may have gone wrong in it."""

    def opened(page, width=1280, height=900, dark=False, media=""):
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        browser.get(pages[page])
        return browser

    yield opened
    assert browser.get_log("browser") == []


# --- what holds everywhere -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("page", ["one", "two"])
def test_one_file_without_the_network(page, show, pages):
    text = Path(pages[page].removeprefix("file://")).read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|@import|url\()\s*=?\s*[\"']?https?:", text)
    assert show(page).execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []


# WCAG 2.2: relative luminance and contrast ratio.
RATIO = """
const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const read = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const ratio = (...colors) => {
  const [high, low] = colors.map(luminance).sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
};
"""
# Of every text that shows, against what is behind it.
CONTRASTS = (
    RATIO
    + """
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
  if (!text || element.closest("script, desc, .hidden") || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  let behind = element, color = [0, 0, 0, 0];
  while (behind && color[3] === 0) {
    color = read(getComputedStyle(behind).backgroundColor);
    if (color.length === 3) color.push(1);
    behind = behind.parentElement;
  }
  found.push([ratio(read(element.closest("svg") ? style.fill : style.color), color), text]);
}
return found;
"""
)
# Of what is drawn without text, against the page (1.4.11): lines, bars, dots.
DRAWN = (
    RATIO
    + """
const page = read(getComputedStyle(document.body).backgroundColor);
const marks = [".line", ".bar", ".dot", ".axis", ".error"].map((one) => ".chart " + one).join();
return [...document.querySelectorAll(marks)].map((one) => {
  const style = getComputedStyle(one);
  return [ratio(read(one.matches(".bar, .dot") ? style.fill : style.stroke), page), one.getAttribute("class")];
});
"""
)


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("page", ["one", "two"])
def test_contrast(page, dark, show):
    """WCAG 2.2, level AA: 4.5 for text, 3 for what is drawn."""
    browser = show(page, dark=dark)
    texts = browser.execute_script(CONTRASTS)
    assert len(texts) > 200
    assert min(texts)[0] >= 4.5, min(texts)
    drawn = browser.execute_script(DRAWN)
    assert len(drawn) > 50
    assert min(drawn)[0] >= 3, min(drawn)


@pytest.mark.browser
def test_the_button_changes_the_theme(show):
    for dark in (False, True):
        browser = show("one", dark=dark)
        before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        button = browser.find_element("id", "theme")
        assert button.text == ("Light" if dark else "Dark")
        button.click()
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
        assert min(browser.execute_script(CONTRASTS))[0] >= 4.5
        assert button.text == ("Dark" if dark else "Light")


@pytest.mark.browser
def test_everything_has_a_name_and_words(show, diagnoses):
    browser = show("two")
    assert browser.execute_script("return document.documentElement.lang") == "en"
    charts = browser.execute_script(
        """return [...document.querySelectorAll("svg.chart")].map((svg) => [svg.getAttribute("role"),
        svg.getAttribute("aria-label"), document.getElementById(svg.getAttribute("aria-describedby")).textContent])"""
    )
    assert len(charts) == 12
    for role, name, words in charts:
        assert role == "img"
        assert name.endswith((": Pre-LN", ": <LNS> & co"))
        assert re.search(r"\d", words), name
    assert len({name for _, name, _ in charts}) == 12
    worst = max(diagnoses[0].layers, key=lambda one: one["loss_added"])
    words = next(words for _, name, words in charts if name == "What each layer is worth: Pre-LN")
    assert words.endswith(f"at layer {worst['layer']}")
    # No other picture, no duplicate id, no level of heading left out, every heading cell has a scope, buttons a text.
    assert browser.execute_script("return document.querySelectorAll('img, canvas').length") == 0
    ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(ids) == len(set(ids))
    levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert browser.execute_script("return document.querySelectorAll('th:not([scope])').length") == 0
    assert all(button.text for button in browser.find_elements("tag name", "button"))


# --- figures ---------------------------------------------------------------------------------------------------------


def point(browser, figure, x, y, model=0):
    """Moves the pointer to a place of a figure, in its own units; returns what is shown there."""
    from selenium.webdriver import ActionChains

    svg = browser.find_element("css selector", f"svg[data-figure='{figure}'][data-model='{model}']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    box = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.width, b.height]", svg)
    scale = box[0] / WIDTH
    ActionChains(browser, duration=0).move_to_element_with_offset(
        svg, round(x * scale - box[0] / 2), round(y * scale - box[1] / 2)
    ).perform()
    return tip(browser)


def tip(browser):
    return browser.execute_script(
        "const tip = document.getElementById('tip'); return tip.hidden ? '' : tip.textContent"
    )


@pytest.mark.browser
def test_values_show_on_hover(show, diagnoses):
    browser = show("two")
    step, rise, bottom = (WIDTH - LEFT - RIGHT) / 12, (HEIGHT - BOTTOM - TOP) / 12, HEIGHT - BOTTOM
    for model, (layer, size) in {0: (3, 4), 1: (0, 10)}.items():
        text = point(browser, "angular", LEFT + (layer + 0.5) * step, bottom - (size - 0.5) * rise, model)
        value = diagnoses[model].angular[layer][size - 1]
        assert text == f"layers {layer} to {layer + size - 1} ({size})\nangular distance {float(f'{value:.3g}'):g}"
    assert browser.execute_script(
        "return getComputedStyle(document.querySelector('[data-figure=angular] .cursor')).display"
    )
    # Above the triangle there is nothing.
    assert point(browser, "angular", LEFT + 11.5 * step, TOP + 5) == ""
    text = point(browser, "ratio", LEFT + 2.5 * step, 100)
    layer = diagnoses[0].layers[2]
    ratios = {"attention": "attention_ratio", "MLP": "mlp_ratio"}
    expected = [f"{what} {layer[name]:.3g} ± {layer[f'{name}_error']:.3g}" for what, name in ratios.items()]
    assert text.split("\n") == ["layer 2", *expected]
    text = point(browser, "jacobian", LEFT + 4.5 * step, 100)
    assert re.fullmatch(r"layer 4\ndistance [\d.]+ ± [\d.]+", text)


@pytest.mark.browser
def test_values_show_by_keyboard(show, diagnoses):
    from selenium.webdriver import Keys

    browser = show("one")
    svg = browser.find_element("css selector", "svg[data-figure='angular']")
    browser.execute_script("arguments[0].focus()", svg)
    svg.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert tip(browser) == f"layers 2 to 3 (2)\nangular distance {diagnoses[0].angular[2][1]:.3g}"
    svg.send_keys(*[Keys.ARROW_RIGHT] * 20)
    assert tip(browser).startswith("layer 11\n")
    svg.send_keys(Keys.ESCAPE)
    assert tip(browser) == ""
    assert browser.find_element("id", "tip").get_attribute("role") == "status"


@pytest.mark.browser
def test_two_models_share_their_axes(show):
    browser = show("two")
    for figure in ("variance", "loss", "ratio", "jacobian", "angular"):
        panels = browser.execute_script(
            """return [...document.querySelectorAll(`svg[data-figure='${arguments[0]}']`)].map((svg) =>
            [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getAttribute("x"),
            text.getAttribute("y")]))""",
            figure,
        )
        assert len(panels) == 2
        assert panels[0] == panels[1]


def places(browser):
    return browser.execute_script(
        """return [...document.querySelectorAll("svg[data-figure='variance']")].map((svg) => {
        const box = svg.getBoundingClientRect(); return [box.left, box.top, box.width]; })"""
    )


@pytest.mark.browser
def test_on_a_wide_screen_models_are_side_by_side_and_on_a_phone_below_each_other(show):
    (left, top, width), (other_left, other_top, other_width) = places(show("two"))
    assert top == other_top
    assert other_left >= left + width
    assert width == other_width > 400
    browser = show("two", width=390, height=800)
    (left, top, width), (other_left, other_top, _) = places(browser)
    assert left == other_left
    assert other_top > top
    assert width > 330


@pytest.mark.browser
@pytest.mark.parametrize("page", ["one", "two"])
@pytest.mark.parametrize("width", [320, 390])
def test_readable_on_a_phone(page, width, show):
    browser = show(page, width=width, height=800)
    # Nothing sticks out; wide tables scroll by themselves.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    smallest = browser.execute_script(
        """return Math.min(...[...document.querySelectorAll("svg.chart text")].map((text) =>
        parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getBoundingClientRect().width / 520))"""
    )
    assert smallest > 9
    # Labels of an axis do not run into each other, nor out of the figure.
    overlaps = browser.execute_script(
        """const found = [];
        for (const svg of document.querySelectorAll("svg.chart")) {
          const outer = svg.getBoundingClientRect();
          const texts = [...svg.querySelectorAll("text")];
          const boxes = texts.map((text) => [text.getBoundingClientRect(), text.textContent]);
          boxes.forEach(([a, name], i) => {
            if (a.left < outer.left - 1 || a.right > outer.right + 1) found.push([svg.dataset.figure, name]);
            if (a.top < outer.top - 1 || a.bottom > outer.bottom + 1) found.push([svg.dataset.figure, name]);
            for (const [b, other] of boxes.slice(i + 1))
              if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
                found.push([svg.dataset.figure, name, other]);
          });
        }
        return found;"""
    )
    assert overlaps == []


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_the_table_sorts_by_every_column(show, diagnoses):
    browser = show("one")
    columns = browser.find_elements("css selector", ".sortable thead button")
    titles = [button.text for button in columns]
    assert titles[:2] == ["layer", "typical"]
    assert len(titles) == 12

    def order():
        return browser.execute_script(
            """return [...document.querySelectorAll(".sortable tbody tr")].map((row) =>
            Number(row.cells[0].dataset.value))"""
        )

    assert order() == list(range(12))
    layers = diagnoses[0].layers
    for title, field in {
        "loss added": "loss_added",
        "influence": "block_influence",
        "Jacobian": "jacobian_distance",
    }.items():
        button = columns[titles.index(title)]
        head = button.find_element("xpath", "..")
        rising = sorted(range(12), key=lambda i, field=field: layers[i][field])
        button.click()
        assert order() == rising
        assert head.get_attribute("aria-sort") == "ascending"
        button.click()
        assert order() == rising[::-1]
        assert head.get_attribute("aria-sort") == "descending"
        assert len(browser.find_elements("css selector", "th[aria-sort]")) == 1
    cells = [cell.text for cell in browser.find_elements("css selector", ".sortable tbody tr:first-child > *")]
    assert len(cells) == 12


@pytest.mark.browser
def test_names_are_text_not_markup(show):
    browser = show("two")
    heads = [head.text for head in browser.find_elements("css selector", ".card h2")]
    assert heads == ["Pre-LN", "<LNS> & co"]
    assert browser.execute_script("return document.querySelectorAll('lns').length") == 0


# --- print, scripts off, notebook ------------------------------------------------------------------------------------


@pytest.mark.browser
def test_print(show):
    browser = show("two", dark=True, media="print")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.find_element("id", "theme").is_displayed()
    assert min(browser.execute_script(CONTRASTS))[0] >= 4.5
    # On A4, in the width between the margins, every column is on the page.
    browser = show("one", width=720, media="print")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 720
    widths = browser.execute_script("return [...document.querySelectorAll('table')].map((table) => table.scrollWidth)")
    assert max(widths) <= 720
    paper = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert base64.b64decode(paper["data"]).startswith(b"%PDF")


@pytest.mark.browser
def test_whole_without_its_script(show, browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show("one")
        assert len(browser.find_elements("css selector", "svg.chart")) == 6
        assert len(browser.find_elements("css selector", ".sortable tbody tr")) == 12
        assert not browser.find_element("id", "theme").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.browser
def test_in_a_notebook(show, diagnoses):
    browser = show("notebook")
    frame = browser.find_element("tag name", "iframe")
    assert frame.get_attribute("title") == "Diagnosis of Pre-LN"
    browser.switch_to.frame(frame)
    try:
        assert browser.find_element("css selector", ".headline").text == diagnoses[0].verdict["headline"]
        assert len(browser.find_elements("css selector", "svg.chart")) == 6
        browser.find_element("css selector", ".sortable thead button").click()
    finally:
        browser.switch_to.default_content()
