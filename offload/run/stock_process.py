"""Runs a checkpoint as a Python user tries first: transformers, with accelerate's map over GPU, RAM and disk. A process
of its own: a JSON document on stdin, a line of JSON on stdout for each thing that has happened.

It imports nothing of the project, so that nothing of it takes memory beside the model.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import compute_module_sizes
from transformers import AutoModelForCausalLM
from transformers.utils import logging

_WARM_UP = 8  # tokens


def main() -> None:
    """For ``{path, prompt, tokens, memory, folder}`` say ``{loaded, placed}``, ``{prefill}``, then ``{token}`` for
    each, all in seconds; ``placed`` are bytes by tier. ``memory`` are bytes by device, empty for all there is; what is
    offloaded to disk may be written to ``folder``."""
    asked = json.load(sys.stdin)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    started = time.perf_counter()
    memory = {int(name) if name.isdecimal() else name: size for name, size in asked["memory"].items()}
    model: Any = AutoModelForCausalLM.from_pretrained(
        asked["path"], device_map="auto", max_memory=memory or None, offload_folder=asked["folder"], dtype="auto"
    )
    _say(loaded=time.perf_counter() - started, placed=_placed(model))
    with torch.inference_mode():
        _decode(model, asked["prompt"][:_WARM_UP], 1, told=False)
        _decode(model, asked["prompt"], asked["tokens"], told=True)


def _decode(model: Any, prompt: list[int], tokens: int, *, told: bool) -> None:
    inputs, cache, device = torch.tensor([prompt]), None, model.get_input_embeddings().weight.device
    for step in range(tokens + 1):
        started = time.perf_counter()
        out = model(
            input_ids=inputs.to("cpu" if device.type == "meta" else device), past_key_values=cache, use_cache=True
        )
        inputs, cache = out.logits[:, -1].argmax(-1, keepdim=True).cpu(), out.past_key_values
        if told:
            _say(**{"token" if step else "prefill": time.perf_counter() - started})


def _placed(model: Any) -> dict[str, int]:
    """Bytes of the model by tier, by accelerate's map."""
    sizes = compute_module_sizes(model)
    found = {"vram": 0, "ram": 0, "disk": 0}
    for module, device in (getattr(model, "hf_device_map", None) or {"": model.device}).items():
        tier = str(device) if str(device) == "disk" else "ram" if str(device) == "cpu" else "vram"
        found[tier] += int(sizes.get(module, 0))
    return found


def _say(**told: Any) -> None:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({**told, "peak_rss_bytes": int(peak.split()[1]) * 1024}), flush=True)


if __name__ == "__main__":
    main()
