"""Every pair of a command's options, on a tiny model: it runs, or is refused in one line.

    python -m tests.fuzz.pairs [--only generate,bench,serve,plan,quantize] [--with OPTION]

Each option has values that make sense, and some that a script or a slip of the pen would give: another kind of file, a
folder that is full or cannot be written. Each pair of values of two options is tried once, in a fork of this process
on a fresh copy of what it may write to. Beside the form of what comes out, an answer must be the one without the
options where none of them is to change it. Prints every pair that fails.
"""

import argparse
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

from cli.main import main as coldstream
from tests import checkpoints
from tests.fuzz.ground import keep_machine, make_ground, measure_nothing, place_machine

SECONDS = 60.0
_WAITED = 10.0  # for a server to begin
Value = tuple[str, ...]  # the words of an option

_PATHS = ("{text.txt}", "{stored}", "/dev/full", "{absent/file}")
_BUDGETS: dict[str, tuple[str, ...]] = {
    "--vram": ("0", "8GiB"),
    "--ram": ("1GiB", "460MiB", "1"),
    "--context": ("48", "128", "4096"),
    "--kv": ("int8", "bf16"),
    "--kv-disk": ("{kept}", "{text.txt}", "/proc"),
    "--kv-ram": ("1MiB", "1"),
    "--kv-epsilon": ("0", "1e-3", "2"),
}
_SAMPLING: dict[str, tuple[str, ...]] = {
    "--max-tokens": ("1", "5"),
    "--temperature": ("0", "0.8"),
    "--top-k": ("3",),
    "--top-p": ("0.5", "0"),
    "--min-p": ("1",),
    "--repetition-penalty": ("1.2", "0"),
    "--seed": ("7",),
    "--stop": ("e", ""),
}
_ENGINE: dict[str, tuple[str, ...]] = {
    "--recipe": ("{recipe.toml}", "fast", "{text.txt}"),
    "--routing": ("{routing.json}", "{trace.json}", "{imatrix.safetensors}"),
    "--policy": ("lru", "seeded"),
    "--device": ("cpu", "cuda"),
    "--threads": ("1", "2"),
    "--prompt-chunk": ("1", "7"),
    "--exact": ("",),
    "--page-cache": ("",),
    "--no-graph": ("",),
    "--warm": ("1MiB",),
    "--regain": ("",),
    "--draft": ("ngram",),
    "--draft-model": ("{stored}", "{draft}", "{qwen}", "{text.txt}"),
    "--prompt-cache": ("{kept}", "{text.txt}", "/dev/null", "/proc"),
    "--prompt-cache-size": ("1MiB", "1"),
}
_SCHEMES: dict[str, tuple[str, ...]] = {
    "--experts": ("int4", "int2", "int3-g64", "int8", "nf4", "bf16", "auto"),
    "--shared-expert": ("int4", "bf16"),
    "--dense-mlp": ("int8",),
    "--attention": ("int8", "int2", "auto"),
    "--lm-head": ("int8", "auto", "bf16"),
    "--vision": ("int8", "bf16", "int4"),
    "--group-size": ("32", "64", "256"),
}
_SAYING: dict[str, tuple[str, ...]] = {"--json": ("",), "-q": ("",), "-v": ("",)}
_REPORT = {"--report": ("{report.html}", *_PATHS, "/proc/report.html")}

OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "generate": {
        **{"--image": ("{text.txt}",), "--video": ("{text.txt}",), "--frames": ("2",), "--chat": ("",)},
        "--ignore-eos": ("",),
        **(_REPORT | _SAMPLING | _BUDGETS | _ENGINE | _SAYING),
    },
    "bench": {
        "--prompt-tokens": ("1", "90"),
        "--tokens": ("1", "9"),
        "--repeat": ("1",),
        "--text": ("{text.txt}", "{stored}", "{imatrix.safetensors}"),
        "--draft-errors": ("0", "1"),
        "--sequences": ("1,2", "3", "0"),
        "--arriving": ("20",),
        "--filled": ("16", "100000"),
        "--against": ("accelerate",),
        **(_REPORT | _BUDGETS | _ENGINE | _SAYING),
    },
    "serve": {
        "--host": ("127.0.0.1", "0.0.0.0", "nowhere.invalid"),
        "--api-key": ("secret", ""),
        "--unprotected": ("",),
        "--allow-host": ("example.org",),
        "--allow-origin": ("http://example.org", "example"),
        "--name": ("mine",),
        "--queue": ("0",),
        "--parallel": ("1", "3"),
        "--timeout": ("5",),
        "--no-images": ("",),
        "--images-from": ("*", "{stored}/"),
        **(_SAMPLING | _BUDGETS | _ENGINE | _SAYING),
    },
    "plan": {
        "--calibrate": ("{text.txt}", "{stored}"),
        "--gpu": ("RTX 4090", "mine,24GiB,1008GB/s,165TFLOPS,pcie4x16", "GTX 1080"),
        "--ram-bandwidth": ("50",),
        "--disk-bandwidth": ("3",),
        "--refresh": ("",),
        **(_BUDGETS | _SCHEMES | _SAYING),
        **{name: _ENGINE[name] for name in ("--routing", "--recipe", "--prompt-chunk", "--draft-model")},
    },
    "quantize": {
        "--tokenizer": ("{stored}", "{text.txt}"),
        "--for": ("vllm", "transformers"),
        "--repack": ("",),
        "--resume": ("",),
        "--rounding": ("rtn",),
        "--calibrate": ("{text.txt}", "{stored}"),
        "--tune": ("1",),
        "--imatrix": ("{text.txt}", "{imatrix.safetensors}", "{routing.json}"),
        "--save-imatrix": ("{saved.safetensors}", *_PATHS),
        "--target-bits": ("4.5", "2.3", "0.1"),
        "--target-size": ("300KiB", "1"),
        "--fit": ("RTX 4090", "this"),
        "--speed": ("10", "1000000"),
        "--per-expert": ("",),
        "--least-bits": ("2", "3"),
        **(_BUDGETS | _SCHEMES | _SAYING),
        **{name: _ENGINE[name] for name in ("--routing", "--recipe")},
    },
}
for absent in ("--kv", "--kv-disk", "--kv-ram", "--kv-epsilon"):
    OPTIONS["quantize"].pop(absent)
BASES: dict[str, list[str]] = {
    "generate": ["{stored}", "The quick brown fox", "-n", "6", "--exact", "--temperature", "0"],
    "bench": ["{stored}", "--prompt-tokens", "8", "--tokens", "4", "--repeat", "1"],
    "serve": ["{stored}", "--port", "0"],
    "plan": ["{stored}"],
    "quantize": ["{source}", "{out}", "--experts", "int4"],
}
# What may not change a greedy answer, alone or together.
_NEUTRAL = {
    *("--report", "--threads", "--policy", "--routing", "--page-cache", "--no-graph", "--warm", "--regain", "--draft"),
    *(
        "--draft-model",
        "--prompt-cache",
        "--prompt-cache-size",
        "--vram",
        "--ram",
        "--exact",
        "--seed",
        "--prompt-chunk",
    ),
    *("--device", "--json", "-q", "-v"),
}


def pairs(command: str) -> list[tuple[Value, Value]]:
    """Each value of each option with each of every other, and each alone (with nothing)."""
    values = [
        (name, *([found] if found or not _takes_none(options, name) else []))
        for options in (OPTIONS[command],)
        for name, listed in options.items()
        for found in listed
    ]
    alone = [(value, ()) for value in values]
    return alone + [(one, two) for one, two in combinations(values, 2) if one[0] != two[0]]


def _takes_none(options: dict[str, tuple[str, ...]], name: str) -> bool:
    return options[name] == ("",)


class Trials:
    """Commands run on ``ground``, each in a fork, in ``folder``; those that are ``interrupted`` end by Ctrl-C."""

    interrupted = frozenset({"serve"})

    def __init__(self, ground: Path, folder: Path) -> None:
        self.ground, self.folder = ground, folder
        self.plain = ""  # the answer without options

    def wrong(self, command: str, chosen: tuple[Value, ...]) -> tuple[str, str]:
        """What is wrong with the end of ``command`` with these options, if anything is; and how it ended."""
        words = [command, *self.found(BASES[command]), *self.found([word for value in chosen for word in value])]
        wrong, code, out = self.ended(words)
        names = {value[0] for value in chosen if value}
        if not wrong and command == "generate" and code == "0" and names <= _NEUTRAL:
            text = json.loads(out.splitlines()[-1])["text"] if "--json" in words else out.strip("\n")
            self.plain = self.plain or text
            if text.strip() != self.plain.strip():
                wrong = f"another answer: {text!r} for {self.plain!r}"
        return wrong, code

    def ended(self, words: list[str]) -> tuple[str, str, str]:
        """What is wrong with how ``coldstream WORDS`` ended, if anything is; its exit code, and what it printed."""
        for name in ("out", "out.partial", "kept"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("report.html", "saved.safetensors"):
            (self.folder / name).unlink(missing_ok=True)
        keep_machine(self.folder)
        place_machine(self.folder)
        interrupted = words[0] in self.interrupted
        code, out, err, seconds = self._run(words, interrupted)
        said = f"code {code}: {err[-700:]}{out[-200:]}"
        errors = [line for line in err.splitlines() if line.startswith("coldstream: error: ")]
        if code not in ((130, -signal.SIGINT, 0) if interrupted else (0,)) + (1, 2) or "Traceback" in err + out:
            return f"{seconds:.0f} s, {said}", str(code), out
        if (
            len(errors) != (code in (1, 2)) and words[0] != "chat"
        ):  # which says what is wrong with a message, and goes on
            return f"{len(errors)} error lines, {said}", str(code), out
        if (errors and not err.endswith(f"{errors[0]}\n")) or any(ord(mark) < 32 for line in errors for mark in line):
            return f"more than a line, {said}", str(code), out
        if "--json" in words:
            try:
                document = json.loads(out.splitlines()[-1])
            except (ValueError, IndexError):
                return f"no document, {said}", str(code), out
            if ("error" in document) != (code in (1, 2)):
                return f"document, {said}", str(code), out
        return "", str(code), out

    def found(self, words: list[str]) -> list[str]:
        """``words`` with the files of the ground that they name in braces."""
        return [word.replace("{", f"{self.folder}/").replace("}", "") if "{" in word else word for word in words]

    def enough(self, child: int, seconds: float) -> bool:
        """Whether ``child``, which began ``seconds`` ago and says nothing, is to be interrupted."""
        return seconds > _WAITED

    def before(self) -> None:
        """What a child does before its command."""

    def _run(self, words: list[str], interrupts: bool) -> tuple[int, str, str, float]:
        answered = 0
        files = [self.folder / "stdout", self.folder / "stderr"]
        for file in files:
            file.write_text("")
        started = time.monotonic()
        child = os.fork()
        if not child:
            self._child(words, files)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            passed = time.monotonic() - started
            if done:
                break
            if passed > SECONDS and (worked(child) > SECONDS / 3 or passed > 10 * SECONDS):  # the machine may be busy
                os.kill(child, signal.SIGKILL)
            elif interrupts:
                listens = re.search(r"http://[^:\s]+:(\d+)", files[1].read_text(errors="replace"))
                if listens or self.enough(child, passed):
                    answered = _asked(int(listens[1])) if listens else 0
                    os.kill(child, signal.SIGINT)
                    interrupts = False
            time.sleep(0.005)
        out, err = (file.read_text(errors="replace") for file in files)
        if answered >= 500:
            return answered, out, err, passed
        return os.waitstatus_to_exitcode(status), out, err, passed

    def _child(self, words: list[str], files: list[Path]) -> None:
        code = 0
        try:
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            for number, file in enumerate(files, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.chdir(self.folder)
            self.before()
            os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
            sys.argv = ["coldstream", *words]
            coldstream()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:  # noqa: BLE001 - a child must never come back to its parent's code
            import traceback

            traceback.print_exc()
            code = 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _asked(port: int) -> int:
    """The status of a request to the server at ``port``, 0 if it answers none in time."""
    body = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": "Bearer secret"})
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def worked(child: int) -> float:
    """Seconds of processor time that ``child`` has had."""
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _make(folder: Path) -> None:
    """In a process of its own: one that has computed has threads that a fork lacks."""
    make_ground(folder)
    small = {"num_hidden_layers": 1, "num_local_experts": 2, "max_position_embeddings": 128}
    checkpoints.make("mixtral", folder / "draft", **small)


def import_once() -> None:
    """Have what each run needs, before its children share it."""
    import transformers  # noqa: F401

    import offload.run.session  # noqa: F401
    import quant.convert.convert  # noqa: F401


def main() -> int:
    """Exit code 1 if a pair fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.pairs", description=__doc__)
    parser.add_argument("--only", default=",".join(OPTIONS))
    parser.add_argument("--with", dest="beside", default="", help="only pairs with this option")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        _make(asked.make)
        return 0
    failed = 0
    measure_nothing()
    with tempfile.TemporaryDirectory(prefix="coldstream-pairs-") as temporary:
        folder = Path(temporary) / "ground"
        subprocess.run([sys.executable, "-m", "tests.fuzz.pairs", "--make", str(folder)], check=True)
        trials = Trials(folder, folder)
        import_once()

        for command in asked.only.split(","):
            codes: Counter[str] = Counter()
            started = time.monotonic()
            for chosen in [((), ()), *pairs(command)]:
                if asked.beside and asked.beside not in chosen[0] + chosen[1]:
                    continue
                wrong, code = trials.wrong(command, chosen)
                codes[code] += 1
                if wrong:
                    failed += 1
                    print(f"{command} {' '.join(chosen[0] + chosen[1])}\n    {wrong}", flush=True)
            ended = ", ".join(f"{count} ended with {code}" for code, count in codes.most_common())
            print(f"{command}: {codes.total()} in {time.monotonic() - started:.0f} s, {ended}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
