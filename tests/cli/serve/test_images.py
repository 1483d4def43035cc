"""Images in each dialect come to the same answer; what may not be fetched is not; the page takes them, too."""

import base64
import http.server
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from playwright.sync_api import Browser, expect

from offload.vision import image_url
from quant.convert.quantize import quantize
from quant.errors import InputError
from tests import images
from tests.cli.serve.described import Described
from tests.cli.serve.running import Running
from tests.cli.serve.test_page import CHROMIUM, browser, faults, settle, shown  # noqa: F401 - browser is a fixture


def png(seed: int = 0) -> bytes:
    written = io.BytesIO()
    images.picture(28, 28, seed=seed).save(written, "PNG")
    return written.getvalue()


PICTURE = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
OTHER = f"data:image/png;base64,{base64.b64encode(png(1)).decode()}"


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A server of pictures on this machine, whose paths say how it behaves."""

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    if gone.wait(0.1):
                        return
            away = {"/moved": "/picture.png", "/elsewhere": "http://localhost:1/x", "/file": "file:///etc/passwd"}
            if target := {**away, "/round": "/round"}.get(self.path):
                self.send_response(302)
                self.send_header("Location", target)
                self.end_headers()
                return
            data = b"y" * (17 << 20) if self.path == "/large" else png()
            self.send_response(200 if self.path in ("/picture.png", "/large") else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    gone = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        gone.set()
        made.shutdown()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("seeing")
    quantize(images.make_model(folder / "source"), folder / "int4", experts="int4-g32", attention="int8-g32")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(png())
    (folder / "pictures" / "out.png").symlink_to("/etc/passwd")
    allowed = ("--images-from", "127.0.0.1", "--images-from", f"{folder}/pictures/")
    running = Running(folder / "int4", "--context", "400", *allowed)
    running.folder = folder  # type: ignore[attr-defined]
    yield running
    running.end()


def asked(*urls: str, text: str = " what?") -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_every_dialect_sees_the_same_picture(seeing: Running) -> None:
    through = httpx2.Client(transport=Described())
    chat = openai.OpenAI(base_url=f"{seeing.url}/v1", api_key="any", http_client=through)
    claude = anthropic.Anthropic(base_url=seeing.url, api_key="any", http_client=through)
    told: Any = {"model": "any", "temperature": 0}
    first = chat.chat.completions.create(messages=asked(PICTURE), max_tokens=6, **told)
    again = chat.chat.completions.create(messages=asked(PICTURE), max_tokens=6, **told)
    other = chat.chat.completions.create(messages=asked(OTHER), max_tokens=6, **told)
    said: Any = [
        {"type": "input_image", "image_url": PICTURE, "detail": "auto"},
        {"type": "input_text", "text": " what?"},
    ]
    response = chat.responses.create(input=[{"role": "user", "content": said}], max_output_tokens=6, **told)
    source = {"type": "base64", "media_type": "image/png", "data": PICTURE.partition(",")[2]}
    blocks: Any = [{"type": "image", "source": source}, {"type": "text", "text": " what?"}]
    talk: Any = [{"role": "user", "content": blocks}]
    message = claude.messages.create(model="any", messages=talk, max_tokens=6, extra_body={"temperature": 0})
    counted = claude.messages.count_tokens(model="any", messages=talk)
    text = first.choices[0].message.content
    assert text == again.choices[0].message.content == response.output_text == message.content[0].text  # type: ignore[union-attr]
    assert first.usage and other.usage and response.usage
    assert first.usage.prompt_tokens == other.usage.prompt_tokens == response.usage.input_tokens == counted.input_tokens
    assert other.choices[0].message.content != text
    through.close()
    assert seeing.ask("GET", "/props")[2]["modalities"]["vision"]


def test_what_is_allowed_is_fetched_and_nothing_else(seeing: Running, site: str) -> None:
    folder = seeing.folder  # type: ignore[attr-defined]

    def ask(url: str) -> tuple[int, str]:
        body = {"messages": asked(url), "max_tokens": 4, "temperature": 0}
        status, _, document = seeing.ask("POST", "/v1/chat/completions", body)
        return status, document["choices"][0]["message"]["content"] if status == 200 else document["error"]["message"]

    same = ask(PICTURE)
    assert same[0] == 200
    for url in (f"{site}/picture.png", f"{site}/moved", f"file://{folder}/pictures/a.png"):
        assert ask(url) == same
    for url, said in {
        f"{site}/elsewhere": "fetches nothing from 'localhost'",
        f"{site}/file": "leads elsewhere",
        f"{site}/round": "leads elsewhere",
        f"{site}/none": "it answers 404",
        f"{site}/large": "larger than",
        "http://127.0.0.1:1/x": "cannot be fetched",
        "http://localhost/x": "fetches nothing from 'localhost'",
        "http://169.254.169.254/latest": "fetches nothing from",
        "ftp://127.0.0.1/x": "of the scheme 'ftp'",
        f"file://{folder}/pictures/out.png": "is a file",
        f"file://{folder}/pictures/../int4/config.json": "is a file",
        "file:///etc/passwd": "is a file",
        "data:image/png;base64,???": "is broken",
        "data:image/png,abc": "is broken",
        "data:image/png;base64,AAAA": "no image that can be read",
    }.items():
        status, message = ask(url)
        assert status == 400 and said in message, (url, message)


def test_too_many_images_and_those_of_others_than_users_are_refused(seeing: Running) -> None:
    many = seeing.ask("POST", "/v1/chat/completions", {"messages": asked(*[PICTURE] * 17), "max_tokens": 1})
    system = [{"role": "system", "content": asked(PICTURE)[0]["content"]}]
    wrong = seeing.ask("POST", "/v1/chat/completions", {"messages": system, "max_tokens": 1})
    assert many[0] == wrong[0] == 400
    assert "17 images" in many[2]["error"]["message"] and "'image_url'" in wrong[2]["error"]["message"]


def test_only_public_addresses_are_fetched_from_anywhere(site: str) -> None:
    anywhere = image_url.ImageSources(["*"])
    for url in (f"{site}/picture.png", "http://[::1]:1/x", "http://[::ffff:127.0.0.1]:1/x", "http://localhost:1/x"):
        with pytest.raises(InputError, match="private network"):
            anywhere.read(url, time.monotonic() + 5)
    named = image_url.ImageSources(["127.0.0.1"])
    started = time.monotonic()
    with pytest.raises(InputError, match="takes too long"):
        named.read(f"{site}/drip", time.monotonic() + 0.5)
    assert time.monotonic() - started < 3


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to look at the page, and none is on the PATH")
def test_the_page_takes_images_by_file_paste_and_drop(
    seeing: Running,
    browser: Browser,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    page = browser.new_page(viewport={"width": 390, "height": 800})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(seeing.url)
    expect(page.get_by_role("button", name="Image", exact=True)).to_be_visible()
    page.locator("#file").set_input_files(tmp_path / "a.png")
    expect(page.locator("#pictures img")).to_have_count(1)
    for kind, field, seed in (("paste", "clipboardData", 1), ("drop", "dataTransfer", 2)):
        page.evaluate(_GIVE, [kind, field, base64.b64encode(png(seed)).decode()])
        expect(page.locator("#pictures img")).to_have_count(seed + 1)
    page.get_by_role("button", name="Remove image 3").click()
    expect(page.locator("#pictures img")).to_have_count(2)
    assert faults(page) == []
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data) if "chat" in request.url else None)
    page.get_by_label("Message", exact=True).fill(" what?")
    page.get_by_text("Settings").click()
    page.get_by_label("Tokens at most").fill("4")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#status")).to_contain_text("4 tokens, ")
    settle(page)
    [body] = [json.loads(one) for one in sent if one]
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    expect(page.locator(".user img")).to_have_count(2)
    assert page.evaluate("document.querySelector('.user img').naturalWidth") == 28, "the policy lets it be shown"
    shown(page, "images")
    page.get_by_role("button", name="Edit message 1").click()
    expect(page.locator("#pictures img")).to_have_count(2)
    assert said == []
    page.close()


_GIVE = """([kind, field, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], "b.png", { type: "image/png" }));
  const event = new Event(kind, { bubbles: true, cancelable: true });
  Object.defineProperty(event, field, { value: given });
  document.getElementById("text").dispatchEvent(event);
}"""
