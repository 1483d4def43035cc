"""The report page: complete, self-contained, escaped; and looked at in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from cli.html.run_report import render_page, write_page
from offload.run.report import RunReport
from quant.errors import OutputError
from tests.reports import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)">' & </title>"""

# Added to a copy of the page: tries the readouts as a reader would and writes down what the browser saw.
PROBE = """<pre id="probe"></pre><script>{
const plot = document.querySelector("[data-readout=time]"), map = document.getElementById("heat");
plot.focus();
plot.dispatchEvent(new KeyboardEvent("keydown", {key: "End"}));
map.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
document.getElementById("probe").textContent = JSON.stringify({
  resources: performance.getEntriesByType("resource").map((entry) => entry.name),
  width: innerWidth, content: document.documentElement.scrollWidth,
  time: document.getElementById("time-readout").textContent,
  heat: document.getElementById("heat-readout").textContent,
  background: getComputedStyle(document.body).backgroundColor,
});}</script>"""


class Outline(HTMLParser):
    """Tags in order, checked to nest, and the text between them."""

    VOID = ("meta", "link", "path", "rect", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


@pytest.mark.parametrize(
    "run",
    [
        report(tokens=2000, layers=48, experts=16),
        report(tokens=300, layers=24, experts=128, vram=0.4),
        report(tokens=1, layers=4),
        report(tokens=0, layers=1),
    ],
    ids=["scout", "maverick", "one token", "prompt only"],
)
def test_the_page_is_well_formed_and_asks_for_nothing_outside_itself(run: RunReport) -> None:
    page = render_page(run)
    outline(page)
    assert not re.search(r"""(https?:)?//[a-z]|\bsrc=|@import|url\(""", page.replace("http-equiv", ""))
    assert "default-src 'none'" in page
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.S).lower().split()
    assert len(page) < 1_000_000


def test_the_summary_that_a_reader_sees_first_says_speed_limit_and_distance() -> None:
    text = outline(render_page(report(tokens=100))).text
    assert re.search(r"Decode runs at [\d.]+ tokens/s, \d+ % of what the RAM bandwidth", text)


def test_whatever_a_model_is_called_it_stays_text() -> None:
    page = render_page(report(tokens=10, model=EVIL, notes=(EVIL,)))
    parsed = outline(page)
    assert parsed.tags.count("img") == 0
    assert parsed.tags.count("script") == 4
    assert "alert(1)</script>" not in page.replace("&lt;/script&gt;", "")


def test_the_data_of_the_page_can_be_taken_out_again() -> None:
    run = report(tokens=20)
    [data] = re.findall(r'<script type="application/json" id="report">(.*?)</script>', render_page(run), re.S)
    assert json.loads(data)["decode"]["tokens"] == run.decode.tokens


def test_thousands_of_tokens_and_experts_are_drawn_within_few_shapes() -> None:
    page = render_page(report(tokens=5000, layers=24, experts=128, vram=0.4))
    assert outline(page).tags.count("path") < 100


def test_a_page_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_page(report(tokens=5), tmp_path / "no" / "such" / "folder.html")


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_marks_stand_out_from_their_background(theme: int) -> None:
    """WCAG 2: 4.5 to 1 for text, 3 to 1 for graphics, against the card they lie on."""
    style = files("cli").joinpath("html", "assets", "page.css").read_text()
    palettes = re.findall(r":root \{(.*?)\}", style, re.S)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", palettes[theme]))
    for name in ("ink", "quiet"):
        assert _contrast(colours[name], colours["card"]) >= 4.5, name
        assert _contrast(colours[name], colours["page"]) >= 4.5, name
    for name in ("vram", "ram", "disk", "mark"):
        assert _contrast(colours[name], colours["card"]) >= 3, name


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium to look at the page, and none is on the PATH")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_a_browser_shows_the_page_without_errors_requests_or_sideways_scrolling(
    tmp_path: Path, width: int, dark: bool
) -> None:
    page = tmp_path / "run.html"
    page.write_text(render_page(report(tokens=2000, vram=0.3)).replace("</body>", PROBE + "</body>"))
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    [found] = re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    seen = json.loads(found)
    assert [name for name in seen["resources"] if not name.startswith("data:")] == []
    assert seen["content"] <= seen["width"]
    assert seen["time"].startswith("Tokens ")
    assert re.match(r"Layer 0, expert 0: [\d,]+ requests", seen["heat"])
    assert (seen["background"] == "rgb(16, 20, 27)") == dark
