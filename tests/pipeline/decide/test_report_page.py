"""The report in a real browser, headless: keyboard, filters, phones, both colour schemes, and no network."""

# ruff: noqa: F811
from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hydra_pipe import report
from tests.pipeline.decide.reported import TRAIN, Words, digits, words  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine; apt-get install chromium"
)


@dataclass
class Opened:
    """A page, and what it did that it should not.

    Attributes:
        page: Playwright's.
        requests: Addresses that it asked for, but for itself.
        said: Messages on its console, and errors.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def visible(self) -> list[str]:
        """Return the ids of the rows that are shown, in order."""
        code = (
            "() => [...document.querySelectorAll('#ranked tbody tr')].filter(r => !r.hidden).map(r => r.id)"
        )
        return self.page.evaluate(code)

    def cells(self, column: str) -> list[float]:
        """Return the values of a column of the rows that are shown."""
        code = """name => {
            const at = [...document.querySelectorAll('#ranked thead th')].findIndex(c => c.textContent === name);
            return [...document.querySelectorAll('#ranked tbody tr')].filter(r => !r.hidden)
                .map(r => Number(r.cells[at].dataset.v));
        }"""
        return self.page.evaluate(code, column)


PATIENCE = 180_000
"""Milliseconds that a browser may take for anything: other tests keep every core busy."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def files(digits, words, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    report(digits, to=place / "digits.html", explain=[3])
    report(words, Words(), to=place / "words.html", explain=[0, 1, 2, 3, 4, 5])
    return {name: place / f"{name}.html" for name in ("digits", "words")}


@pytest.fixture
def opened(browser, files) -> Iterator[Any]:
    """Open a page; afterwards nothing may have been fetched, and nothing said on its console."""
    pages: list[Opened] = []
    contexts = []

    def go(name: str = "digits", **options: Any) -> Opened:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        found = Opened(context.new_page())
        address = files[name].as_uri()

        def route(request: Any) -> None:
            if request.request.url.split("#")[0] == address:
                request.continue_()
            else:
                found.requests.append(request.request.url)
                request.abort()

        context.route("**/*", route)
        found.page.on("console", lambda message: found.said.append(message.text))
        found.page.on("pageerror", lambda error: found.said.append(str(error)))
        found.page.goto(address)
        pages.append(found)
        return found

    yield go
    for one in pages:
        assert one.requests == []
        assert one.said == []
    for context in contexts:
        context.close()


def test_columns_are_sorted_by_keyboard(opened):
    found = opened()
    page = found.page
    assert len(found.visible()) == 50
    button = page.locator("#ranked thead th button", has_text="sample")
    button.focus()
    page.keyboard.press("Enter")
    head = page.locator("#ranked thead th").nth(0)
    assert head.get_attribute("aria-sort") == "ascending"
    assert found.cells("sample") == sorted(found.cells("sample"))
    assert found.cells("sample")[0] == 0
    assert page.locator("#said").inner_text() == "Sorted by sample, ascending"
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert found.cells("sample")[0] == TRAIN - 1
    page.keyboard.press("Tab")  # on to the next header, and back to the ranking
    page.keyboard.press("Space")
    assert page.evaluate("document.querySelectorAll('#ranked [aria-sort]').length") == 1
    assert found.cells("rank") == list(range(1, 51))


def test_labels_that_are_missing_sort_last(opened):
    found = opened()
    found.page.locator("#every").click()
    found.page.locator("#ranked thead th button", has_text="suggested").click()
    code = "() => [...document.querySelectorAll('#ranked tbody tr')].map(r => r.dataset.suggested)"
    shown = found.page.evaluate(code)
    known = [value for value in shown if value != "–"]
    assert 0 < len(known) < TRAIN
    assert shown == [*sorted(known, key=int), *["–"] * (TRAIN - len(known))]


def test_filters_leave_what_they_say(opened):
    found = opened()
    page = found.page
    page.select_option("select[name=given]", "3")
    assert set(found.cells("given")) == {3}
    count = len(found.visible())
    assert page.locator("#said").inner_text() == f"{count} of {TRAIN} samples"
    page.locator("button[type=reset]").click()
    page.wait_for_function("document.getElementById('where').textContent.startsWith('1 to 50')")
    page.check("input[name=flagged]")
    flagged = page.evaluate("document.querySelectorAll('tr[data-flagged=\"1\"]').length")
    assert 0 < len(found.visible()) == flagged
    page.uncheck("input[name=flagged]")
    page.fill("input[name=text]", "#17")
    assert "train-17" in found.visible()
    page.fill("input[name=text]", "nothing is called so")
    assert found.visible() == []
    assert page.locator("#where").inner_text() == "no sample"


def test_pages_are_turned(opened):
    found = opened()
    page = found.page
    assert page.locator("#where").inner_text() == f"1 to 50 of {TRAIN}"
    assert page.locator("#back").is_disabled()
    first = found.visible()
    page.locator("#next").click()
    assert page.locator("#where").inner_text() == f"51 to 100 of {TRAIN}"
    assert not set(first) & set(found.visible())
    page.locator("#next").click()
    assert page.locator("#next").is_disabled()
    page.locator("#every").click()
    assert len(found.visible()) == TRAIN


def test_a_sample_is_opened_by_keyboard_and_leads_to_what_it_harms(opened):
    found = opened()
    page = found.page
    row = page.locator("#ranked tbody tr").first
    summary = row.locator("summary")
    assert not row.locator("pre").is_visible()
    small = row.locator("th img").bounding_box()["width"]
    summary.focus()
    page.keyboard.press("Enter")
    assert row.locator("pre").is_visible()
    assert "hydra-pipe explain" in row.locator("pre").inner_text()
    assert row.locator("th img").bounding_box()["width"] > small
    assert row.locator(".harmed img").first.evaluate("image => image.naturalWidth") == 8
    page.locator("nav a", has_text="Explained").click()
    assert page.locator("#test-3 h3").is_visible()


def test_all_is_there_without_script(opened):
    found = opened(java_script_enabled=False)
    page = found.page
    rows = page.locator("#ranked tbody tr")
    assert rows.count() == TRAIN
    assert rows.last.is_visible()
    assert not page.locator("#filters").is_visible()
    assert page.locator("#ranked thead button").count() == 0
    rows.nth(3).locator("summary").click()
    assert rows.nth(3).locator("pre").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(opened, scheme):
    """Contrast of text to its background, by the formula of WCAG 2, is at least 4.5."""
    found = opened(color_scheme=scheme)
    code = """selector => {
        const light = c => { const [r, g, b] = c.match(/[0-9.]+/g).slice(0, 3).map(Number).map(v => {
            v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const node = document.querySelector(selector);
        let under = node;
        while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
        const back = light(getComputedStyle(under).backgroundColor);
        const style = getComputedStyle(node);
        const fore = light(node instanceof SVGElement ? style.fill : style.color);
        return [(Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05), back];
    }"""
    for selector in (
        "main p",
        ".note",
        "dt",
        "td",
        "thead th",
        ".flag",
        "nav a",
        "caption",
        "svg text",
        "summary",
    ):
        contrast, back = found.page.evaluate(code, selector)
        assert contrast >= 4.5, selector
        assert (back > 0.5) == (scheme == "light"), selector


@pytest.mark.parametrize("name", ["digits", "words"])
def test_a_phone_scrolls_tables_and_not_the_page(opened, name):
    found = opened(name, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    wide, room = found.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert room == 390
    assert wide <= room
    for box in found.page.locator("main > section").all():
        assert box.bounding_box()["width"] <= 390
    size = found.page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)")
    assert size >= 16


def test_hostile_texts_do_nothing(opened):
    found = opened("words")
    page = found.page
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.scripts.length") == 1
    shown = page.locator("#ranked").inner_text()
    assert "<script>window.hacked = 1</script>" in shown
    assert "\U0001f600" in shown
    page.fill("input[name=text]", "<script>")
    assert found.visible()
    page.locator("#ranked thead th button", has_text="score").click()
    assert page.evaluate("window.hacked") is None
    direction = page.locator("bdi", has_text="desrever").first.evaluate(
        "node => getComputedStyle(node).unicodeBidi"
    )
    assert direction == "isolate"


def test_injected_script_is_stopped_by_the_policy(browser, files, tmp_path):
    """Were something not escaped, it would not run: the policy names one script by its hash."""
    text = files["digits"].read_text(encoding="utf-8")
    spoilt = tmp_path / "spoilt.html"
    attack = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1">'
    spoilt.write_text(text.replace("<h1>", f"{attack}<h1>"), encoding="utf-8")
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(spoilt.as_uri())
    assert page.evaluate("window.hacked") is None
    page.close()


def test_a_printed_page_has_all_columns(opened):
    page = opened(viewport={"width": 720, "height": 1000}).page
    page.emulate_media(media="print")
    right = "[...document.querySelectorAll('#ranked thead th')].at(-1).getBoundingClientRect().right"
    assert page.evaluate(right) <= 720


def test_numbers_along_an_axis_are_not_cut_off(opened):
    cut = """() => [...document.querySelectorAll('svg')].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(text => {
            const own = text.getBoundingClientRect();
            return own.left < box.left - 1 || own.right > box.right + 1;
        }).map(text => text.textContent);
    })"""
    assert opened().page.evaluate(cut) == []
