"""What an exact start may take: a solution with what it promises."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.runtime.head_rows import HeadRows


class HeadFit(NamedTuple):
    """A solution that an exact start may take.

    name: for messages. rows: that it is from. before, held_out: mean losses in nats, of the model as it is and of fits of other rows.
    make: puts it into the weights, which may take forwards. unseen: logits by fits of other rows less those by the fit itself, float64
    [rows, candidates], where rows have candidates.
    """

    name: str
    rows: int
    before: float
    held_out: float
    make: Callable[[], HeadRows]
    unseen: npt.NDArray[np.float64] | None = None
