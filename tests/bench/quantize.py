"""Speed and peak memory of quantizing one MoE layer in Scout's true shape: 4 GB of bf16 experts.

    python -m tests.bench.quantize [--folder /tmp] [--layers 1] [--vocab 2048] [--scheme int4] [--repeat 3]

Each run is a process of its own, so that its peak RSS counts the imports and nothing else. ``cold`` runs
begin with the source dropped from the page cache, so they include the disk's reading; ``warm`` ones do not.
Writing always ends on the disk (fdatasync). The last line is one JSON document. The source is removed at the
end.

Noise: other processes on the machine move the figures by 20 % and more; the median of the runs is shown.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from quant.checkpoint.layout import StoredTensor, lay_out
from quant.model.shape import ModelShape

# What was expected before the first measurement, on 2 cores with a disk of 1 GB/s: torch's import 280 MB, two
# source slices of 168 MB, two results of 44 MB, and the kernel's 1.6 GB/s shared with reading and writing.
PREDICTED = {"peak_rss_mb": 750, "mb_per_s": 800}
BARS = {"peak_rss_mb": 1500, "mb_per_s": 400}
_RUN = """
import json, resource, sys
from pathlib import Path
from quant.convert.convert import convert
from quant.scheme import Scheme
schemes = dict.fromkeys(sys.argv[4].split(","), Scheme.parse(sys.argv[3]))
report = convert(Path(sys.argv[1]), Path(sys.argv[2]), schemes)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"mb_per_s": report.mb_per_s, "seconds": report.seconds, "peak_rss_mb": peak / 1e6}))
"""


def scout_layers(folder: Path, layers: int, vocab: int) -> Path:
    """A Llama 4 checkpoint of ``layers`` MoE layers in Scout's shape, its experts fused."""

    config = {
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": layers,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocab,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shape = ModelShape.from_config(config)
    tensors = [StoredTensor(spec.key, "BF16", spec.shape) for spec in shape.plain_tensors()]
    tensors += [
        StoredTensor(f"{spec.module}.weight", "BF16", (spec.out_features, spec.in_features))
        for spec in shape.dense_linears()
    ]
    for layer in shape.moe_layers:
        base = f"{shape.layer_prefix(layer)}feed_forward.experts."
        tensors.append(StoredTensor(f"{base}gate_up_proj", "BF16", (16, 5120, 16384)))
        tensors.append(StoredTensor(f"{base}down_proj", "BF16", (16, 8192, 5120)))
    file = lay_out("model.safetensors", tensors, [])
    generator = torch.Generator().manual_seed(1)
    block = (torch.randn(2**25 + 4096, generator=generator) * 0.02).bfloat16().view(torch.uint8).numpy()
    with (folder / file.name).open("wb") as stream:
        stream.write(file.header)
        left, turn = file.nbytes - file.data_start, 0
        while left:
            start = turn * 74 % 8192  # another start each time: no two experts are equal
            left -= stream.write(block[start : start + min(left, 2**26)].data)
            turn += 1
        stream.flush()
        os.fsync(stream.fileno())
    return folder


def run(source: Path, destination: Path, scheme: str, roles: str, cold: bool) -> dict[str, float]:
    """Quantize in a fresh process and return its figures."""
    if cold:
        for file in source.glob("*.safetensors"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
    command = [sys.executable, "-c", _RUN, str(source), str(destination), scheme, roles]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(destination)
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=2048, help="202048: head and embeddings of 2 GB each")
    parser.add_argument("--scheme", default="int4")
    parser.add_argument(
        "--roles", default="experts,lm_head", help="experts,shared_expert,attention: with imagined inputs"
    )
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    work = options.folder / f"bench-quantize-{os.getpid()}"
    work.mkdir()
    try:
        source = scout_layers(work / "source", options.layers, options.vocab)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        result: dict[str, object] = {"source_bytes": size, "scheme": options.scheme, "cores": os.cpu_count()}
        for name, cold in (("warm", False), ("cold", True)):
            runs = [run(source, work / "out", options.scheme, options.roles, cold) for _ in range(options.repeat)]
            figures = {key: round(statistics.median(r[key] for r in runs), 1) for key in runs[0]}
            spread = [round(f(r["mb_per_s"] for r in runs), 1) for f in (min, max)]
            print(f"{name}: {figures}, MB/s from {spread[0]} to {spread[1]}", file=sys.stderr)
            result[name] = {**figures, "mb_per_s_range": spread}
        print(f"predicted: {PREDICTED}, bars: {BARS}", file=sys.stderr)
        print(json.dumps({**result, "predicted": PREDICTED, "bars": BARS}))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
