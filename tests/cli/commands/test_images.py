"""Images from the command line: ``generate --image`` and ``/image`` in a chat."""

import json
from pathlib import Path

import pytest

from quant.convert.quantize import quantize
from tests import images
from tests.commands import invoke


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    quantize(images.make_model(folder / "source"), folder / "int4", experts="int4-g32")
    return folder / "int4"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "a picture.png", tmp_path / "other.jpg"]
    for seed, file in enumerate(files):
        images.picture(40 + 30 * seed, 30, seed=seed).save(file)
    return files


def test_generate_puts_images_before_the_prompt_or_where_it_says(seeing: Path, pictures: list[Path]) -> None:
    words = [word for file in pictures for word in ("--image", file)]
    before, placed = (
        json.loads(invoke("generate", seeing, prompt, *words, "-n", "3", "--ignore-eos", "--json").stdout)
        for prompt in ("what?", "<|image|><|image|>what?")
    )
    assert before["text"] == placed["text"] and before["prompt_tokens"] == placed["prompt_tokens"] > 40
    alone = json.loads(invoke("generate", seeing, "what?", "-n", "3", "--ignore-eos", "--json").stdout)
    assert alone["prompt_tokens"] < 10
    chat = json.loads(invoke("generate", seeing, "what?", *words, "--chat", "-n", "3", "--json").stdout)
    assert chat["prompt_tokens"] > before["prompt_tokens"]


def test_a_chat_is_shown_images_and_saves_where_they_were(seeing: Path, pictures: list[Path], tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    talk = f"/image '{pictures[0]}' what is this?\n/image {pictures[1]}\nand this?\n"
    talk += f"/save {saved}\n/image\n/image none.png\n"
    done = invoke("chat", seeing, "-n", "3", stdin=talk)
    asked = [m for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]
    assert asked == [
        {"role": "user", "content": "what is this?", "images": [str(pictures[0])]},
        {"role": "user", "content": "and this?", "images": [str(pictures[1])]},
    ]
    assert "is shown with the next message" in done.stderr
    assert "/image needs a path" in done.stderr and "none.png is missing" in done.stderr


@pytest.mark.parametrize(
    ("content", "prompt", "said"),
    [(b"no image", "x", "is no image that can be read"), (None, "<|image|> <|image|>", "2 places for images")],
)
def test_what_cannot_be_shown_is_one_line(
    content: bytes | None, prompt: str, said: str, seeing: Path, pictures: list[Path]
) -> None:
    if content is not None:
        pictures[0].write_bytes(content)
    done = invoke("generate", seeing, prompt, "--image", pictures[0], "-n", "1")
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [(), ("--no-images",)], ids=["text", "no room"])
def test_a_chat_goes_on_after_an_image_that_cannot_be_looked_at(
    words: tuple[str, ...], seeing: Path, model: Path, pictures: list[Path]
) -> None:
    talk = f"/image '{pictures[0]}' what?\n/image {pictures[1]}\nHello\n"
    done = invoke("chat", seeing if words else model, *words, "-n", "2", "--json", stdin=talk)
    assert done.returncode == 0, done.stderr
    assert [m["content"] for m in json.loads(done.stdout)["messages"] if m["role"] == "user"] == ["Hello"]


def test_a_chat_goes_on_after_an_image_for_which_there_is_no_room(seeing: Path, pictures: list[Path]) -> None:
    talk = f"/image '{pictures[0]}'\n{'word ' * 200}\nHello\n"
    done = invoke("chat", seeing, "--context", "100", "-n", "2", stdin=talk)
    assert "nothing is shown any more" in done.stderr and done.stderr.count("coldstream: error") == 1
    assert "tokens/s" in done.stderr, "Hello was answered"


def test_a_model_of_text_says_that_it_cannot_look(model: Path, pictures: list[Path]) -> None:
    done = invoke("generate", model, "x", "--image", pictures[0], "-n", "1")
    assert done.returncode != 0 and "reads text only" in done.stderr


def test_a_video_is_shown_by_generate_and_chat(seeing: Path, tmp_path: Path) -> None:
    film, saved = images.make_video(tmp_path / "a film.mp4"), tmp_path / "talk.json"
    two, five = (
        json.loads(invoke("generate", seeing, "x", "--video", film, "--frames", n, "-n", "1", "--json").stdout)
        for n in ("2", "5")
    )
    rows = (five["prompt_tokens"] - two["prompt_tokens"]) / 3
    assert rows == int(rows) >= 5, "as many more for each picture"
    talk = f"/video '{film}' what is this?\n/save {saved}\n/video\n/video {saved}\n"
    done = invoke("chat", seeing, "-n", "3", stdin=talk)
    asked = [m for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]
    assert asked == [{"role": "user", "content": "what is this?", "videos": [str(film)]}]
    assert "/video needs a path" in done.stderr and "cannot be read as a video" in done.stderr
    alone = invoke("generate", seeing, "x", "--frames", "2")
    assert alone.returncode == 2 and "--frames" in alone.stderr


def test_a_profile_says_what_images_ask_for_apart(seeing: Path, pictures: list[Path], tmp_path: Path) -> None:
    text, first, both = tmp_path / "t.txt", tmp_path / "first.json", tmp_path / "both.json"
    text.write_text("some words to run " * 5)
    shown = [word for file in pictures for word in ("--image", file)]
    done = invoke("profile", seeing, *shown, "--out", first, "--context", "400", "--json")
    assert done.returncode == 0, done.stderr
    alone = json.loads(first.read_text())
    assert 0 < alone["image_tokens"] < alone["tokens"], "each image has tokens around its rows"
    assert json.loads(done.stdout)["image_overlap"] and alone["trace"] is None
    words = ("profile", seeing, "--text", text, *shown, "--out", both, "--context", "400")
    merged = json.loads(invoke(*words, "--merge", first, "--json").stdout)
    found = json.loads(both.read_text())
    assert merged["image_tokens"] == found["image_tokens"] == 2 * alone["image_tokens"]
    assert found["image_counts"] == [[2 * n for n in row] for row in alone["image_counts"]]
    assert all(0 < share <= 1 for share in merged["image_overlap"])
    assert "images alike" in invoke(*words).stderr
    nothing = invoke("profile", seeing, "--out", both)
    assert nothing.returncode == 2 and "--text" in nothing.stderr
    damaged = {**found, "image_counts": [[10**6] * len(row) for row in found["counts"]]}
    both.write_text(json.dumps(damaged))
    assert "damaged" in invoke("generate", seeing, "x", "--routing", both).stderr
