"""Estimators of projected gradients. A new one is a file and a row of `ESTIMATORS` (and its name in edgezo/config.py)."""

from edgezo.runtime.estimators.curvature import CURVATURE
from edgezo.runtime.estimators.estimator import Estimator
from edgezo.runtime.estimators.one_sided import ONE_SIDED
from edgezo.runtime.estimators.two_sided import TWO_SIDED

ESTIMATORS: dict[str, Estimator] = {"two-sided": TWO_SIDED, "one-sided": ONE_SIDED, "curvature": CURVATURE}
