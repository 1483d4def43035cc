"""A fuzzed input: a command's words, what is typed, and the edits that spoil the files it reads; as JSON, and drawn at
random."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import typer

from cli.main import build_app
from tests import hostile

Edit = list[Any]  # [file, kind, …], see `spoil`

# What each command is run with; a {name} is a file of the ground, {out} a path where nothing is yet.
_RUN = ("--device", "cpu", "--context", "64", "--ram", "1GiB", "--exact")
BASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "plan": (
        ("{source}", "--recipe", "{recipe.toml}"),
        ("{stored}", "--routing", "{routing.json}"),
        ("{vision}", "--experts", "int4-g32"),
        ("{qwen}", "--experts", "int4-g32"),
        ("{mixtral}", "--gpu", "RTX 4090"),
        ("{source}", "--calibrate", "{text.txt}", "--experts", "int4-g32"),
    ),
    "simulate": (("{stored}", "--trace", "{trace.json}", "--tokens", "8", "--prompt", "16"),),
    "rank-policies": (
        ("{trace.json}", "--sizes", "2", "--tokens", "8"),
        ("{trace.json}", "--sizes", "2", "--model", "{stored}"),
    ),
    "quantize": (
        ("{source}", "{out}", "--recipe", "{recipe.toml}", "--rounding", "rtn"),
        ("{source}", "{out}", "--experts", "int4-g32", "--imatrix", "{imatrix.safetensors}"),
        ("{qwen}", "{out}", "--experts", "int4-g32", "--rounding", "rtn"),
        ("{source}", "{out}", "--target-bits", "5", "--group-size", "32", "--routing", "{routing.json}"),
        ("{vision}", "{out}", "--experts", "int8", "--rounding", "rtn"),
    ),
    "generate": (
        ("{stored}", "prompt", "-n", "2", *_RUN),
        ("{stored}", "-", "-n", "2", "--seed", "7", "--chat", "--routing", "{routing.json}", *_RUN),
        ("{stored}", "prompt", "-n", "4", "--temperature", "0", *_RUN),
        ("{qwen}", "prompt", "-n", "4", "--temperature", "0", *_RUN),
        ("{vision}", "prompt", "-n", "3", "--temperature", "0", *_RUN),
        ("{mixtral}", "prompt", "-n", "4", "--temperature", "0", "--chat", *_RUN),
    ),
    "chat": (("{stored}", "-n", "2", "--seed", "7", *_RUN),),
    "profile": (
        ("{stored}", "--text", "{text.txt}", "--tokens", "8", "--out", "{out}", "--merge", "{routing.json}", *_RUN),
    ),
    "eval": (
        (
            *("{stored}", "--reference", "{source}", "--text", "{text.txt}"),
            *("--windows", "1", "--context", "8", "--cache", "{cache}"),
        ),
    ),
    "synth": (
        ("{source}", "{out}", "--experts", "int4-g32"),
        (
            *("{out}", "--hidden", "128", "--layers", "1", "--experts-per-layer", "2", "--intermediate", "128"),
            *("--heads", "2", "--kv-heads", "1", "--head-dim", "32", "--vocab", "64", "--experts", "int4-g32"),
        ),
    ),
}
_SHARE = {"plan": 12, "simulate": 3, "rank-policies": 3, "quantize": 5, "generate": 9, "chat": 2, "profile": 2}
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
_NOT_ASKED = {"--help", "--refresh", "--tune", "--verbose", "--repeat"}  # long work, or none
_MUCH_WORK = {"--tokens", "--prompt", "--max-tokens", "--windows", "--sizes", "--threads"}
_WORDS = (
    *("", "0", "1", "2", "3", "-1", "7", "64", "129", "1.5", "1e300", "-0.0", "nan", "inf", "-inf", "1e-300"),
    *(str(2**31), str(2**63), str(10**30), "1GiB", "0B", "-1GiB", "1e9GiB", "64 gigs", "text", "é" * 99, "\udcff"),
    *("auto", "int4", "int8", "bf16", "nf4", "int4-g32", "int4-g0", "int4-g-1", "cuda", "lru", "uniform", "zipf:0"),
    *("/dev/null", "/", "..", "{text.txt}", "{stored}", "{routing.json}", "{imatrix.safetensors}", "{out}", "[bold]"),
)
_TEMPLATES = (
    *("", "{{", "{% for %}", "{{ 1/0 }}", "{{ raise_exception('no') }}", "{{ messages[9].content }}", "{{ x.y.z }}"),
    *("{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**10 }}", "\x00\ud83d"),
    *("{{ messages | tojson }}", "{% include 'x' %}", "{{ messages[0]['content'] + 1 }}", "{{ none.none }}"),
)
_LINES = (
    *('experts = "int5"', "experts = 4", "group_size = 0", "group_size = -1", "group_size = 7", "group_size = 1e99"),
    *("ram = 0", 'ram = "nan"', 'ram = "1e99GiB"', "context = 0", "context = nan", "[run", "[weights]", "[other]"),
    *('layers = "x"', "= 1", "experts = []", "experts = {a = 1}", "x = " + "[" * 600, "\x00", 'ram = "-1GiB"'),
    *('gpu = "RTX 4090"', 'vram = "1GiB"', "kv = 8", "[[weights]]", "description = 1", 'routing = "/"'),
)
_TYPED = (
    "hello\n",
    "\n\n",
    "/help\n/quit\n",
    "/file nowhere\n",
    '"""\nopen',
    "/\n/x\n",
    "a\x00b\n",
    "\xff\xfe\n",
    "\x1b[2J\n",
)


@dataclass(frozen=True)
class Case:
    """``coldstream COMMAND WORDS`` with ``stdin`` (bytes, as latin-1) after ``edits`` to the files of the ground."""

    command: str
    words: tuple[str, ...]
    stdin: str = ""
    edits: tuple[Edit, ...] = ()

    @classmethod
    def read(cls, text: str) -> "Case":
        """The case that ``str`` wrote."""
        found = json.loads(text)
        return cls(found["command"], tuple(found["words"]), found["stdin"], tuple(found["edits"]))

    def __str__(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def smaller(self) -> Iterator["Case"]:
        """The same with one edit, or one option that is not the command's usual one, less."""
        for index in range(len(self.edits)):
            yield replace(self, edits=self.edits[:index] + self.edits[index + 1 :])
        for base in BASES[self.command]:
            if base != self.words[: len(base)] or self.words[len(base) :]:
                yield replace(self, words=base)
        if self.stdin:
            yield replace(self, stdin="")


def draw(random: Random, commands: tuple[str, ...] = tuple(BASES)) -> Case:
    """A case of one of ``commands`` with one to three things about it changed."""
    command = random.choices(commands, [_SHARE.get(name, 1) for name in commands])[0]
    case = Case(command, random.choice(BASES[command]), "hello\nagain\n" if command in ("chat", "generate") else "")
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        what = random.random()
        if what < 0.72:
            if edit := _edit(random, case):
                case = replace(case, edits=(*case.edits, edit))
        elif what < 0.92:
            case = replace(case, words=_reworded(random, case))
        else:
            case = replace(case, stdin="".join(random.choices(_TYPED, k=random.randint(0, 3))))
    return case


def _reworded(random: Random, case: Case) -> tuple[str, ...]:
    words = list(case.words)
    if random.random() < 0.2:
        words[random.randrange(len(words))] = random.choice(_WORDS)
        return tuple(words)
    name, flag = random.choice(_options(case.command))
    if flag:
        return (*words, name)
    much = name in _MUCH_WORK
    value = random.choice([word for word in _WORDS if not (much and word.isdigit() and int(word) > 9)])
    if name in words:
        words[words.index(name) + 1] = value
        return tuple(words)
    return (*words, name, value)


@cache
def _options(command: str) -> list[tuple[str, bool]]:
    """Options of ``command``, and whether each is a flag."""
    group: Any = typer.main.get_command(build_app(command))
    named = [
        (parameter.opts[-1], bool(getattr(parameter, "is_flag", False))) for parameter in group.commands[command].params
    ]
    return [(name, flag) for name, flag in named if name.startswith("--") and name not in _NOT_ASKED]


def _edit(random: Random, case: Case) -> Edit | None:
    names = [word[1:-1] for word in case.words if word.startswith("{") and word not in ("{out}", "{cache}")]
    if not names:
        return None
    if random.random() < 0.02:
        return ["cache/coldstream/machine.json", "set", ["ram_gb_s"], random.choice(hostile.VALUES)]
    name = random.choice(names)
    if "." not in name:
        kinds = ["config.json"] * 6 + list(_FILES) + ["chat_template.jinja", "weights", "weights", "index"]
        if case.command in ("plan", "simulate", "synth", "rank-policies"):
            kinds = ["config.json"] * 9 + ["weights", "index"]
        kind = random.choice(kinds)
        if kind == "weights":
            kind = "model-00001-of-00002.safetensors" if name == "source" else "model*.safetensors"
        name = f"{name}/{'model.safetensors.index.json' if kind == 'index' else kind}"
    how = random.random()
    if how < 0.04:
        return [name, random.choice(["delete", "empty", "folder"])]
    if how < 0.1:
        return [name, "truncate", random.random()]
    if how < 0.16:
        return [name, "bytes", random.random(), random.choice(["\x00", "\xff\xff", "{", '"', "é", "9" * 30, "]" * 9])]
    if name.endswith(".jinja"):
        return [name, "text", random.choice(_TEMPLATES)]
    if name.endswith(".toml"):
        return [name, "line", random.random(), random.choice(_LINES)]
    if name.endswith(".txt"):
        return [name, "text", random.choice(["", "x", "\x00" * 999, "é" * 5000, "\n" * 9999, "<|eot|>" * 99])]
    # Where in the file is found when the file is there: numbers that lead down from key to key.
    way = [random.random() for _ in range(random.choice((1, 1, 2, 2, 3, 4)))]
    match random.choice(["set", "set", "set", "remove", "duplicate", "nudge", "add"]):
        case "remove":
            return [name, "remove", way]
        case "nudge":
            return [name, "nudge", way, random.choice([-1, 1, 2, 1 << 32])]
        case "add":
            return [name, "add", way, random.choice(_ADDED), random.choice(hostile.VALUES)]
        case kind:
            return [name, kind, way, random.choice(hostile.VALUES)]


_ADDED = (
    *("", "x", "text_config", "quantization_config", "rope_scaling", "rope_parameters", "num_experts", "layer_types"),
    *("head_dim", "hidden_act", "tie_word_embeddings", "sliding_window", "eos_token_id", "added_tokens", "dtype"),
    *("chat_template", "normalizer", "pre_tokenizer", "post_processor", "truncation", "padding", "stop_strings"),
    *("model_max_length", "bos_token", "auto_map", "suppress_tokens", "attention_bias", "use_cache", "__metadata__"),
)


def spoil(folder: Path, edit: Edit) -> None:
    """Do ``edit`` to its file in ``folder``; one whose file or place is not there changes nothing."""
    name, kind, *more = edit
    file = next(iter(sorted(folder.glob(name))), None)
    if kind == "text" and (file is None or file.is_file()):
        (file or folder / name).write_text(more[0], errors="surrogatepass")
    if file is None or not file.is_file():
        return
    if kind == "delete":
        file.unlink()
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind in ("truncate", "bytes"):
        data = file.read_bytes()
        at = int(more[0] * min(len(data), 4096 if kind == "bytes" else len(data)))
        new = more[1].encode("latin-1") if kind == "bytes" else None
        file.write_bytes(data[:at] if new is None else data[:at] + new + data[at + len(new) :])
    elif kind == "line":
        lines = file.read_text(errors="replace").splitlines()
        lines[int(more[0] * len(lines)) : int(more[0] * len(lines)) + 1] = [more[1]]
        file.write_text("\n".join(lines))
    elif kind != "text":
        _change(file, kind, *more)


def _change(file: Path, kind: str, way: list[Any], *more: Any) -> None:
    body = b""
    try:
        if file.suffix == ".safetensors":
            value, body = hostile.read_safetensors(file)
        else:
            value = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError):  # an edit before this one left no JSON
        return
    place = _place(value, way)
    new = more[-1] if more else None
    text = None
    if kind == "set" and place:
        value = hostile.replaced(value, place, new)
    elif kind == "set":
        value = new
    elif kind == "remove" and place:
        value = hostile.without(value, place)
    elif kind == "nudge" and isinstance(number := hostile.at(value, place), int | float):
        value = hostile.replaced(value, place, number + more[0]) if place else value
    elif kind == "add" and isinstance(outer := hostile.at(value, place[:-1]), dict):
        outer[more[0]] = new
    elif kind == "duplicate" and isinstance(value, dict) and place:
        text = f"{json.dumps(value)[:-1]}, {json.dumps(place[0])}: {json.dumps(new)}}}"
    if file.suffix == ".safetensors":
        hostile.write_safetensors(file, text or value, body)
    else:
        file.write_text(text or json.dumps(value))


def _place(value: Any, way: list[Any]) -> hostile.Place:
    """Where ``way`` leads: keys as they are, and parts of one for that part of the way through the keys."""
    place: hostile.Place = ()
    for step in way:
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        if not keys:
            break
        key = keys[int(step * len(keys))] if isinstance(step, float) else step
        if key not in keys:
            break
        place, value = (*place, key), value[key]
    return place
