"""What a fuzzed command starts from: small models and files that are all as they should be."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from offload.hardware import probe
from tests import checkpoints
from tests.commands import invoke
from tests.machines import machine

_TEXT = "The quick brown fox jumps over the lazy dog; 0123456789.\n" * 12
_RECIPE = """description = "A recipe."

[weights]
group_size = 32
experts = "int4"
attention = "int8"
lm_head = "int8"

[run]
ram = "1GiB"
context = 64
"""
_SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 128}
MACHINE = "cache/coldstream/machine.json"  # its name on disk is the machine's own


def make_ground(folder: Path) -> Path:
    """Fill ``folder``: models ``source`` (two shards), ``stored`` (quantized), ``vision``, ``qwen``, ``mixtral``; files
    ``text.txt``, ``recipe.toml``, ``routing.json``, ``trace.json``, ``imatrix.safetensors`` and the machine as it
    was measured."""
    folder.mkdir(parents=True)
    checkpoints.make("llama4_text", folder / "source", shards=2, num_local_experts=4, **_SMALL)
    checkpoints.make("llama4", folder / "vision", num_local_experts=2, **_SMALL)
    checkpoints.make("qwen3_moe", folder / "qwen", num_experts=4, **_SMALL)
    checkpoints.make("mixtral", folder / "mixtral", num_local_experts=4, **_SMALL)
    (folder / "text.txt").write_text(_TEXT)
    (folder / "recipe.toml").write_text(_RECIPE)
    keep_machine(folder)
    text, profiled = folder / "text.txt", ("--tokens", "64", "--device", "cpu")
    for words in (
        ("quantize", folder / "source", folder / "stored", "--recipe", folder / "recipe.toml"),
        ("profile", folder / "stored", "--text", text, "--out", folder / "routing.json", *profiled),
        ("profile", folder / "stored", "--text", text, "--out", folder / "trace.json", *profiled, "--trace"),
        (
            *("quantize", folder / "source", folder / "other", "--experts", "int4-g32", "--rounding", "rtn"),
            *("--imatrix", text, "--save-imatrix", folder / "imatrix.safetensors"),
        ),
    ):
        done = invoke(*words, "-q")
        assert done.returncode == 0, (words, done.stderr)
    shutil.rmtree(folder / "other")
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "eos_token_id": [3, 4]}
    (folder / "stored" / "generation_config.json").write_text(json.dumps(sampled))
    return folder


def measure_nothing() -> None:
    """Have this process take the machine for what it is in tests: no input changes what it is, and to measure it takes
    seconds whenever a case has spoiled what was kept."""
    probe._measure = lambda *_: dataclasses.replace(machine(), quiet=True)


def keep_machine(folder: Path) -> None:
    """Have this machine measured in ``folder/cache``, just now: what is kept longer is looked at again."""
    now = time.time()
    kept = dataclasses.replace(machine(), measured_at=now, looked_at=now, quiet=True)
    file = folder / MACHINE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept.to_json()))


def place_machine(folder: Path) -> None:
    """Give the machine's file the name under which this machine looks for it."""
    file = folder / MACHINE
    if file.is_file():
        file.rename(file.with_name(probe._cache_file(folder).name))
