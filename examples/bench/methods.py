"""What the study of convergence compares: whole ways to learn, and every estimator, sampler and rule at rates that edgezo measures."""

from typing import Any, NamedTuple


class Method(NamedTuple):
    """Which model a method tunes, and its settings; `each_budget`: a run of its own for every number of training rows; `choices`: learns rows of choices."""

    edge: str
    settings: dict[str, Any]
    each_budget: bool = False
    choices: bool = True


PLAIN: dict[str, Any] = {"start": "none", "rule": "sgd", "directions": 1, "batch": 16, "schedule": "constant"}
WAYS = {
    "edgezo": Method("lora", {}),
    # eps and lr given, since nothing but the start is to be counted
    "exact start alone": Method("lora", {"steps": 0, "eps": 1e-3, "lr": 1e-3}, each_budget=True),
    "linear probe": Method("lora", {}, each_budget=True, choices=False),
    "edgezo without exact start": Method("lora", {"start": "none"}),
    "MeZO LoRA, published": Method("lora", {**PLAIN, "eps": 1e-2, "lr": 1e-4, "tune_a": True}),
    **{f"MeZO LoRA, lr {lr:g}": Method("lora", {**PLAIN, "eps": 1e-2, "lr": lr, "tune_a": True}) for lr in (1e-3, 1e-2)},
    "MeZO, published": Method("full", {**PLAIN, "eps": 1e-3, "lr": 1e-6}),
    **{f"MeZO, lr {lr:g}": Method("full", {**PLAIN, "eps": 1e-3, "lr": lr}) for lr in (5e-6, 2e-5, 8e-5)},
    "backpropagation, LoRA, AdamW": Method("source", {}),
}

# directions that share rows are fewer, so that a step takes about as many rows of forward: 32 and 30
SHARED: dict[str, dict[str, Any]] = {
    "one-sided": {"estimator": "one-sided", "directions": 7, "batch": 4},
    "curvature": {"estimator": "curvature", "directions": 7, "batch": 2},
}
VARIANTS = {
    "edgezo without exact start": WAYS["edgezo without exact start"],  # 16 directions of a row, normalized, two-sided
    "LoRA, one direction of 16 rows": Method("lora", {"start": "none", "directions": 1, "batch": 16}),
    **{
        f"LoRA, rule {rule}": Method("lora", {"start": "none", "rule": rule})
        for rule in ("sgd", "sign", "fzoo", "meazo", "momentum", "adam", "conservative", "svrg")
    },
    **{f"LoRA, estimator {name}": Method("lora", {"start": "none", **settings}) for name, settings in SHARED.items()},
    "LoRA, rule fzoo, estimator one-sided": Method("lora", {"start": "none", "rule": "fzoo", **SHARED["one-sided"]}),
    "LoRA, sampler layers": Method("lora", {"start": "none", "sampler": "layers"}),
    "all weights: sgd, two-sided, one direction of 16 rows": Method("full", {"start": "none"}),
    **{f"all weights, noise {noise}": Method("full", {"start": "none", "noise": noise}) for noise in ("gaussian", "sphere")},
    "all weights, rule hizoo, noise gaussian": Method(
        "full", {"start": "none", "rule": "hizoo", "estimator": "curvature", "noise": "gaussian", "batch": 11}
    ),
    **{
        f"all weights, sampler {sampler}": Method("full", {"start": "none", "sampler": sampler})
        for sampler in ("layers", "magnitude", "lozo", "subzero", "tezo")
    },
}
GROUPS = {"ways": WAYS, "variants": VARIANTS}
METHODS = {**WAYS, **VARIANTS}
