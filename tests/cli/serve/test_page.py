"""The page in a real browser: a conversation, the live view, and what it is for those who use no mouse or eyes."""

import json
import os
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.cli.serve.running import KEY, Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to look at the page, and none is on the PATH")
AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text()
EVIL = """# <img src=x onerror="alert(1)">

**bold** *low* `a<b` <script>alert(2)</script> [bad](javascript:alert(3)) [good](https://example.org/x)

- one
  - two
1. three

| a | b |
|---|---|
| <b>1</b> | 2 |

> quoted

```html
<script>alert(4)</script>
```"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield made
        made.close()


@pytest.fixture
def opened(browser: Browser, server: Running, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page with its key given; what the browser complains of fails the test."""
    asked: dict[str, Any] = getattr(request, "param", {})
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **asked)
    page = context.new_page()
    page.set_default_timeout(30_000)
    said: list[str] = []
    addresses: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda sent: addresses.append(sent.url))
    page.goto(server.url)
    page.evaluate(f"sessionStorage.setItem('coldstream-key', {json.dumps(KEY)})")
    page.reload()
    yield page
    assert [text for text in said if "401" not in text] == []
    assert all(address.startswith(server.url) for address in addresses), "no other machine is asked"
    context.close()


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def settle(page: Page) -> None:
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")


def short(page: Page, tokens: int) -> None:
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens at most").fill(str(tokens))


def shown(page: Page, name: str) -> None:
    """A picture for whoever wants to look, in the folder that COLDSTREAM_PICTURES names."""
    if folder := os.environ.get("COLDSTREAM_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def faults(page: Page) -> list[str]:
    """What axe finds that is serious."""
    # By the debugger's own door: the page's policy, rightly, lets no script in.
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{fault['id']}: {fault['help']}: {fault['nodes'][0]['html']}"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
    ]


def test_a_message_is_answered_edited_and_sent_again(opened: Page) -> None:
    short(opened, 12)
    send(opened, "def main")
    expect(opened.locator(".assistant .body")).not_to_be_empty()
    settle(opened)
    expect(opened.locator("#status")).to_contain_text("12 tokens, ")
    send(opened, "import os")
    settle(opened)
    expect(opened.locator(".message")).to_have_count(4)
    opened.get_by_role("button", name="Edit message 1").click()
    expect(opened.get_by_label("Message", exact=True)).to_have_value("def main")
    send(opened, "def other")
    settle(opened)
    expect(opened.locator(".message")).to_have_count(2)
    expect(opened.locator(".user .body")).to_have_text("def other")
    opened.get_by_role("button", name="New chat").click()
    expect(opened.locator(".message")).to_have_count(0)


@pytest.mark.parametrize("way", ["key", "button"])
def test_an_answer_can_be_stopped(opened: Page, server: Running, way: str) -> None:
    opened.route("**/v1/chat/completions", _endless)
    send(opened, "go on")
    stop = opened.get_by_role("button", name="Stop")
    expect(stop).to_be_visible()
    if way == "key":
        opened.keyboard.press("Escape")
    else:
        stop.click()
    expect(opened.locator("#status")).to_contain_text("Stopped")
    expect(opened.get_by_role("button", name="Send")).to_be_visible()


def _endless(route: Any) -> None:
    """The request of the page, made longer than it could finish."""
    body = json.loads(route.request.post_data) | {"logit_bias": {"1": -100, "4": -100}, "n": 16}
    route.continue_(post_data=json.dumps(body))


def test_what_a_model_writes_is_never_markup(opened: Page) -> None:
    opened.evaluate("text => document.body.append(Object.assign(document.createElement('section'), {id: 'try'}))", EVIL)
    opened.evaluate("text => document.getElementById('try').append(...Markdown.blocks(text))", EVIL)
    tried = opened.locator("#try")
    for name in ("img", "script", "b"):
        expect(tried.locator(name)).to_have_count(0)
    for name in ("strong", "em", "table", "blockquote", "ol", "ul ul", "pre code", "h3"):
        expect(tried.locator(name)).to_have_count(1)
    assert [link.get_attribute("href") for link in tried.locator("a").all()] == ["https://example.org/x"]
    expect(tried.locator("h3")).to_have_text('<img src=x onerror="alert(1)">')


def test_the_live_view_shows_every_expert_and_byte(opened: Page) -> None:
    short(opened, 8)
    send(opened, "import os")
    settle(opened)
    live = opened.locator("#live")
    expect(live.locator("#map")).to_have_attribute("aria-label", "Experts of 4 layers: 64 in RAM")
    expect(live.locator("#tiers")).to_contain_text("routed experts")
    expect(live.locator("#speeds")).to_contain_text("tokens/s")
    expect(live.locator("#speeds")).to_contain_text("100 %")
    expect(live.locator("#speeds")).to_contain_text("RAM bandwidth")
    colours = (
        live.locator("#tiers .tier")
        .first.locator(".legend .swatch")
        .evaluate_all("all => all.map((one) => getComputedStyle(one).backgroundColor)")
    )
    assert len({*colours}) == 6 and "rgba(0, 0, 0, 0)" not in colours, "each has a colour of its own, the rest has one"
    assert live.locator("#tiers .tier").first.locator(".legend li").count() == 6, (
        "what is small is one colour and one name"
    )
    expect(live.locator("#tiers")).to_contain_text("Files")
    assert opened.title() == f"{opened.locator('#model').inner_text()} · Coldstream"
    shown(opened, "wide")


def test_a_model_without_experts_has_no_map_of_them(opened: Page) -> None:
    expect(opened.locator("#experts")).to_be_visible()
    told = json.loads(opened.evaluate("fetch('/live', { headers: Access.headers() }).then((answer) => answer.text())"))
    dense = told | {"experts": {"layers": [], "counts": [], "tiers": []}, "hit_rate": None}
    opened.route("**/live", lambda route: route.fulfill(json=dense))
    expect(opened.locator("#experts")).to_be_hidden()
    expect(opened.locator("#live-status")).to_have_text("")


@pytest.mark.parametrize("opened", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True)
def test_axe_finds_nothing_serious(opened: Page) -> None:
    short(opened, 8)
    send(opened, "import os")
    settle(opened)
    expect(opened.locator("#map")).to_have_attribute("aria-label", "Experts of 4 layers: 64 in RAM")
    assert faults(opened) == []
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 27)") == dark
    shown(opened, "dark" if dark else "light")
    opened.get_by_role("button", name="Theme").click()
    opened.get_by_role("button", name="Theme").click()
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 27)"


def test_a_phone_has_room_for_all_of_it(opened: Page) -> None:
    opened.set_viewport_size({"width": 390, "height": 800})
    short(opened, 8)
    send(opened, "import os, " * 20)
    settle(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    shown(opened, "phone")
    opened.reload()
    expect(opened.locator("#model")).not_to_have_text("Coldstream")
    opened.get_by_role("button", name="Live view").click()
    expect(opened.locator("#tiers")).to_contain_text("routed experts")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    assert faults(opened) == []
    shown(opened, "phone-live")


def test_it_asks_for_a_key_where_one_is_needed(opened: Page) -> None:
    field = opened.get_by_label("This server asks for a key")
    expect(field).to_be_hidden()
    opened.evaluate("sessionStorage.clear()")
    opened.reload()
    field.fill(KEY)
    field.press("Enter")
    expect(field).to_be_hidden()
    short(opened, 4)
    send(opened, "x")
    settle(opened)
    expect(opened.locator(".assistant .body")).not_to_be_empty()
