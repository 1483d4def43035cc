"""The ruler: this project's roundings beside its peers' on the same tensors of the demo model.

    pip install gguf   (for Q4_0 and Q8_0 only)
    python -m tests.bench.quality [--calibrate] [--windows 32]

Routed experts, shared expert and attention are quantized, dequantized by each format's own code (``gguf``'s
quants, bitsandbytes, ``quant.pack``) and put into the stock transformers model, which runs the first 32
windows of 512 tokens of held_out.txt in f32 (``--windows 0``: all 81). Mean KL divergence is to the bf16
weights, over all tokens, with its standard error as of independent tokens;
perplexity over all but each window's last. ``--calibrate`` adds what needs calibration.txt, GPTQ, importance
matrix and chosen bits (many minutes), and GPTQ on calibration-long.txt. The last line is one JSON document.

Noise: a rounding decision is one draw. Moving every weight by 2 % of its standard deviation before rounding
moves mean KL by about 0.001 and perplexity by 0.2 (one standard deviation), more than most roundings differ
in perplexity.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from offload.quality.windows import Windows
from offload.text.tokenizer import load_tokenizer
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import find_weight
from quant.model.families import Role
from quant.pack import Packed, dequantize, dequantize_nf4, quantize_absmax, quantize_nf4
from quant.rounding.rounding import Search
from quant.scheme import Scheme

DEMO = Path(__file__).resolve().parent.parent.parent / "recipes" / "demo"
ROLES: tuple[Role, ...] = ("experts", "shared_expert", "attention")
BARS = {"search int4-g128": 0.055}
CALIBRATE = ("--calibrate", str(DEMO / "calibration.txt"))
RECIPES = {"quality": 4.90, "scout-rtx4090": 4.35, "maverick-rtx4090": 4.35, "demo": 4.79}  # bits, of ROLES
IMATRIX = ("--imatrix", str(DEMO / "calibration.txt"))
Method = Callable[[str, Tensor], Tensor]


class Ruler:
    """A stock model (the demo model, or one like it), whose weights can be replaced, and its original predictions."""

    def __init__(self, windows: int | None, folder: Path = DEMO) -> None:
        self.folder = folder
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.ids = Windows.cut((DEMO / "held_out.txt").read_text(), load_tokenizer(folder), 512, windows).ids
        self.weights = dict(self._weights())
        self.original = {module: weight.clone() for module, weight in self.weights.items()}
        self.reference = [self._predict(window) for window in self.ids]

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every quantized Linear's weight ``[N, K]`` as a view of the model's parameters, by checkpoint
        module."""
        shape, parameters = Checkpoint.open(self.folder).shape, dict(self.model.named_parameters())
        for spec in shape.dense_linears():
            if spec.role in ROLES:
                yield spec.module, parameters[f"{spec.module}.weight"].data
        for layer in shape.moe_layers:
            base = f"model.layers.{layer}.feed_forward.experts."
            gate_up, down = parameters[f"{base}gate_up_proj"].data, parameters[f"{base}down_proj"].data
            for expert in range(shape.num_experts):
                gate, up = gate_up[expert].chunk(2, 1)
                yield f"{base}{expert}.gate_proj", gate.t()
                yield f"{base}{expert}.up_proj", up.t()
                yield f"{base}{expert}.down_proj", down[expert].t()

    @torch.inference_mode()
    def _predict(self, window: Tensor) -> Tensor:
        return torch.log_softmax(self.model(input_ids=window[None], use_cache=False).logits[0].float(), -1)

    @torch.inference_mode()
    def measure(self, method: Method) -> dict[str, float]:
        """Mean KL divergence and perplexity with every weight replaced by what ``method`` makes of it."""
        for module, weight in self.weights.items():
            weight.copy_(method(module, self.original[module].contiguous()))
        divergences, losses = [], []
        for window, reference in zip(self.ids, self.reference, strict=True):
            found = self._predict(window)
            divergences.append((reference.exp() * (reference - found)).sum(-1))
            losses.append(-found[:-1].gather(1, window[1:, None]))
        kl = torch.cat(divergences)
        return {
            "kl": kl.mean().item(),
            "kl_error": kl.std().item() / math.sqrt(len(kl)),
            "perplexity": math.exp(torch.cat(losses).mean().item()),
        }


def gguf(kind: str) -> Method:
    """The ``gguf`` package's own quantize and dequantize."""
    from gguf import GGMLQuantizationType, quants

    wanted = GGMLQuantizationType[kind]
    return lambda module, weight: torch.from_numpy(
        quants.dequantize(quants.quantize(weight.numpy(), wanted), wanted).copy()
    )


def searched(scheme: Scheme) -> Method:
    """The default, without data."""
    rounder = Search(Checkpoint.open(DEMO))

    def stored(module: str, weight: Tensor) -> Tensor:
        tensors = rounder.encode(weight, scheme, module, False, module, 0).tensors
        return dequantize(Packed(scheme, tensors["weight_packed"], tensors["weight_scale"]))

    return stored


def nearest(scheme: Scheme) -> Method:
    """To nearest by absmax."""
    return lambda module, weight: dequantize(quantize_absmax(weight, scheme))


def calibrated(schemes: Mapping[Role, Scheme], text: str = "calibration.txt", passes: int = 0) -> Method:
    """GPTQ on ``text``, tuned in so many ``passes``, through the command's own code."""
    from offload.quality.calibrate import calibrate
    from quant.convert.convert import convert
    from quant.rounding.prepared import Prepared

    source = Checkpoint.open(DEMO)
    windows = Windows.cut((DEMO / text).read_text(), load_tokenizer(DEMO), 512)
    folder = Path(tempfile.mkdtemp())
    seen = calibrate(source, schemes, windows, folder / "work", passes=passes)
    print(*seen.notes(), sep="\n", file=sys.stderr)
    convert(DEMO, folder / "out", schemes, rounder=Prepared(folder / "work", "gptq", Search(source)))
    return stored_in(folder / "out")


def command(*asked: str, model: Path = DEMO) -> Method:
    """What ``coldstream quantize`` makes of ``model``, the head left alone."""
    folder = Path(tempfile.mkdtemp()) / "out"
    words = ("quantize", str(model), str(folder), "--lm-head", "bf16", *asked)
    subprocess.run([sys.executable, "-m", "cli.main", *words], check=True, cwd=DEMO.parent.parent)
    return stored_in(folder)


def stored_in(folder: Path) -> Method:
    """The weights of a quantized checkpoint."""
    packed = Checkpoint.open(folder)
    specs = {spec.module: spec for spec in packed.shape.linears()}

    def stored(module: str, weight: Tensor) -> Tensor:
        scheme, entries = find_weight(packed, specs[module])
        tensors = {suffix: packed.read(entry.key) for suffix, entry in entries.items()}
        return dequantize(Packed(scheme, tensors["weight_packed"], tensors["weight_scale"]))

    return stored


def _by_hand(scheme: str) -> list[str]:
    return [word for role in ROLES for word in (f"--{role.replace('_', '-')}", scheme)]


def measured_row(ruler: Ruler, name: str, bits: float, method: Method) -> dict[str, float]:
    """What ``method``, of so many ``bits`` per weight, costs by ``ruler``; its row is printed."""
    row = {"bits": bits, **ruler.measure(method)}
    kl, error, perplexity = (row[key] for key in ("kl", "kl_error", "perplexity"))
    print(f"{name:40} {bits:6.3f} bits  KL {kl:.4f} ± {error:.4f}  perplexity {perplexity:.2f}", flush=True)
    return row


def main() -> None:
    """Print a line per method as it is measured, then the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    arguments = parser.parse_args()
    ruler = Ruler(arguments.windows or None)
    methods: dict[str, tuple[float, Callable[[], Method]]] = {
        "bf16": (16, lambda: lambda module, weight: weight),
        "Q8_0": (8.5, lambda: gguf("Q8_0")),
        "rtn int8-g128": (8.125, lambda: nearest(Scheme("int8"))),
        "search int8-g128": (8.125, lambda: searched(Scheme("int8"))),
        "Q4_0": (4.5, lambda: gguf("Q4_0")),
        "nf4 b64": (4.5, lambda: lambda module, weight: dequantize_nf4(quantize_nf4(weight))),
        "rtn int4-g32": (4.5, lambda: nearest(Scheme("int4", 32))),
        "rtn int4-g128": (4.125, lambda: nearest(Scheme("int4"))),
        "search int4-g32": (4.5, lambda: searched(Scheme("int4", 32))),
        "search int4-g128": (4.125, lambda: searched(Scheme("int4"))),
    }
    if arguments.calibrate:
        for text in ("int4-g128", "int4-g32", "int8-g128"):
            scheme = Scheme.parse(text)
            schemes = dict.fromkeys(ROLES, scheme)
            methods[f"gptq {text}"] = (scheme.bits_per_weight, partial(calibrated, schemes))
            methods[f"imatrix {text}"] = (scheme.bits_per_weight, partial(command, *_by_hand(text), *IMATRIX))
        longer = partial(calibrated, dict.fromkeys(ROLES, Scheme("int4")), "calibration-long.txt")
        methods["gptq int4-g128, longer text"] = (4.125, longer)
        methods["gptq int4-g128, longer text, tuned"] = (4.125, partial(longer, passes=6))
        for bits in ("4.25", "4.5", "5"):
            target = ("--target-bits", bits)
            methods[f"target {bits}"] = (float(bits), partial(command, *target))
            methods[f"target {bits}, imatrix"] = (float(bits), partial(command, *target, *IMATRIX))
            methods[f"target {bits}, gptq"] = (float(bits), partial(command, *target, *CALIBRATE))
            uneven = (*target, "--per-expert", *CALIBRATE)
            methods[f"uneven {bits}, gptq"] = (float(bits), partial(command, *uneven))
        for recipe, mean in RECIPES.items():
            methods[f"recipe {recipe}"] = (mean, partial(command, "--recipe", recipe))
            methods[f"recipe {recipe}, gptq"] = (mean, partial(command, "--recipe", recipe, *CALIBRATE))
    found: dict[str, dict[str, float]] = {}
    for name, (bits, make) in methods.items():
        if arguments.only not in name:
            continue
        try:
            method = make()
        except ImportError as error:
            print(f"{name:18} skipped: {error}")
            continue
        found[name] = measured_row(ruler, name, bits, method)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
