"""The page of answers, opened in a real browser."""

import base64
import hashlib
import re
import shutil
import time
from html.parser import HTMLParser

import pytest
from PIL import Image

from sapo_trl.evaluation.benchmark import Problem
from sapo_trl.evaluation.page import write_page
from sapo_trl.evaluation.store import GenerationStore


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "</pre></details></article></main><script>document.title = 'owned'</script>",
    '" onfocus="document.title=\'owned\'" autofocus x="',
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; <!-- ]]> \u202e \x00 </textarea></style></title>",
    "<svg/onload=\"document.title='owned'\"> <a href=\"javascript:document.title='owned'\">x</a>",
]


def make_run(folder, texts, n=1, hostile=""):
    """A run with one problem for `n` texts in a row; every second generation is right, every fifth has no answer."""
    store = GenerationStore(folder)
    scores, rows, problems = [], [], []
    for index, text in enumerate(texts):
        row, generation = divmod(index, n)
        key = {"row": row, "id": f"p{row}{hostile}", "generation": generation}
        rows.append({**key, "seed": 1, "text": text, "tokens": 9, "finish_reason": "length"})
        extracted = None if index % 5 == 4 else f"{index}{hostile}"
        correct = float(index % 2 == 0 and extracted is not None)
        fixed = {"rules": correct, "scorer": "rules", "error": hostile or None}
        scores.append(
            {"benchmark": "odd" if row % 2 else "even", **key, "correct": correct, "extracted": extracted, **fixed}
        )
        if generation == 0:
            image = Image.new("RGB", (40, 30), "navy")
            prompt = [{"role": "user", "content": [{"type": "text", "text": f"Question {row}? {hostile}"}]}]
            problems.append(
                Problem(f"p{row}{hostile}", prompt, f"{row}{hostile}", [image], {"topic": hostile or "sums"})
            )
    for parity, name in enumerate(("even", "odd")):
        chosen = [(row, problem) for row, problem in enumerate(problems) if row % 2 == parity]
        store.add(name, chosen, [entry for entry in rows if entry["row"] % 2 == parity])
    entry = {
        "title": f"Title {hostile}",
        "headline": "accuracy",
        "problems": len(problems),
        "belonging": len(problems) + 1,
        "metrics": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}},
        "scorers": {"rules": len(rows)},
    }
    results = {"name": f"model {hostile}", "settings_line": "n 1", "benchmarks": {"even": entry, "odd": entry}}
    return results, store, scores


class Elements(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_hostile_text_adds_no_element(tmp_path):
    """Parsed as HTML, a page with markup in every text has the elements of one without, and all of the text."""
    for name, hostile in (("plain", ""), ("hostile", "".join(HOSTILE).replace("\x00", ""))):
        (tmp_path / name).mkdir()
        results, store, scores = make_run(tmp_path / name, HOSTILE if hostile else ["text"] * len(HOSTILE), 2, hostile)
        write_page(tmp_path / name, results, store, scores)
    pages = [Elements((tmp_path / name / "answers.html").read_text()) for name in ("plain", "hostile")]
    # What hostile text may add is the note of an error, which is no element of its own.
    counts = [[tag for tag, _ in page.tags] for page in pages]
    assert counts[0] == counts[1]
    assert not any(name.startswith("on") for _, attributes in pages[1].tags for name in attributes)
    everything = "".join(pages[1].text)
    assert all(text in everything for text in HOSTILE if "\x00" not in text)
    assert "\u202e" not in everything and everything.count("⟨U+202E⟩") > 20  # or it would turn the text around


def test_the_policy_lets_the_pages_own_script_run_and_no_other(tmp_path):
    write_page(tmp_path, *make_run(tmp_path, ["x"]))
    html = (tmp_path / "answers.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in policy or f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "http" not in policy
    assert not re.search(r'(src|href)="(?!data:|#)', html)


def test_a_page_has_its_share_of_each_benchmark(tmp_path):
    results, store, scores = make_run(tmp_path, ["x"] * 40, n=2)
    write_page(tmp_path, results, store, scores, most_answers=16)
    html = (tmp_path / "answers.html").read_text()
    assert html.count('<article data-benchmark="even"') == html.count('<article data-benchmark="odd"') == 4
    assert "16 of 40 answers are on this page" in html


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def shown(browser):
    """Ids of the problems that are displayed, and the number that the page tells."""
    script = """return [...document.querySelectorAll('article')].filter(a => a.offsetParent !== null)
        .map(a => a.querySelector('h2 span').textContent)"""
    return browser.execute_script(script), browser.find_element("id", "count").text


def search(browser, words):
    field = browser.find_element("id", "search")
    field.clear()
    field.send_keys(words)
    time.sleep(0.4)  # the page waits for a pause in typing


@pytest.mark.slow
class TestInABrowser:
    def test_hostile_text_is_shown_and_not_run(self, browser, tmp_path):
        hostile = "".join(HOSTILE).replace("\x00", "")
        path = write_page(tmp_path, *make_run(tmp_path, HOSTILE, 2, hostile))
        browser.get(path.as_uri())
        time.sleep(0.5)
        assert browser.title.startswith("model ")
        assert len(browser.find_elements("css selector", "script")) == 1
        texts = [element.get_attribute("textContent") for element in browser.find_elements("css selector", "pre")]
        written_out = str.maketrans({"\x00": "⟨U+0000⟩", "\u202e": "⟨U+202E⟩"})
        assert [text.strip() for text in texts] == [text.translate(written_out) for text in reordered(HOSTILE)]
        # Behind the escaping, the policy: what is written into the page as markup does not run either.
        browser.execute_script(
            "document.body.insertAdjacentHTML('beforeend', arguments[0]);"
            "const s = document.createElement('script'); s.textContent = \"document.title = 'owned'\";"
            "document.body.append(s);",
            HOSTILE[1],
        )
        time.sleep(0.3)
        assert browser.title != "owned"

    def test_filters_search_and_keys(self, browser, tmp_path):
        from selenium.webdriver.common.keys import Keys

        texts = [f"text number {i}, cosine" if i == 3 else f"text number {i}" for i in range(10)]
        browser.get(write_page(tmp_path, *make_run(tmp_path, texts)).as_uri())
        everything, count = shown(browser)
        assert sorted(everything) == [f"p{i}" for i in range(10)] and count == "10 answers"
        assert browser.find_element("css selector", "img").size["width"] == 42  # with its border

        browser.find_element("css selector", "#benchmark option[value=odd]").click()
        assert sorted(shown(browser)[0]) == ["p1", "p3", "p5", "p7", "p9"]
        browser.find_element("css selector", "#benchmark option[value='']").click()
        for verdict, expected in (
            ("right", ["p0", "p2", "p6", "p8"]),
            ("wrong", ["p1", "p3", "p5", "p7"]),
            ("none", ["p4", "p9"]),
            ("partly", []),
        ):
            browser.find_element("css selector", f".choice.{verdict} span").click()
            found, count = shown(browser)
            assert (sorted(found), count) == (expected, f"{len(expected)} answers")
        assert browser.find_element("id", "nothing").is_displayed()
        browser.find_element("css selector", ".choice span").click()

        search(browser, "COSINE")
        assert shown(browser) == (["p3"], "1 answer")
        browser.find_element("id", "search").send_keys(Keys.ESCAPE)
        assert shown(browser)[1] == "10 answers"
        # By keys alone: to the next problem, back, and to the search.
        body = browser.find_element("css selector", "body")
        focused = "return document.activeElement.querySelector('h2 span')?.textContent ?? document.activeElement.id"
        moves = []
        for key in "jjk/":
            browser.switch_to.active_element.send_keys(key)
            moves.append(browser.execute_script(focused))
        order = everything
        assert moves == [order[0], order[1], order[0], "search"]
        assert body.is_displayed() and browser.find_element("id", "search").get_attribute("value") == ""

    def test_five_thousand_answers_stay_fluid(self, browser, tmp_path):
        texts = [f"answer {i}: " + "and so on, " * 60 for i in range(5000)]
        path = write_page(tmp_path, *make_run(tmp_path, texts))
        started = time.perf_counter()
        browser.get(path.as_uri())
        loaded = time.perf_counter() - started
        assert shown(browser)[1] == "5000 answers"
        filtering = browser.execute_script(
            """const field = document.getElementById('search'), started = performance.now();
            field.value = 'answer 4999:'; apply();
            document.body.getBoundingClientRect();
            return performance.now() - started"""
        )
        assert shown(browser) == (["p4999"], "1 answer")
        print(f"{path.stat().st_size / 1e6:.1f} MB, loaded in {loaded:.1f} s, first search in {filtering:.0f} ms")
        # Times are the machine's; what keeps them short is that only what is near the window is laid out.
        search(browser, "answer")
        assert shown(browser)[1] == "5000 answers"
        laid_out = (
            "return [...document.querySelectorAll('pre')].map(e => e.checkVisibility({contentVisibilityAuto: true}))"
        )
        visible = browser.execute_script(laid_out)
        assert visible[0] and sum(visible) < 50

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_has_contrast_in_both_schemes(self, browser, tmp_path, scheme):
        """At least 4.5 to 1 (WCAG AA) for every colour of text, on the cards and on the page."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(write_page(tmp_path, *make_run(tmp_path, ["x"] * 10)).as_uri())
        names = ("page", "card", "code", "ink", "quiet", "right", "wrong", "partly", "none")
        style = "getComputedStyle(document.documentElement)"
        colours = {name: browser.execute_script(f"return {style}.getPropertyValue('--{name}')") for name in names}
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (luminance(colours["page"]) < 0.2) == (scheme == "dark")
        assert background == f"rgb({', '.join(str(int(255 * part)) for part in channels(colours['page']))})"
        for text in ("ink", "quiet", "right", "wrong", "partly", "none"):
            for ground in ("page", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def reordered(texts, n=2):
    """In the page's order: benchmark after benchmark, problems with an even number first."""
    problems = [texts[start : start + n] for start in range(0, len(texts), n)]
    return [text for parity in (0, 1) for problem in problems[parity::2] for text in problem]


def channels(colour):
    digits = colour.strip().lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    return [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]


def luminance(colour):
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
