"""Hit rates of every cache policy on the demo model's routing and on made-up routing: the tables of
docs/policy.md.

    coldstream quantize recipes/demo MODEL --recipe demo
    coldstream profile MODEL --text recipes/demo/calibration.txt --trace --out routing.json
    python -m tests.bench.policies routing.json [--tokens 8192]

Replays are exact: there is no noise. The last line is one JSON document.
"""

import argparse
import json
from pathlib import Path

from offload.routing.eviction import POLICIES
from offload.routing.policy_replay import CLAIRVOYANT, PolicyHitRates, replay_policies
from offload.routing.trace import RULES, Synthetic, Trace, load_trace

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
CHUNKS = {1: "decode", 512: "prompt chunks of 512 tokens"}


def table(done: PolicyHitRates) -> str:
    """Hit rates in percent as a Markdown table, policies down, cache sizes across."""
    total = len(done.trace.keys)
    heads = [f"{count} ({count / total:.0%})" for count in done.slots]
    lines = ["| policy | " + " | ".join(heads) + " | below the bound |", "|---|" + "---:|" * (len(heads) + 1)]
    for name, rates in done.hit_rates.items():
        cells = [f"{100 * rate:.1f}" for rate in rates]
        below = "" if name == CLAIRVOYANT else f"{100 * done.regret(name):.1f}"
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {below} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    recorded = load_trace(arguments.trace).head(arguments.tokens)
    traces: dict[str, Trace] = {"demo model": recorded}
    traces |= {rule: Synthetic(rule, tokens=4096).trace() for rule in RULES}
    document: dict[str, dict[str, object]] = {}
    for chunk, what in CHUNKS.items():
        for name, trace in traces.items():
            slots = [round(len(trace.keys) * share) for share in SHARES]
            done = replay_policies(trace, slots, chunk=chunk)
            print(f"\n{name}, {what}, {len(trace.steps):,} tokens\n\n{table(done)}", flush=True)
            document[f"{name}, {what}"] = {
                "slots": slots,
                "hit_rates": done.hit_rates,
                "below_bound": {policy: done.regret(policy) for policy in POLICIES},
            }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
