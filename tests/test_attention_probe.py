"""A probe of the attention changes the output projections as transformers would have them changed, and the fit finds what attention knows."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
from reference import edge_log_probs, make_pairs, network_log_probs, randomise
from sklearn.linear_model import Ridge

import edgezo
from edgezo.adapters import ATTENTION, HEAD_ROWS, PROBE_A, PROBE_B
from edgezo.errors import AdapterError, RunError
from edgezo.runtime import exact_start, noise, probe_fit
from edgezo.runtime.attention_probe import NO_PROBE, add_probe, probe_directions, take_probe
from edgezo.runtime.generate import generate
from edgezo.runtime.head_fit import HeadFit
from edgezo.runtime.head_rows import NO_ROWS, HeadRows
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import head_record
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.noise import Direction
from edgezo.runtime.probe_fit import contrasts, read_linearly
from edgezo.runtime.scoring import Sequences

OUTPUTS = {
    "llama": "model.layers.{}.self_attn.o_proj",
    "qwen2": "model.layers.{}.self_attn.o_proj",
    "gpt2": "transformer.h.{}.attn.c_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
}


def random_probe(model: EdgeModel, rank: int = 3, seed: int = 0) -> HeadRows:
    targets = model.manifest.probes
    values = 4 * np.random.default_rng(seed).normal(size=(len(targets), targets[0].in_features, rank))
    return HeadRows(NO_ROWS.tokens, NO_ROWS.rows, values.astype(np.float32))


# graphs


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_output_projection_of_attention_is_found(export_tiny: Callable[..., Path], name: str) -> None:
    model = EdgeModel(export_tiny(name), threads=1)
    assert [target.module for target in model.manifest.probes] == [OUTPUTS[name].format(layer) for layer in range(2)]
    assert model.manifest.scoring.outputs == ["log_probs", "hidden", ATTENTION]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_probe_is_a_change_of_these_weights(export_tiny: Callable[..., Path], name: str) -> None:
    model, network = EdgeModel(export_tiny(name), threads=1), tiny.make_model(name)
    before = edge_log_probs(model, make_pairs())
    model.head = random_probe(model)
    found = edge_log_probs(model, make_pairs())
    assert np.abs(found - before).max() > 0.01
    directions = probe_directions(3, model.manifest.probes[0].out_features)
    with torch.no_grad():
        for target, read in zip(model.manifest.probes, model.head.probe, strict=True):
            module = network.get_submodule(target.module)
            change = torch.from_numpy(read @ directions)
            module.weight += change if name == "gpt2" else change.T
    assert np.abs(found - network_log_probs(network, make_pairs())).max() < 1e-4


@pytest.mark.parametrize("graph", ["scoring.onnx", "generation.onnx"])
def test_no_product_of_the_base_is_over_no_elements(lora_dir: Path, graph: str) -> None:
    """Before onnxruntime 1.20 such a product is not zero, but whatever lies in memory."""
    loaded = onnx.load(lora_dir / graph, load_external_data=False).graph
    factors = {name for node in loaded.node if node.op_type == "MatMul" for name in node.input}
    given = [
        tensor for tensor in loaded.initializer if tensor.name in factors or "lora_" in tensor.name or tensor.name in {PROBE_A, PROBE_B}
    ]
    assert {PROBE_A, PROBE_B} <= {tensor.name for tensor in given}
    empty = [tensor.name for tensor in given if 0 in tensor.dims]
    assert empty == [HEAD_ROWS]  # no columns, but one row


@pytest.mark.parametrize(
    "settings",
    [{"adapter": "lora"}, {"adapter": "lora", "weights": "int4"}, {"adapter": "prefix", "weights": "fp16"}, {"adapter": "prefix"}],
)
def test_every_kind_of_edge_model_takes_one(export_tiny: Callable[..., Path], settings: dict[str, Any]) -> None:
    """The generation graph, too: greedy tokens come from the probed model."""
    model = EdgeModel(export_tiny("llama", **settings), threads=1)
    before = edge_log_probs(model, make_pairs())
    model.head = random_probe(model)
    assert np.abs(edge_log_probs(model, make_pairs()) - before).max() > 0.01
    assert model.manifest.generation is not None
    prompt = model.text.encode("the film", True)
    best = np.argmax(np.concatenate(Sequences(model).log_probs([(prompt, [token]) for token in range(tiny.VOCABULARY)])))
    assert "".join(generate(model, "the film", 1)) == model.text.decode([int(best)])


def test_attention_is_what_the_output_projection_reads(export_tiny: Callable[..., Path]) -> None:
    model, network, seen = EdgeModel(export_tiny("llama"), threads=1), tiny.make_model("llama"), []
    for target in model.manifest.probes:
        network.get_submodule(target.module).register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    prompts = [[5, 9, 11], [7, 8, 30, 31, 2]]
    read = Sequences(model).states([(prompt, [4]) for prompt in prompts], attention=True)
    for prompt, found in zip(prompts, read.attention, strict=True):
        seen.clear()
        with torch.no_grad():
            network(torch.tensor([prompt]))
        assert np.abs(found - torch.cat([given[0, -1] for given in seen]).numpy()).max() < 1e-5
    assert Sequences(model).states([(prompts[0], [4])]).attention.shape == (1, 0)


# the fit


def test_directions_are_those_of_the_specification() -> None:
    found = probe_directions(2, 100)
    words = np.random.Philox(
        key=np.array([0, 11], np.uint64), counter=np.array([0, noise.tensor_id("probe_B"), 0, 1], np.uint64)
    ).random_raw(2)
    bits = [(int(words[place // 64]) >> (place % 64)) & 1 for place in range(100)]
    assert found[1].tolist() == [np.float32(-0.1) if bit else np.float32(0.1) for bit in bits]
    assert np.array_equal(found[0], np.float32(0.1) * noise.signs(Direction(0, 0, 0), noise.tensor_id("probe_B"), 100, noise.PROBE))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_contrasts_keep_differences_of_scores(count: int) -> None:
    basis, scores = contrasts(count), np.random.default_rng(0).normal(size=count)
    assert np.allclose(basis.T @ basis, np.eye(count - 1))
    assert np.allclose(basis @ (basis.T @ scores), scores - scores.mean())


def test_a_linear_reading_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    states, wanted = random.normal(size=(50, 8)) * np.arange(1, 9), random.normal(size=(50, 2))
    monkeypatch.setattr(probe_fit, "RIDGES", (0.1,))
    scale = np.sqrt((states**2).mean(axis=0))
    reference = Ridge(alpha=0.1 * 50, fit_intercept=False).fit(states / scale, wanted)
    assert np.allclose(read_linearly(states, wanted) * scale[:, None], reference.coef_.T)


def test_a_linear_reading_does_not_rely_on_a_feature_that_is_switched_off() -> None:
    random = np.random.default_rng(2)
    wanted = random.normal(size=(50, 1))
    found = read_linearly(np.hstack([random.normal(size=(50, 8)), 1e-30 * wanted]), wanted)
    assert np.abs(found[-1]).max() < 1e-20


def test_the_ridge_is_chosen_on_rows_that_were_not_read() -> None:
    random = np.random.default_rng(1)
    states, truth = random.normal(size=(200, 30)), random.normal(size=(30, 1))
    assert np.abs(read_linearly(states, states @ truth) - truth).max() < 1e-4
    assert np.abs(read_linearly(states, random.normal(size=(200, 1)))).max() < 0.15


def test_the_solution_that_promises_less_is_tried_where_the_other_does_not_help(
    lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = exact_start.label_fits
    rows = [{"text": f"{word} film", "label": label} for label, words in enumerate((["bad", "poor"], ["good", "fine"])) for word in words]

    def turned_round(*given: Any) -> Any:
        """The first solution is of the wrong sign."""
        for place, fit in enumerate(every(*given)):
            yield fit if place else fit._replace(make=partial(turned, fit))

    def turned(fit: HeadFit) -> HeadRows:
        head = fit.make()
        return head._replace(rows=-head.rows)

    monkeypatch.setattr(exact_start, "label_fits", turned_round)
    notices: list[str] = []
    reporter, data = edgezo.Reporter(notice=notices.append), write_rows(rows * 4)
    settings = {"template": "{text} It was", "labels": "terrible,great", "threads": 1, "steps": 0, "lr": 0.1, "eps": 0.01}
    result = edgezo.tune(lora_dir, tmp_path / "run", data=data, valid=data, reporter=reporter, **settings)
    assert result.start is not None
    assert result.before is not None
    assert result.start.score() > result.before.score()
    (told,) = [text for text in notices if text.startswith("exact start")]
    contents = read_journal(tmp_path / "run" / "journal.bin")
    assert ("rows of the head for" in told) == (not contents.heads[0].probe.size)


def test_a_solution_that_breaks_the_model_is_left_out(
    lora_dir: Path, tmp_path: Path, write_rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = exact_start.label_fits
    rows = [{"text": f"{word} film", "label": label} for label, words in enumerate((["bad", "poor"], ["good", "fine"])) for word in words]

    def broken(fit: HeadFit) -> HeadRows:
        head = fit.make()
        return head._replace(rows=head.rows + np.float32(3e38))

    def all_broken(*given: Any) -> Any:
        return (fit._replace(make=partial(broken, fit)) for fit in every(*given))

    monkeypatch.setattr(exact_start, "label_fits", all_broken)
    notices: list[str] = []
    reporter, data = edgezo.Reporter(notice=notices.append), write_rows(rows * 4)
    settings = {"template": "{text} It was", "labels": "terrible,great", "threads": 1, "steps": 0, "lr": 0.1, "eps": 0.01}
    result = edgezo.tune(lora_dir, tmp_path / "run", data=data, valid=data, reporter=reporter, **settings)
    assert result.start is None or result.start == result.before
    assert read_journal(tmp_path / "run" / "journal.bin").heads == {}
    (told,) = [text for text in notices if text.startswith("exact start")]
    assert "does not keep the losses finite" in told


# formats


def test_a_probe_goes_through_lora_and_back(lora_dir: Path) -> None:
    model = EdgeModel(lora_dir, threads=1)
    manifest, probe, random = model.manifest, random_probe(model).probe, np.random.default_rng(0)
    target = manifest.probes[0]
    own = {
        "lora_A": random.normal(size=(target.in_features, 2)).astype(np.float32),
        "lora_B": random.normal(size=(2, target.out_features)).astype(np.float32),
    }
    pairs = {target.module: dict(own)}
    add_probe(pairs, probe, manifest, 2.0)
    product = 2.0 * pairs[target.module]["lora_A"] @ pairs[target.module]["lora_B"]
    directions = probe_directions(3, target.out_features)
    assert np.allclose(product, 2.0 * own["lora_A"] @ own["lora_B"] + probe[0] @ directions, atol=1e-5)
    assert np.array_equal(take_probe(pairs, manifest, 2.0)[0], probe[0])
    assert list(pairs) == [target.module]
    assert np.array_equal(pairs[target.module]["lora_A"], own["lora_A"])
    assert take_probe(pairs, manifest, 2.0) is NO_PROBE


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("probe_A", np.ones(5, np.float32), "its probe of shape [5] is no finite float32 of this model's layers; it cannot be used"),
        (
            "probe_A",
            np.full((2, 32, 1), np.nan, np.float32),
            "its probe of shape [2, 32, 1] is no finite float32 of this model's layers; it cannot be used",
        ),
        ("probe_B", np.ones((3, 32), np.float32), "its probe writes along other directions than edgezo's; it cannot be used"),
        (
            "model.layers.0.self_attn.o_proj.lora_A.weight",
            np.ones((1, 7, 8), np.float32),
            "lora_A and lora_B of a layer with a probe do not fit it; save the adapter again",
        ),
    ],
)
def test_a_damaged_probe_in_an_adapter_file_is_refused(lora_dir: Path, tmp_path: Path, name: str, array: Any, message: str) -> None:
    model, path = EdgeModel(lora_dir, threads=1), tmp_path / "a.onnx_adapter"
    randomise(model)
    assert model.adapter is not None
    feeds = {**model.adapter.feeds(), **random_probe(model).feeds(model.manifest), name: array}
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({key: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for key, value in feeds.items()})
    file.export_adapter(str(path))
    with pytest.raises(AdapterError, match=f"^{re.escape(f'{path}: {message}')}$"):
        EdgeModel(lora_dir, adapter=path, threads=1)


def test_a_record_is_read_as_written_and_torn_anywhere_left_out(tmp_path: Path) -> None:
    probe = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    head = HeadRows(np.array([4, 2]), np.arange(6, dtype=np.float32).reshape(3, 2), probe)
    Journal.create(tmp_path / "j", {"config": {}}, [head_record(head)]).close()
    data = (tmp_path / "j").read_bytes()
    assert read_journal(tmp_path / "j").heads[0].equals(head)
    for cut in range(1, len(head_record(head)[1]) + 5):
        (tmp_path / "j").write_bytes(data[:-cut])
        assert read_journal(tmp_path / "j").heads == {}


@pytest.mark.parametrize("probe", [np.full((2, 3, 1), np.nan, np.float32), np.full((2, 3, 1), np.inf, np.float32)])
def test_numbers_that_no_run_writes_are_refused(tmp_path: Path, probe: Any) -> None:
    head = HeadRows(np.array([4]), np.ones((3, 1), np.float32), probe)
    Journal.create(tmp_path / "j", {"config": {}}, [head_record(head)]).close()
    message = f"{tmp_path / 'j'}: a record of the head holds NaN, infinity or a token twice, which no run writes; the run cannot be used"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        read_journal(tmp_path / "j")
