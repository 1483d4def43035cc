"""A prompt with images runs as stock transformers runs it, wherever the experts are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from offload.records import RunOptions
from offload.run.session import Session
from offload.text.tokenizer import load_tokenizer
from offload.vision.processor import ImageProcessor
from offload.vision.video_file import Video
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.quantize import quantize
from quant.errors import InputError, UsageError
from tests import checkpoints, images, oracle, sessions

SPLITS: dict[str, dict[str, Any]] = {
    "all in ram": {"ram_slots": 64},
    "three slots, the rest on disk": {"ram_slots": 3, "fills": False},
    "device window": {"ram_slots": 4, "vram_slots": 5, "fills": False},
}
SEEN = [images.picture(100, 30, seed=1), images.picture(20, 90, seed=3)]  # seven tiles each
TEXT = "what <|image|> is, and <|image|> is not:"
NEW = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    source = images.make_model(folder / "source")
    quantize(source, folder / "int4", experts="int4-g32", attention="int8-g32")
    return source, folder / "int4"


@pytest.fixture(scope="module")
def stock(models: tuple[Path, Path]) -> Any:
    return oracle.stock(*models)


def _session(model: Path, **placed: Any) -> Session:
    """Prompts run in chunks that end within an image; the text is longer than an attention chunk."""
    options = RunOptions(context=400, exact=True, images=True)
    return sessions.session(model, options, **{"ram_slots": 64, "prompt_chunk": 10, **placed})


def _expected(model: Path, stock: Any, text: str, seen: list[Image.Image]) -> tuple[torch.Tensor, list[int]]:
    processor = ImageProcessor(Checkpoint.open(model), load_tokenizer(model))
    ids, pixels = processor.encode(text, seen, add_special_tokens=True)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": torch.cat(pixels).float()}
    with torch.inference_mode():
        logits = stock(**inputs).logits[0, -1]
        text_ids = stock.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    return logits, text_ids[0, len(ids) :].tolist()


def test_an_int8_tower_is_planned_with_and_gives_stock_text(models: tuple[Path, Path], tmp_path: Path) -> None:
    from offload.plan.planned_run import planned_run
    from tests.machines import machine

    quantize(models[0], tmp_path / "int8", experts="int4-g32", attention="int8-g32", vision="int8-g32")
    on_disk = [planned_run(str(path), RunOptions(), machine=machine()).plan for path in (models[1], tmp_path / "int8")]
    assert on_disk[1].total("disk", "vision") < 0.75 * on_disk[0].total("disk", "vision")
    expected = _expected(tmp_path / "int8", oracle.stock(models[0], tmp_path / "int8"), TEXT, SEEN)
    with _session(tmp_path / "int8", **SPLITS["three slots, the rest on disk"]) as session:
        ids = session.encode(TEXT, SEEN)
        torch.testing.assert_close(sessions.prompt_logits(session, ids), expected[0], atol=1e-4, rtol=1e-4)
        session.reset()
        made = [record.token_id for record in session.generate(ids, max_tokens=NEW, ignore_eos=True)]
    assert made == expected[1]


@pytest.mark.parametrize("split", SPLITS)
def test_logits_and_greedy_text_equal_stock_transformers(split: str, models: tuple[Path, Path], stock: Any) -> None:
    _, quantized = models
    logits, tokens = _expected(quantized, stock, TEXT, SEEN)
    with _session(quantized, **SPLITS[split]) as session:
        ids = session.encode(TEXT, SEEN)
        session.prefill(ids)
        session.reset()
        seen = sessions.prompt_logits(session, ids)
        torch.testing.assert_close(seen, logits, atol=1e-4, rtol=1e-4)
        session.reset()
        made = [record.token_id for record in session.generate(ids, max_tokens=NEW, ignore_eos=True)]
    assert made == tokens


def test_an_image_is_found_in_the_prompt_cache_by_what_it_shows(models: tuple[Path, Path], tmp_path: Path) -> None:
    options = RunOptions(context=400, images=True, prompt_cache=tmp_path)
    text, found = f"{TEXT}{' word' * 20}", list[list[int]]()  # both images are in the first block of 128 tokens
    for before, seen, disk in (([], SEEN, 0), (SEEN[1:], SEEN, 128), ([], SEEN[::-1], 0)):
        with sessions.session(models[1], options, ram_slots=64) as session:
            for picture in before:  # then the same image has other ids
                session.encode("<|image|>", [picture])
            ids = session.encode(text, seen)
            records = list(session.generate(ids, max_tokens=NEW, ignore_eos=True))
            assert records[0].reused.disk == disk
            found.append([record.token_id for record in records])
    assert found[0] == found[1]


def test_a_conversation_runs_what_is_new_alone_and_another_image_is_another_prompt(
    models: tuple[Path, Path], stock: Any
) -> None:
    _, quantized = models
    first, second = ({"type": "image", "image": image} for image in SEEN)
    with _session(quantized) as session:

        def ask(*parts: dict[str, Any], history: list[dict[str, Any]]) -> tuple[int, list[int]]:
            ids = session.encode_chat([*history, {"role": "user", "content": list(parts)}])
            records = list(session.generate(ids, max_tokens=3, ignore_eos=True))
            return records[0].tokens_in, [record.token_id for record in records]

        text = {"type": "text", "text": " what?"}
        whole, answer = ask(first, text, history=[])
        again, same = ask(first, text, history=[])
        assert (again, same) == (1, answer)
        other, different = ask(second, text, history=[])
        assert other > again and other > 28
        session.reset()
        assert ask(second, text, history=[])[1] == different
        told = [{"role": "user", "content": [second, text]}, {"role": "assistant", "content": "x"}]
        more, _ = ask({"type": "text", "text": "and?"}, history=told)
        assert more < 28 < whole  # the image itself is not run again


def test_sampling_and_penalties_take_no_row_for_a_token(models: tuple[Path, Path]) -> None:
    with _session(models[1]) as session:
        ids = session.encode("", SEEN[:1])
        asked = {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 1}
        records = list(session.generate(ids, max_tokens=4, ignore_eos=True, **asked))
        assert all(0 <= record.token_id < images.VOCABULARY for record in records)


def test_images_that_cannot_be_looked_at_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoints.make("llama4_text", tmp_path / "text")
    blind = sessions.session(models[1], RunOptions(context=64), ram_slots=64)
    reader = sessions.session(tmp_path / "text", RunOptions(context=64, images=True), ram_slots=64)
    with blind, reader, _session(models[1]) as session:
        with pytest.raises(UsageError, match="kept no room"):
            blind.encode("", SEEN)
        with pytest.raises(UsageError, match="reads text only"):
            reader.encode("", SEEN)
        with pytest.raises(InputError, match="tiles: expected at most 136"):
            session.encode("", [images.picture(100, 30, seed=seed) for seed in range(40)])
        with pytest.raises(InputError, match="1 places"):
            session.encode("<|image|>", SEEN)
        with pytest.raises(UsageError, match="without 'image'"):
            session.encode_chat([{"role": "user", "content": [{"type": "image"}]}])


def test_the_plan_counts_what_looking_takes(models: tuple[Path, Path]) -> None:
    from offload.plan.planned_run import planned_run
    from tests.machines import machine

    plain = planned_run(str(models[1]), RunOptions(), machine=machine()).plan
    seeing = planned_run(str(models[1]), RunOptions(images=True), machine=machine()).plan
    assert plain.total("ram", "images") == 0 < seeing.total("ram", "images")


def test_a_video_is_its_pictures_each_after_its_time(models: tuple[Path, Path], tmp_path: Path) -> None:
    film = Video(images.make_video(tmp_path / "v.mp4"), 3)
    with sessions.session(models[1], RunOptions(context=400, images=True), ram_slots=64) as session:
        frames = film.sampled(28)
        told = "".join(f"{frame.clock} <|image|>\n" for frame in frames)
        pictures = [frame.image for frame in frames]
        assert session.encode("see <|image|> now", [film]) == session.encode(f"see {told} now", pictures)
        assert session.encode("what?", [SEEN[0], film]) == session.encode(f"<|image|>{told}what?", [SEEN[0], *pictures])
        part = {"type": "video", "video": film}
        turn = {"role": "user", "content": [part, {"type": "text", "text": "what?"}]}
        plain = session._looking().encode(f"[user] {told}what?[assistant] ", pictures, add_special_tokens=False)
        assert session.encode_chat([turn]) == plain
        with pytest.raises(UsageError, match="without 'video'"):
            session.encode_chat([{"role": "user", "content": [{"type": "video"}]}])
