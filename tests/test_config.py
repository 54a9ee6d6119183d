"""One configuration: files and options are checked alike, and options come first."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from every_field import FIELDS, NEITHER_DEFAULT

from edgezo.config import ACCURACY_BATCH, ADAPTER_DEFAULTS, CONFIG_BYTES_LIMIT, AdapterKind, make_config, parse_labels
from edgezo.errors import ConfigError

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration file; returns its path."""

    def to(name: str, content: str) -> Path:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return to


def refusal(file: Path | None, **options: Any) -> str:
    """The message of the error, which is one line."""
    with pytest.raises(ConfigError) as caught:
        make_config(file, options)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def test_a_file_and_options_override_the_defaults_of_an_adapter(write: Write) -> None:
    path = write("run.yaml", "data: x\nlr: 0.5\neps: 0.25\n")
    config = make_config(path, {"eps": 0.125}, "lora")
    assert (config.lr, config.eps, config.directions) == (0.5, 0.125, ADAPTER_DEFAULTS["lora"]["directions"])


@pytest.mark.parametrize("kind", [None, "lora", "prefix"])
@pytest.mark.parametrize("objective", ["cross-entropy", "accuracy", "f1"])
def test_accuracy_has_more_rows_a_direction_of_an_adapter(objective: str, kind: AdapterKind | None) -> None:
    rows = 16 if kind is None else ACCURACY_BATCH if objective == "accuracy" else 1
    assert make_config(None, {"data": "x", "objective": objective}, kind).batch == rows
    assert make_config(None, {"data": "x", "objective": objective, "batch": 2}, kind).batch == 2
    assert make_config(None, {"data": "x"}, kind, {"objective": objective, "batch": 3}).batch == 3


def test_a_yaml_file_sets_every_field(write: Write) -> None:
    path = write("run.yaml", "".join(f"{field}: {json.dumps(value)}\n" for field, value in NEITHER_DEFAULT.items()))
    assert make_config(path, {}).model_dump() == NEITHER_DEFAULT


def test_a_json_file_sets_every_field(write: Write) -> None:
    path = write("run.json", json.dumps(NEITHER_DEFAULT))
    assert make_config(path, {}).model_dump() == NEITHER_DEFAULT


def test_the_file_of_a_run_is_a_configuration_file(write: Write) -> None:
    first = make_config(None, {"data": "x", "steps": 5, "labels": "a,b"})
    assert make_config(write("config.json", first.model_dump_json()), {}) == first


def test_yaml_numbers_without_a_dot_are_numbers(write: Write) -> None:
    assert make_config(write("run.yaml", "data: x\nlr: 2e-6\nseed: 5\n"), {}).lr == 2e-6


def test_options_override_the_file_and_none_means_not_given(write: Write) -> None:
    path = write("run.yaml", "data: x\nlr: 0.5\nbatch: 3\nlabels: [a, b]\n")
    config = make_config(path, {"lr": 0.25, "batch": None, "labels": "c,d"})
    assert (config.data, config.lr, config.batch, config.labels) == ("x", 0.25, 3, {"0": "c", "1": "d"})


def test_zero_overrides_the_file(write: Write) -> None:
    assert make_config(write("run.yaml", "data: x\nseed: 3\nwarmup: 0.5\n"), {"seed": 0, "warmup": 0.0}).seed == 0


@pytest.mark.parametrize(
    ("written", "labels"),
    [
        ("terrible,great", {"0": "terrible", "1": "great"}),
        ("[terrible, great]", {"0": "terrible", "1": "great"}),
        ("'neg=terrible,pos=great'", {"neg": "terrible", "pos": "great"}),
        ("{neg: terrible, pos: great}", {"neg": "terrible", "pos": "great"}),
        ("{0: terrible, 1: great}", {"0": "terrible", "1": "great"}),
        ("{0: 5, 1: 6}", {"0": "5", "1": "6"}),
    ],
)
def test_labels_of_a_file_take_every_form(write: Write, written: str, labels: dict[str, str]) -> None:
    assert make_config(write("run.yaml", f"data: x\nlabels: {written}\n"), {}).labels == labels


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("terrible,great", {"0": "terrible", "1": "great"}),
        (" terrible , great ", {"0": "terrible", "1": "great"}),
        ("very bad,good", {"0": "very bad", "1": "good"}),
        ("neg=terrible, pos=great", {"neg": "terrible", "pos": "great"}),
        ("a=x=y,b=z", {"a": "x=y", "b": "z"}),
        ("one", {"0": "one"}),
        ("2=c,0=a,1=b", {"2": "c", "0": "a", "1": "b"}),
    ],
)
def test_parse_labels(text: str, labels: dict[str, str]) -> None:
    assert list(parse_labels(text).items()) == list(labels.items())


def test_labels_of_a_mapping_may_share_a_word_but_not_those_of_a_list() -> None:
    labels = {"0": "No", "not_entailment": "No", "1": "Yes"}
    assert parse_labels(labels) == parse_labels("0=No,not_entailment=No,1=Yes") == labels
    for listed in ("No,No,Yes", ["No", "No", "Yes"]):
        with pytest.raises(ConfigError) as caught:
            parse_labels(listed)
        assert str(caught.value) == f"--labels {listed!r}: every label needs one word of its own"


@pytest.mark.parametrize("text", ["a=x,y", "x,b=y"])
def test_labels_of_both_forms_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_labels(text)
    assert str(caught.value) == f"--labels {text!r}: mixes words and label=word; use one form"


@pytest.mark.parametrize(
    ("text", "which"), [("", "word 1"), (",", "word 1"), ("a,", "word 2"), ("a,,b", "word 2"), ("a=,b=y", "the word of 'a'")]
)
def test_an_empty_word_is_named(text: str, which: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_labels(text)
    assert str(caught.value) == f"--labels {text!r}: {which} is empty; give every label its word"


@pytest.mark.parametrize("text", ["a,a", "a=x,b=x", "a=x,a=y", "=x,b=y"])
def test_labels_without_a_word_of_their_own_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_labels(text)
    assert str(caught.value) == f"--labels {text!r}: every label needs one word of its own"


@pytest.mark.parametrize("written", ["{0: a, 1: a}", "{0: a, 1: ''}", "{0: a, 1: null}"])
def test_labels_of_a_file_are_checked_like_the_option(write: Write, written: str) -> None:
    expected = "every label needs one word of its own" if written.endswith("a}") else "the word of '1' is empty"
    assert expected in refusal(write("run.yaml", f"data: x\nlabels: {written}\n"))


@pytest.mark.parametrize("written", ["[no, yes]", "{0: no, 1: yes}", "{no: bad, yes: good}"])
def test_labels_that_yaml_reads_as_truth_values_are_refused(write: Write, written: str) -> None:
    assert "YAML reads yes, no, on and off as true and false; put them in quotes" in refusal(
        write("run.yaml", f"data: x\nlabels: {written}\n")
    )


def test_missing_data_is_said_by_its_option() -> None:
    assert refusal(None) == "--data: not given; it is needed"


def test_missing_data_is_said_by_its_file(write: Write) -> None:
    path = write("run.yaml", "lr: 0.1\n")
    assert refusal(path) == f"{path}: data: not given; it is needed"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("max_length", 1, "input should be greater than 1"),
        ("steps", -1, "input should be greater than or equal to 0"),
        ("minutes", -1.0, "input should be greater than 0"),
        ("minutes", float("inf"), "input should be a finite number"),
        ("lr", 0.0, "input should be greater than 0"),
        ("lr", 1e7, "input should be less than or equal to 1000000"),
        ("lr", float("inf"), "input should be a finite number"),
        ("eps", float("inf"), "input should be a finite number"),
        ("eps", -0.1, "input should be greater than 0"),
        ("directions", 0, "input should be greater than 0"),
        ("directions", 1025, "input should be less than or equal to 1024"),
        ("batch", 0, "input should be greater than 0"),
        ("estimator", "sided", "input should be 'two-sided', 'one-sided' or 'curvature'"),
        (
            "rule",
            "lion",
            "input should be 'sgd', 'normalized', 'sign', 'fzoo', 'meazo', 'momentum', 'adam', 'conservative', 'svrg' or 'hizoo'",
        ),
        ("beta_m", 1.0, "input should be less than 1"),
        ("beta_v", -0.1, "input should be greater than or equal to 0"),
        ("anchor_every", 0, "input should be greater than 0"),
        ("anchor_batches", 0, "input should be greater than 0"),
        ("hessian_smooth", 0.0, "input should be greater than 0"),
        ("hessian_smooth", 1.0, "input should be less than 1"),
        ("sampler", "random", "input should be 'full', 'layers', 'magnitude', 'lozo', 'subzero' or 'tezo'"),
        ("share", 0.0, "input should be greater than 0"),
        ("share", 1.5, "input should be less than or equal to 1"),
        ("z_rank", 65, "input should be less than or equal to 64"),
        ("redraw_every", 0, "input should be greater than 0"),
        ("rank", 0, "input should be greater than 0"),
        ("alpha", float("inf"), "input should be a finite number"),
        ("tune_a", "perhaps", "write true or false"),
        ("seed", -1, "input should be greater than or equal to 0"),
        ("seed", 1 << 64, "input should be less than 18446744073709551616"),
        ("noise", "uniform", "input should be 'rademacher', 'gaussian' or 'sphere'"),
        ("schedule", "step", "input should be 'constant', 'linear' or 'cosine'"),
        ("warmup", 1.0, "input should be less than 1"),
        ("weight_decay", -0.5, "input should be greater than or equal to 0"),
        ("eval_every", 0, "input should be greater than 0"),
        ("eval_rows", 0, "input should be greater than 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_option(field: str, value: Any, reason: str) -> None:
    assert refusal(None, data="x", **{field: value}) == f"--{field.replace('_', '-')} {value!r}: {reason}"


@pytest.mark.parametrize("field", ["lr", "eps", "alpha", "minutes", "warmup", "weight_decay"])
def test_nan_is_refused_by_its_option(field: str) -> None:
    assert refusal(None, data="x", **{field: float("nan")}).startswith(f"--{field.replace('_', '-')} nan: input should be ")


@pytest.mark.parametrize(("seed", "steps"), [(0, 1), ((1 << 64) - 1, 1 << 40)])
def test_values_at_the_ends_of_their_range_are_taken(seed: int, steps: int) -> None:
    config = make_config(None, {"data": "x", "seed": seed, "steps": steps})
    assert (config.seed, config.steps) == (seed, steps)


def test_a_value_out_of_range_in_a_file_is_refused_by_the_file(write: Write) -> None:
    path = write("run.yaml", "data: x\nweight_decay: -1\n")
    assert refusal(path) == f"{path}: weight_decay -1: input should be greater than or equal to 0"


def test_an_option_out_of_range_is_not_blamed_on_the_file(write: Write) -> None:
    assert refusal(write("run.yaml", "data: x\nlr: 0.1\n"), lr=-1.0) == "--lr -1.0: input should be greater than 0"


@pytest.mark.parametrize("name", ["data", "labels", "choices"])
def test_text_that_is_not_utf8_is_refused(name: str) -> None:
    """Python reads other bytes of a path or an option as surrogates, which neither journal nor config.json can hold."""
    given = {"data": "r\udcff.jsonl", "labels": {"0": "a", "1": "\udcff"}, "choices": ["\udcff"]}[name]
    found = refusal(None, **{"data": "x", name: given})
    assert found == f"--{name} {given!r}: is not UTF-8, which a run is kept in; rename the file or give other text"


def test_a_decay_of_a_whole_weight_a_step_is_refused() -> None:
    assert (
        refusal(None, data="x", lr=0.5, weight_decay=2.0) == "--lr 0.5 times --weight-decay 2 is 1, and must be below 1; lower one of them"
    )


@pytest.mark.parametrize(("name", "near"), [("seeds", "seed"), ("patients", "patience"), ("resume", None), ("eval-every", "eval_every")])
def test_an_unknown_setting_is_refused_with_the_known_ones(write: Write, name: str, near: str | None) -> None:
    path = write("run.yaml", f"data: x\n{name}: 1\n")
    hint = f" (did you mean {near!r}?)" if near is not None else ""
    assert refusal(path) == f"{path}: {name}: no such setting{hint}; the settings are {', '.join(FIELDS)}"


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such configuration file"


@pytest.mark.parametrize(("content", "kind"), [("- a\n- b\n", "list"), ("text\n", "str"), ("5\n", "int")])
def test_a_file_that_is_no_mapping_is_refused(write: Write, content: str, kind: str) -> None:
    path = write("run.yaml", content)
    assert refusal(path) == f"{path}: holds a {kind}, not settings by name"


def test_an_empty_file_is_called_empty(write: Write) -> None:
    path = write("run.yaml", "# nothing yet\n")
    assert "empty" in refusal(path).removeprefix(str(path))


def test_malformed_json_is_refused_with_its_place(write: Write) -> None:
    path = write("run.json", '{"data": "x",\n "lr": }')
    assert refusal(path) == f"{path}: not readable as JSON (Expecting value: line 2 column 8 (char 21))"


@pytest.mark.parametrize(
    "content", ["data: x\nlr: [1\nbatch: 3\n", "data: x\nlr: 'open\n", "data: x\n\tlr: 1\n", "data: *none\n", "a: b: c\n"]
)
def test_malformed_yaml_is_refused_with_its_place(write: Write, content: str) -> None:
    path = write("run.yaml", content)
    message = refusal(path)
    assert message.startswith(f"{path}: not readable as YAML (")
    assert re.search(r"line \d", message)


@pytest.mark.parametrize("name", ["run.yaml", "run.json"])
def test_deep_nesting_is_refused(write: Write, name: str) -> None:
    assert "not readable as" in refusal(write(name, "[" * 50_000))


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"data: \xff\n")
    assert refusal(path).startswith(f"{path}: not readable as YAML (")


def test_yaml_cannot_make_objects(write: Write) -> None:
    assert "not readable as YAML" in refusal(write("run.yaml", "data: !!python/object/apply:os.getcwd []\n"))


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with open(path, "wb") as file:
        file.truncate(CONFIG_BYTES_LIMIT + 1)
    assert refusal(path) == f"{path}: larger than {CONFIG_BYTES_LIMIT} bytes; this is no configuration"
