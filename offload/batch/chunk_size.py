"""ChunkSize: how many tokens of a prompt to run at once while others wait for their next token."""

_SECONDS = 0.5  # that others wait for a chunk, at most
LEAST = 64  # fewer cost more than they spare: every chunk reads all weights


class ChunkSize:
    """The power of two that takes between a quarter and half a second by the chunks before, 64 at least and ``most`` at
    most.

    A chunk reads all weights whatever its length, so that a shorter one takes more per token: what a chunk took says
    that longer ones take no more than that per token, and shorter ones no less. So it grows by what a chunk of its own
    length or less took, and shrinks by what one of its own or more did. By the speed of long chunks alone it would be
    chosen too long, and others wait for longer than they should.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._beside = LEAST

    @property
    def beside(self) -> int:
        """Tokens to run while others wait."""
        return min(self._beside, self.most)

    def note(self, tokens: int, seconds: float) -> None:
        """A chunk of ``tokens`` took so long. Very short ones say nothing."""
        if tokens < LEAST or seconds <= 0:
            return
        each, beside = seconds / tokens, self._beside
        if tokens >= beside:
            while self._beside > LEAST and self._beside * each > _SECONDS:
                self._beside //= 2
        if tokens <= beside and 2 * beside * each <= _SECONDS and 2 * beside <= self.most:
            self._beside = 2 * beside
