"""The dashboard in a real headless Chromium. Skipped where selenium (the `browser` extra) or Chromium is missing.

pip install -c constraints.txt -e '.[dev,browser]'; apt-get install chromium chromium-driver
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_serve.engine.async_engine import EngineState

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (the `browser` extra)")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900"),
)
WIDTHS = (400, 700, 1200, 1600)
NASTY = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
Live = Callable[[Any], AbstractContextManager[str]]


class Page:
    """The dashboard in a browser, and what tests do with it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, width: int = 1280) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )
        self.driver.get(f"{url}/dashboard")
        self.until(lambda: self.text("status") == "live")

    def find(self, element_id: str) -> Any:
        return self.driver.find_element(By.ID, element_id)

    def text(self, element_id: str) -> str:
        text: str = self.find(element_id).text
        return text

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def until(self, condition: Callable[[], object], seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (
                f"it did not happen; page: {self.driver.find_element(By.TAG_NAME, 'body').text}"
            )
            time.sleep(0.05)

    def say(self, message: str) -> None:
        self.find("chat-text").send_keys(message + Keys.ENTER)

    def complaints(self) -> list[str]:
        """What the console holds, CSP violations included."""
        return [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("WARNING", "SEVERE")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any) -> Page:
    driver.get_log("browser")
    return Page(driver)


@pytest.fixture
def big(make: Any) -> Any:
    """An engine that says it has 60 layers of 256 experts."""
    small = make().engine.expert_report()
    rng = np.random.default_rng(0)
    tokens, ready = rng.zipf(1.6, (60, 256)).clip(0, 5000), rng.random((60, 256)) < 0.4
    residency = replace(small.residency, ready=ready, unused=ready & (rng.random(ready.shape) < 0.1))
    counts = {name: np.resize(values, 60) for name, values in small.counts.items()}
    report = replace(small, layers=tuple(range(60)), tokens=tokens, counts=counts, residency=residency)
    return make(experts=lambda _: report)


# ---- how it looks ---------------------------------------------------------------------------------

OVERFLOWING = """
const width = document.documentElement.clientWidth;
const inside = (node) => node.closest(".scroll, .hidden, .skip");
return [...document.body.querySelectorAll("*")]
  .filter((node) => !inside(node) && node.getBoundingClientRect().right > width + 1)
  .map((node) => node.tagName + "#" + node.id + "." + node.className);
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_sticks_out(page: Page, live: str, width: int) -> None:
    page.open(live, width)
    assert page.run(OVERFLOWING) == []
    assert page.run("return document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("width", [400, 1600])
def test_nothing_sticks_out_with_a_big_model(page: Page, big: Any, serve: Live, width: int) -> None:
    with serve(big.app) as url:
        page.open(url, width)
        assert "60 layers of 256 experts" in page.text("experts-caption")
        assert page.run(OVERFLOWING) == []
        box = page.run("const b = document.getElementById('map').getBoundingClientRect(); return [b.width, b.height]")
        sides = sorted([256, 60], reverse=box[0] > box[1])
        assert [side > 4 * count for side, count in zip(box, sides, strict=True)] == [True, True], "squares of 4 pixels"


def test_a_big_models_map_is_as_wide_as_a_phone_and_its_arrows_go_where_they_point(
    page: Page, big: Any, serve: Live
) -> None:
    """Layers go across, because 256 experts would not fit."""
    with serve(big.app) as url:
        page.open(url, 400)
        widths = page.run("const s = document.getElementById('map-scroll'); return [s.scrollWidth, s.clientWidth]")
        assert widths[0] == widths[1]
        page.find("map").send_keys(Keys.ARROW_RIGHT)
        assert page.text("cell").startswith("Layer 0, expert 0:")
        page.find("map").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
        assert page.text("cell").startswith("Layer 1, expert 2:")
        page.find("map").send_keys(*[Keys.ARROW_DOWN] * 150)
        assert page.text("cell").startswith("Layer 1, expert 152:")
        box = "document.getElementById('map-scroll')"
        top, most = page.run(f"return [{box}.scrollTop, {box}.scrollHeight - {box}.clientHeight]")
        assert 0 < top < most, "the box follows the marked square"


@pytest.mark.parametrize(("width", "first"), [(400, "chat-title"), (1024, "now-title"), (1600, "now-title")])
def test_the_chat_comes_first_where_it_cannot_be_beside(page: Page, live: str, width: int, first: str) -> None:
    page.open(live, width)
    tops = page.run(
        "return ['findings', 'chat-title', 'tiles', 'experts-title']"
        ".map(id => document.getElementById(id).getBoundingClientRect()).map(b => [b.top, b.left])"
    )
    (findings, _), (chat, chat_left), (tiles, tiles_left), (experts, _) = tops
    assert findings < chat < experts
    assert (chat < tiles) if first == "chat-title" else (chat_left > tiles_left and abs(chat - tiles) < 60)


@pytest.mark.parametrize(("scheme", "colour"), [("light", "rgb(245, 246, 246)"), ("dark", "rgb(17, 21, 24)")])
def test_the_colours_follow_the_system_until_the_button_is_pressed(
    page: Page, live: str, scheme: str, colour: str
) -> None:
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    page.open(live)
    background = "return getComputedStyle(document.body).backgroundColor"
    assert page.run(background) == colour
    page.find("theme").click()
    assert page.run(background) != colour
    page.driver.refresh()
    assert page.run(background) != colour, "the choice is kept"
    page.run("localStorage.clear()")


def test_nothing_moves_for_those_who_asked_for_that(page: Page, live: str) -> None:
    preference = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    page.open(live)
    assert page.run("return getComputedStyle(document.querySelector('.meter i')).transitionDuration") == "0s"
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# ---- what it says ---------------------------------------------------------------------------------


def test_it_talks_to_nobody_else_and_breaks_no_rule(page: Page, live: str) -> None:
    page.driver.get("about:blank")  # the last test's page still asks its own server
    page.driver.get_log("performance")
    page.open(live)
    page.say("Hello")
    page.until(lambda: "tokens; first after" in page.text("chat-note"))
    events = [json.loads(line["message"])["message"] for line in page.driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 10
    assert all(url.startswith(live) for url in asked)
    assert page.complaints() == []


def test_the_numbers_arrive(page: Page, live: str) -> None:
    page.open(live)
    page.say("Hello")
    page.until(lambda: "First token\n100 ms" in page.text("tiles"))
    assert "2 layers of 4 experts" in page.text("experts-caption")
    assert "affinity, this cache\n75.0 %" in page.text("cache").replace("\u00a0", " ")
    rows = [row.text for row in page.driver.find_elements(By.CSS_SELECTOR, "#layers tbody tr")]
    assert len(rows) == 2
    assert rows[1].startswith("3")


def test_the_map_can_be_read_with_the_keyboard_and_as_a_table(page: Page, live: str) -> None:
    page.open(live)
    page.say("Hello")
    page.until(lambda: "tokens; first after" in page.text("chat-note"))
    heat_map = page.find("map")
    heat_map.send_keys(Keys.ARROW_RIGHT)
    assert page.text("cell").startswith("Layer 1, expert 0:")
    heat_map.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert page.text("cell").startswith("Layer 3, expert 3:")
    assert "in memory ahead of time, not used yet" in page.text("cell")
    page.driver.find_element(By.CSS_SELECTOR, "#map-table summary").click()
    page.until(lambda: "(away)" in page.text("map-table"))


def test_every_control_has_a_name(page: Page, live: str) -> None:
    page.open(live)
    page.driver.find_element(By.CSS_SELECTOR, ".settings summary").click()
    controls = page.driver.find_elements(By.CSS_SELECTOR, "button, input, textarea, summary, [tabindex='0']")
    assert len(controls) > 10
    for control in filter(lambda c: c.is_displayed(), controls):
        assert control.accessible_name, control.get_attribute("outerHTML")


def test_an_engine_without_experts_has_no_empty_cards(page: Page, make: Any, serve: Live) -> None:
    with serve(make(experts=lambda _: None).app) as url:
        page.open(url)
        assert not page.find("expert-cards").is_displayed()
        assert page.complaints() == []


def test_a_server_that_has_gone_is_noticed_and_found_again(page: Page, make: Any, serve: Live) -> None:
    with serve(make().app) as url:
        page.open(url)
    page.until(lambda: page.text("status").startswith("no answer; next try in"))
    assert page.find("status").get_attribute("data-kind") == "trouble"


def test_requests_in_flight_are_listed_with_their_stage(page: Page, make: Any, serve: Live) -> None:
    with serve(make(delay_s=0.05).app) as url:
        page.open(url)
        assert page.text("requests-caption") == "No request is in flight."
        page.say("Hello")
        page.until(lambda: "answering" in page.text("requests"))
        assert page.text("requests-caption").startswith("1 in flight")
        page.find("chat-stop").click()
        page.until(lambda: page.text("requests-caption") == "No request is in flight.")


def test_what_is_wrong_stands_first_and_says_what_to_do(page: Page, make: Any, serve: Live) -> None:
    served = make()
    with serve(served.app) as url:
        page.open(url)
        page.until(lambda: page.text("findings").startswith("✓"))
        served.async_engine.state = EngineState.DEAD
        page.until(lambda: "The engine is dead" in page.text("findings"))
        assert page.text("findings").split("\n")[:2] == ["✕", "Problem"]
        assert "Restart" in page.text("findings")


# ---- the chat -------------------------------------------------------------------------------------


def test_an_answer_streams_in(page: Page, live: str, sentence: str) -> None:
    page.open(live)
    page.say("Hello")
    page.until(lambda: "tokens; first after" in page.text("chat-note"))
    mine, answer = page.driver.find_elements(By.CSS_SELECTOR, ".turn .text")
    assert mine.text == "Hello"
    assert sentence[:40] in answer.text
    assert page.find("chat-text").get_attribute("value") == ""


def test_what_the_model_writes_stays_text(page: Page, make: Any, serve: Live) -> None:
    served = make()
    served.engine.ids = served.engine.tokenizer.encode(NASTY)
    with serve(served.app) as url:
        page.open(url)
        page.say("<b>bold?</b>")
        page.until(lambda: "tokens; first after" in page.text("chat-note"))
        mine, answer = page.driver.find_elements(By.CSS_SELECTOR, ".turn .text")
        assert mine.text == "<b>bold?</b>"
        assert NASTY in answer.text
        assert page.run("return document.querySelectorAll('#chat-log :is(img, script, b)').length") == 0
        assert page.driver.title == "moe-serve dashboard"


def test_stop_ends_the_answer_here_and_at_the_server(page: Page, make: Any, serve: Live) -> None:
    served = make(delay_s=0.05)
    with serve(served.app) as url:
        page.open(url)
        page.say("Hello")
        page.until(lambda: "quick" in page.text("chat-log"))
        page.find("chat-stop").click()
        page.until(lambda: page.text("chat-note") == "stopped")
        page.until(lambda: served.engine.aborted)
        assert page.find("chat-send").is_enabled()


def test_a_refusal_is_shown_and_the_question_given_back(page: Page, live: str) -> None:
    page.open(live)
    page.driver.find_element(By.CSS_SELECTOR, ".settings summary").click()
    page.find("max-tokens").clear()
    page.find("max-tokens").send_keys("9999")
    page.say("Hello")
    page.until(lambda: "the prompt is too long" in page.text("chat-error"))
    assert page.find("chat-text").get_attribute("value") == "Hello"
    assert page.driver.find_elements(By.CLASS_NAME, "turn") == []


def test_the_key_goes_into_the_header_and_is_not_kept(page: Page, live: str) -> None:
    page.open(live)
    page.driver.find_element(By.CSS_SELECTOR, ".settings summary").click()
    page.driver.get_log("performance")
    page.find("api-key").send_keys("secret-key")
    page.say("Hello")
    page.until(lambda: "tokens; first after" in page.text("chat-note"))
    events = [json.loads(line["message"])["message"] for line in page.driver.get_log("performance")]
    asked = [e["params"]["request"] for e in events if e["method"] == "Network.requestWillBeSent"]
    chat = next(r for r in asked if r["url"].endswith("/chat/completions"))
    assert chat["headers"]["Authorization"] == "Bearer secret-key"
    stored = page.run("return JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert "secret-key" not in stored
    page.driver.refresh()
    page.until(lambda: page.text("status") == "live")
    assert page.find("api-key").get_attribute("value") == ""
