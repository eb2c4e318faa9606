"""The page of `sapo-trl view` in headless Chromium. Each test finds the page as if it had just been opened."""

import json
import math

import pytest
from matplotlib import colormaps
from matplotlib.colors import to_hex, to_rgb

from sapo_trl.viewer import read_recording, write_page
from sapo_trl.viewer.page import colour_scales
from tests.viewer.browser import (
    ActionChains,
    By,
    Keys,
    Select,
    background,
    colour_by,
    count,
    needs_browser,
    open_page,
    panels,
    press,
    rgb,
    search,
    start_browser,
    theme,
    tip,
    tokens,
    wait,
)
from tests.viewer.recorded_runs import recorded_response, write_large_run, write_log, write_rollout


pytestmark = needs_browser

HOSTILE = ["<script>window.ran = 1</script>", "<img src=x onerror='window.ran = 1'>", "</script>", "<!--", "&lt;b&gt;"]
# Entropies are 0 or 2 and advantages -1, 0 or 1, so that colours are the ends and the middle of their scales.
KNOWN = recorded_response(
    ["Step 1: ", "a\n", "sum", "<|im_end|>"],
    reward=0.0,
    segment_ids=[0, 0, 0, 1],
    entropies=[0.0, 0.0, 2.0, 2.0],
    logps=[0.0, math.log(0.5), -1.0, -2.0],
    values=[0.25, 0.5, 0.0, 1.0],
    advantages=[-1.0, -1.0, 1.0, 0.0],
    returns=[0.125, 0.125, 1.0, 0.5],
    visual_dependency=[0.0, 0.0, 2.0, 2.0],
    policy_mask=[1, 0, 0, 1],
    masked_tokens=["tool says 3"],
    masked_positions=[2],
)
SIMPLE = {"entropies": [0.0, 2.0], "advantages": [1.0, -1.0], "values": [0.0, 1.0], "segment_ids": [0, 1]}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A page of two runs, of which `one` has the known response, one of hostile text, and 60 others."""
    folder = tmp_path_factory.mktemp("viewer")
    hostile = recorded_response(
        HOSTILE,
        prompt="<img src=x onerror='window.ran = 1'>Which?",
        **{**dict.fromkeys(("entropies", "advantages", "values"), [0.0] * 5), "segment_ids": [0] * 5, "reward": 0.5},
    )
    others = [recorded_response([f"answer {i}", " end"], prompt=f"Question {i}", **SIMPLE) for i in range(60)]
    segments = folder / "one" / "segments"
    segments.mkdir(parents=True)
    lines = [json.dumps(row) for row in (KNOWN, hostile, *others)]
    (segments / "segments_000000_000.json").write_text("\n".join(lines) + "\n")
    ratios = {"response": 0, "log_ratios": [math.log(1.25), -math.log(1.25), 0.0, math.log(2)]}
    (segments / "ratios_000000_000.json").write_text(json.dumps(ratios) + "\n")
    write_rollout(folder / "two" / "segments", [{**KNOWN, "reward": 1.0}, recorded_response(["z", "y"], **SIMPLE)], 4)
    for name in ("one", "two"):
        bad = "<img src=x onerror='window.ran = 1'>"
        write_log(folder / name, [{"step": step, "reward": step / 10, bad: step / 5} for step in range(5)])
    runs = [read_recording(folder / "one", "<b>one</b>"), read_recording(folder / "two")]
    write_page(runs, folder / "page.html")
    browser = start_browser()
    browser.execute_cdp_cmd("Network.enable", {})
    open_page(browser, folder / "page.html")
    yield browser
    errors = [entry["message"] for entry in browser.get_log("browser")]
    browser.quit()
    assert errors == []  # none at any time


@pytest.fixture
def page(opened):
    theme(opened, "light")
    if len(panels(opened)) > 1:
        press(opened, "c")
    opened.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    wait(opened, lambda: count(opened).startswith("64 "))
    opened.find_element(By.ID, "list").send_keys(Keys.HOME)
    colour_by(opened, "segment")
    return opened


class TestOpening:
    def test_no_requests_but_the_file(self, opened):
        messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert sent[0].startswith("file://") and sent[0].endswith("/page.html")
        assert {url.partition(":")[0] for url in sent[1:]} <= {"data", "blob"}

    def test_what_is_there(self, page):
        assert count(page) == "64 responses"
        assert page.find_element(By.ID, "summary").text.startswith("64 responses · ")
        assert [run.text for run in page.find_elements(By.CSS_SELECTOR, "h1 .run")] == ["<b>one</b>", "two"]
        assert "<b>one</b> · step 0 · reward 0" in panels(page)[0].text
        # Both runs' curves in the chart. Metrics that were not logged have none.
        charts = page.find_elements(By.CSS_SELECTOR, ".chart")
        assert [len(chart.find_elements(By.CSS_SELECTOR, ".scatterlayer .trace")) for chart in charts] == [2]
        (select,) = page.find_elements(By.CSS_SELECTOR, ".charts select")
        assert select.get_attribute("value") == "reward" and len(Select(select).options) == 2

    def test_rows_of_the_list_have_one_line_of_facts_however_long(self, page):
        heights = page.execute_script("""
            const facts = [...document.querySelectorAll("#list .row .facts")];
            facts[0].querySelector("b").textContent = "reward -0.0123456789 and more";
            return facts.map(line => line.offsetHeight / parseFloat(getComputedStyle(line).fontSize));
        """)
        assert len(heights) > 5 and max(heights) < 2

    def test_hostile_text_is_shown_and_not_run(self, page):
        search(page, "onerror")
        wait(page, lambda: count(page) == "1 of 64 responses")
        shown = [token.get_attribute("textContent") for token in tokens(page)]
        assert shown == HOSTILE
        assert "<img src=x onerror='window.ran = 1'>Which?" in panels(page)[0].text
        tokens(page)[0].click()
        assert page.find_element(By.CSS_SELECTOR, "#tip .what").text == HOSTILE[0]
        assert page.execute_script("return window.ran") is None
        assert page.find_elements(By.CSS_SELECTOR, "img[src=x], #panels script") == []


class TestFilters:
    def test_text_of_responses_and_prompts(self, page):
        search(page, "ANSWER 7")
        wait(page, lambda: count(page) == "1 of 64 responses")
        assert "answer 7" in panels(page)[0].text
        search(page, Keys.CONTROL + "a")
        search(page, "question 1")  # and 10 to 19
        wait(page, lambda: count(page) == "11 of 64 responses")

    def test_step_run_and_prompt(self, page):
        Select(page.find_element(By.ID, "filter-step-from")).select_by_value("4")
        wait(page, lambda: count(page) == "2 of 64 responses")
        Select(page.find_element(By.ID, "filter-run")).select_by_visible_text("<b>one</b>")
        wait(page, lambda: count(page) == "0 of 64 responses")
        Select(page.find_element(By.ID, "filter-step-from")).select_by_value("")
        wait(page, lambda: count(page) == "62 of 64 responses")
        Select(page.find_element(By.ID, "filter-prompt")).select_by_index(1)
        wait(page, lambda: count(page) == "1 of 64 responses")

    def test_reward_and_order(self, page):
        page.find_element(By.ID, "filter-reward-from").send_keys("0")
        page.find_element(By.ID, "filter-reward-to").send_keys("0.5")
        wait(page, lambda: count(page) == "2 of 64 responses")
        Select(page.find_element(By.ID, "order")).select_by_value("high")
        first = (By.CSS_SELECTOR, "#list .row b")
        wait(page, lambda: [row.text for row in page.find_elements(*first)] == ["reward 0.5", "reward 0"])


class TestColours:
    def test_segments(self, page):
        known = tokens(page)
        classes = [set(token.get_attribute("class").split()) for token in known]
        assert classes == [
            {"token", "odd"},
            {"token", "odd"},
            {"token", "masked"},
            {"token", "odd", "cut"},
            {"token", "even", "cut", "special"},
        ]
        # The mark, not the tint alone.
        assert [token.value_of_css_property("border-right-width") for token in known] == ["0px"] * 3 + ["2px"] * 2

    @pytest.mark.parametrize(("name", "colormap"), [("light", "YlGnBu"), ("dark", "viridis")])
    def test_sequential(self, page, name, colormap):
        theme(page, name)
        colour_by(page, "entropies")
        low, high = (rgb(to_hex(colormaps[colormap](end))) for end in (0.0, 1.0))
        known = tokens(page)
        assert [background(known[place]) for place in (0, 1, 3, 4)] == [low, low, high, high]
        assert background(known[2]) not in (low, high)  # a tool's token has no entropy

    @pytest.mark.parametrize(("mode", "places"), [("visual_dependency", (3, 4)), ("policy_mask", (0, 4))])
    def test_sight_and_mask(self, page, mode, places):
        colour_by(page, mode)
        low, high = (rgb(to_hex(colormaps["YlGnBu"](end))) for end in (0.0, 1.0))
        known = tokens(page)
        assert [place for place in (0, 1, 3, 4) if background(known[place]) == high] == list(places)
        assert all(background(known[place]) in (low, high) for place in (0, 1, 3, 4))

    def test_diverging_and_its_signs(self, page):
        colour_by(page, "advantages")
        known = tokens(page)
        assert [background(known[place]) for place in (0, 3)] == [rgb("#b34700"), rgb("#0b559f")]
        lines = [known[place].value_of_css_property("text-decoration-style") for place in (0, 3)]
        assert lines == ["dotted", "solid"]
        assert known[4].value_of_css_property("text-decoration-line") == "none"

    def test_by_keys(self, page):
        for key, mode in zip(
            "12345678",
            (
                "segment",
                "entropies",
                "logps",
                "values",
                "advantages",
                "log_ratios",
                "visual_dependency",
                "policy_mask",
            ),
            strict=True,
        ):
            press(page, key)
            chosen = page.find_elements(By.CSS_SELECTOR, "#colours [aria-pressed=true]")
            assert [button.get_attribute("data-mode") for button in chosen] == [mode]

    def test_text_is_readable_on_every_colour(self):
        def luminance(colour):
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
            return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

        for scales in colour_scales().values():
            for colours in scales.values():
                for colour in colours:
                    on_white, on_black = 1.05 / (luminance(colour) + 0.05), (luminance(colour) + 0.05) / 0.05
                    assert max(on_white, on_black) >= 4.5  # WCAG AA


class TestTokens:
    def test_hover_shows_the_numbers(self, page):
        ActionChains(page).move_to_element(tokens(page)[1]).perform()
        assert tip(page) == {
            "token": "2 of 5",
            "segment": "1 of 2",
            "entropy": "0",
            "probability": "0.5",
            "value": "0.5",
            "advantage in the loss": "−1",
            "return": "0.125",
            "dependence on the images": "0",
            "learned from": "0",
            "ratio": "0.8",
            "segment’s ratio (geometric mean)": "1",
        }
        assert page.find_element(By.CSS_SELECTOR, "#tip .what").text == "a\\n"

    def test_keys_reach_every_token(self, page):
        page.find_element(By.ID, "list").send_keys(Keys.ENTER)
        assert tip(page)["token"] == "1 of 5"
        focused = lambda: page.switch_to.active_element  # noqa: E731
        focused().send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        assert tip(page)["kind"] == "not the policy's, or not trained on"
        assert focused().text == "tool says 3"
        focused().send_keys(Keys.ARROW_RIGHT)
        assert "entropy 2" in focused().get_attribute("aria-label")  # what a screen reader says
        focused().send_keys(Keys.ARROW_DOWN)
        assert tip(page)["segment"] == "2 of 2" and tip(page)["ratio"] == "2"
        focused().send_keys(Keys.HOME)
        assert tip(page)["token"] == "1 of 5"

    def test_line_breaks_and_blanks_are_kept(self, page):
        token = tokens(page)[1]
        assert token.get_attribute("textContent") == "a↵\n"
        assert token.value_of_css_property("white-space-collapse") == "preserve"

    def test_value_curve(self, page):
        x, y = page.execute_script(
            "const trace = document.querySelector('.curve').data.find((each) => each.name === 'value');"
            "return [trace.x, trace.y]"
        )
        assert x == [0, 1, 2, 3, 4] and y == [0.25, 0.5, None, 0.0, 1.0]

    def test_other_cuts(self, page):
        cards = {
            card.find_element(By.CSS_SELECTOR, "h3 span").text: [
                span.get_attribute("textContent").replace("↵", "")
                for span in card.find_elements(By.CSS_SELECTOR, ".text > .token")
            ]
            for card in page.find_elements(By.CSS_SELECTOR, ".cuts section")
        }
        assert cards["recorded"] == ["Step 1: a\n", "tool says 3", "sum", "<|im_end|>"]
        assert cards["lines"] == ["Step 1: a\n", "tool says 3", "sum<|im_end|>"]
        assert cards["steps"] == ["Step 1: a\n", "tool says 3", "sum<|im_end|>"]
        assert len(cards) == 8


class TestList:
    def test_keys_move_and_few_rows_exist(self, page):
        box = page.find_element(By.ID, "list")
        box.send_keys(Keys.ARROW_DOWN)
        selected = page.find_element(By.CSS_SELECTOR, "#list .row[aria-selected=true]")
        assert selected.get_attribute("aria-posinset") == "2" and selected.get_attribute("aria-setsize") == "64"
        assert box.get_attribute("aria-activedescendant") == selected.get_attribute("id")
        box.send_keys(Keys.END)
        wait(page, lambda: "two · step 4" in panels(page)[0].text)
        wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "#list .row[aria-posinset='64']"))
        assert len(page.find_elements(By.CSS_SELECTOR, "#list .row")) < 40
        press(page, "k")
        assert "63" == page.find_element(By.CSS_SELECTOR, "#list .row[aria-selected=true]").get_attribute(
            "aria-posinset"
        )


class TestCompare:
    def test_same_prompt_of_the_other_run(self, page):
        press(page, "c")
        assert len(panels(page)) == 2
        assert "<b>one</b> · step 0 · reward 0" in panels(page)[0].text
        assert "two · step 4 · reward 1" in panels(page)[1].text
        colour_by(page, "entropies")
        assert [background(tokens(page, side)[3]) for side in (0, 1)] == [rgb(to_hex(colormaps["YlGnBu"](1.0)))] * 2
        # From here the list chooses the right one, and each side has its own choice of the prompt's responses.
        page.find_element(By.ID, "list").send_keys(Keys.HOME, Keys.ARROW_DOWN)
        assert "reward 0.5" in panels(page)[1].text and "reward 0\n" in panels(page)[0].text
        choice = Select(panels(page)[0].find_element(By.TAG_NAME, "select"))
        choice.select_by_index(1)
        assert "two · step 4 · reward 1" in panels(page)[0].text
        press(page, "c")
        assert len(panels(page)) == 1


class TestAccess:
    def test_every_control_has_a_name_and_a_place_in_the_order(self, page):
        controls = page.find_elements(By.CSS_SELECTOR, "button, select, input, summary, [role=listbox]")
        assert len(controls) > 15
        for control in controls:
            if control.is_displayed():
                assert control.accessible_name.strip(), control.get_attribute("outerHTML")
        assert page.find_elements(By.CSS_SELECTOR, "[tabindex]:not([tabindex='0']):not([tabindex='-1'])") == []

    def test_help_opens_and_closes_by_keys(self, page):
        press(page, "?")
        assert page.find_element(By.ID, "help").is_displayed()
        ActionChains(page).send_keys(Keys.ESCAPE).perform()
        assert not page.find_element(By.ID, "help").is_displayed()


@pytest.mark.slow
def test_five_thousand_responses(tmp_path, record_property):
    write_large_run(tmp_path / "run")
    written = write_page([read_recording(tmp_path / "run")], tmp_path / "page.html")
    assert written["responses"] == 5000 and written["notes"] == []
    assert written["bytes"] < 30e6
    browser = start_browser()
    try:
        # Of its own processor time: on a shared machine the clock measures the others.
        browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        open_page(browser, tmp_path / "page.html")
        metrics = {m["name"]: m["value"] for m in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
        clock = float(browser.execute_script("return document.documentElement.dataset.ready")) / 1000
        record_property("seconds", {"clock": clock, "main_thread": metrics["ThreadTime"]})
        assert metrics["ThreadTime"] < 3.0, (
            f"{metrics['ThreadTime']:.1f} s of processor time, {clock:.1f} s by the clock"
        )
        search(browser, "word19")
        wait(browser, lambda: " of 5,000 responses" in count(browser))
        assert len(browser.find_elements(By.CSS_SELECTOR, "#list .row")) < 40
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
