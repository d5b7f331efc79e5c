"""How long a pass takes by its number of rows, and which rows are worth it.

A pass over n rows takes about a + b n: a for reading the weights and for everything that is done once, b for each
row. Where b is small, as on an accelerator or in a small batch, a row that will probably be thrown away costs next
to nothing; in a full batch it slows down all others (WISP, arXiv 2601.11652, calls it verification interference).
"""

from __future__ import annotations

# How much of what was seen before still counts after one more pass.
_KEPT = 0.98
# So many passes, in effect, before the line through them is believed.
_ENOUGH = 8.0


class PassTime:
    """Measures a and b from the passes that were done; the last fifty or so count.

    Example:
        >>> times = PassTime()
        >>> for rows in range(1, 40):
        ...     times.add(rows, 0.002 + 0.001 * rows)
        >>> [round(value, 4) for value in times.line or ()]
        [0.002, 0.001]
    """

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        """A pass is done."""
        for name, value in (
            ("_weight", 1.0),
            ("_rows", float(num_rows)),
            ("_seconds", seconds),
            ("_rows_rows", float(num_rows) ** 2),
            ("_rows_seconds", num_rows * seconds),
        ):
            setattr(self, name, _KEPT * getattr(self, name) + value)

    @property
    def line(self) -> tuple[float, float] | None:
        """a and b, seconds; None as long as too little was seen, or always the same number of rows."""
        if self._weight < _ENOUGH:
            return None
        rows, seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_rows / self._weight - rows**2
        if spread < 0.25:
            return None
        slope = max(0.0, (self._rows_seconds / self._weight - rows * seconds) / spread)
        return max(0.0, seconds - slope * rows), slope

    def is_worth(self, chance: float, *, num_rows: int, tokens: float) -> bool:
        """Whether one more row lets a pass bring more tokens a second.

        n rows bring the sum of their chances in a + b n seconds; one more is worth it where its chance times
        (a + b n) is more than b times that sum.

        Args:
            chance: of the row's next step to be of use.
            num_rows: n, the rows that are in the pass already.
            tokens: the sum of their chances.

        Example:
            >>> times = PassTime()
            >>> for rows in range(1, 40):
            ...     times.add(rows, 0.002 + 0.001 * rows)
            >>> times.is_worth(0.6, num_rows=1, tokens=1.0), times.is_worth(0.6, num_rows=8, tokens=8.0)
            (True, False)
        """
        line = self.line
        if line is None:
            return True
        once, each = line
        return chance * (once + each * num_rows) > each * tokens
