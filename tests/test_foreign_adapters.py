"""Adapters from elsewhere: the same scores, or a refusal in one line that leaves nothing behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import peft
import pytest
import tiny
import torch
from interchange import CONFIG, TASK, TENSORS, assert_same
from reference import edge_log_probs, make_pairs, network_log_probs, randomise, write_adapter
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import edgezo
from edgezo.errors import AdapterError, ConfigError
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel

Damage = Callable[[Path], None]


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
        "{0}: no such adapter; give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)",
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
    assert refusals.message(path) == f"{path}: no such adapter; give a PEFT folder (edgezo merge DIR RUN --format peft makes one of a run)"
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
