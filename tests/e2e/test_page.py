"""The page at /, in headless Chromium: what it draws, that it asks nothing of anybody else, and the playground."""

import base64
import io
import json
import os
import shutil
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from slora_jax import Engine
from slora_jax.api.app import create_app
from slora_jax.api.server import Server, listen
from slora_jax.config import build_config
from slora_jax.demo import with_demo

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Debian's packages chromium and chromium-driver"),
]

ADAPTERS = ("emoji", "haiku", "json", "pirate")
FRANCE = {
    "base model": "The capital of France is Paris.",
    "json": '{"answer": "The capital of France is Paris.", "topic": "geography"}',
    "pirate": "Arr! The capital o' France be Paris, matey!",
}


@pytest.fixture(scope="module")
def server():
    """Its URL. The embedded model, so that answers are known."""
    engine = Engine.create(with_demo(build_config({"pool": {"pages": 400}, "warm_up": False})), progress=False)
    engine.start()
    server = Server(create_app(engine), listen("127.0.0.1", 0), on_stop=engine.close)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server.url
    server.stop()
    thread.join()


@pytest.fixture(scope="module")
def ask(server):
    def ask_one(model: str, tokens: int = 40) -> None:
        body = f'{{"model": "{model}", "prompt": "Once upon a time", "max_tokens": {tokens}, "ignore_eos": true}}'
        request = urllib.request.Request(
            f"{server}/v1/completions", body.encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=200).read()

    return ask_one


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium, of the group dev")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--disable-gpu", "--window-size=1280,1400", "--force-device-scale-factor=1"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, server):
    browser.get_log("performance")
    browser.get(f"{server}/")
    wait_for(lambda: text(browser, "model") == "SmolLM2-135M-Instruct")
    yield browser
    errors = [entry["message"] for entry in browser.get_log("browser")]
    assert not errors, "the browser's console is not empty"


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def text(browser, name: str) -> str:
    return browser.find_element("id", name).text


def rows(browser) -> dict[str, list[str]]:
    script = "return [...document.querySelectorAll('#adapters tr')].map(r => [...r.cells].map(c => c.innerText.trim()))"
    return {row[0]: row[1:] for row in browser.execute_script(script)}


def colours_in(browser, name: str) -> set[tuple[int, ...]]:
    """Of the pixels of a canvas."""
    image = pytest.importorskip("PIL.Image")
    data = browser.execute_script(f"return document.getElementById('{name}').toDataURL('image/png')")
    drawn = image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGBA")
    return {colour for count, colour in drawn.getcolors(2**24) if count > 20 and colour[3] == 255}


def test_the_pool_is_drawn_and_moves(page, ask):
    wait_for(lambda: "free" in text(page, "legend"))
    assert "399 pages of 16 tokens" in text(page, "pool-note")
    before = colours_in(page, "pool")
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(ask, ADAPTERS))
    wait_for(lambda: all(rows(page)[name][0] == "pool" for name in ADAPTERS))
    time.sleep(2)
    after = colours_in(page, "pool")
    assert len(after - before) >= len(ADAPTERS), "each adapter has a colour of its own"
    shown = rows(page)
    assert next(iter(shown)) == "base model" and set(shown) == {"base model", *ADAPTERS}
    assert shown["json"][1] == "16" and shown["json"][4] == "1" and shown["json"][5] == "40"
    assert "4 in the pool" in text(page, "tiers")
    for plot in ("plot-rate", "plot-first", "plot-load"):
        assert colours_in(page, plot), plot


def test_the_playground_asks_all_at_once(page):
    wait_for(lambda: len(page.find_elements("css selector", "#who button")) == 1 + len(ADAPTERS))
    page.execute_script("[...document.querySelectorAll('#who button')].find(b => b.innerText == 'emoji').click()")
    page.find_element("id", "go").click()
    wait_for(lambda: len(page.find_elements("css selector", "article")) == len(ADAPTERS))
    wait_for(lambda: not page.find_elements("css selector", "article.busy"))
    cards = page.find_elements("css selector", "article")
    answers = {
        card.find_element("tag name", "h3").text: card.find_element("tag name", "p").text.strip() for card in cards
    }
    assert "emoji" not in answers
    assert {name: answers[name] for name in FRANCE} == FRANCE
    assert all("tokens" in card.find_element("tag name", "small").text for card in cards)


def test_an_adapter_that_is_not_there_is_told(page):
    page.execute_script(
        "for (const b of document.querySelectorAll('#who button[aria-pressed=true]')) b.click();"
        "const a = document.getElementById('another'); a.value = '<b>nobody</b>'; a.dispatchEvent(new Event('change'));"
    )
    page.find_element("id", "go").click()
    wait_for(lambda: page.find_elements("css selector", "article.failed"))
    (card,) = page.find_elements("css selector", "article")
    assert "the model '<b>nobody</b>' does not exist" in card.text
    (error,) = page.get_log("browser")  # Chromium's own line for the status
    assert "404" in error["message"]


def test_it_loads_nothing_from_elsewhere(page, server):
    time.sleep(2.5)
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith((f"{server}/", "data:")) for url in urls)
    assert 2 <= sum(url == f"{server}/v1/pool" for url in urls) <= 6
    # What the policy forbids does not run, though it were on the page.
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
    )
    assert page.execute_script("return window.ran") is None
    assert all("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_a_key_is_asked_for_and_sent(page):
    page.execute_script(
        "window.sent = []; window.fetch = async (url, options) => { window.sent.push(options.headers.Authorization);"
        "return new Response('{}', {status: 401}); }"
    )
    wait_for(lambda: page.find_element("id", "key").is_displayed())
    page.find_element("id", "key-text").send_keys("secret")
    page.find_element("css selector", "#key button").click()
    wait_for(lambda: "Bearer secret" in page.execute_script("return window.sent"))
    page.execute_script("sessionStorage.clear()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_schemes(page, scheme):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    ink, ground = page.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor].map(c => c.match(/\\d+/g))"
    )
    brightness = [sum(map(int, colour[:3])) / 3 for colour in (ink, ground)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    assert abs(brightness[0] - brightness[1]) > 180
    width = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "nothing is wider than the window"
