"""Which rows a step sees: a function of the seed and the step alone."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from edgezo.runtime import noise

ORDER = 2  # version, in the journal of a run; 1 is known too
WINDOW_BATCHES = 8  # batches formed together, so that rows of like length meet: random ones pad to twice their mean length


class DataOrder:
    """Seeded batches without end; every row comes once in each epoch.

    A stream of permuted epochs is cut into windows of eight batches. Inside a window rows are sorted by epoch, then by length, and cut into
    batches, which are then taken in a permuted order. By length alone, which was order 1, the copies of a row met in one batch.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: of the run.
        version: of the order, `ORDER` or an earlier one.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, version: int = ORDER) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.version = version
        self._epoch = lru_cache(maxsize=4)(lambda epoch: noise.permutation(seed, len(self.lengths), 2 * epoch))

    def batch(self, step: int) -> list[int]:
        """Row numbers of step `step` (from 0)."""
        window, place = divmod(step, WINDOW_BATCHES)
        size = WINDOW_BATCHES * self.batch_size
        epochs, places = np.divmod(np.arange(window * size, (window + 1) * size), len(self.lengths))
        rows = np.array([self._epoch(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])
        lengths = self.lengths[rows]
        rows = rows[np.argsort(lengths, kind="stable") if self.version == 1 else np.lexsort((lengths, epochs))]
        chosen = noise.permutation(self.seed, WINDOW_BATCHES, 2 * window + 1)[place]
        return [int(row) for row in rows[chosen * self.batch_size : (chosen + 1) * self.batch_size]]
