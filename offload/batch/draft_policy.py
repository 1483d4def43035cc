"""How many drafted tokens a step takes: as many as make the most tokens per second by what was measured.

Two things are learned while a text is generated. How often a drafted token is right, by how much speaks for it: every
token that comes is held against what would have been drafted, whether it was or not, so that this costs nothing. And
how long a step takes with so many rows; before a number of rows was ever run it is told from the bytes of each tier:
dense weights are read once, n rows of a layer ask for E · (1 − (1 − k ÷ E)ⁿ) of its E experts.

    tokens per second of a step = (sequences + Σ over drafted tokens of the chance that it and all before it are right)
                                  ÷ seconds of a step with that many rows

Whatever is believed, drafts are stopped while they have lost more than a hundredth of the time that decoding took.
Policy only: no tensors.
"""

from collections.abc import Callable, Mapping, Sequence

from offload.tiers import Tier

_LEVELS = (2, 3, 4, 6, 9, 17)  # the least evidence of each level
_PRIOR = (0.15, 0.25, 0.4, 0.55, 0.7, 0.85)
_PRIOR_WEIGHT, _SESSION_WEIGHT = 3.0, 4.0
_PRIOR_MEAN = 0.7
_MEMORY = 64.0  # observations after which old ones fade
_LATEST = 8.0  # steps of a kind whose mean is its time
_FADE = 0.995  # of what a measurement counts, for each step after it
_OUTLIER = 2.0  # times what was expected: more is not believed
_LOSS = 0.01  # of decoding's time that drafts may cost
_GAIN = 1.03  # that a step must be expected to gain, and more where it waits for the disk:
_DISK_GAIN = 1.0  # what a rejected token read has taken the place of what later steps want
_CREDIT = 6  # steps that are kept of what drafts have won
_STALE = 48  # drafted steps after which one without is measured again
_FIRST = 2  # steps that meet cold code and caches


class Acceptance:
    """How often drafted tokens are right, by the evidence for them; where few were seen, as ``whole`` says."""

    def __init__(self, whole: "Acceptance | None" = None) -> None:
        self._whole = whole
        self._right, self._seen = [0.0] * len(_LEVELS), [0.0] * len(_LEVELS)

    def note(self, evidence: int, right: bool) -> None:
        """A token with so much ``evidence`` was ``right`` or not."""
        level = _level(evidence)
        fade = min(1.0, _MEMORY / (self._seen[level] + 1))
        self._seen[level] = (self._seen[level] + 1) * fade
        self._right[level] = (self._right[level] + right) * fade
        if self._whole is not None:
            self._whole.note(evidence, right)

    @property
    def mean(self) -> float:
        """The chance that a token is right of which nothing is known yet."""
        return (sum(self._right) + _PRIOR_WEIGHT * _PRIOR_MEAN) / (sum(self._seen) + _PRIOR_WEIGHT)

    def of(self, evidence: int) -> float:
        """The chance that a token with so much ``evidence`` is right."""
        level = _level(evidence)
        before, weight = (_PRIOR[level], _PRIOR_WEIGHT)
        if self._whole is not None:
            before, weight = self._whole.of(evidence), _SESSION_WEIGHT
        return (self._right[level] + weight * before) / (self._seen[level] + weight)


def _level(evidence: int) -> int:
    return max((i for i, least in enumerate(_LEVELS) if least <= evidence), default=0)


class StepTimes:
    """Seconds of a step by its rows. ``union`` says how many experts a layer reads for so many rows, for each that one
    reads; ``rate`` GB/s of a tier, None where nobody knows; ``dense`` the bytes that every step reads in memory."""

    def __init__(self, union: Callable[[int], float], rate: Callable[[Tier], float | None], dense: int) -> None:
        self._union, self._rate, self._dense = union, rate, dense
        self._seconds: dict[int, float] = {}  # mean of the latest steps by rows
        self._weight: dict[int, float] = {}  # how many that is; what was not run for long counts for less
        self._seen = 0
        self._in_memory, self._on_disk = float(dense), 0.0  # bytes of a step of one row, smoothed

    def note(self, rows: int, seconds: float, read: Mapping[Tier, int]) -> None:
        """A step of ``rows`` took ``seconds`` and ``read`` so many bytes."""
        self._seen += 1
        if self._seen <= _FIRST:
            return
        expected = self.of(rows)
        if expected is not None:  # one that the system interrupted is not what a step takes
            seconds = min(seconds, _OUTLIER * expected)
        for other in self._weight:
            self._weight[other] *= _FADE
        weight = self._weight[rows] = min(self._weight.get(rows, 0.0) + 1, _LATEST)
        mean = self._seconds.get(rows, seconds)
        self._seconds[rows] = mean + (seconds - mean) / weight
        share = 1 / self._union(rows)
        disk = read.get("disk", 0) * share
        routed = max(0.0, sum(size for tier, size in read.items() if tier != "disk") - self._dense) * share
        smooth = 1 / min(self._seen - _FIRST, _LATEST)
        self._on_disk += smooth * (disk - self._on_disk)
        self._in_memory += smooth * (self._dense + routed - self._in_memory)

    def of(self, rows: int) -> float | None:
        """Seconds of a step of ``rows``: as measured, the less often the more as its bytes tell beside what was
        measured most. None before any was."""
        if not self._weight:
            return None
        base = max(self._weight, key=lambda known: self._weight[known])
        if rows == base:
            return self._seconds[rows]
        told = self._seconds[base] * self._told(rows) / self._told(base)
        weight = self._weight.get(rows, 0.0)
        return (self._seconds.get(rows, 0.0) * weight + told) / (weight + 1)

    @property
    def disk_share(self) -> float:
        """How much of a step of one row its bytes from the disk take, from 0 to 1."""
        disk, memory = self._rate("disk"), self._rate("ram")
        if not disk or not memory:
            return 0.0
        read = self._on_disk / disk
        return read / (read + self._in_memory / memory)

    def _told(self, rows: int) -> float:
        """What a step of ``rows`` takes by its bytes, relative to another."""
        union = self._union(rows)
        memory = self._rate("ram") or 1.0
        in_memory = (self._dense + (self._in_memory - self._dense) * union) / memory
        disk = self._rate("disk")
        return max(in_memory, self._on_disk * union / disk) if disk else in_memory


class DraftPolicy:
    """Chooses depths by ``times`` and by the chances of what is proposed."""

    def __init__(self, times: StepTimes) -> None:
        self.times = times
        self.acceptance = Acceptance()
        self._balance = 0.0  # seconds that drafts have won, and what they may lose
        self._since_plain = 0

    def choose(self, chances: Sequence[Sequence[float]], most: int) -> list[int]:
        """How many of the tokens proposed for each sequence to run, ``most`` in all; ``chances[i][j]`` is that of the
        token j of sequence i, if those before it are right."""
        sequences, none = len(chances), [0] * len(chances)
        plain = self.times.of(sequences)
        if plain is None or self._balance < 0 or self._since_plain >= _STALE:
            return none
        candidates: list[tuple[float, int]] = []
        for index, of_one in enumerate(chances):
            together = 1.0
            for chance in of_one:
                together *= chance
                candidates.append((together, index))
        candidates.sort(key=lambda candidate: -candidate[0])
        gain = _GAIN + _DISK_GAIN * self.times.disk_share
        best, rate, tokens = 0, gain * sequences / plain, float(sequences)
        for count, (together, _) in enumerate(candidates[:most], 1):
            tokens += together
            seconds = self.times.of(sequences + count)
            assert seconds is not None
            if seconds - plain > self._balance + plain:  # what may be lost grows with what was won
                break
            if tokens / seconds > rate:
                best, rate = count, tokens / seconds
        for _, index in candidates[:best]:
            none[index] += 1
        return none

    def may_lose(self, seconds: float) -> bool:
        """Whether drafts may be made that take ``seconds``: they have won as much, or may lose it."""
        return not self._balance < 0 and seconds <= self._balance + (self.times.of(1) or 0.0)

    def depth(self, sequences: int, texts: int, most: int, each: float) -> int:
        """How many tokens to draft for each of ``texts`` among ``sequences``, ``most`` at most, before anything is
        known of them, where drafting one takes ``each`` seconds."""
        plain = self.times.of(sequences)
        if plain is None or self._balance < 0 or self._since_plain >= _STALE:
            return 0
        chance, together, tokens = self.acceptance.mean, 1.0, float(sequences)
        best, rate = 0, (_GAIN + _DISK_GAIN * self.times.disk_share) * sequences / plain
        for depth in range(1, most + 1):
            together *= chance
            tokens += texts * together
            seconds = (self.times.of(sequences + texts * depth) or 0.0) + texts * depth * each
            if seconds - plain > self._balance + plain:
                break
            if tokens / seconds > rate:
                best, rate = depth, tokens / seconds
        return best

    def note(
        self, sequences: int, drafted: int, tokens: int, seconds: float, read: Mapping[Tier, int], cost: float = 0.0
    ) -> None:
        """A step of ``sequences`` with ``drafted`` tokens more gave ``tokens`` in ``seconds`` and ``read`` so much;
        what was drafted had taken ``cost`` seconds before."""
        self.times.note(sequences + drafted, seconds, read)
        self._balance -= cost
        plain, took = self.times.of(sequences), self.times.of(sequences + drafted)
        if plain is None or took is None:
            return
        if drafted:
            self._since_plain += 1
            self._balance = min(self._balance + tokens / sequences * plain - took, _CREDIT * plain)
        else:
            self._since_plain = 0
            self._balance = max(self._balance, min(self._balance + _LOSS * plain, plain))
