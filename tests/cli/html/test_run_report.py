"""The report page: complete, self-contained, escaped; and looked at in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from importlib.resources import files
from itertools import combinations
from math import dist
from pathlib import Path

import pytest

from cli.html.byte_roles import COLOURS, largest_roles
from cli.html.run_report import render_page, write_page
from offload.run.report import Message, RunReport, RunRequest
from quant.errors import OutputError
from tests.reports import report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = """<script>alert(1)</script><img src=x onerror="alert(2)">' & </title>"""

# Added to a copy of the page: tries what a reader would and writes down what the browser saw. "Nothing yet" is
# what stays if a promise is never kept.
PROBE = """<pre id="probe">nothing yet</pre><script>(async () => {
const key = (target, name) => target.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
const plot = document.querySelector("[data-readout=time]"), map = document.getElementById("heat");
const text = (id) => document.getElementById(id).textContent, seen = {};
plot.focus();
key(plot, "End");
key(map, "ArrowRight");
seen.time = text("time-readout"); seen.heat = text("heat-readout");
document.querySelector("[name=across][value=use]").click();
key(map, "ArrowRight");
seen.sorted = text("heat-readout");
seen.background = getComputedStyle(document.body).backgroundColor;
document.getElementById("theme").click(); document.getElementById("theme").click();
const kept = localStorage.getItem("coldstream-theme");
seen.toggled = [text("theme"), getComputedStyle(document.body).backgroundColor, kept];
const link = document.getElementById("download");
link.addEventListener("click", (event) => event.preventDefault());
link.click();
seen.download = [link.download, link.href.slice(0, 5)];
const mine = document.getElementById("report").textContent, other = JSON.parse(mine);
other.decode.tokens_per_s *= 2; other.model = EVIL; other.prefill.tokens_per_s /= 11;
const pick = async (name, content) => {
  const files = new DataTransfer(), input = document.getElementById("compare-file");
  const before = document.getElementById("comparison");
  const file = new File([content], name);
  files.items.add(file);
  input.files = files.files;
  input.dispatchEvent(new Event("change"));
  const shown = () => document.getElementById("comparison");
  // Reading a file takes real time, which virtual time runs ahead of unless there is something to do at every moment.
  for (let tries = 0; tries < 200000 && (!shown() || shown() === before); tries++)
    await new Promise((done) => setTimeout(done, 1));
  return shown().innerText;
};
seen.nonsense = await pick("notes.txt", "Dear diary");
seen.compared = await pick("other.json", JSON.stringify(other));
const slow = JSON.parse(mine), decoded = slow.timeline.phase.lastIndexOf("decode");
for (let back = 0; back < 10; back++) slow.timeline.ms[decoded - back] = 98765;
seen.slow = await pick("slow.json", JSON.stringify(slow));
seen.images = document.images.length;
seen.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
seen.width = innerWidth; seen.content = document.documentElement.scrollWidth;
document.body.style.width = "375px";
const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
seen.collisions = [];
for (const place of document.querySelectorAll(".canvas, .ticks-x")) {
  const labels = [...place.querySelectorAll(".tag, .ticks-x > span")];
  for (const one of labels) for (const other of labels)
    if (one !== other && meet(one.getBoundingClientRect(), other.getBoundingClientRect()))
      seen.collisions.push([one.textContent, other.textContent]);
}
seen.labels = document.querySelectorAll(".canvas .tag").length;
document.getElementById("probe").textContent = JSON.stringify(seen);
})();</script>"""


TALK = (Message("user", "Why?"), Message("assistant", "Because."))


class Outline(HTMLParser):
    """Tags in order, checked to nest, and the text between them."""

    VOID = ("meta", "link", "path", "rect", "br", "input")

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
    plain = outline(render_page(report(tokens=10))).tags.count("script")
    parsed = outline(page)
    assert parsed.tags.count("img") == 0
    assert parsed.tags.count("script") == plain
    assert "alert(1)</script>" not in page.replace("&lt;/script&gt;", "")


@pytest.mark.parametrize(
    "said", [EVIL, "<b>bold</b>", "]]>", "<!--", "</pre></section>", "\x00\x1b[31m\x07\x7f", "\ud800"]
)
def test_what_was_asked_and_answered_stays_text(said: str, tmp_path: Path) -> None:
    plain = replace(report(tokens=10), request=RunRequest("a", {"experts": "a"}, 1, 1, (Message("user", "a"),)))
    asked = RunRequest(said, {said: said}, 1, 1, (Message("user", said), Message(said, said)))
    run = replace(report(tokens=10), request=asked, doubts=(said,))
    write_page(run, tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    parsed = outline(page)
    for tag in ("script", "img", "b", "section"):
        assert parsed.tags.count(tag) == outline(render_page(plain)).tags.count(tag), tag
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page)
    [data] = re.findall(r'<script type="application/json" id="report">(.*?)</script>', page, re.S)
    assert json.loads(data)["request"]["messages"][0]["content"] == said


def test_the_page_begins_with_what_was_run_asked_and_answered() -> None:
    asked = RunRequest("coldstream generate m 'Why?'", {"experts": "int4-g128"}, 9 * 2**30, 0, TALK)
    text = outline(render_page(replace(report(tokens=10), request=asked))).text
    first = [text.index(said) for said in (asked.command_line, "int4-g128", "9.00 GiB of RAM", "AnswerBecause.")]
    assert first == sorted(first)
    assert first[-1] < text.index("Where a token’s time went")


def test_at_most_six_colours_tell_roles_apart_and_small_ones_share_one() -> None:
    roles = {f"role_{index}": 2**index for index in range(12)}
    memory = replace(report(tokens=5).memory, ram=roles, disk={"experts": 5000, "norm": 1})
    shown = largest_roles(memory)
    assert shown == ["experts", "role_11", "role_10", "role_9", "role_8"]
    assert len(shown) == COLOURS - 1
    few = {"experts": 50, "attention": 50}
    assert largest_roles(replace(memory, ram=few, disk=few)) == ["experts", "attention"]


def test_the_data_of_the_page_can_be_taken_out_again() -> None:
    run = report(tokens=20)
    [data] = re.findall(r'<script type="application/json" id="report">(.*?)</script>', render_page(run), re.S)
    assert json.loads(data)["decode"]["tokens"] == run.decode.tokens


def test_thousands_of_tokens_and_experts_are_drawn_within_few_shapes() -> None:
    page = render_page(report(tokens=5000, layers=24, experts=128, vram=0.4))
    assert outline(page).tags.count("path") < 100


def test_a_page_replaces_an_earlier_page_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="found no directory"):
        write_page(report(tokens=5), tmp_path / "no" / "such" / "folder.html")
    page = tmp_path / "run.html"
    page.write_text("<!doctype html><title>My thesis</title>")
    with pytest.raises(OutputError, match="not of this kind"):
        write_page(report(tokens=5), page)
    page.unlink()
    write_page(report(tokens=5), page)
    first = page.read_text()
    write_page(report(tokens=6), page)
    assert page.read_text() != first


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_marks_stand_out_from_their_background(theme: int) -> None:
    """WCAG 2: 4.5 to 1 for text, 3 to 1 for graphics, against the card they lie on."""
    colours = palette(theme)
    for name in ("ink", "quiet", "doubt"):
        assert _contrast(colours[name], colours["card"]) >= 4.5, name
        assert _contrast(colours[name], colours["page"]) >= 4.5, name
    assert _contrast(colours["doubt"], colours["doubt-card"]) >= 4.5
    for name in ("vram", "ram", "disk", "mark", "rest", "theirs", *ROLES):
        assert _contrast(colours[name], colours["card"]) >= 2.95, name


ROLES = [f"role{index}" for index in range(COLOURS)]
# Machado et al. 2009, severity 1: what linear red, green and blue look like to most colour-blind readers.
SEEN_BY = {
    "all cones": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "no red cones": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green cones": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "no blue cones": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("eyes", SEEN_BY)
def test_the_colours_of_roles_differ_whatever_cones_a_reader_has(theme: int, eyes: str) -> None:
    """By distance in Oklab, where 0.02 is just noticeable side by side."""
    colours = palette(theme)
    places = {
        name: oklab([sum(m * c for m, c in zip(row, _linear(colours[name]), strict=True)) for row in SEEN_BY[eyes]])
        for name in ROLES
    }
    for one, other in combinations(ROLES, 2):
        assert dist(places[one], places[other]) > 0.08, (one, other)


def oklab(linear: Sequence[float]) -> tuple[float, ...]:
    """Ottosson's perceptual space, from linear red, green and blue."""
    r, g, b = (min(max(channel, 0.0), 1.0) for channel in linear)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def palette(theme: int) -> dict[str, str]:
    """The colours by name, of the light page (0) or the dark one."""
    style = files("cli").joinpath("html", "assets", "page.css").read_text()
    pairs = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\)", style)
    return {name: colours[theme] for name, *colours in pairs}


def _linear(colour: str) -> list[float]:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        linear = _linear(colour)
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium to look at the page, and none is on the PATH")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (500, True)])
def test_a_browser_shows_the_page_and_all_that_its_scripts_add(tmp_path: Path, width: int, dark: bool) -> None:
    page, run = (
        tmp_path / "run.html",
        replace(report(tokens=2000, vram=0.3), request=RunRequest("x" * 300, {}, 1, 1, TALK)),
    )
    probe = PROBE.replace("EVIL", json.dumps(EVIL).replace("<", "\\u003c"))
    page.write_text(render_page(run).replace("</body>", probe + "</body>"))
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=4000000",
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
    seen = json.loads(unescape(found))
    assert [name for name in seen["resources"] if not name.startswith("data:")] == []
    assert seen["content"] <= seen["width"]
    assert seen["labels"] >= 3 and seen["collisions"] == []
    assert seen["time"].startswith("Tokens ")
    requests = re.compile(r"Layer 0, expert (\d+): ([\d,]+) requests")
    first, most = requests.match(seen["heat"]), requests.match(seen["sorted"])
    assert first and most
    assert (first[1], int(most[2].replace(",", ""))) == ("0", max(run.expert_map.counts[0]))
    assert (seen["background"] == "rgb(16, 20, 27)") == dark
    assert seen["toggled"] == ["Theme: dark", "rgb(16, 20, 27)", "dark"]
    assert seen["download"] == ["Llama-4-Scout-17B-16E-int4.json", "blob:"]
    assert "expected a report page" in seen["nonsense"]
    assert "−50 %, worse" in seen["compared"] and "11×, better" in seen["compared"]
    assert EVIL in seen["compared"]
    assert "cut off: 98,765 ms" in seen["slow"] and "cut off" not in seen["compared"]
    assert seen["images"] == 0
