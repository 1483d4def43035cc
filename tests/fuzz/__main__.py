"""``python -m tests.fuzz --seconds N --seed S [--inputs N] [--only plan,quantize]``: draw and run cases; keep each new
fault in ``corpus``, as few edits as show it."""

import argparse
import faulthandler
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path
from random import Random

import torch

from tests import conftest  # noqa: F401  no network, Triton's interpreter
from tests.fuzz.cases import BASES, Case, draw
from tests.fuzz.ground import make_ground, measure_nothing
from tests.fuzz.outcome import Outcome, outcome

_KINDS = ("ran", "refused", "traceback", "wrong", "different", "slow", "memory")
CORPUS = Path(__file__).parent / "corpus"


def minimised(case: Case, found: Outcome, ground: Path, folder: Path) -> Case:
    """``case`` with as few changes as still end in the fault ``found``."""
    while True:
        for less in case.smaller():
            again = outcome(less, ground, folder)
            if (again.kind, again.sign) == (found.kind, found.sign):
                case = less
                break
        else:
            return case
        if not case.edits:
            return case


def main() -> int:
    """Exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--inputs", type=int, default=2**63, help="stop after so many, if that is sooner")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", default=",".join(BASES), help="commands, with commas between them")
    asked = parser.parse_args()
    commands = tuple(asked.only.split(","))
    faulthandler.enable()
    measure_nothing()
    torch.set_num_threads(1)  # tiny models are no work for more
    counts: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    per_command: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory(prefix="coldstream-fuzz-") as temporary:
        ground, folder = make_ground(Path(temporary) / "ground"), Path(temporary) / "case"
        last = Path(tempfile.gettempdir()) / f"coldstream-fuzz-{asked.seed}.json"  # stays if the process dies
        random, end = Random(asked.seed), time.monotonic() + asked.seconds
        while time.monotonic() < end and counts.total() < asked.inputs:
            case = draw(random, commands)
            last.write_text(str(case))
            found = outcome(case, ground, folder)
            counts[found.kind] += 1
            judged[found.judged] += found.kind == "ran"
            per_command[case.command] += 1
            if counts.total() % 500 == 0:
                print(f"{counts.total()} inputs, {len(seen)} faults", file=sys.stderr, flush=True)
            if found.is_fault and (found.kind, found.sign) not in seen:
                seen.add((found.kind, found.sign))
                if found.kind not in ("slow", "memory"):
                    case = minimised(case, found, ground, folder)
                name = sha256(f"{found.kind} {found.sign}".encode()).hexdigest()[:8]
                file = CORPUS / f"{case.command}-{found.kind}-{name}.json"
                file.write_text(str(case))
                said = found.said.strip().splitlines()
                print(f"{file.name}: {found.sign}\n    {said[-1][:300] if said else ''}", flush=True)
        last.unlink()
    told = ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS)
    print(f"seed {asked.seed}: {counts.total()} inputs: {told}; {len(seen)} faults")
    print("answers held against " + ", ".join(f"{name} {count}" for name, count in judged.most_common()))
    print(", ".join(f"{name} {count}" for name, count in per_command.most_common()))
    return 1 if seen else 0


if __name__ == "__main__":
    raise SystemExit(main())
