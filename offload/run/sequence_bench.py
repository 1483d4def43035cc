"""Several sequences measured on a loaded model: steps that they share, and a long prompt that arrives while others are
being answered."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

from offload.batch.chunk_size import LEAST
from offload.generate.stream import Stream
from offload.records import Sampling, TokenRecord
from offload.run.benchmark import Benchmark
from offload.run.sequence_speed import Together
from offload.run.session import Session
from quant.kernels import native

_WITH = 3  # sequences that are being answered when a prompt arrives
_BEFORE = 8  # tokens of each before it does
_STEPS = 3  # normal steps, which beside a chunk of the prompt nobody waits longer than
_READ_S = 0.1  # that RAM is read for beside each run
_DOTS_S = 0.02  # the same of dot products
_CACHES = 512 * 2**20  # bytes that a processor's caches may hold the most of


@dataclass(frozen=True)
class Arrival:
    """A prompt of ``prompt_tokens`` that arrives while ``sequences`` others are being answered: when its first token
    came, the longest that one of the others waited for a token from then until it did, and what a step took before; a
    chunk of ``prompt_chunk`` tokens, as the last one beside others had, takes ``chunk_ms`` on average."""

    sequences: int
    prompt_tokens: int
    prompt_chunk: int
    first_token_s: float
    longest_gap_ms: float
    step_ms: float
    chunk_ms: float

    @property
    def bound_ms(self) -> float:
        """What no gap should exceed: three normal steps and one chunk."""
        return _STEPS * self.step_ms + self.chunk_ms

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "bound_ms": self.bound_ms}


@dataclass(frozen=True)
class SequenceBenchmark:
    """``counts`` sequences at a time, each with a prompt and tokens as ``each`` says; then a prompt of ``arriving``
    tokens beside others, if that is not 0."""

    each: Benchmark
    counts: tuple[int, ...] = ()
    arriving: int = 0

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        beside = self.each.prompt_tokens + _BEFORE + self.arriving if self.arriving else 0
        return max(self.each.context, beside)

    @property
    def sequences(self) -> int:
        """How many of that length the KV cache must hold at once."""
        others = _WITH * (self.each.prompt_tokens + _BEFORE + 4 + self.arriving // LEAST) if self.arriving else 0
        return -(-max(max(self.counts, default=1) * self.each.context, self.arriving + others) // self.context)

    def run(self, session: Session, text: str, progress: Callable[[str], None]) -> Together | None:
        """The decode steps in which as many sequences were as was asked, those of each sequence, RAM being read before
        and after each run; None if nothing was asked for."""
        if not self.counts:
            return None
        ids, found, rates = session.encode(text), list[list[TokenRecord]](), dict[int, float]()
        dots = [0.0]  # a core that others use for a moment makes the rate too low, nothing makes it too high
        before = _ram_gb_s(session)
        for count in self.counts:
            beside = list[float]()  # a run is judged by the better of both: memory that others use gives too little
            for turn in range(self.each.repeat):
                progress(f"{count} sequences, run {turn + 1} of {self.each.repeat}")
                session.reset()
                prompts = [self.each.prompt(ids, turn * count + place + 1) for place in range(count)]
                streams = [self._submit(session, prompt, self.each.tokens + 1) for prompt in prompts]
                for run in [list(stream) for stream in streams]:
                    # The first has waited for the prompts of those that came later.
                    found.append([r for r in run if r.phase == "decode" and r.sequences == count][1:])
                after = _ram_gb_s(session)
                dots.append(native.dot_rate(_DOTS_S) if session.device.type == "cpu" else 0.0)
                beside.append(max(before, after))
                before = after
            if all(beside):
                rates[count] = median(beside)
        return Together([run for run in found if run], rates, max(dots) or None)

    def arrive(self, session: Session, text: str, progress: Callable[[str], None]) -> Arrival | None:
        """A long prompt beside others, if one was asked for."""
        if not self.arriving:
            return None
        progress(f"a prompt of {self.arriving:,} tokens beside {_WITH} sequences")
        ids = session.encode(text)
        session.reset()
        most = min(_BEFORE + 4 + self.arriving // LEAST, session.context - self.each.prompt_tokens)
        streams = [self._submit(session, self.each.prompt(ids, place), most) for place in range(_WITH)]
        before = [[next(stream) for _ in range(_BEFORE)] for stream in streams]
        steps = [r.seconds for run in before for r in run if r.phase == "decode" and r.sequences == _WITH]
        started = perf_counter()
        long = Benchmark(self.arriving).prompt(ids, 1)
        newcomer = self._submit(session, long, 1)
        first = next(newcomer)
        took = perf_counter() - started
        chunk = session.runner.chunk_beside
        after = [list(stream) for stream in streams]
        gaps = [record.seconds for run in after for record in run]
        return Arrival(
            _WITH,
            self.arriving,
            chunk,
            took,
            1e3 * max(gaps, default=0.0),
            1e3 * median(steps or [0.0]),
            1e3 * first.busy_seconds * chunk / self.arriving,
        )

    @staticmethod
    def _submit(session: Session, prompt: Sequence[int], tokens: int) -> Stream:
        return session.submit(prompt, Sampling(max_tokens=tokens, ignore_eos=True))


def _ram_gb_s(session: Session) -> float:
    """GB/s of reading the experts where they lie, which takes no memory; 0 where not all of them are there, or some
    leave parts of their slots untouched, or caches may hold them."""
    experts = session.experts
    whole = experts.holds_all and experts.store.expert_nbytes is not None
    if session.device.type != "cpu" or not whole or experts.arena.memory.nbytes < _CACHES:
        return 0.0
    return native.read_rate(experts.arena.memory, _READ_S)
