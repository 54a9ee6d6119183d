"""Every field of the configuration is an option that says its default and reaches the run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from every_field import DEFAULTS, FIELDS, NEITHER_DEFAULT
from pydantic import TypeAdapter

from edgezo import cli
from edgezo.config import ADAPTER_DEFAULTS, DEFAULT_STEPS, AdapterKind, make_config
from edgezo.options import as_typed


@pytest.fixture
def option_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What `edgezo tune --help` says of each option, without line breaks."""
    monkeypatch.setattr("sys.argv", ["edgezo", "tune", "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    parts = re.split(r"\n  (?:-\w, )?--([a-z-]+)", capsys.readouterr().out)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_an_option_of_tune(option_help: dict[str, str], field: str) -> None:
    assert field.replace("_", "-") in option_help


def test_tune_has_no_other_options_than_the_fields_and_how_to_run(option_help: dict[str, str]) -> None:
    others = {"output", "config", "task", "resume", "threads", "device", "memory", "json", "help"}
    assert set(option_help) == {field.replace("_", "-") for field in FIELDS} | others


@pytest.mark.parametrize("field", [field for field in FIELDS if DEFAULTS[field] is not None and field != "data"])
def test_help_says_the_default_of_the_configuration(option_help: dict[str, str], field: str) -> None:
    said = re.search(r"\[default: ([^\]]*)\]", option_help[field.replace("_", "-")])
    assert said is not None
    assert TypeAdapter(type(DEFAULTS[field])).validate_python(said[1]) == DEFAULTS[field]


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, defaults in ADAPTER_DEFAULTS.items() for field in defaults])
def test_help_says_the_defaults_of_each_adapter_and_they_hold(option_help: dict[str, str], kind: AdapterKind, field: str) -> None:
    default = ADAPTER_DEFAULTS[kind][field]
    said = re.search(rf"\[{kind}: ([^\]]*)\]", option_help[field.replace("_", "-")])
    assert said is not None
    assert TypeAdapter(type(default)).validate_python(said[1]) == default
    assert getattr(make_config(None, {"data": "x"}, kind), field) == default
    assert getattr(make_config(None, {"data": "x"}), field) == DEFAULTS[field]


# no default, or one that is said in words
SHOWN = {"steps", "max_length", "answer_field", "stop", "objective", "metrics", "valid", "lr", "eps", "patience", "start"}


@pytest.mark.parametrize("field", [field for field in FIELDS if DEFAULTS[field] is None and field not in SHOWN])
def test_help_says_no_default_where_there_is_none(option_help: dict[str, str], field: str) -> None:
    assert "default" not in option_help[field.replace("_", "-")]


def test_help_says_the_steps_of_a_run_without_steps_and_minutes(option_help: dict[str, str]) -> None:
    assert f"[default: {DEFAULT_STEPS} unless --minutes is given]" in option_help["steps"]
    assert make_config(None, {"data": "x"}).total_steps == DEFAULT_STEPS


OTHER_ROWS = {"choices", "stop", "metrics"}  # of other kinds of rows than labelled ones
REFUSED_ON = {"exported_dir": {"rank", "alpha", "tune_a", "init", *OTHER_ROWS}, "lora_dir": {"noise", "init", *OTHER_ROWS}}


def option(field: str, value: Any) -> list[str]:
    """A field as it is written on the command line."""
    name = f"--{field.replace('_', '-')}"
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if field == "replace":
        (only,) = value
        return [name, f"{only}:{option(field[:0], value[only])[1]}"]
    if field == "choices":
        return [part for choice in value for part in (name, choice)]
    if isinstance(value, list):
        return [name, ",".join(value)]
    return [name, ",".join(f"{label}={word}" for label, word in value.items()) if isinstance(value, dict) else str(value)]


def test_there_is_a_value_for_every_field_and_none_is_its_default() -> None:
    assert set(NEITHER_DEFAULT) == set(FIELDS)
    assert not [field for field in FIELDS if NEITHER_DEFAULT[field] == DEFAULTS[field]]


@pytest.mark.parametrize("edge", REFUSED_ON)
def test_every_option_reaches_the_run(
    request: pytest.FixtureRequest, edge: str, tmp_path: Path, write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(
        [{"body": body, "sentiment": number % 2} for number, body in enumerate(["a film", "a plot", "film", "plot", "great"])]
    )
    given = {field: data if value == "DATA" else value for field, value in NEITHER_DEFAULT.items() if field not in REFUSED_ON[edge]}
    options = [part for field, value in given.items() for part in option(field, value)]
    monkeypatch.setattr("sys.argv", ["edgezo", "tune", str(request.getfixturevalue(edge)), "-o", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    kept = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert kept == {**given, **{field: DEFAULTS[field] for field in REFUSED_ON[edge]}}


@pytest.mark.parametrize("value", [True, False])
def test_tune_a_reaches_the_run_either_way(
    exported_dir: Path, tmp_path: Path, reviews: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: bool
) -> None:
    (tmp_path / "run.yaml").write_text(f"tune_a: {json.dumps(not value)}\n")
    options = ["--config", str(tmp_path / "run.yaml"), "--data", reviews, "--template", "{text} It was", "--labels", "terrible,great"]
    arguments = ["edgezo", "tune", str(exported_dir), "-o", str(tmp_path / "run"), "--steps", "1", *options, *option("tune_a", value)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    refused = "error: --tune-a: this edge model has no branch points for LoRA; export it with --adapter lora\n" in capsys.readouterr().err
    assert (caught.value.code, refused) == ((1, True) if value else (0, False))


def test_init_reaches_the_run(
    exported_dir: Path, tmp_path: Path, reviews: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", reviews, "--steps", "1", "--init", str(tmp_path / "nowhere")]
    monkeypatch.setattr("sys.argv", ["edgezo", "tune", str(exported_dir), "-o", str(tmp_path / "run"), *options])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (caught.value.code, str(tmp_path / "nowhere") in line) == (1, True)
    assert not (tmp_path / "run").exists()


def test_line_breaks_of_the_command_line_reach_every_prompt() -> None:
    given = {"template": "{a}\\nb", "choices": ["x\\ty", "z"], "stop": "\\n", "calibrate": "N/A\\n", "replace": [], "labels": "a,b"}
    assert as_typed(**given) == {
        "template": "{a}\nb",
        "choices": ["x\ty", "z"],
        "stop": "\n",
        "calibrate": "N/A\n",
        "replace": None,
        "labels": "a,b",
    }
    assert as_typed(choices=[])["choices"] is None
