"""The files of a checkpoint that are not weights: config, tokenizer, templates, processors, licences."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quant.writer import write_file, writing

_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt",
    ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz",
)  # fmt: skip


_ANY_CHUNK = 8192


def sidecars(source: Path) -> Iterator[Path]:
    """Paths, relative to ``source``, of the files that travel with the weights; hidden ones do not."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if (
            path.is_file()
            and not hidden
            and not path.name.endswith(_WEIGHTS)
            and str(relative) != "config.json"
        ):
            yield relative


def sidecar_bytes(source: Path) -> int:
    """Bytes of the sidecars of ``source``."""
    return sum((source / path).stat().st_size for path in sidecars(source))


def copy_sidecars(source: Path, destination: Path) -> None:
    """Copy the sidecars of ``source``; links are followed. Raises OutputError."""
    for path in sidecars(source):
        with writing(destination / path):
            (destination / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, destination / path)


def write_config(destination: Path, config: dict[str, Any], quantization_config: dict[str, Any]) -> None:
    """Write config.json with ``quantization_config``, and with what transformers would refuse put right.

    Some published Llama 4 configs have ``attn_temperature_tuning: 4``, which transformers' type check
    rejects, or ``attention_chunk_size: null``, which means that no layer is chunked.
    """
    config = json.loads(json.dumps(config))
    for section in (config, config.get("text_config") or {}):
        if not isinstance(section.get("attn_temperature_tuning", False), bool):
            section["attn_temperature_tuning"] = bool(section["attn_temperature_tuning"])
        if section.get("attention_chunk_size", 0) is None and "num_hidden_layers" in section:
            section["layer_types"] = ["full_attention"] * section["num_hidden_layers"]
            section["attention_chunk_size"] = (
                _ANY_CHUNK  # transformers wants a number even where nobody reads it
            )
    config["quantization_config"] = quantization_config
    write_file(destination / "config.json", json.dumps(config, indent=2).encode() + b"\n")
