"""ChunkSize: how many tokens of a prompt to run at once while others wait for their next token."""

_SECONDS = 0.5  # that others wait for a chunk
LEAST = 64  # fewer cost more than they spare: every chunk reads all weights
_FIRST = 128  # before any speed is known


class ChunkSize:
    """From the speed of the last chunk: the power of two from 64 to ``most`` nearest to half a second's worth."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._beside = _FIRST

    @property
    def beside(self) -> int:
        """Tokens to run while others wait."""
        return min(self._beside, self.most)

    def note(self, tokens: int, seconds: float) -> None:
        """A chunk of ``tokens`` took so long. Short ones say little of long ones."""
        if tokens >= LEAST and seconds > 0:
            self._beside = LEAST
            while 1.5 * self._beside <= tokens / seconds * _SECONDS and 2 * self._beside <= self.most:
                self._beside *= 2
