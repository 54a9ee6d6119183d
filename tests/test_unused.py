"""Settings that have no effect beside others."""

from pathlib import Path
from typing import Any

import pytest
from interchange import TASK

import edgezo
from edgezo.config import TuneConfig, make_config
from edgezo.runtime.reports import Reporter
from edgezo.unused import unused_notes, unused_settings


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({"labels": "a,b", "start": "none"}, {"max_tokens", "beta", "start_rows"}),
        ({"valid": "v.jsonl", "start": "exact"}, {"label_field", "valid_share"}),
        ({"choices": ["{a}", "{b}"]}, {"label_field", "max_tokens"}),
        ({"objective": "f1"}, {"label_field", "beta"}),
        ({"objective": "module:function"}, {"label_field"}),
        ({"objective": "dpo", "rule": "svrg"}, {"label_field", "beta_m", "beta_v", "hessian_smooth"}),
        ({"rule": "hizoo", "estimator": "curvature"}, {"label_field", "beta_m", "beta_v", "anchor_every", "anchor_batches"}),
        ({"rule": "momentum"}, {"label_field", "beta_v", "anchor_every", "anchor_batches", "hessian_smooth"}),
        ({"rule": "meazo"}, {"label_field", "beta_m", "anchor_every", "anchor_batches", "hessian_smooth"}),
        ({"sampler": "lozo"}, {"label_field", "share"}),
        ({"sampler": "tezo"}, {"label_field", "share", "redraw_every"}),
        ({"sampler": "layers"}, {"label_field", "z_rank", "redraw_every"}),
    ],
)
def test_settings_without_an_effect_follow_from_the_others(settings: dict[str, Any], unused: set[str]) -> None:
    found = unused_settings(make_config(None, {"data": "d.jsonl", "template": "{text}", **settings}))
    others = {} if "rule" in settings else {"beta_m", "beta_v", "anchor_every", "anchor_batches", "hessian_smooth"}
    others = {*others, *(() if "sampler" in settings else ("share", "z_rank", "redraw_every"))}
    assert found - others == unused
    assert found <= TuneConfig.model_fields.keys()
    assert unused_settings(make_config(None, {"data": "d.jsonl"}), evaluated=False) >= {
        "valid_share",
        "eval_every",
        "eval_rows",
        "patience",
    }


def notes(**settings: Any) -> list[str]:
    """Those of a configuration with label words."""
    return unused_notes(make_config(None, {"data": "d.jsonl", "template": "{text}", "labels": "a,b", **settings}))


def test_what_was_given_and_has_no_effect_is_noted() -> None:
    assert notes(rule="momentum", beta_m=0.5, sampler="lozo", z_rank=2, start="exact", start_rows=9, valid_share=0.2) == []
    assert notes(rule="sgd", hessian_smooth=0.5, beta_m=0.5, beta_v=0.99) == [  # beta_v has its default, as in a file of all settings
        "note: --beta-m 0.5 has no effect, it is of --rule momentum and adam",
        "note: --hessian-smooth 0.5 has no effect, it is of --rule hizoo",
    ]
    assert notes(sampler="layers", z_rank=2) == ["note: --z-rank 2 has no effect, it is of --sampler lozo and subzero and tezo"]
    assert notes(start="none", start_rows=9) == ["note: --start-rows 9 has no effect, no exact start is made"]
    assert notes(labels=None, label_field="kind") == []  # tells answers from rows with a label
    assert notes(valid="v.jsonl", valid_share=0.2) == ["note: --valid-share 0.2 has no effect, --valid gives the validation rows"]


def test_a_run_notes_them_once_and_not_again_as_it_goes_on(exported_dir: Path, reviews: str, tmp_path: Path) -> None:
    told: list[str] = []
    listening, given = Reporter(notice=told.append), {**TASK, "data": reviews, "eps": 0.01, "lr": 0.01, "start": "none"}
    edgezo.tune(exported_dir, tmp_path / "run", steps=1, beta_m=0.5, reporter=listening, **given)
    assert [line for line in told if "no effect" in line] == ["note: --beta-m 0.5 has no effect, it is of --rule momentum and adam"]
    told.clear()
    edgezo.tune(exported_dir, tmp_path / "run", steps=2, resume=True, reporter=listening)
    assert not [line for line in told if "no effect" in line]
