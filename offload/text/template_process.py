"""Renders chat templates: a line of JSON on stdin, one on stdout. Runs as a process of its own.

A template is a program from whoever made the model. Jinja's sandbox keeps it from files and from Python's
insides, but not from taking all time and memory there is: so this process takes limits before each one. It
imports nothing of the project and of transformers, whose environment for templates this one is like, so that
it starts in a tenth of a second; it stays for the next conversation, and ends when nobody can ask it any more.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training: here it is text like any other."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PublicNamespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, as transformers has it."""

    def __init__(*args: Any, **values: Any) -> None:  # so that a value may be called self
        self, *given = args
        for name in dict(*given, **values):
            _check_public(name)
        Namespace.__init__(self, *given, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        """Raise SecurityError for an underscore."""
        _check_public(name)
        super().__setitem__(name, value)


class PublicDict:
    """``dict`` without what a type has of Python's insides."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As of ``dict``."""
        return dict.fromkeys(*args)


@lru_cache(4)
def compiled(template: str) -> Template:
    """``template``, read. Raises whatever is wrong with it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"dict": PublicDict(), "namespace": PublicNamespace}
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment.from_string(template)


def main() -> None:
    """For each ``{template, values, cpu_seconds, memory, characters}`` answer ``{text}`` or ``{error}``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides what an interrupt ends
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + asked["cpu_seconds"]
        resource.setrlimit(resource.RLIMIT_AS, (asked["memory"], resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            text = compiled(asked["template"]).render(**asked["values"])
            if len(text) > asked["characters"]:
                raise ValueError(f"it makes {len(text):,} characters, expected {asked['characters']:,} at most")
            answer = {"text": text}
        except BaseException as error:  # noqa: BLE001 - whoever asks raises it
            answer = {"error": _reason(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _reason(error: BaseException) -> str:
    """What went wrong, and in which line of the template."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    kind = type(error)
    said = "it takes too much memory" if kind is MemoryError else str(error)[:500] or kind.__name__
    return said if line is None else f"line {line}: {said}"


def _check_public(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names with an underscore are not for templates")


def _refuse(message: object) -> None:
    raise TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes what HTML would not take.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
