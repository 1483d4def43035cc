"""What the GPU bench found, judged and put into words: bars, and a page of tables for docs/."""

from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]


def bars(found: Found) -> list[dict[str, Any]]:
    """Each bar with its value; ``met`` is None where the section did not run."""
    scout, tests = _part(found, "scout"), _part(found, "tests")
    decode, prefill = _part(scout, "decode"), _part(scout, "prefill")
    within = None
    if "vram_peak" in scout:
        within = scout["vram_peak"] / scout["vram_budget"]
    ratio = decode.get("simulated_over_measured")
    off = None if ratio is None else abs(ratio - 1)
    return [
        _bar("tests marked gpu", tests.get("passed"), "all pass", lambda value: bool(value)),
        _bar("greedy tokens agree on every path", _part(found, "agreement").get("identical"), "identical", bool),
        _bar("decode, of the floor", decode.get("of_floor"), "≥ 0.7, aim 0.85", lambda value: value >= 0.7),
        _bar("prefill of 2,048, of the floor", prefill.get("of_floor"), "≥ 0.5, aim 0.8", lambda v: v >= 0.5),
        _bar("VRAM as the driver sees it, of --vram", within, "≤ 1", lambda value: value <= 1),
        _bar("simulator, off the measured decode", off, "≤ 0.2, aim 0.1", lambda value: value <= 0.2),
    ]


def _bar(name: str, value: Any, bar: str, met: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "bar": bar, "met": None if value is None else bool(met(value))}


def _part(found: Found, name: str) -> Found:
    """A section that ran, or nothing."""
    part = found.get(name)
    return part if isinstance(part, Mapping) and not {"failed", "skipped"} & part.keys() else {}


def slug(found: Found) -> str:
    """The card's name as a file name."""
    name = _name(found).lower().replace("nvidia", "").replace("geforce", "")
    return "-".join("".join(c if c.isalnum() else " " for c in name).split()) or "card"


def _name(found: Found) -> str:
    gpu = _part(found, "machine").get("gpu") or _part(found, "card")
    return str(gpu.get("name", "card"))


def markdown(found: Found) -> str:
    """The page: what was measured on which machine, section by section, failures included."""
    parts = [_head(found), _bars(found), _scout(found), _kernels(found), _agreement(found), _troubles(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(found: Found) -> str:
    machine = _part(found, "machine")
    gpu, versions = machine.get("gpu") or {}, machine.get("versions") or {}
    lines = [f"# Measured: {_name(found)}", "", "`python -m tests.bench.gpu`"]
    if machine:
        lines += [
            "",
            f"{machine['cpu']}, {machine['cores']} cores; RAM {_n(machine['ram_gb_s'])} GB/s, with the bus "
            f"at once {_n(gpu.get('together_gb_s'))}; PCIe {_n(gpu.get('h2d_gb_s'))} GB/s to the card; VRAM "
            f"{_n(gpu.get('vram_gb_s'))} GB/s; bf16 {_n(gpu.get('bf16_tflops'))} TFLOP/s; disk "
            f"{_n(machine['disk_gb_s'])} GB/s. {_ahead(machine.get('warming'))}"
            f"torch {versions.get('torch')}, triton {versions.get('triton')}.",
        ]
    return "\n".join(lines)


def _ahead(part: Found | None) -> str:
    """What ``tests.bench.warming`` found of the host alone."""
    if not part:
        return ""
    times = ", ".join(f"{_n(ms)} ({float(mib):.0f} MiB)" for mib, ms in part["ms_by_mib"].items())
    return (
        f"An expert of {_n(part['expert_mb'])} MB takes the CPU, by what it read ahead into its caches, ms: "
        f"{times}; products from the caches {_n(part.get('cached_gb_s'))} GB/s. "
    )


def _bars(found: Found) -> str:
    rows = [
        f"| {bar['name']} | {_n(bar['value'])} | {bar['bar']} | {_met(bar['met'])} |" for bar in found.get("bars", ())
    ]
    return "\n".join(["| | measured | bar | |", "|---|---:|---|---|", *rows])


def _met(met: bool | None) -> str:
    return "not run" if met is None else "met" if met else "**missed**"


def _scout(found: Found) -> str:
    rows = []
    for name, title in (("scout", "one CUDA graph"), ("no-graph", "`--no-graph`")):
        part = _part(found, name)
        if not part:
            continue
        decode, prefill = part["decode"], part["prefill"]
        hits = " / ".join(f"{100 * decode['hit_rates'][tier]:.0f}" for tier in ("vram", "ram", "disk"))
        rows.append(
            f"| {title} | {_n(decode['tokens_per_s'])} | {_n(decode['ms'])} | {_n(decode['floor_ms'])} | "
            f"{_n(decode['of_floor'])} | {_n(decode['simulated_tokens_per_s'])} | "
            f"{_n(decode['planned_tokens_per_s'])} | {hits} % | {_n(prefill['tokens_per_s'])} | "
            f"{_n(prefill['of_floor'])} | {_n(prefill['simulated_tokens_per_s'])} | "
            f"{_gib(part['vram_peak'])} of {_gib(part['vram_budget'])} |"
        )
    if not rows:
        return ""
    layers = next(_part(found, name)["layers"] for name in ("scout", "no-graph") if _part(found, name))
    head = (
        "| decode as | tok/s | ms | floor ms | of it | simulated | planned | VRAM / RAM / disk | "
        "prefill tok/s | of floor | simulated | VRAM by the driver |"
    )
    rule = "|---|" + "---:|" * 11
    told = _warming(_part(found, "scout").get("warming"))
    title = f"## Scout, {layers} of 48 layers, random weights in int4"
    return "\n".join([title, "", head, rule, *rows, *told])


def _warming(part: Found | None) -> list[str]:
    if part is None:
        return []
    return [
        "",
        f"Reading up to {part['budget'] / 2**20:.0f} MiB of a coming miss into the CPU's caches: "
        f"{_n(part['ms_with'])} ms per token with it, {_n(part['ms_without'])} without; "
        f"{100 * part['foreseen']:.0f} % of {part['asked']:,} missed experts were foreseen, "
        f"{_n(part['mb_per_hint'])} MB read per hint.",
    ]


def _kernels(found: Found) -> str:
    kernels = _part(found, "kernels")
    rows = []
    for name, figures in kernels.items():
        if "failed" in figures or "skipped" in figures:
            rows.append(f"| {name} | {figures.get('failed') or figures.get('skipped')} | | |")
        elif "of_bandwidth" in figures:
            cells = (_n(figures["gb_s"]) + " GB/s", _n(figures["of_bandwidth"]), _n(figures["us_each"]))
            rows.append(f"| {name} | {' | '.join(cells)} |")
        else:
            listed = ", ".join(f"{key} {_n(value)}" for key, value in figures.items())
            rows.append(f"| {name} | {listed} | | |")
    head = ["## Kernels", "", "| | rate | of the bandwidth | µs each |", "|---|---:|---:|---:|"]
    return "\n".join([*head, *rows]) if rows else ""


def _agreement(found: Found) -> str:
    part = _part(found, "agreement")
    if not part:
        return ""
    of = " ".join(map(str, part["of"]))
    rows = [
        f"| {name} | {part['kernels'][name]} | {' '.join(map(str, agreed))} of {of} |"
        for name, agreed in part["agreed_tokens"].items()
    ]
    title = "## Greedy tokens on the demo model: how many agree with the CPU's, prompt by prompt"
    return "\n".join([title, "", "| path | kernels | agree |", "|---|---|---|", *rows])


def _troubles(found: Found) -> str:
    rows = []
    for name, part in found.items():
        if isinstance(part, Mapping) and (trouble := part.get("failed") or part.get("skipped")):
            rows += [f"* {name}: {trouble}", *(f"      {line}" for line in part.get("said", ()))]
    if absent := (found.get("prepared") or {}).get("missing_optional"):
        rows.append(f"* not installed, their tests are skipped: {', '.join(absent)}")
    failures = _part(found, "tests").get("failures", ())
    rows += [f"* test failed: {name}" for name in failures]
    for name in ("agreement", "scout"):
        rows += [f"* {name}: {note}" for note in _part(found, name).get("notes", ())]
    return "\n".join(["## Failed, skipped, noted", "", *rows]) if rows else ""


def _n(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
