"""From text to token ids: as the tokenizer itself does it, and never by running a model's code."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from offload.text.tokenizer import check_ids, encode, encode_chat, load_tokenizer
from quant.errors import CheckpointError, InputError, UsageError
from tests.malicious import make_malicious
from tests.tokenizers import SPECIAL, byte_level, with_bos

BEGIN = SPECIAL[0]
EVERY_BYTE = tuple(bytes([byte]) for byte in range(256))


def test_a_text_begins_as_the_tokenizer_begins_one() -> None:
    plain = byte_level(EVERY_BYTE, bos_token=BEGIN)
    assert encode(plain, "Hi") == [72, 105], "it knows a beginning of text and adds none"
    adding = with_bos(byte_level(EVERY_BYTE), BEGIN)
    begin = adding.convert_tokens_to_ids(BEGIN)
    assert encode(adding, "Hi") == [begin, 72, 105]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("setting", [True, False, None])
def test_it_is_as_transformers_reads_the_files(tmp_path: Path, adds: bool, setting: bool | None) -> None:
    made = byte_level(EVERY_BYTE, bos_token=BEGIN)
    (with_bos(made, BEGIN) if adds else made).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    config = tmp_path / "tokenizer_config.json"
    values = json.loads(config.read_text()) | ({} if setting is None else {"add_bos_token": setting})
    config.write_text(json.dumps(values))
    assert encode(load_tokenizer(tmp_path), "Hi") == AutoTokenizer.from_pretrained(tmp_path)("Hi")["input_ids"]


def test_a_beginning_that_is_spelled_out_or_in_the_template_is_not_doubled() -> None:
    tokenizer = with_bos(byte_level(EVERY_BYTE), BEGIN)
    begin = tokenizer.convert_tokens_to_ids(BEGIN)
    assert encode(tokenizer, BEGIN + "Hi") == [begin, 72, 105]
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert encode_chat(tokenizer, [{"role": "user", "content": "Hi"}]) == [begin, 72, 105]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert encode_chat(tokenizer, [{"role": "user", "content": "Hi"}]) == [72, 105]


def test_the_demo_models_texts_begin_as_it_was_trained(demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    assert encode(tokenizer, "import os")[0] == tokenizer.bos_token_id == 0
    assert encode_chat(tokenizer, [{"role": "user", "content": "?"}]).count(0) == 1


def test_no_template_is_said() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        encode_chat(byte_level(), [{"role": "user", "content": "?"}])


def test_half_a_character_is_no_text() -> None:
    tokenizer = byte_level(EVERY_BYTE, chat_template="{{ messages[0].content }}")
    for give in (encode, lambda made, text: encode_chat(made, [{"role": "user", "content": text}])):
        with pytest.raises(InputError, match=r"character 3 is '\\udce9'"):
            give(tokenizer, "caf\udce9")


def test_a_token_beyond_the_embedding_is_named() -> None:
    check_ids([0, 255], 256)
    check_ids([], 256)
    with pytest.raises(CheckpointError, match=r"token 256 .* ends at 255"):
        check_ids([3, 256, 0], 256)


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_code_beside_a_tokenizer_is_never_run_and_nobody_is_asked(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny(family), folder)
    mark = make_malicious(folder)
    read, write = os.pipe()
    os.write(write, b"y\n" * 8)
    os.close(write)
    with os.fdopen(read) as consent:
        monkeypatch.setattr("sys.stdin", consent)
        if family == "mixtral":  # its tokenizer has a class in transformers
            assert encode(load_tokenizer(folder), "Hi")
        else:
            with pytest.raises(CheckpointError, match="never runs"):
                load_tokenizer(folder)
        assert consent.read() == "y\n" * 8
    assert not mark.exists()


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "null", '{"model": {}}', '{"version": "1.0", "model": 3}', "\x00", "[" * 5000]
)
def test_a_broken_tokenizer_is_one_line(tiny: Callable[..., Path], tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("mixtral"), folder)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can load") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_a_config_that_transformers_itself_refuses_does_not_matter(
    tiny: Callable[..., Path], tmp_path: Path, kind: str | None
) -> None:
    folder = shutil.copytree(tiny("llama4_text"), tmp_path / "model")
    for name, key, value in (
        ("config.json", "attn_temperature_tuning", 4),
        ("tokenizer_config.json", "tokenizer_class", kind),
    ):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, key: value}))
    assert encode(load_tokenizer(folder), "Hi") == encode(load_tokenizer(tiny("llama4_text")), "Hi")
