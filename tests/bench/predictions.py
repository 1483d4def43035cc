"""What plans predict beside what runs take, on this machine: the accuracy table of docs/planning.md.

    coldstream synth mini-scout MODEL
    python -m tests.bench.predictions MODEL all 3GiB 2.2GiB 1.2GiB

Each budget gets a session of its own; the machine is measured again right before its run, and the plan made
from that. Other programs disturb both: the speeds mean something on an idle machine only. The last line is
one JSON document.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from offload.hardware.probe import probe
from offload.plan.planner import make_plan
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.checkpoint.inventory import schemes_of_tensors
from quant.sizes import parse_size

PROMPT, DECODED, CONTEXT = 512, 64, 1024


@dataclass(frozen=True)
class Compared:
    """Tokens per second, predicted and measured, and memory in bytes, planned and resident at the peak."""

    ram: str
    slots: int
    experts: int
    ram_gb_s: float
    disk_gb_s: float
    int8_gops: float
    decode_predicted: float
    decode: float
    prefill_predicted: float
    prefill: float

    def row(self) -> str:
        """One line of a Markdown table."""
        pairs = ((self.decode_predicted, self.decode), (self.prefill_predicted, self.prefill))
        cells = [f"{p:.1f} | {m:.1f} | {p / m - 1:+.0%}".replace("-", "−") for p, m in pairs]
        rates = f"{self.ram_gb_s:.0f} / {self.disk_gb_s:.1f} GB/s"
        return f"| {self.ram} | {self.slots} of {self.experts} | {rates} | {' | '.join(cells)} |"


def compare(model: Path, ram: str) -> Compared:
    """Run ``model`` within ``ram`` and plan the same run."""
    budget = None if ram == "all" else parse_size(ram)
    with Session.open(model, RunOptions(ram=budget, context=CONTEXT, device="cpu")) as session:
        span = session.shape.vocab_size - 200
        prompt = [100 + index * 7919 % span for index in range(PROMPT)]
        list(session.generate(prompt[:300], Sampling(max_tokens=20, ignore_eos=True)))
        machine = probe(model, refresh=True)
        session.reset()
        first, *rest = session.generate(prompt, Sampling(max_tokens=DECODED + 1, ignore_eos=True))
        plan = make_plan(
            session.shape,
            schemes_of_tensors(session.checkpoint),
            machine,
            vram=0,
            ram=session.plan.ram,
            context=CONTEXT,
            prompt_chunk=session.plan.prompt_chunk,
            slot_bytes=session.plan.slot_bytes,
        )
    return Compared(
        ram=ram,
        slots=plan.ram_slots,
        experts=plan.experts,
        ram_gb_s=machine.ram_gb_s,
        disk_gb_s=machine.disk_gb_s,
        int8_gops=machine.int8_gops,
        decode_predicted=plan.predicted_tokens_per_s,
        decode=len(rest) / sum(record.seconds for record in rest),
        prefill_predicted=plan.predicted_prefill_tokens_per_s,
        prefill=PROMPT / first.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("ram", nargs="+", help="budgets, or all")
    arguments = parser.parse_args()
    print("| --ram | experts in RAM | RAM / disk | decode, planned | run | | prefill, planned | run | |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    found = []
    for ram in arguments.ram:
        found.append(compare(arguments.model, ram))
        print(found[-1].row(), flush=True)
    print(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
