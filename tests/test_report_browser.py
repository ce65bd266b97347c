"""The report in a real browser: it draws, says nothing to the console, and fits the screen, light and dark."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.made_up import made_up, names
from tests.support.pages import FIGURES, HOSTILE, STEPS, page_of


@pytest.fixture(scope="module")
def text() -> str:
    return page_of(made_up([*names(2), HOSTILE], STEPS))[0]


def browser() -> Any:
    """Headless Chromium; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    return webdriver, options, Service(driver)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver, options, service = browser()
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def open_page(chromium: Any, path: Path, theme: str, width: int) -> float:
    """Open a page as a device of that width in that theme would; the seconds until all is drawn."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chromium.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    begun = time.monotonic()
    chromium.get(path.as_uri())
    wait_drawn(chromium)
    return time.monotonic() - begun


def wait_drawn(chromium: Any) -> None:
    end = time.monotonic() + 600
    while not chromium.execute_script("return document.documentElement.dataset.drawn"):
        assert time.monotonic() < end, chromium.get_log("browser")
        time.sleep(0.05)


def background(chromium: Any) -> str:
    return str(chromium.execute_script("return getComputedStyle(document.body).backgroundColor"))


LOOK = """
return [...document.querySelectorAll(".chart")].map((place) => {
  const svg = place.querySelector("svg, canvas");
  const box = svg ? svg.getBoundingClientRect() : {width: 0, height: 0};
  const marks = svg ? svg.querySelectorAll(".mark-symbol path, .mark-rect path, .mark-line path").length : 0;
  const label = place.getAttribute("aria-label") || svg?.getAttribute("aria-label");
  return [place.id, box.width, box.height, place.clientWidth, marks, label];
});
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 360])
def test_page_in_a_browser(chromium: Any, text: str, tmp_path: Path, width: int) -> None:
    path = tmp_path / "run.html"
    path.write_text(text, encoding="utf-8")
    seen = {}
    for theme in ("light", "dark"):
        open_page(chromium, path, theme, width)
        log = [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        assert not log
        found = chromium.execute_script(LOOK)
        assert [name for name, *_ in found] == list(FIGURES)
        for name, wide, high, room, marks, label in found:
            assert 100 < wide <= room + 1 and high > 60 and marks > 0, name
            assert label, f"{name}: nothing for those who cannot see it"
        assert chromium.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert chromium.title != "taken"
        requests = chromium.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert requests == []
        seen[theme] = background(chromium)
    assert seen["light"] != seen["dark"]


@pytest.mark.browser
def test_figures_follow_theme_and_width_and_the_reader_s_choices(chromium: Any, text: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    path = tmp_path / "run.html"
    path.write_text(text, encoding="utf-8")
    open_page(chromium, path, "light", 1280)

    def card() -> str:
        return str(chromium.execute_script("return document.querySelector('#skill svg').style.backgroundColor"))

    def wait_for(what: str) -> None:
        end = time.monotonic() + 600
        while not chromium.execute_script(f"return {what}"):
            assert time.monotonic() < end, what
            time.sleep(0.05)

    select = Select(chromium.find_element(By.CSS_SELECTOR, "#coefficients select"))
    before = chromium.execute_script("return document.querySelectorAll('#coefficients .mark-symbol path').length")
    select.select_by_visible_text("q alone")
    wait_for(f"document.querySelectorAll('#coefficients .mark-symbol path').length != {before}")
    light = card()
    chromium.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    wait_for(f"[...document.querySelectorAll('#parts svg')].some((card) => card.style.backgroundColor != '{light}')")
    wait_for("document.querySelector('#coefficients select')?.selectedOptions[0].textContent == 'q alone'")
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    wait_for("document.querySelector('#parts svg')?.getBoundingClientRect().width < 400")
    assert not [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.browser
def test_the_table_is_sorted_by_its_heads(chromium: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    path.write_text(text, encoding="utf-8")
    open_page(chromium, path, "light", 1280)
    chromium.execute_script(
        "document.querySelector('details').open = true; document.querySelectorAll('th button')[3].click()"
    )
    shares = chromium.execute_script(
        "return [...document.querySelectorAll('tbody tr')].map((row) => row.cells[3].dataset.value)"
    )
    numbers = list(map(float, shares))
    assert numbers == sorted(numbers, reverse=True) and len(set(numbers)) > 10


@pytest.mark.slow
@pytest.mark.browser
def test_a_large_run_stays_light(chromium: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = made_up(names(36), tuple(range(1, 501)))
    begun = time.monotonic()
    text, _ = page_of(large)
    made = time.monotonic() - begun
    path = tmp_path / "large.html"
    path.write_text(text, encoding="utf-8")
    drawn = {width: open_page(chromium, path, "light", width) for width in (1280, 360)}
    with capsys.disabled():
        print(
            f"\n{len(large.findings.tensors)} tensors, 500 steps: {path.stat().st_size / 1e6:.2f} MB, made in {made:.1f} s, "
            f"drawn in {drawn[1280]:.1f} s (1280 px) and {drawn[360]:.1f} s (360 px)"
        )
    assert path.stat().st_size < 2_500_000
