"""``coldstream demo``: the whole path on the model that ships with the package, telling what it does."""

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from shutil import rmtree, which
from typing import Annotated, Any

import typer

from cli.options.output import takes_console
from cli.options.typed import typed_path
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from cli.terminal.visible import visible
from offload.records import RunOptions, Sampling

Keep = Annotated[
    Path,
    typer.Option(
        "--keep",
        parser=typed_path,
        metavar="DIR",
        help="Where model, profile and report page are left; an earlier demo's go.",
    ),
]

PROMPT = "def read(path):"
TOKENS = 96
PROFILE_TOKENS = 8192
CONTEXT = 1024
CHUNK = 64
RECIPE = "demo"
MODEL, PROFILE, PAGE = "model", "routing.json", "run.html"


@takes_console
def demo(console: Console, keep: Keep = Path("coldstream-demo")) -> None:
    """The whole path on the embedded model: quantize, profile, plan, generate, report.

    The model is a small Llama 4 (9 MB), trained on Python's standard library: what it writes looks like
    Python and means little.
    """
    with seldom_collecting():
        import torch  # noqa: F401  (before there is a folder to tidy up: Ctrl-C ends an import on the spot)

    started = time.perf_counter()
    with ExitStack() as stack:
        _clear(keep)
        source = stack.enter_context(as_file(files("recipes").joinpath("demo")))
        document = Demo(_near(source), keep, console).run()
    seconds = time.perf_counter() - started
    console.say(f"\nDone in {seconds:.0f} s. Next:")
    if which("coldstream") is None:
        console.prose(
            f"   source {_near(Path(sys.prefix, 'bin', 'activate'))}    so that your shell finds coldstream", 3
        )
    console.prose(f"   open {keep / PAGE} in a browser: where every byte was, and what a token's time went to", 3)
    console.prose(f"   coldstream chat {keep / MODEL}", 3)
    console.prose("   coldstream plan scout    what a model of 109 billion weights would need on this machine", 3)
    console.result({**document, "seconds": seconds, "kept": keep})


def _near(path: Path) -> Path:
    """``path`` as somebody would type it: from here, where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _clear(keep: Path) -> None:
    """Make ``keep`` an empty directory that can be written. Raises OutputError if it has what no demo made."""
    from offload.documents import PAGE_MARK
    from offload.routing.trace import PROFILE_MARK
    from quant.convert.convert import REPORT
    from quant.errors import OutputError
    from quant.output_file import check_output, writing

    if keep.exists() and not keep.is_dir():
        raise OutputError(f"{keep} is a file: name a new directory for --keep")
    with writing(keep, resumable=False):
        keep.mkdir(parents=True, exist_ok=True)
        made = {MODEL: REPORT, f"{MODEL}.partial": "lock"}  # a file in each that shows whose it is
        for entry in keep.iterdir():
            ours = entry.name in made and (entry / made[entry.name]).is_file()
            if not ours and entry.name not in (PROFILE, PAGE):
                raise OutputError(f"{keep} is not empty, and not an earlier demo's: name a new directory for --keep")
        for name, mark in ((PROFILE, PROFILE_MARK), (PAGE, PAGE_MARK)):
            check_output(keep / name, "--keep", mark)
            (keep / name).unlink(missing_ok=True)
        for name in made:
            if (keep / name).exists():
                rmtree(keep / name)


class Demo:
    """The five steps, each saying what it does and the command that does the same."""

    def __init__(self, source: Path, folder: Path, console: Console) -> None:
        self.source, self.folder, self.console = source, folder, console
        self.model, self.routing, self.page = folder / MODEL, folder / PROFILE, folder / PAGE
        self.step = 0
        self.options = RunOptions(context=CONTEXT, prompt_chunk=CHUNK, routing=self.routing, device="cpu")

    def run(self) -> dict[str, Any]:
        """All steps; what each found, by its command's name."""
        return {
            "quantize": self.quantize(),
            "profile": self.profile(),
            "plan": self.plan(),
            "generate": self.generate(),
        }

    def heading(self, title: str, command: str) -> None:
        """Say what comes now and how to do it by hand."""
        self.step += 1
        self.console.say()
        self.console.prose(f"{self.step}. {title}", 3)
        self.console.say(f"   $ coldstream {command}")

    def _result(self, text: str) -> None:
        """Say what came of it."""
        self.console.prose(f"   {text}", 3)

    def quantize(self) -> dict[str, Any]:
        """By the packaged recipe."""
        from cli.terminal.words import size
        from quant.convert.convert import convert
        from quant.model.recipe import load_recipe

        recipe = load_recipe(RECIPE)
        self.heading(
            "Quantize: routed and shared experts to 4 bits.", f"quantize {self.source} {self.model} --recipe {RECIPE}"
        )
        done = convert(self.source, self.model, recipe.schemes)
        self._result(
            f"{size(done.source_bytes)} became {size(done.output_bytes)}, "
            f"{done.bits_per_weight:.2f} bits per weight of the whole checkpoint, in {done.seconds:.1f} s"
        )
        return done.to_json()

    def profile(self) -> dict[str, Any]:
        """Run text the model was trained on, and keep which experts it asked for."""
        from cli.commands.profile import heat_map, profile_document, run_text
        from cli.steps.open_model import open_session
        from cli.steps.texts import read_text
        from cli.terminal.words import percent

        self.heading(
            "Profile: which experts does text ask for?",
            f"profile {self.model} --text {self.source / 'calibration.txt'} --out {self.routing}",
        )
        quiet = Console(json=True)
        with open_session(self.model, RunOptions(context=CONTEXT, device="cpu"), quiet) as session:
            text = read_text(self.source / "calibration.txt")
            seconds = run_text(session, text, PROFILE_TOKENS, quiet)
            stats = session.routing
            stats.save(self.routing)
        skew = stats.skew()
        quarter = sum(layer.top25 for layer in skew) / len(skew)
        self._result(
            f"{stats.tokens:,} tokens in {seconds:.1f} s; the most used quarter of the experts takes "
            f"{percent(quarter)} of the requests"
        )
        self.console.say()
        self.console.say(heat_map(stats))
        return profile_document(stats, self.routing, stats.tokens, seconds)

    def plan(self) -> dict[str, Any]:
        """Where every byte of the coming run goes, with RAM for about half of the experts."""
        from cli.terminal.words import limit_name, number, percent, size
        from offload.experts.storage.store import ExpertStore
        from offload.hardware.probe import probe
        from offload.plan.planned_run import PlannedModel, planned_run
        from quant.checkpoint.checkpoint import Checkpoint
        from quant.checkpoint.inventory import schemes_of_tensors, wider_bytes

        checkpoint = Checkpoint.open(self.model)
        model = PlannedModel(
            checkpoint.shape, schemes_of_tensors(checkpoint), "as stored", wider=wider_bytes(checkpoint)
        )
        fitted = partial(planned_run, model, machine=probe(self.model), slot_bytes=ExpertStore(checkpoint).slot_bytes)
        roomy = fitted(self.options).plan
        some = roomy.experts * 7 // 16
        ram = (roomy.total("ram") - roomy.framework_bytes - roomy.slot_bytes * some) // 1024 * 1024
        self.options = replace(self.options, ram=ram)
        plan = fitted(self.options).plan
        self.heading(
            "Plan: RAM for about half of the experts. Where does every byte go, and how fast will it be?",
            f"plan {self.model} --ram {ram // 1024}KiB --context {CONTEXT} --prompt-chunk {CHUNK} "
            f"--routing {self.routing}",
        )
        self._result(
            f"{size(plan.total('ram') - plan.framework_bytes)} of the model in RAM, beside "
            f"{size(plan.framework_bytes)} of Python and its libraries"
        )
        self._result(
            f"{plan.ram_slots} of {plan.experts} experts at a time, the others read from disk "
            f"when asked for: {percent(plan.hit_rates['ram'])} hits expected"
        )
        self._result(
            f"{number(plan.predicted_tokens_per_s)} tokens/s decode and "
            f"{number(plan.predicted_prefill_tokens_per_s)} prefill predicted, limited by {limit_name(plan.limited_by)}"
        )
        return plan.to_json()

    def generate(self) -> dict[str, Any]:
        """Answer a question, then the report, on the terminal and as a page."""
        from cli.html.run_report import write_page
        from cli.steps.open_model import open_session
        from cli.terminal.run_summary import INDENT, summary_rows
        from offload.run.collect import account
        from offload.run.report import Message

        command = (
            f'generate {self.model} "{PROMPT}" --max-tokens {TOKENS} --ram {(self.options.ram or 0) // 1024}KiB '
            f"--context {CONTEXT} --prompt-chunk {CHUNK} --routing {self.routing} --report {self.page}"
        )
        self.heading("Generate, with the profile deciding which experts are kept at hand.", command)
        quiet = Console(json=True)
        with open_session(self.model, self.options, quiet) as session:
            if not self.console.json:
                print(f"\n   {PROMPT}", end="", file=sys.stderr)
            records = []
            for record in session.generate(session.encode(PROMPT), Sampling(max_tokens=TOKENS)):
                records.append(record)
                if not self.console.json:
                    print(visible(record.text).replace("\n", "\n   "), end="", file=sys.stderr, flush=True)
            answer = "".join(record.text for record in records)
            report = account(
                session,
                [records],
                command="generate",
                command_line=f"coldstream {command}",
                messages=(Message("user", PROMPT), Message("assistant", answer)),
                warmup=1,
            )
        self.console.say("\n")
        self.console.rows(summary_rows(report), INDENT)
        write_page(report, self.page)
        return report.to_json()
