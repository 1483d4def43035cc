"""Trace: which experts a sequence of tokens asked for, recorded or made up, for policies to be replayed on.

Legend: T tokens, L MoE layers, E experts per layer, k experts per token.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from offload.tiers import Key
from quant.errors import ProfileError, UsageError
from quant.input_file import read_object, validated

PROFILE_VERSION = 1
PROFILE_MARK = b'{"version": 1, "model_id": '  # begins every routing profile, and no config.json
_MOST_BYTES = 2**30
_MOST_EXPERTS = 2**14  # per layer, as in a config.json: each of them has an entry in tables


class _Head(BaseModel):
    """What every routing profile says, whatever else is in it."""

    model_config = ConfigDict(strict=True, extra="ignore")
    version: int
    moe_layers: Annotated[list[int], Field(min_length=1)]
    num_experts: Annotated[int, Field(ge=1, le=_MOST_EXPERTS)]


_STEPS: TypeAdapter[list[list[list[int]]]] = TypeAdapter(
    Annotated[list[list[list[Annotated[int, Field(ge=0)]]]], Field(min_length=1)], config=ConfigDict(strict=True)
)


@dataclass(frozen=True)
class Trace:
    """``steps[t][l]`` are the experts that token t chose in the l-th MoE layer. Layers are counted, not
    numbered.
    """

    name: str
    num_experts: int
    steps: Sequence[Sequence[Sequence[int]]]

    @property
    def layers(self) -> int:
        """MoE layers."""
        return len(self.steps[0])

    @property
    def top_k(self) -> int:
        """Experts per token and layer."""
        return len(self.steps[0][0])

    @property
    def keys(self) -> list[Key]:
        """Every (layer, expert), layer by layer, as they lie on disk."""
        return [(layer, expert) for layer in range(self.layers) for expert in range(self.num_experts)]

    def requests(self, chunk: int = 1) -> list[list[Key]]:
        """What is asked for together, in order: for each layer of ``chunk`` tokens, each expert once."""
        groups = []
        for start in range(0, len(self.steps), chunk):
            tokens = self.steps[start : start + chunk]
            for layer in range(self.layers):
                chosen = dict.fromkeys(expert for step in tokens for expert in step[layer])
                groups.append([(layer, expert) for expert in chosen])
        return groups

    def counts(self) -> dict[Key, int]:
        """Requests of each key; keys never asked for are there with 0."""
        counted = dict.fromkeys(self.keys, 0)
        for group in self.requests():
            for key in group:
                counted[key] += 1
        return counted

    def halves(self) -> tuple["Trace", "Trace"]:
        """The first half, to learn from, and the second, to be judged on."""
        middle = len(self.steps) // 2
        return tuple(Trace(self.name, self.num_experts, part) for part in (self.steps[:middle], self.steps[middle:]))  # type: ignore[return-value]

    def head(self, tokens: int) -> "Trace":
        """The first ``tokens`` tokens."""
        return Trace(self.name, self.num_experts, self.steps[:tokens])


def read_profile(path: Path) -> dict[str, Any]:
    """The JSON of a routing profile. Raises ProfileError if it cannot be read or is of another version."""
    data = read_object(path, "the routing profile that `coldstream profile` writes", ProfileError, _MOST_BYTES)
    version = validated(_Head, data, f"{path} is no routing profile", ProfileError).version
    if version != PROFILE_VERSION:
        raise ProfileError(f"{path} is a routing profile of version {version}: expected {PROFILE_VERSION}")
    return data


def load_trace(path: Path) -> Trace:
    """The trace in a routing profile written by ``coldstream profile --trace``.

    Raises ProfileError if the file is unreadable or holds none.
    """
    if not path.exists():
        raise ProfileError(
            f"{path} is missing: expected a file of `coldstream profile MODEL --trace`, or one of {', '.join(RULES)}"
        )
    data = read_profile(path)
    if not data.get("trace"):
        raise ProfileError(f"{path} holds counts but no trace: record it with `coldstream profile MODEL --trace`")
    steps = checked_steps(data, path)
    if len(steps) < 2:
        raise ProfileError(f"{path} holds a damaged trace: one token, expected two or more")
    return Trace(path.name, int(data["num_experts"]), steps)


def checked_steps(data: dict[str, Any], path: Path) -> list[list[list[int]]]:
    """``Trace.steps`` of the profile ``data``. Raises ProfileError if they are not as many experts of each layer for
    every token, each once."""
    said = f"{path} holds a damaged trace"
    steps: list[list[list[int]]] = validated(_STEPS, data["trace"], said, ProfileError)
    layers, experts = len(data["moe_layers"]), data["num_experts"]
    top_k = len(steps[0][0]) if steps[0] else 0
    if not 1 <= top_k <= experts:
        raise ProfileError(f"{said}: {top_k} experts per token of {experts}")
    for token, step in enumerate(steps):
        if len(step) != layers or any(len(ids) != top_k or len(set(ids)) != top_k for ids in step):
            raise ProfileError(f"{said}: expected {top_k} experts in each of {layers} layers, token {token} has others")
        if any(expert >= experts for ids in step for expert in ids):
            raise ProfileError(f"{said}: token {token} asks for an expert beyond the {experts} there are")
    return steps


@dataclass(frozen=True)
class Synthetic:
    """Routing made up by a rule; the same every time.

    * uniform: every expert as likely as any other.
    * zipf: the r-th most used expert of a layer has a share proportional to 1 / r; each layer has its order.
    * recency: in three of ten cases one of the layer's last four experts again, else uniform, as measured on
    the demo model.
    * drift: zipf, but who is first changes every 512 tokens, as when the subject does.
    """

    rule: str
    layers: int = 8
    num_experts: int = 16
    top_k: int = 1
    tokens: int = 2048
    seed: int = 0

    def trace(self) -> Trace:
        """The trace. Raises UsageError for an unknown rule."""
        if self.rule not in _RULES:
            raise UsageError(f"no routing is called {self.rule!r}: expected one of {', '.join(_RULES)}, or a file")
        source = random.Random(self.seed)
        rule = _RULES[self.rule]
        choose = [rule(self.num_experts, random.Random(source.random())) for _ in range(self.layers)]
        steps = [[self._distinct(pick, token) for pick in choose] for token in range(self.tokens)]
        return Trace(self.rule, self.num_experts, steps)

    def _distinct(self, pick: Callable[[int], int], token: int) -> list[int]:
        chosen: dict[int, None] = {}
        while len(chosen) < min(self.top_k, self.num_experts):
            chosen[pick(token)] = None
        return list(chosen)


def _uniform(experts: int, source: random.Random) -> Callable[[int], int]:
    return lambda token: source.randrange(experts)


def _zipf(experts: int, source: random.Random) -> Callable[[int], int]:
    order = source.sample(range(experts), experts)
    weights = [1 / rank for rank in range(1, experts + 1)]
    return lambda token: source.choices(order, weights)[0]


def _recency(experts: int, source: random.Random) -> Callable[[int], int]:
    last: list[int] = []

    def pick(token: int) -> int:
        again = last and source.random() < 0.3
        expert = source.choice(last) if again else source.randrange(experts)
        last.append(expert)
        del last[:-4]
        return expert

    return pick


def _drift(experts: int, source: random.Random) -> Callable[[int], int]:
    chosen = [_zipf(experts, source)]

    def pick(token: int) -> int:
        if token and token % 512 == 0:
            chosen[0] = _zipf(experts, source)
        return chosen[0](token)

    return pick


_RULES: dict[str, Callable[[int, random.Random], Callable[[int], int]]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "recency": _recency,
    "drift": _drift,
}
RULES = tuple(_RULES)
