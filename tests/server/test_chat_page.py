"""The chat page in a browser: headless Chromium, driven by the protocol of WebDriver. Skipped where there is none."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from served import LONG, NAME, SECONDS, Scripted, serving

from lowbit.options import LimitOptions, ListenOptions

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (DRIVER and BROWSER), reason="needs chromium and chromium-driver"),
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """A page, by CSS selectors."""

    def __init__(self, driver: str):
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run"]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"binary": BROWSER, "args": flags},
                  "goog:loggingPrefs": {"browser": "ALL"}}  # fmt: skip
        self.driver, self.session = driver, ""
        self.session = f"/session/{self.call('POST', '/session', capabilities={'alwaysMatch': wanted})['sessionId']}"

    def call(self, method: str, path: str, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.driver + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, url: str) -> None:
        self.call("POST", f"{self.session}/url", url=url)

    def run(self, script: str, *arguments):
        return self.call("POST", f"{self.session}/execute/sync", script=script, args=arguments)

    def _element(self, selector: str) -> str:
        found = self.call("POST", f"{self.session}/element", using="css selector", value=selector)
        return f"{self.session}/element/{found[ELEMENT]}"

    def click(self, selector: str) -> None:
        self.call("POST", f"{self._element(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"{self._element(selector)}/value", text=text)

    def text(self, selector: str) -> str:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join('|')", selector
        )

    def shown(self, selector: str) -> bool:
        return self.run("return document.querySelector(arguments[0]).checkVisibility()", selector)

    def until(self, holds) -> None:
        end = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < end, self.run("return document.body.innerText")
            time.sleep(0.02)

    def complaints(self) -> list[str]:
        """What is not mere advice."""
        found = self.call("POST", f"{self.session}/se/log", type="browser")
        return [each["message"] for each in found if each["level"] not in ("DEBUG", "INFO")]


@pytest.fixture(scope="module")
def browser():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                made = Browser(f"http://127.0.0.1:{port}")
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.1)
        yield made
        made.call("DELETE", made.session)
    finally:
        process.terminate()
        process.wait(SECONDS)


@pytest.fixture(scope="module")
def page(session):
    with serving(session, listen=ListenOptions(ui=True), limits=LimitOptions(max_tokens=LONG)) as served:
        yield served


@pytest.fixture
def opened(browser, page):
    browser.open(page.url)
    browser.until(lambda: browser.text("#model") == NAME)
    return browser


def ask(browser, question: str, tokens: int) -> None:
    browser.run("document.querySelector('#most').value = arguments[0]", tokens)
    browser.run("document.querySelector('#temperature').value = 0")
    browser.type("#question", f"{question}\ue007")  # Enter


def test_answers_come_and_the_conversation_goes_on(opened, page):
    turns = []
    for question in ("the dog sleeps", "and then"):
        ask(opened, question, 12)
        opened.until(lambda: opened.shown("#send"))
        turns.append({"role": "user", "content": question})
        expected = page.session.generate(page.session.encode_chat(turns), max_new_tokens=12).text
        assert opened.text(".user:nth-last-child(2)") == question and opened.text(".assistant:last-child") == expected
        turns.append({"role": "assistant", "content": expected})
        assert opened.text("#rate").startswith("12 tokens, ") and opened.text("#rate").endswith(" per second")
    opened.click("#clear")
    assert opened.text("#turns p") == ""
    assert opened.complaints() == []


def test_stop_ends_an_answer(browser, session):
    """It shows what came so far, and the server goes on with the next."""
    slow = Scripted(session, "the dog " * LONG, pause=0.02)
    with serving(slow, listen=ListenOptions(ui=True), limits=LimitOptions(max_tokens=LONG)) as served:
        browser.open(served.url)
        ask(browser, "the dog", LONG - 100)
        browser.until(lambda: browser.text(".assistant:last-child"))
        assert not browser.shown("#send")
        browser.click("#stop")
        browser.until(lambda: browser.shown("#send"))
        time.sleep(0.2)  # what the page still has to paint is painted
        assert browser.text("#rate").endswith(", stopped")
        assert served.complete(max_tokens=2).status == 200


def test_a_long_answer_is_shown_whole(browser, session):
    """As fast as it comes: it took minutes, all of a core, when each token laid the page out anew."""
    said = "the dog sleeps. " * (LONG // 8)
    fast = Scripted(session, said)
    with serving(fast, listen=ListenOptions(ui=True), limits=LimitOptions(max_tokens=LONG)) as served:
        browser.open(served.url)
        ask(browser, "x", LONG - 100)
        browser.until(lambda: browser.shown("#send"))
        assert browser.text(".assistant") == said


def test_what_a_model_writes_is_text(browser, session):
    hostile = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
    with serving(Scripted(session, hostile), listen=ListenOptions(ui=True)) as served:
        browser.open(served.url)
        ask(browser, "x", 300)
        browser.until(lambda: browser.shown("#send") and browser.text("#rate"))
        assert browser.text(".assistant") == hostile and browser.text("title") == "lowbit"
        assert browser.run("return document.querySelectorAll('.assistant *').length") == 0


def test_a_refusal_is_shown_and_a_key_is_asked_for(browser, session):
    with serving(session, key="secret", listen=ListenOptions(ui=True)) as served:
        browser.open(served.url)
        browser.until(lambda: browser.shown("#door"))
        assert "the key is missing or wrong" in browser.text(".error")
        browser.type("#key", "secret\ue004")  # Tab
        browser.until(lambda: browser.text("#model") == NAME)
        ask(browser, "x", LONG)
        browser.until(lambda: "exceed the context" in browser.text(".error"))


def test_the_page_reaches_its_server_only(page):
    reply = page.ask("GET", "/")
    assert reply.status == 200 and "connect-src 'self'" in reply.headers["content-security-policy"]
    assert b"http" not in reply.body.replace(b'"HTTP "', b"")
