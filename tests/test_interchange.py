"""Tuned weights for elsewhere, averaged or not, and switched: the same scores, or a refusal that leaves nothing behind."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
import transformers
from conftest import ExportTiny
from interchange import CONFIG, TASK, TENSORS, assert_same
from reference import edge_log_probs, make_pairs, network_log_probs, peft_network
from safetensors.numpy import load_file

import edgezo
from edgezo.errors import AdapterError, ConfigError, EdgezoError, RunError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.hugging_face import source_weights
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.scoring import Pair
from edgezo.runtime.tuned import write_tuned

TEXTS = ["the film is great", "", "  Two  spaces\nand <|im_start|>user a b", "Größe 東京 🙂"]


class Run(NamedTuple):
    """A run of a few large steps, and scores of what it made."""

    name: str
    directory: Path
    path: Path
    log_probs: Any

    def write(self, output: Path, to: Any) -> Path:
        write_tuned(self.directory, [self.path], [1.0], "last", output, to, threads=1)
        return output


@pytest.fixture(scope="module")
def make_run(export_tiny: ExportTiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Tune a tiny model, once for each name, kind and number; shared, never to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"text": f"the {word} film", "label": row % 2} for row, word in enumerate(["great", "long", "bad", "new"] * 2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made: dict[str, Run] = {}

    def make(name: str, kind: str, number: int = 0, **settings: Any) -> Run:
        key = "-".join(map(str, (name, kind, number, *settings.values())))
        if key not in made:
            directory = export_tiny(name, **({} if kind == "full" else {"adapter": kind}), **settings)
            tuning: dict[str, Any] = {
                "directions": 4,
                "batch": 2,
                "schedule": "constant",
                "seed": number,
                "steps": 5,
                "rule": "normalized",
                "start": "none",
            }
            tuning |= {"full": {"lr": 2e-2}, "prefix": {"lr": 0.1}, "lora": {"lr": 5e-2, "rank": 3 - number, "alpha": 5.0 + number}}[kind]
            edgezo.tune(directory, folder / key, data=str(folder / "rows.jsonl"), **TASK, **tuning)
            found = edge_log_probs(EdgeModel(directory, run=folder / key, step="last", threads=1), make_pairs())
            assert np.abs(found - edge_log_probs(EdgeModel(directory, threads=1), make_pairs())).max() > 0.1
            made[key] = Run(name, directory, folder / key, found)
        return made[key]

    return make


@pytest.fixture(params=["llama", "gpt2"])
def lora_run(request: pytest.FixtureRequest, make_run: Callable[..., Run]) -> Run:
    return make_run(request.param, "lora")


# tuned weights for elsewhere


def test_a_peft_folder_is_read_by_peft(lora_run: Run, tmp_path: Path) -> None:
    folder = lora_run.write(tmp_path / "out", "peft")
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, TENSORS]
    assert_same(network_log_probs(peft_network(lora_run.name, folder), make_pairs()), lora_run.log_probs)
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 5, lora_run.name == "gpt2")
    assert_same(edge_log_probs(EdgeModel(lora_run.directory, adapter=folder, threads=1), make_pairs()), lora_run.log_probs, 1e-5)


def test_a_prefix_as_peft_folder_is_read_by_peft(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run("llama", "prefix")
    folder = run.write(tmp_path / "out", "peft")
    assert_same(network_log_probs(peft_network("llama", folder), make_pairs()), run.log_probs)
    assert_same(edge_log_probs(EdgeModel(run.directory, adapter=folder, threads=1), make_pairs()), run.log_probs, 0)


def merged(run: Run) -> list[tuple[str, Any]]:
    """Every weight of a run's model under its Hugging Face name."""
    return list(source_weights(EdgeModel(run.directory, run=run.path, step="last", threads=1)))


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("llama", "lora", {}),
        ("gpt2", "lora", {}),
        ("llama", "lora", {"weights": "int4"}),
        ("llama", "lora", {"weights": "fp16"}),
        ("gpt2", "lora", {"weights": "fp16"}),
        ("gpt2", "full", {}),
        ("llama", "full", {}),
    ],
)
def test_a_hugging_face_folder_is_read_by_transformers(
    make_run: Callable[..., Run], tmp_path: Path, name: str, kind: str, settings: dict[str, Any]
) -> None:
    run = make_run(name, kind, **settings)
    folder = run.write(tmp_path / "out", "hf")
    network, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert type(network) is type(tiny.make_model(name))
    assert {weight.dtype for weight in network.state_dict().values()} == {torch.float32}
    assert_same(network_log_probs(network.eval(), make_pairs()), run.log_probs)


def test_the_tokenizer_of_a_hugging_face_folder_gives_the_same_ids(lora_run: Run, tmp_path: Path) -> None:
    folder = lora_run.write(tmp_path / "out", "hf")
    found, source = transformers.AutoTokenizer.from_pretrained(folder), tiny.make_tokenizer()
    text = EdgeModel(lora_run.directory, threads=1).text
    for line in TEXTS:
        assert found(line)["input_ids"] == source(line)["input_ids"] == text.encode(line)
        assert found.decode(found(line)["input_ids"]) == line
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(found, name) == getattr(source, name)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder)
    given = found("the film", return_tensors="pt")
    assert network.generate(**given, max_new_tokens=2, do_sample=False).shape == (1, len(text.encode("the film")) + 2)
    messages = [{"role": "user", "content": "the film"}]
    assert found.apply_chat_template(messages, add_generation_prompt=True) == source.apply_chat_template(
        messages, add_generation_prompt=True
    )


def test_an_edge_model_of_its_own_scores_as_the_run(lora_run: Run, make_run: Callable[..., Run], tmp_path: Path) -> None:
    for number, run in enumerate([lora_run, make_run("llama", "prefix"), make_run("llama", "full")]):
        model = EdgeModel(run.write(tmp_path / str(number), "edge"), threads=1)
        assert_same(edge_log_probs(model, make_pairs()), run.log_probs, 1e-4 if run is lora_run else 0)
        tuned = EdgeModel(run.directory, run=run.path, step="last", threads=1)
        assert [model.generate(text, 12) for text in TEXTS[:1]] == [tuned.generate(text, 12) for text in TEXTS[:1]]
        (entry,) = model.manifest.tuned
        assert (entry.step, entry.weight) == (5, 1.0)
        assert entry.journal == hashlib.sha256((run.path / "journal.bin").read_bytes()).hexdigest()
        assert model.manifest.adapter == read_manifest(run.directory).adapter


def test_an_adapter_of_the_old_base_is_refused_by_the_merged_one(lora_run: Run, tmp_path: Path) -> None:
    adapter, directory = lora_run.write(tmp_path / "adapter", "peft"), lora_run.write(tmp_path / "edge", "edge")
    old, new = (str(read_manifest(path).origin.weights_sha256) for path in (lora_run.directory, directory))
    with pytest.raises(AdapterError) as caught:
        EdgeModel(directory, adapter=adapter)
    assert str(caught.value) == (
        f"{adapter}: was tuned on another base (weights {old[:12]}) than this edge model ({new[:12]}); give its own base"
    )
    with pytest.raises(RunError, match="was tuned from another edge model"):
        EdgeModel(directory, run=lora_run.path)


def plain_feeds(pair: Pair, inputs: set[str], before: int = 0) -> dict[str, Any]:
    """What docs/edge-model.md asks for, by hand, for one row."""
    prompt, completion = pair
    ids = prompt + completion[:-1]
    feeds = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, before + len(ids)), np.int64),
        "position_ids": before + np.arange(len(ids))[None],
        "hidden_rows": np.arange(len(prompt) - 1, len(ids)),
        "pair_rows": np.arange(len(completion)),
        "pair_targets": np.array(completion),
    }
    return {name: value for name, value in feeds.items() if name in inputs}


@pytest.mark.parametrize(("name", "kind"), [("llama", "lora"), ("gpt2", "lora"), ("llama", "prefix")])
def test_an_onnx_adapter_is_read_by_plain_onnxruntime(make_run: Callable[..., Run], tmp_path: Path, name: str, kind: str) -> None:
    run = make_run(name, kind)
    path = run.write(tmp_path / "tuned.onnx_adapter", "onnx-adapter")
    adapter, options, quiet = onnxruntime.LoraAdapter(), onnxruntime.RunOptions(), onnxruntime.SessionOptions()
    adapter.Load(str(path))
    options.add_active_adapter(adapter)
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(run.directory / "scoring.onnx"), quiet, providers=["CPUExecutionProvider"])
    inputs = {value.name for value in session.get_inputs()}
    before = 5 if kind == "prefix" else 0
    found = [session.run(["log_probs"], plain_feeds(pair, inputs, before), options)[0].sum() for pair in make_pairs()]
    assert_same(np.array(found), run.log_probs, 1e-4)
    base = [session.run(["log_probs"], plain_feeds(pair, inputs))[0].sum() for pair in make_pairs()]
    assert np.abs(np.array(found) - base).max() > 0.1
    if kind == "lora":
        assert_same(edge_log_probs(EdgeModel(run.directory, adapter=path, threads=1), make_pairs()), run.log_probs)


def test_an_onnx_adapter_serves_the_generation_graph(lora_run: Run, tmp_path: Path) -> None:
    path = lora_run.write(tmp_path / "tuned.onnx_adapter", "onnx-adapter")
    tuned = EdgeModel(lora_run.directory, run=lora_run.path, step="last", threads=1)
    model = EdgeModel(lora_run.directory, adapter=path, threads=1)
    assert [model.generate(text, 12) for text in TEXTS[2:]] == [tuned.generate(text, 12) for text in TEXTS[2:]]


# averages


def test_the_average_of_two_lora_runs_is_the_mean_of_their_weights(make_run: Callable[..., Run], tmp_path: Path) -> None:
    """Of unlike rank and alpha: matrices are joined along the rank."""
    runs = [make_run("llama", "lora", number) for number in (0, 1)]
    directory, paths = runs[0].directory, [run.path for run in runs]
    tuned = write_tuned(directory, paths, [0.5, 0.5], "last", tmp_path / "hf", "hf", threads=1)
    assert [(entry.step, entry.weight) for entry in tuned] == [(5, 0.5), (5, 0.5)]
    found = load_file(tmp_path / "hf" / "model.safetensors")
    first, second = (dict(merged(run)) for run in runs)
    assert found.keys() == first.keys()
    for name, weight in found.items():
        assert np.abs(weight - (first[name].astype(np.float64) + second[name]) / 2).max() < 1e-6, name
    assert any(np.abs(first[name] - second[name]).max() > 1e-2 for name in found)
    expected = network_log_probs(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(), make_pairs())
    write_tuned(directory, paths, [0.5, 0.5], "last", tmp_path / "peft", "peft", threads=1)
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["r"] == 3 + 2
    assert_same(network_log_probs(peft_network("llama", tmp_path / "peft"), make_pairs()), expected)
    write_tuned(directory, paths, [0.5, 0.5], "last", tmp_path / "edge", "edge", threads=1)
    assert_same(edge_log_probs(EdgeModel(tmp_path / "edge", threads=1), make_pairs()), expected)


@pytest.mark.parametrize(("kind", "shares"), [("lora", [0.3, -1.2]), ("full", [0.5, 0.5]), ("full", [1.0, 1.0])])
def test_shares_scale_the_change_of_each_run(make_run: Callable[..., Run], tmp_path: Path, kind: str, shares: list[float]) -> None:
    runs = [make_run("llama", kind, number) for number in (0, 1)]
    write_tuned(runs[0].directory, [run.path for run in runs], shares, "last", tmp_path / "hf", "hf", threads=1)
    found, base = load_file(tmp_path / "hf" / "model.safetensors"), dict(source_weights(EdgeModel(runs[0].directory, threads=1)))
    changes = [dict(merged(run)) for run in runs]
    for name, weight in found.items():
        wide = base[name].astype(np.float64)
        expected = wide + sum(share * (change[name] - wide) for share, change in zip(shares, changes, strict=True))
        assert np.abs(weight - expected).max() < 1e-6, name


def test_the_average_of_two_prefixes_is_their_mean(make_run: Callable[..., Run], tmp_path: Path) -> None:
    runs = [make_run("llama", "prefix", number) for number in (0, 1)]
    write_tuned(runs[0].directory, [run.path for run in runs], [0.5, 0.5], "last", tmp_path / "edge", "edge", threads=1)
    first, second = (EdgeModel(run.directory, run=run.path, step="last").weights["prefix"].astype(np.float64) for run in runs)
    assert np.array_equal(EdgeModel(tmp_path / "edge").weights["prefix"], ((first + second) / 2).astype(np.float32))
    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize(
    ("kind", "settings", "to", "output", "message"),
    [
        ("prefix", {}, "hf", "out", "{dir}: a prefix is no change of weights and cannot be merged into them; use --format peft or edge"),
        (
            "full",
            {},
            "peft",
            "out",
            "{dir}: its runs tune the weights of the base, not an adapter, so there is none to write; use --format hf or edge",
        ),
        (
            "full",
            {},
            "onnx-adapter",
            "out.onnx_adapter",
            "{dir}: its runs tune the weights of the base, not an adapter, so there is none to write; use --format hf or edge",
        ),
        ("lora", {}, "onnx-adapter", "out.bin", "-o {out}: a file that ends in .onnx_adapter is written; name it so"),
        (
            "lora",
            {"weights": "int4"},
            "edge",
            "out",
            "{dir}: its weights are int4, whose steps would swallow the change; use --format peft, onnx-adapter or hf",
        ),
        (
            "lora",
            {"weights": "fp16"},
            "edge",
            "out",
            "{dir}: its weights are fp16, whose steps would swallow the change; use --format peft, onnx-adapter or hf",
        ),
    ],
)
def test_a_format_that_cannot_hold_what_was_tuned_is_refused(
    make_run: Callable[..., Run], tmp_path: Path, kind: str, settings: dict[str, Any], to: Any, output: str, message: str
) -> None:
    run = make_run("llama", kind, **settings)
    with pytest.raises(EdgezoError) as caught:
        run.write(tmp_path / output, to)
    assert str(caught.value) == message.format(dir=run.directory, run=run.path, out=tmp_path / output)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5, 0.5], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_shares_that_do_not_fit_the_runs_are_refused(make_run: Callable[..., Run], tmp_path: Path, shares: list[float]) -> None:
    run = make_run("llama", "lora")
    with pytest.raises(ConfigError) as caught:
        write_tuned(run.directory, [run.path, run.path], shares, "last", tmp_path / "out")
    assert str(caught.value) == f"--weights: {len(shares)} numbers for 2 runs; give one finite number a run"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["edge", "hf", "peft", "onnx-adapter"])
def test_what_exists_is_not_overwritten(make_run: Callable[..., Run], tmp_path: Path, to: Any) -> None:
    output = tmp_path / "out.onnx_adapter"
    output.write_text("mine")
    with pytest.raises(RunError) as caught:
        make_run("llama", "lora").write(output, to)
    assert str(caught.value) == f"{output}: exists already; choose another place or remove it"
    assert output.read_text() == "mine"


# on another base


def test_an_adapter_tuned_on_four_bits_runs_on_float32(make_run: Callable[..., Run], lora_dir: Path, tmp_path: Path) -> None:
    run = make_run("llama", "lora", weights="int4")
    folder = run.write(tmp_path / "adapter", "peft")
    found = edge_log_probs(EdgeModel(lora_dir, adapter=folder, threads=1), make_pairs())
    assert_same(found, network_log_probs(peft_network("llama", folder), make_pairs()))


# switching


@pytest.mark.parametrize("kind", ["lora", "prefix", "full"])
def test_models_are_switched_bit_for_bit_in_the_same_sessions(make_run: Callable[..., Run], tmp_path: Path, kind: str) -> None:
    first, second = make_run("llama", kind, 0), make_run("llama", kind, 1)
    choices: list[dict[str, Any]] = [
        {},
        {"run": first.path, "step": "last"},
        {"run": second.path, "step": 3},
        {"run": first.path, "step": 2},
    ]
    if kind != "full":
        choices.append({"adapter": second.write(tmp_path / "adapter", "peft")})
    expected = []
    for choice in choices:
        fresh = EdgeModel(first.directory, threads=1, **choice)
        expected.append((edge_log_probs(fresh, make_pairs()).tobytes(), fresh.generate("the film", 8), fresh.step))
    assert len({scores for scores, *_ in expected}) == len(choices)
    model = EdgeModel(first.directory, threads=1)
    sessions = model.scoring, model.generation
    for place in [1, 0, 1, 2, *range(len(choices)), *reversed(range(len(choices))), 3, 0]:
        assert model.use(**choices[place]) == expected[place][2]
        assert (edge_log_probs(model, make_pairs()).tobytes(), model.generate("the film", 8), model.step) == expected[place]
    assert (model.scoring, model.generation) == sessions
    before = expected[0]
    for choice, kind_of_error in (
        ({"run": first.path, "adapter": "x"}, ConfigError),
        ({"run": tmp_path / "nowhere"}, RunError),
        ({"run": first.path, "step": 6}, RunError),
        ({"adapter": tmp_path / "nowhere"}, AdapterError),
    ):
        with pytest.raises(kind_of_error):
            model.use(**choice)
        assert (edge_log_probs(model, make_pairs()).tobytes(), model.generate("the film", 8), model.step) == before


def test_using_an_adapter_leaves_the_files_of_the_base(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run("llama", "prefix")
    before = {path.name: path.read_bytes() for path in run.directory.iterdir()}
    model = EdgeModel(run.directory, run=run.path, step="last", threads=1)
    assert isinstance(model.adapter, Prefix)
    model.use()
    assert np.array_equal(model.adapter.array, EdgeModel(run.directory).weights["prefix"])
    assert {path.name: path.read_bytes() for path in run.directory.iterdir()} == before
