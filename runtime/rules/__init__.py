"""Update rules, from the scalars of a step. A new one is a file and a row of `RULES` (and its name in edgezo/config.py)."""

from collections.abc import Callable, Mapping

from edgezo.config import TuneConfig
from edgezo.runtime.rules.adam import Adam
from edgezo.runtime.rules.conservative import Conservative
from edgezo.runtime.rules.fzoo import Fzoo
from edgezo.runtime.rules.hizoo import Hizoo
from edgezo.runtime.rules.meazo import Meazo
from edgezo.runtime.rules.momentum import Momentum
from edgezo.runtime.rules.normalized import Normalized
from edgezo.runtime.rules.rule import Rule
from edgezo.runtime.rules.sgd import Sgd
from edgezo.runtime.rules.sign import Sign
from edgezo.runtime.rules.svrg import Svrg

RULES: dict[str, Callable[[TuneConfig, Mapping[str, int]], Rule]] = {
    "sgd": lambda config, sizes: Sgd(),
    "normalized": lambda config, sizes: Normalized(),
    "sign": lambda config, sizes: Sign(),
    "fzoo": lambda config, sizes: Fzoo(),
    "meazo": lambda config, sizes: Meazo(config.beta_v),
    "momentum": lambda config, sizes: Momentum(sizes, config.beta_m),
    "adam": lambda config, sizes: Adam(sizes, config.beta_m, config.beta_v),
    "conservative": lambda config, sizes: Conservative(),
    "svrg": lambda config, sizes: Svrg(config.anchor_every, config.anchor_batches),
    "hizoo": lambda config, sizes: Hizoo(sizes, config.hessian_smooth),
}


def make_rule(config: TuneConfig, sizes: Mapping[str, int]) -> Rule:
    """The rule of a run, at its start.

    Args:
        sizes: elements of every tunable tensor.
    """
    return RULES[config.rule](config, sizes)
