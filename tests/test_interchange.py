"""Tuned weights for elsewhere and adapters from elsewhere: the same scores, or a refusal in one line that leaves nothing behind."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import peft
import pytest
import tiny
import torch
import transformers
from reference import edge_log_probs, make_pairs, network_log_probs, peft_network, randomise, write_adapter
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import edgezo
from edgezo.errors import AdapterError, ConfigError, EdgezoError, RunError
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.hugging_face import source_weights
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.scoring import Pair
from edgezo.runtime.tuned import write_tuned

ExportTiny = Callable[..., Path]
Damage = Callable[[Path], None]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TEXTS = ["the film is great", "", "  Two  spaces\nand <|im_start|>user a b", "Größe 東京 🙂"]
TASK = {"template": "{text} It was", "labels": "terrible,great", "threads": 1}


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


def assert_same(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    assert np.abs(found - expected).max() <= tolerance


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


# adapters from elsewhere


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "down_proj"]}, {"lora_alpha": 3.5}])
def test_an_adapter_that_peft_made_is_read(lora_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})
    network = peft.get_peft_model(tiny.make_model("llama"), config).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    network.save_pretrained(tmp_path / "adapter")
    model = EdgeModel(lora_dir, adapter=tmp_path / "adapter", threads=1)
    found = edge_log_probs(model, make_pairs())
    assert_same(found, network_log_probs(network, make_pairs()))
    assert np.abs(found - edge_log_probs(EdgeModel(lora_dir, threads=1), make_pairs())).max() > 0.1


def test_half_precision_is_read(lora_dir: Path, tmp_path: Path) -> None:
    model = EdgeModel(lora_dir, threads=1)
    lora = randomise(model)
    assert isinstance(lora, Lora)
    for array in (lora.a, lora.b):
        array[...] = array.astype(np.float16)
    folder = write_adapter(model, tmp_path / "adapter")
    save_file({name: value.astype(np.float16) for name, value in load_file(folder / TENSORS).items()}, folder / TENSORS)
    other = EdgeModel(lora_dir, adapter=folder, threads=1)
    assert np.array_equal(edge_log_probs(other, make_pairs()), edge_log_probs(model, make_pairs()))


def test_an_adapter_tuned_on_four_bits_runs_on_float32(make_run: Callable[..., Run], lora_dir: Path, tmp_path: Path) -> None:
    run = make_run("llama", "lora", weights="int4")
    folder = run.write(tmp_path / "adapter", "peft")
    found = edge_log_probs(EdgeModel(lora_dir, adapter=folder, threads=1), make_pairs())
    assert_same(found, network_log_probs(peft_network("llama", folder), make_pairs()))


def change_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return damage


def change_tensors(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """`change` alters the tensors by name, in the order of the file, and keeps the metadata's base."""

    def damage(folder: Path) -> None:
        tensors = {name: value.copy() for name, value in sorted(load_file(folder / TENSORS).items())}
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return damage


def change_base(folder: Path) -> None:
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"edgezo_base": "0123456789abcdef" * 4})


def as_bfloat16(folder: Path) -> None:
    save_torch({name: torch.from_numpy(value).bfloat16() for name, value in load_file(folder / TENSORS).items()}, folder / TENSORS)


Q0, STEM = "model.layers.0.self_attn.q_proj", "base_model.model."
A0, B0 = f"{STEM}{Q0}.lora_A.weight", f"{STEM}{Q0}.lora_B.weight"


def to_rank(rank: int) -> Callable[[dict[str, Any]], Any]:
    def change(tensors: dict[str, Any]) -> None:
        for name, value in tensors.items():
            tensors[name] = value[:rank] if "lora_A" in name else value[:, :rank]

    return change


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


def make_nan(tensors: dict[str, Any]) -> None:
    tensors[B0][1, 2] = np.nan


LORA_REFUSALS: list[tuple[str, Damage, str]] = [
    ("other base", change_base, "{0}: was tuned on another base (weights 0123456789ab) than this edge model ({own}); give its own base"),
    (
        "missing B",
        change_tensors(lambda tensors: tensors.pop(B0)),
        f"{{0}}: {Q0} has lora_A alone; lora_A and lora_B are both needed, save the adapter again",
    ),
    ("NaN", change_tensors(make_nan), f"{{0}}/{TENSORS}: {B0} holds NaN, infinity or float32; it cannot be used"),
    (
        "integers",
        change_tensors(put(B0, np.zeros((32, 3), np.int64))),
        f"{{0}}/{TENSORS}: {B0} holds NaN, infinity or int64; it cannot be used",
    ),
    (
        "shape of A",
        change_tensors(put(A0, np.zeros((3, 31), np.float32))),
        f"{{0}}: {Q0} has A of [3, 31] and B of [32, 3], the layer has 32 inputs and 32 outputs",
    ),
    (
        "shape of B",
        change_tensors(put(B0, np.zeros((33, 3), np.float32))),
        f"{{0}}: {Q0} has A of [3, 32] and B of [33, 3], the layer has 32 inputs and 32 outputs",
    ),
    (
        "ranks of A and B",
        change_tensors(put(B0, np.zeros((32, 2), np.float32))),
        f"{{0}}: {Q0} has A of [3, 32] and B of [32, 2], the layer has 32 inputs and 32 outputs",
    ),
    (
        "dimensions",
        change_tensors(put(B0, np.zeros((32, 3, 1), np.float32))),
        f"{{0}}: tensor '{B0}' of shape [32, 3, 1] is no LoRA matrix of a linear layer; it cannot be used",
    ),
    (
        "embedding",
        change_tensors(put(f"{STEM}model.embed_tokens.lora_embedding_A", np.zeros((3, 320), np.float32))),
        f"{{0}}: tensor '{STEM}model.embed_tokens.lora_embedding_A' of shape [3, 320] is no LoRA matrix of a linear layer; it cannot be used",
    ),
    (
        "unknown module",
        change_tensors(put(A0.replace("layers.0", "layers.7"), np.zeros((3, 32), np.float32))),
        f"{{0}}: changes 1 layers without branch points ({Q0.replace('layers.0', 'layers.7')}); export the model with --targets that cover it",
    ),
    ("nothing", change_tensors(dict.clear), "{0}: holds no matrices; export the model with --targets that cover it"),
    ("rank 0 in the tensors", change_tensors(to_rank(0)), "{0}: ranks [0]; edgezo needs one rank for all layers, above 0"),
    (
        "unlike ranks",
        change_tensors(lambda tensors: tensors.update({A0: tensors[A0][:2], B0: tensors[B0][:, :2]})),
        "{0}: ranks [2, 3]; edgezo needs one rank for all layers, above 0",
    ),
    ("rank 0", change_config(r=0), f"{{0}}/{CONFIG}: rank 0 with alpha 5; numbers above 0, at most 4096 and 1e+06, are expected"),
    ("alpha", change_config(lora_alpha=-1), f"{{0}}/{CONFIG}: rank 3 with alpha -1; numbers above 0, at most 4096 and 1e+06, are expected"),
    (
        "no alpha",
        change_config(lora_alpha=None),
        f"{{0}}/{CONFIG}: rank 3 with alpha None; numbers above 0, at most 4096 and 1e+06, are expected",
    ),
    ("DoRA", change_config(use_dora=True), f"{{0}}/{CONFIG}: has use_dora = True, which edgezo does not do; train the adapter without it"),
    ("bias", change_config(bias="all"), f"{{0}}/{CONFIG}: has bias = 'all', which edgezo does not do; train the adapter without it"),
    (
        "modules to save",
        change_config(modules_to_save=["lm_head"]),
        f"{{0}}/{CONFIG}: has modules_to_save = ['lm_head'], which edgezo does not do; train the adapter without it",
    ),
    (
        "ranks by layer",
        change_config(rank_pattern={"q_proj": 2}),
        f"{{0}}/{CONFIG}: has rank_pattern = {{{{'q_proj': 2}}}}, which edgezo does not do; train the adapter without it",
    ),
    (
        "kind",
        change_config(peft_type="IA3"),
        "{0}: holds IA3, the edge model is prepared for lora; export it with --adapter lora",
    ),
    (
        "JSON",
        lambda folder: (folder / CONFIG).write_text("{not") and None,
        f"{{0}}/{CONFIG}: not readable as JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); save the adapter again",
    ),
    (
        "list",
        lambda folder: (folder / CONFIG).write_text("[]") and None,
        f"{{0}}/{CONFIG}: holds a list, not settings; save the adapter again",
    ),
    (
        "no configuration",
        lambda folder: (folder / CONFIG).unlink(),
        f"{{0}}: no adapter ({CONFIG} is missing); give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)",
    ),
    (
        "no tensors",
        lambda folder: (folder / TENSORS).unlink(),
        f"{{0}}: {TENSORS} is missing; save the adapter as safetensors (PEFT's default)",
    ),
    (
        "no folder",
        shutil.rmtree,
        f"{{0}}: no adapter ({CONFIG} is missing); give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)",
    ),
]


class Refusals:
    """One edge model that is asked for bad adapters: by `use` while it has a good one, by opening, and to start a run from."""

    def __init__(self, directory: Path, reviews: str, tmp_path: Path) -> None:
        self.directory, self.reviews, self.tmp_path = directory, reviews, tmp_path
        self.model = EdgeModel(directory, threads=1)
        if self.model.manifest.adapter is not None:
            randomise(self.model, seed=9)

    def message(self, adapter: Path) -> str:
        """What every way of asking says; afterwards nothing is left and the model is as before."""
        owned, before = self.model.adapter, edge_log_probs(self.model, make_pairs())
        found = []
        for attempt in (
            lambda: self.model.use(adapter=adapter),
            lambda: EdgeModel(self.directory, adapter=adapter, threads=1),
            lambda: edgezo.tune(self.directory, self.tmp_path / "run", data=self.reviews, steps=1, init=str(adapter), **TASK),
        ):
            with pytest.raises(AdapterError) as caught:
                attempt()
            found.append(str(caught.value))
        assert found[0] == found[1] == found[2]
        assert not (self.tmp_path / "run").exists()
        assert self.model.adapter is owned
        assert np.array_equal(edge_log_probs(self.model, make_pairs()), before)
        assert found[0].isprintable()
        return found[0]


@pytest.fixture
def refusals(lora_dir: Path, reviews: str, tmp_path: Path) -> Refusals:
    return Refusals(lora_dir, reviews, tmp_path)


@pytest.fixture(scope="module")
def good_adapter(lora_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder for the tiny Llama, of rank 3 and alpha 5."""
    model = EdgeModel(lora_dir, threads=1)
    randomise(model)
    return write_adapter(model, tmp_path_factory.mktemp("good") / "adapter")


@pytest.mark.parametrize(("damage", "message"), [pytest.param(*rest, id=name.replace(" ", "-")) for name, *rest in LORA_REFUSALS])
def test_an_adapter_that_cannot_be_used_is_refused(
    refusals: Refusals, good_adapter: Path, tmp_path: Path, damage: Damage, message: str
) -> None:
    folder = Path(shutil.copytree(good_adapter, tmp_path / "bad"))
    damage(folder)
    own = str(refusals.model.manifest.origin.weights_sha256)[:12]
    assert refusals.message(folder) == message.format(folder, own=own)


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_tensors_that_are_cut_off_are_refused(refusals: Refusals, good_adapter: Path, tmp_path: Path, length: int) -> None:
    file = Path(shutil.copytree(good_adapter, tmp_path / "bad")) / TENSORS
    file.write_bytes(file.read_bytes()[:length])
    message = refusals.message(tmp_path / "bad")
    assert re.fullmatch(
        re.escape(f"{file}: not readable as float tensors (") + r".+" + re.escape("); save the adapter again in float32"), message
    )


def test_bfloat16_is_refused_by_name(refusals: Refusals, good_adapter: Path, tmp_path: Path) -> None:
    """NumPy has no such type; the package ml_dtypes, where it is installed, gives it one."""
    folder = Path(shutil.copytree(good_adapter, tmp_path / "bad"))
    as_bfloat16(folder)
    assert re.search(
        r": not readable as float tensors \(.+\); save the adapter again in float32$|holds NaN, infinity or bfloat16",
        refusals.message(folder),
    )


def test_a_rank_other_than_the_tensors_is_refused(refusals: Refusals, good_adapter: Path, tmp_path: Path) -> None:
    """alpha / rank would be another than PEFT's."""
    folder = Path(shutil.copytree(good_adapter, tmp_path / "bad"))
    change_config(r=4)(folder)
    assert "rank" in refusals.message(folder)


def test_onnx_adapters_that_cannot_be_used_are_refused(refusals: Refusals, lora_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(b"no adapter at all")
    assert refusals.message(path).startswith(f"{path}: onnxruntime {onnxruntime.__version__} cannot read it (")
    path.unlink()
    assert (
        refusals.message(path)
        == f"{path}: no adapter ({CONFIG} is missing); give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)"
    )
    for name, array, message in (
        (f"{Q0}.lora_A.weight", np.zeros((1, 32, 3), np.float64), f"parameter '{Q0}.lora_A.weight' is no LoRA matrix of finite float32; it cannot be used"),
        (f"{Q0}.lora_A.weight", np.zeros((32, 3), np.float32), f"parameter '{Q0}.lora_A.weight' is no LoRA matrix of finite float32; it cannot be used"),
        (f"{Q0}.lora_A.weight", np.full((1, 32, 3), np.inf, np.float32), f"parameter '{Q0}.lora_A.weight' is no LoRA matrix of finite float32; it cannot be used"),
        ("prefix.0.key", np.zeros((1, 2, 5, 8), np.float32), "parameter 'prefix.0.key' is no LoRA matrix of finite float32; it cannot be used"),
        (f"{Q0}.lora_A.weight", np.zeros((1, 32, 3), np.float32), f"{Q0} has lora_A alone; lora_A and lora_B are both needed, save the adapter again"),
        ("lm_head.lora_A.weight", np.zeros((1, 32, 3), np.float32), "its matrices of the head do not fit each other; save the adapter again"),
    ):  # fmt: skip
        file = onnxruntime.AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(array)})
        file.export_adapter(str(path))
        assert refusals.message(path) == f"{path}: {message}"


def test_a_prefix_and_lora_are_not_mixed_up(
    refusals: Refusals, good_adapter: Path, prefix_dir: Path, exported_dir: Path, reviews: str, tmp_path: Path
) -> None:
    model = EdgeModel(prefix_dir, threads=1)
    randomise(model)
    prefix = write_adapter(model, tmp_path / "prefix")
    assert refusals.message(prefix) == (
        f"{prefix}: holds PREFIX_TUNING, the edge model is prepared for lora; export it with --adapter prefix"
    )
    of_prefix = Refusals(prefix_dir, reviews, tmp_path)
    assert of_prefix.message(good_adapter) == (
        f"{good_adapter}: holds LORA, the edge model is prepared for prefix; export it with --adapter lora"
    )
    of_base = Refusals(exported_dir, reviews, tmp_path)
    assert of_base.message(good_adapter) == (
        f"{good_adapter}: this edge model has no branch points for adapters; export it again with --adapter lora or prefix"
    )
    tensors = load_file(prefix / TENSORS)
    save_file({"prompt_embeddings": tensors["prompt_embeddings"][:4]}, prefix / TENSORS)
    assert of_prefix.message(prefix) == (
        f"{prefix}: its prefix has shape [4, 64], this edge model needs [5, 64]; export with --tokens of the adapter"
    )
    save_file({}, prefix / TENSORS)
    assert of_prefix.message(prefix) == (
        f"{prefix}: its prefix has shape None, this edge model needs [5, 64]; export with --tokens of the adapter"
    )


@pytest.mark.parametrize(("settings", "message"), [
    ({"rank": 4}, "--rank 4: the adapter {0} has rank 3; leave --rank out or start from another"),
    ({"rank": 3, "alpha": 4.0}, "--alpha 4.0: the adapter {0} has alpha 5.0; leave --alpha out or start from another"),
])  # fmt: skip
def test_a_rank_or_alpha_other_than_the_adapters_is_refused(
    lora_dir: Path, good_adapter: Path, reviews: str, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        edgezo.tune(lora_dir, tmp_path / "run", data=reviews, steps=1, directions=2, init=str(good_adapter), **settings, **TASK)
    assert str(caught.value) == message.format(good_adapter)
    assert not (tmp_path / "run").exists()


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
