"""A report in a real browser: no errors, nothing loaded, a slider and an axis that work, text that a phone shows."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from recorded_run import ODD_PROMPTS, epoch_records, write_run, write_samples

from ddpo_fast.report import page, serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright, of the extra dev, is not installed")

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed: `make browser` as root on Debian")

# in pixels, of text that can be read on a phone
SMALLEST_TEXT = 11


class Tab:
    """A tab of the browser that keeps what went wrong in it and what it loaded."""

    def __init__(self, browser, width: int) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800})
        self.errors: list[str] = []
        self.loaded: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.loaded.append(request.url))

    def open(self, address: str) -> None:
        self.page.goto(address)
        self.page.wait_for_selector("body[data-ready=yes]", timeout=120_000)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # as root in a container Chromium has no sandbox
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "mine", epoch_records(approx_kl=0.5))
    write_samples(folder)
    return page.write([folder], folder / "report.html")


def test_the_page_on_a_phone(browser, report):
    tab = Tab(browser, 390)
    tab.open(report.as_uri())
    shown = tab.page
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    # of every element with a text of its own, plotly's labels among them
    sizes = shown.evaluate(
        """() => [...document.querySelectorAll("body *")]
            .filter((one) => !["SCRIPT", "STYLE", "NOSCRIPT"].includes(one.tagName) && one.getClientRects().length)
            .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
            .map((one) => [parseFloat(getComputedStyle(one).fontSize), one.textContent.slice(0, 40)])"""
    )
    assert len(sizes) > 200
    assert min(sizes)[0] >= SMALLEST_TEXT, min(sizes)
    # charts are drawn, each as wide as its card
    widths = shown.evaluate(
        """() => [...document.querySelectorAll(".plot")].map((plot) => {
            const drawn = plot.querySelector(".main-svg");
            const [inner, outer] = [drawn, plot].map((one) => one.getBoundingClientRect().width);
            return [inner, outer, plot.getAttribute("aria-label")];
        })"""
    )
    assert len(widths) >= 12
    assert all(300 < drawn <= width and label for drawn, width, label in widths)
    assert shown.evaluate("[...document.images].every((one) => one.alt && one.naturalWidth > 0)")

    # the slider: the last epoch at first, and the first after the key Home
    slider, said = shown.locator(".viewer input"), shown.locator(".viewer output")
    after = shown.locator(".viewer .pair > div:last-child img").first
    score = shown.locator(".viewer .score").first
    assert said.text_content() == "after epoch 9"
    assert score.text_content() == "reward 0 → 0.9"
    last = after.get_attribute("src")
    slider.press("ArrowLeft")
    assert said.text_content() == "after epoch 3"
    assert score.text_content() == "reward 0 → 0.3"
    assert after.get_attribute("src") != last
    slider.press("Home")
    assert said.text_content() == "before training"
    # prompts are shown as they are
    assert shown.locator(".viewer .prompt").all_text_contents() == list(ODD_PROMPTS)

    # the axis
    title = shown.locator(".plot").first.locator(".xtitle")
    assert title.text_content() == "epoch"
    shown.select_option("#axis", "images")
    shown.locator(".plot").first.locator(".xtitle", has_text="images").wait_for()
    assert tab.errors == []
    assert [address for address in tab.loaded if not address.startswith(("data:", "blob:"))] == [report.as_uri()]
    shown.close()


def test_a_live_page_follows_its_run(browser, tmp_path):
    folder = write_run(tmp_path / "run", epoch_records(3))
    server = serve.Watch([folder])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    tab = Tab(browser, 1200)
    try:
        tab.open(server.address)
        assert "the 3 epochs so far" in tab.page.locator(".lead").first.text_content()
        buttons = tab.page.eval_on_selector_all(".modebar-btn", "all => all.map((one) => one.dataset.title)")
        assert "Download plot as a PNG" in buttons
        assert not any("share" in title.lower() or "cloud" in title.lower() for title in buttons)
        tab.page.select_option("#axis", "minutes")
        write_run(folder, epoch_records(5))
        tab.page.locator(".lead", has_text="the 5 epochs so far").wait_for(timeout=60_000)
        tab.page.wait_for_selector("body[data-ready=yes]", timeout=120_000)
        # what the reader chose is as before
        assert tab.page.input_value("#axis") == "minutes"
        assert tab.errors == []
        assert all(address.startswith((server.address, "data:")) for address in tab.loaded)
    finally:
        tab.page.close()
        server.shutdown()
        server.server_close()
        thread.join()
