"""Opens a page in headless Chromium and reads it, for the tests of `sapo-trl view`."""

import shutil

import pytest
from matplotlib.colors import to_rgb


selenium = pytest.importorskip("selenium", reason="the page is tested through selenium")
from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import StaleElementReferenceException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402, F401 (for the tests)
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402, F401


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver (Debian: apt install chromium-driver)"
)
PATIENCE = 300  # seconds: where other work has the processors a page takes a minute to open


def start_browser() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1200"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(CHROMEDRIVER))
    browser.set_page_load_timeout(PATIENCE)
    browser.set_script_timeout(PATIENCE)
    return browser


def open_page(browser: webdriver.Chrome, path) -> None:
    browser.get(path.as_uri())
    ready = "return document.documentElement.dataset.ready"
    WebDriverWait(browser, PATIENCE).until(lambda _: browser.execute_script(ready))


def wait(browser, condition):
    # A row may be drawn anew between finding and reading it.
    waiting = WebDriverWait(browser, PATIENCE, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def theme(browser, name):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": name}]}
    )


def press(browser, key):
    browser.find_element(By.ID, "responses-title").click()
    ActionChains(browser).send_keys(key).perform()


def count(browser) -> str:
    return browser.find_element(By.ID, "count").text


def panels(browser):
    return browser.find_elements(By.CSS_SELECTOR, "#panels .panel")


def tokens(browser, panel=0):
    return panels(browser)[panel].find_elements(By.CSS_SELECTOR, ".tokens .token")


def colour_by(browser, mode):
    browser.find_element(By.CSS_SELECTOR, f"#colours [data-mode={mode}]").click()


def background(token) -> tuple[int, ...]:
    colour = token.value_of_css_property("background-color")
    return tuple(int(float(part)) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])


def rgb(colour) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(colour))


def tip(browser) -> dict[str, str]:
    rows = browser.find_elements(By.CSS_SELECTOR, "#tip tr")
    return {row.find_element(By.TAG_NAME, "th").text: row.find_element(By.TAG_NAME, "td").text for row in rows}


def search(page, text):
    page.find_element(By.ID, "filter-text").send_keys(text)
