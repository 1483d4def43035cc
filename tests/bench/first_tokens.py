"""What a routing profile is worth to a run's first tokens on a CPU: requests that find their expert in RAM, with a
profile of such text and without; a row of docs/policy.md.

    coldstream quantize recipes/demo MODEL --recipe demo
    coldstream profile MODEL --text recipes/demo/calibration.txt --out routing.json
    python -m tests.bench.first_tokens MODEL routing.json recipes/demo/held_out.txt

The text is cut into windows, each is read token by token in a session of its own. The last line is one JSON
document.
"""

import argparse
import json
import statistics
from pathlib import Path

from offload.experts.storage.store import ExpertStore
from offload.records import RunOptions
from offload.text.tokenizer import load_tokenizer
from quant.checkpoint.checkpoint import Checkpoint
from tests import sessions

TOKENS = 64
FIRST = 16  # of them, counted apart too
PARTS = (0.25, 0.5, 0.75)  # of all experts that RAM holds


def hits(model: Path, routing: Path | None, slots: int, ids: list[int]) -> list[int]:
    """Of each token of ``ids``, the requests that found their expert in one of ``slots``."""
    options = RunOptions(context=256, routing=routing, threads=1, device="cpu")
    found: list[int] = []
    with sessions.session(model, options, ram_slots=slots) as session:
        for end in range(1, len(ids) + 1):
            session.experts.wait()  # what is being read has arrived: no figure depends on the disk's speed
            found.append(session.prefill(ids[:end]).hits)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("routing", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    arguments = parser.parse_args()
    store = ExpertStore(Checkpoint.open(arguments.model))
    ids = load_tokenizer(arguments.model).encode(arguments.text.read_text())
    starts = [len(ids) * window // arguments.windows for window in range(arguments.windows)]
    requests = len(store.shape.moe_layers) * store.shape.top_k
    document: dict[str, dict[str, list[float]]] = {}
    print(
        f"| hits of the first {TOKENS} tokens (of the first {FIRST}), % | without | with a profile |\n|---|---:|---:|"
    )
    for part in PARTS:
        slots = round(part * store.count)
        rates: dict[str, list[float]] = {}
        for name, routing in (("without", None), ("with", arguments.routing)):
            runs = [hits(arguments.model, routing, slots, ids[start : start + TOKENS]) for start in starts]
            rates[name] = [
                100 * statistics.mean(sum(run[:count]) / (requests * count) for run in runs)
                for count in (TOKENS, FIRST)
            ]
        cells = [f"{whole:.1f} ({first:.1f})" for whole, first in rates.values()]
        print(f"| {slots} of {store.count} experts in RAM | " + " | ".join(cells) + " |", flush=True)
        document[str(slots)] = rates
    print(json.dumps(document))


if __name__ == "__main__":
    main()
