"""Settings that have no effect beside others: left out of what a run shows, and told to whoever gave them."""

from collections.abc import Callable

from edgezo.config import OBJECTIVES, TuneConfig

# when a setting has an effect at all, as far as the other settings tell; which adapter there was, or that rows have answers, they do not
MATTERS: dict[str, Callable[[TuneConfig], bool]] = {
    # another field than the default tells answers and plain text from rows with a label
    "label_field": lambda config: config.labels is not None or config.label_field != TuneConfig.model_fields["label_field"].default,
    "max_tokens": lambda config: config.labels is None and config.choices is None,
    "beta": lambda config: config.labels is None and config.objective not in set(OBJECTIVES) - {"preference", "dpo"},
    "beta_m": lambda config: config.rule in {"momentum", "adam"},
    "beta_v": lambda config: config.rule in {"meazo", "adam"},
    "anchor_every": lambda config: config.rule == "svrg",
    "anchor_batches": lambda config: config.rule == "svrg",
    "hessian_smooth": lambda config: config.rule == "hizoo",
    "share": lambda config: config.sampler in {"layers", "magnitude"},
    "z_rank": lambda config: config.sampler in {"lozo", "subzero", "tezo"},
    "redraw_every": lambda config: config.sampler in {"lozo", "subzero"},
    "start_rows": lambda config: config.start != "none",
    "valid_share": lambda config: config.valid is None,
}


def unused_settings(config: TuneConfig) -> set[str]:
    """Names of settings that have no effect beside the others."""
    return {name for name, matters in MATTERS.items() if not matters(config)}


def unused_notes(config: TuneConfig) -> list[str]:
    """A line for each of these that was given another value than its default, as a person would give it who expects something of it."""
    given = {name: TuneConfig.model_fields[name] for name in sorted(unused_settings(config) & config.model_fields_set)}
    changed = {name: field.description or "" for name, field in given.items() if getattr(config, name) != field.default}
    return [
        f"note: --{name.replace('_', '-')} {getattr(config, name)} has no effect"
        + (f", it is {described.partition(':')[0]}" if described.startswith("of ") else " beside the other settings")
        for name, described in changed.items()
    ]
