"""What is kept of one tensor between the passes over it, so that it is read, and scored, once where it is not large."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

#: Most bytes of one tensor, of all its models, that are kept; a larger one is read again.
HELD_BYTES = 1 << 25
#: Most bytes of its scores that are kept, over those: they take longer to find again.
SCORES_OVER_STORED = 4

Rows = tuple[int, int] | None


class Held:
    """Chunks of one tensor of several models, and their scores.

    Args:
        nbytes: of the tensor in all models.
        score_bytes: of scores that serve all models.
    """

    def __init__(self, nbytes: int, score_bytes: int) -> None:
        self.fits = nbytes <= HELD_BYTES
        self._scores_fit = score_bytes <= SCORES_OVER_STORED * HELD_BYTES
        self._stored: dict[Rows, Sequence[Tensor]] = {}
        self._scores: dict[Rows, Sequence[Tensor]] = {}

    def stored(self, rows: Rows, read: Callable[[], Sequence[Tensor]], *, again: bool = True) -> list[Tensor]:
        """Some rows of every model, cut from what is kept or else read, and kept then if they are read again."""
        for part, stored in tuple(self._stored.items()):  # a repeated layer may be merged by another thread meanwhile
            if part == rows:
                return [*stored]
            if rows is not None and part is not None and part[0] <= rows[0] and rows[1] <= part[1]:
                return [x[rows[0] - part[0] : rows[1] - part[0]] for x in stored]
        stored = read()
        if again and self.fits:
            self._stored[rows] = stored
        return [*stored]

    def scores(self, rows: Rows, score: Callable[[], Sequence[Tensor]], *, again: bool) -> Sequence[Tensor]:
        """Scores of some rows, likewise."""
        found = self._scores.get(rows)
        if found is None:
            found = score()
            if again and self._scores_fit:
                self._scores[rows] = found
        return found
