"""Settings that have no effect beside others: left out of what a run shows, and told to whoever gave them."""

from collections.abc import Callable
from typing import NamedTuple

from edgezo.config import OBJECTIVES, TuneConfig


class Use(NamedTuple):
    """When a setting has an effect at all, as far as the other settings tell, and why it has none else.

    Which adapter there was, or that rows have answers, they do not tell.
    """

    matters: Callable[[TuneConfig], bool]
    reason: str


def _one_of(field: str, *values: str) -> Use:
    return Use(lambda config: getattr(config, field) in values, f"it is of --{field} {' and '.join(values)}")


USES = {
    # another field than the default tells answers and plain text from rows with a label
    "label_field": Use(
        lambda config: config.labels is not None or config.label_field != TuneConfig.model_fields["label_field"].default,
        "rows have no label words",
    ),
    "max_tokens": Use(lambda config: config.labels is None and config.choices is None, "no answers are written"),
    "beta": Use(
        lambda config: config.labels is None and config.objective not in set(OBJECTIVES) - {"preference", "dpo"},
        "it is of --objective preference and dpo",
    ),
    "beta_m": _one_of("rule", "momentum", "adam"),
    "beta_v": _one_of("rule", "meazo", "adam"),
    "anchor_every": _one_of("rule", "svrg"),
    "anchor_batches": _one_of("rule", "svrg"),
    "hessian_smooth": _one_of("rule", "hizoo"),
    "share": _one_of("sampler", "layers", "magnitude"),
    "z_rank": _one_of("sampler", "lozo", "subzero", "tezo"),
    "redraw_every": _one_of("sampler", "lozo", "subzero"),
    "start_rows": Use(lambda config: config.start != "none", "no exact start is made"),
    "valid_share": Use(lambda config: config.valid is None, "--valid gives the validation rows"),
}
EVALUATIONS = {"valid_share", "eval_every", "eval_rows", "patience"}  # that have none in a run without validation rows


def unused_settings(config: TuneConfig, evaluated: bool = True) -> set[str]:
    """Names of settings that have no effect beside the others."""
    return {name for name, use in USES.items() if not use.matters(config)} | (set() if evaluated else EVALUATIONS)


def unused_notes(config: TuneConfig) -> list[str]:
    """A line for each of these that was given another value than its default, as a person would give it who expects something of it."""
    given = {name: getattr(config, name) for name in sorted(unused_settings(config) & config.model_fields_set)}
    changed = {name: value for name, value in given.items() if value != TuneConfig.model_fields[name].default}
    return [f"note: --{name.replace('_', '-')} {value} has no effect, {USES[name].reason}" for name, value in changed.items()]
