"""A discrete-event engine: processes that wait, and flows of bytes that share bandwidths. Pure Python.

A *flow* moves an amount through one or more resources at once (a read over PCIe passes the memory of the
host, too) and gets what max-min fairness leaves it: all flows are raised together until a resource is full
or a flow has all it can take. A *process* is a generator that yields what it waits for. Everything
remembers what its time went to, so that a wait can be told by its cause.

Amounts are bytes and rates bytes per second; a resource may also count operations. Times are seconds.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Process = Generator["Event", None, None]
_DUST = 1e-6  # bytes: what rounding leaves of a finished flow


@dataclass(frozen=True)
class Span:
    """``lane`` was busy with ``what`` from ``start`` to ``end``."""

    lane: str
    what: str
    start: float
    end: float


class Event:
    """Something that will have happened: a flow that ended, a time that passed, a process that returned.

    ``cause`` names what waiting for it is waiting for.
    """

    def __init__(self, cause: str, now: float) -> None:
        self.cause, self.began, self.ended = cause, now, math.inf
        self._then: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether it has happened."""
        return self.ended < math.inf

    def then(self, call: Callable[[], None]) -> None:
        """Call when it happens, or now."""
        if self.done:
            call()
        else:
            self._then.append(call)

    def happen(self, now: float) -> None:
        """It happened."""
        self.ended = now
        waiting, self._then = self._then, []
        for call in waiting:
            call()

    def causes(self, start: float, end: float) -> Iterator[tuple[str, float]]:
        """What the time from ``start`` to ``end`` went to, in pieces."""
        if end > start:
            yield self.cause, end - start


class Flow(Event):
    """``left`` of an amount on its way through ``through``, never faster than ``cap``."""

    def __init__(self, what: str, cause: str, amount: float, through: Sequence[str], cap: float, now: float):
        super().__init__(cause, now)
        self.what, self.amount, self.left, self.through, self.cap = what, amount, amount, tuple(through), cap
        self.rate = 0.0


class Joined(Event):
    """All of ``parts``; the time goes to whichever ended last."""

    def __init__(self, parts: Sequence[Event], now: float) -> None:
        super().__init__("", now)
        self.parts = list(parts)

    def causes(self, start: float, end: float) -> Iterator[tuple[str, float]]:
        if self.parts and end > start:
            yield from max(self.parts, key=lambda part: part.ended).causes(start, end)


class Running(Event):
    """A process under way; its time goes to what it waited for."""

    def __init__(self, cause: str, now: float) -> None:
        super().__init__(cause, now)
        self.log: list[tuple[float, float, str]] = []

    def causes(self, start: float, end: float) -> Iterator[tuple[str, float]]:
        for began, ended, cause in self.log:
            if (piece := min(ended, end) - max(began, start)) > 0:
                yield cause, piece


@dataclass
class EventEngine:
    """Runs processes over resources of ``rates`` (units per second each).

    ``moved`` counts what has passed each resource. ``spans`` lists flows by each of their resources while
    ``watching``.
    """

    rates: Mapping[str, float]
    now: float = 0.0
    watching: bool = False
    spans: list[Span] = field(default_factory=list)
    moved: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.moved = dict.fromkeys(self.rates, 0.0)
        self._flows: list[Flow] = []
        self._timers: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._stale = False

    def flow(self, what: str, amount: float, *through: str, cause: str = "", cap: float = math.inf) -> Event:
        """Begin to move ``amount`` through resources ``through``; ``cause`` is by default the first's
        name."""
        flow = Flow(what, cause or through[0], amount, through, cap, self.now)
        if amount <= 0:
            flow.happen(self.now)
        else:
            self._flows.append(flow)
            self._stale = True
        return flow

    def pause(self, seconds: float, cause: str) -> Event:
        """``seconds`` from now."""
        event = Event(cause, self.now)
        if seconds <= 0:
            event.happen(self.now)
        else:
            heapq.heappush(self._timers, (self.now + seconds, next(self._order), event))
        return event

    def join(self, *parts: Event) -> Event:
        """When all ``parts`` have happened."""
        joined = Joined(parts, self.now)
        left = [len(parts)]

        def one_less() -> None:
            left[0] -= 1
            if not left[0]:
                joined.happen(self.now)

        for part in parts:
            part.then(one_less)
        if not parts:
            joined.happen(self.now)
        return joined

    def start(self, process: Process, cause: str = "") -> Running:
        """Run ``process`` beside whatever runs."""
        running = Running(cause, self.now)

        def go_on() -> None:
            while True:
                try:
                    event = next(process)
                except StopIteration:
                    running.happen(self.now)
                    return
                if event.done:
                    continue
                since = self.now
                event.then(lambda event=event, since=since: resume(event, since))  # type: ignore[misc]
                return

        def resume(event: Event, since: float) -> None:
            when = since
            for cause, seconds in event.causes(since, self.now):
                running.log.append((when, when + seconds, cause))
                when += seconds
            go_on()

        go_on()
        return running

    def run(self, until: Event) -> None:
        """Let time pass until ``until`` has happened. A deadlock is an internal error."""
        while not until.done:
            self._step()

    def _step(self) -> None:
        if self._stale:
            share(self._flows, self.rates)
            self._stale = False
        ending = min((flow.left / flow.rate for flow in self._flows), default=math.inf)
        waking = self._timers[0][0] - self.now if self._timers else math.inf
        passed = max(0.0, min(ending, waking))
        assert passed < math.inf, "every process waits for another"
        self.now += passed
        over: list[Flow] = []
        for flow in self._flows:
            step = min(flow.left, flow.rate * passed)
            flow.left -= step
            for name in flow.through:
                self.moved[name] += step
            if flow.left <= max(_DUST, 1e-12 * flow.amount):
                over.append(flow)
        if over:
            self._flows = [flow for flow in self._flows if flow not in over]
            self._stale = True
        for flow in over:
            if self.watching:
                self.spans += [Span(name, flow.what, flow.began, self.now) for name in flow.through]
            flow.happen(self.now)
        while self._timers and self._timers[0][0] <= self.now:
            heapq.heappop(self._timers)[2].happen(self.now)


def share(flows: Sequence[Flow], rates: Mapping[str, float]) -> None:
    """Set every flow's rate: max-min fair over resources of ``rates``, by filling them up together."""
    left = dict(rates)
    rising = list(flows)
    while rising:
        users: dict[str, int] = {}
        for flow in rising:
            for name in flow.through:
                users[name] = users.get(name, 0) + 1
        fair = {name: left[name] / count for name, count in users.items()}
        level = min(fair.values())
        modest = [flow for flow in rising if flow.cap <= level]
        if not modest:
            full = {name for name, value in fair.items() if value <= level * (1 + 1e-12)}
            modest = [flow for flow in rising if not full.isdisjoint(flow.through)]
        for flow in modest:
            flow.rate = min(flow.cap, level)
            for name in flow.through:
                left[name] = max(0.0, left[name] - flow.rate)
        rising = [flow for flow in rising if flow not in modest]


class Line:
    """One server that takes requests one at a time, the most urgent first: a disk."""

    def __init__(self, engine: EventEngine) -> None:
        self._engine = engine
        self._waiting: list[tuple[int, int, Callable[[], Event], Event]] = []
        self._order = itertools.count()
        self._serving = False

    def ask(self, urgency: int, begin: Callable[[], Event], cause: str) -> Event:
        """Be served by ``begin`` when the line is free; lower ``urgency`` goes first."""
        event = Event(cause, self._engine.now)
        heapq.heappush(self._waiting, (urgency, next(self._order), begin, event))
        self._next()
        return event

    def _next(self) -> None:
        if self._serving or not self._waiting:
            return
        self._serving = True
        _, _, begin, event = heapq.heappop(self._waiting)

        def served() -> None:
            self._serving = False
            event.happen(self._engine.now)
            self._next()

        begin().then(served)
