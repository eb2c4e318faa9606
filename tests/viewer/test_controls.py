"""The page of a run that records everything: answers, shares of rewards, pictures, settings, values, credit."""

import json

import pytest
from PIL import Image

from sapo_trl.viewer import read_recording, write_page
from tests.viewer.browser import (
    ActionChains,
    By,
    Keys,
    Select,
    background,
    colour_by,
    needs_browser,
    open_page,
    panels,
    press,
    rgb,
    start_browser,
    tip,
    tokens,
    wait,
)
from tests.viewer.recorded_runs import SETTINGS, recorded_response, write_log, write_rollout


pytestmark = needs_browser

# Three segments of two tokens; the middle one is the worst, the last one the best.
CREDIT = {
    "segment_ids": [0, 0, 1, 1, 2, 2],
    "values": [0.5, 0.25, 0.75, 0.125, 0.0, 0.375],
    "value_states": [1, 0, 1, 0, 1, 0],
    "td_errors": [0.25, 0.25, -0.75, -0.75, 1.0, 1.0],
    "raw_advantages": [0.5, 0.5, -1.0, -1.0, 1.5, 1.5],
    # The clamp has made the first and the last equal.
    "advantages": [2.0, 2.0, -2.0, -2.0, 2.0, 2.0],
    "token_rewards": [0.0, 0.0, -0.25, 0.0, 0.0, 1.0],
}
WORDS = ["One", " two", " three", " four", " five", "\n"]
VERDICT = {
    "answer": "<b>42</b>",
    "reward_names": ["accuracy_reward", "format_reward", "judge"],
    "reward_weights": [0.5, 0.25, 2.0],
    "reward_values": [1.0, 0.5, None],
}
MARKS = "<|im_start|>user\n<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    segments = folder / "run" / "segments"
    (segments / "images").mkdir(parents=True)
    for name, colour in (("original", "white"), ("corrupted", "black")):
        Image.new("RGB", (56, 28), colour).save(segments / "images" / f"{name}.png")
    pictures = {"images": ["original.png"], "corrupted_images": ["corrupted.png"]}
    known = recorded_response(
        WORDS, prompt=f"{MARKS}What is the length of AB?", reward=0.625, **CREDIT, **VERDICT, **pictures
    )
    equal = {**CREDIT, "raw_advantages": [0.5] * 6, "advantages": [0.5, 0.0, 0.5, 0.5, 0.0, 0.0]}
    equal["policy_mask"] = [1, 0, 1, 1, 0, 0]
    long = "supercalifragilistic " * 6
    others = [
        recorded_response(WORDS, prompt=f"{MARKS}What is the length of ACE?", **equal),
        recorded_response(WORDS, prompt=f"{MARKS}What is the area of {long}", **CREDIT),
        recorded_response([], prompt=f"{MARKS}What is the area of {long}", **{name: [] for name in CREDIT}),
    ]
    write_rollout(segments, [known, *others])
    (segments / "run.json").write_text(json.dumps({**SETTINGS, "preset": "vppo", "whiten_advantages": True}))
    write_log(
        folder / "run", [{"step": step, "approx_kl": 0.1, "epoch": step / 4, "entropy": 1 / step} for step in (1, 2)]
    )
    write_page([read_recording(folder / "run")], folder / "page.html")
    browser = start_browser()
    open_page(browser, folder / "page.html")
    yield browser
    errors = [entry["message"] for entry in browser.get_log("browser")]
    browser.quit()
    assert errors == []


@pytest.fixture
def page(opened):
    opened.find_element(By.ID, "list").send_keys(Keys.HOME)
    colour_by(opened, "segment")
    return opened


def table(place) -> list[list[str]]:
    rows = place.find_elements(By.TAG_NAME, "tr")
    return [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]


def focused(browser) -> str:
    return browser.switch_to.active_element.get_attribute("data-place")


def status(browser) -> str:
    return panels(browser)[0].find_element(By.CSS_SELECTOR, ".status").text


def trace(browser, name):
    return browser.execute_script(
        "const found = document.querySelector('.curve').data.find((each) => each.name === arguments[0]);"
        "return found ? [found.x, found.y] : null",
        name,
    )


def test_the_corrupted_picture_is_beside_the_original(page):
    figures = panels(page)[0].find_elements(By.CSS_SELECTOR, ".prompt figure")
    captions = [figure.find_element(By.TAG_NAME, "figcaption").text for figure in figures]
    assert captions == ["as it is", "corrupted: 0.5 of its visual tokens are hidden"]
    # The pixels that the browser has decoded.
    colours = page.execute_script("""
        return [...document.querySelectorAll(".prompt img")].map((image) => {
          const canvas = Object.assign(document.createElement("canvas"), { width: 56, height: 28 });
          canvas.getContext("2d").drawImage(image, 0, 0);
          return canvas.getContext("2d").getImageData(20, 10, 1, 1).data[0];
        });
    """)
    assert colours == [255, 0]
    tops = [figure.find_element(By.TAG_NAME, "img").rect["y"] for figure in figures]
    assert tops[0] == tops[1]


def test_the_right_answer_and_the_share_of_each_reward_function(page):
    verdict = panels(page)[0].find_element(By.CSS_SELECTOR, ".verdict")
    assert verdict.find_element(By.TAG_NAME, "b").text == "<b>42</b>"  # as text
    assert table(verdict) == [
        ["reward function", "value", "weight", "share"],
        ["accuracy_reward", "1", "0.5", "0.5"],
        ["format_reward", "0.5", "0.25", "0.125"],
        ["judge", "none", "2", "–"],
        ["reward", "", "", "0.625"],
    ]


def test_algorithm_and_settings(page):
    assert page.find_element(By.ID, "setup-names").text == "nearest to vppo"
    page.find_element(By.CSS_SELECTOR, "#setup summary").click()
    setups = page.find_element(By.ID, "setups")
    assert "Nearest to vppo: masks by sight" in setups.text
    assert table(setups) == [["critic", "ladder"], ["learning_rate", "0.0001"], ["seed", "3"]]
    page.find_element(By.CSS_SELECTOR, "#setup summary").click()
    assert not setups.is_displayed()


def test_the_used_values_are_marked(page):
    assert trace(page, "used for advantages") == [[0, 2, 4], [0.5, 0.75, 0.0]]
    colour_by(page, "values")
    lines = [token.value_of_css_property("box-shadow") != "none" for token in tokens(page)]
    assert lines == [True, False] * 3
    assert "advantages use this value" in page.find_element(By.ID, "legend").text
    for place, name in ((0, "value, used for advantages"), (1, "value")):
        ActionChains(page).move_to_element(tokens(page)[place]).perform()
        assert name in tip(page)


def test_td_errors_and_both_advantages_are_labelled(page):
    ActionChains(page).move_to_element(tokens(page)[3]).perform()
    shown = tip(page)
    assert (shown["segment’s TD error δ"], shown["advantage, raw"], shown["advantage, whitened"]) == (
        "−0.75",
        "−1",
        "−2",
    )
    press(page, "9")
    chosen = page.find_element(By.CSS_SELECTOR, "#colours [aria-pressed=true]")
    assert chosen.get_attribute("data-mode") == "td_errors"
    assert background(tokens(page)[4]) == rgb("#0b559f")  # the largest


def test_a_reward_has_a_colour_where_it_falls_due(page):
    press(page, "0")
    neutral = background(tokens(page)[0])
    assert [background(token) != neutral for token in tokens(page)] == [False, False, True, False, False, True]


def test_segments_one_by_one(page):
    box = panels(page)[0].find_element(By.CSS_SELECTOR, ".one-by-one")
    assert table(box) == [
        ["segment", "text", "value", "reward", "TD error δ", "advantage, raw", "advantage, whitened"],
        ["1", "One two", "0.5", "0", "0.25", "0.5", "2"],
        ["2", "three four", "0.75", "−0.25", "−0.75", "−1", "−2"],
        ["3", "five↵", "0", "1", "1", "1.5", "2"],
    ]
    box.find_elements(By.TAG_NAME, "button")[1].click()
    assert focused(page) == "2"
    press(page, "j")  # only some tokens are learned from
    box = panels(page)[0].find_element(By.CSS_SELECTOR, ".one-by-one")
    assert [row[-1] for row in table(box)[1:]] == ["0.5", "0.5", "–"]


def test_keys_to_the_best_and_the_worst_segment(page):
    press(page, "b")
    # By the raw advantage: the clamp has made the first segment's equal to the last one's.
    assert focused(page) == "4" and status(page) == "Best segment: 3 of 3, advantage, raw 1.5."
    press(page, "w")
    assert focused(page) == "2" and status(page) == "Worst segment: 2 of 3, advantage, raw −1."
    panels(page)[0].find_element(By.XPATH, ".//button[starts-with(., 'Best segment')]").click()
    assert focused(page) == "4"
    press(page, "j")  # the same advantage everywhere
    press(page, "b")
    assert status(page) == "All 3 segments have the same advantage, 0.5."
    press(page, "j")
    press(page, "j")  # a response without tokens
    press(page, "w")
    assert status(page) == "No advantages were recorded for this response."


def test_the_help_lists_the_new_keys(page):
    press(page, "?")
    keys = page.find_element(By.CSS_SELECTOR, "#help dl").text
    assert "to the best, to the worst segment" in keys and "TD error, reward" in keys
    ActionChains(page).send_keys(Keys.ESCAPE).perform()


def test_prompts_in_the_filter_are_whole_words(page):
    names = [option.text for option in Select(page.find_element(By.ID, "filter-prompt")).options]
    # Without the marks of the template, and from the word on in which they differ.
    assert names == [
        "any of 3",
        "1: length of AB?",
        "2: length of ACE?",
        "3: area of supercalifragilistic supercalifragilistic supercalifragilistic…",
    ]


def test_a_metric_that_was_not_logged_has_no_chart(page):
    selects = page.find_elements(By.CSS_SELECTOR, ".charts select")
    assert [select.get_attribute("value") for select in selects] == ["entropy"]


def test_what_an_old_recording_lacks_is_said(tmp_path):
    """The page of an earlier version's recording, of one log entry, and of sampled values."""
    old = recorded_response(["a", "b"], segment_ids=[0, 1], advantages=[-0.5, 0.25])
    write_rollout(tmp_path / "old", [old])
    write_log(
        tmp_path / "old", [{"step": 5, "approx_kl": 0.5, "epoch": 1.0}, {"step": 5, "epoch": 1.0, "train_loss": 2.0}]
    )
    values = {"values": [0.5, 0.0, 0.75, 0.0, 0.25, 0.0], "value_states": CREDIT["value_states"]}
    write_rollout(tmp_path / "sampled", [recorded_response(WORDS, **{**CREDIT, **values})])
    (tmp_path / "sampled" / "run.json").write_text(
        json.dumps({**SETTINGS, "critic": "monte_carlo", "differences": {}})
    )
    for name in ("old", "sampled"):
        write_page([read_recording(tmp_path / name)], tmp_path / f"{name}.html")
    browser = start_browser()
    try:
        open_page(browser, tmp_path / "old.html")
        assert browser.find_element(By.ID, "setup-names").text == "not recorded"
        verdict = panels(browser)[0].find_element(By.CSS_SELECTOR, ".verdict").text
        assert verdict.split("\n") == ["Right answer not recorded", "Reward functions not recorded"]
        assert trace(browser, "value") is not None and trace(browser, "used for advantages") is None
        assert "not recorded" in panels(browser)[0].find_element(By.CSS_SELECTOR, ".one-by-one").text
        press(browser, "b")
        assert status(browser) == "Best segment: 2 of 2, advantage in the loss 0.25."
        # No chart of one point; the numbers instead, without `epoch`.
        curves = browser.find_element(By.ID, "curves")
        assert curves.find_elements(By.CSS_SELECTOR, ".chart, select") == []
        assert table(curves) == [["approx_kl", "0.5"], ["train_loss", "2"]]
        assert "only one step (5)" in curves.text and "--logging_steps 1" in curves.text
        open_page(browser, tmp_path / "sampled.html")
        # A line through zeros that are no values would be wrong.
        assert trace(browser, "value") == [[0, 2, 4], [0.5, 0.75, 0.25]]
        assert browser.find_element(By.ID, "setup-names").text == SETTINGS["preset"]
        wait(browser, lambda: browser.get_log("browser") == [])
    finally:
        browser.quit()
