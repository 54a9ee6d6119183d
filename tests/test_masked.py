"""Masked language models: the mask is scored as transformers scores it, and everything else of a run works on them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import pytest
import tiny_encoders
import torch
import transformers
from refusals import refusal

from edgezo import api
from edgezo.config import parse_labels
from edgezo.errors import ConfigError, DataError, EdgeModelError, ExportError
from edgezo.export import export_model
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.data import Row
from edgezo.runtime.examples import make_candidates, make_examples
from edgezo.runtime.hugging_face import write_hugging_face
from edgezo.runtime.lora import Lora
from edgezo.runtime.masked import ModelFacts
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.scoring import Masked, Sequences
from edgezo.runtime.tasks import find_task

ROWS = [("a great film", 1), ("a terrible plot", 0), ("the plot is great", 1), ("the film is terrible", 0)] * 4
TEMPLATE, WORDS = "{text} It was {mask} .", "terrible,great"
TOLERANCE = 2e-3

Export = Callable[..., Path]
Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export a tiny masked language model, once for each name and settings; shared, never to be changed."""
    made: dict[tuple[str, ...], Path] = {}

    def make(name: str = "bert", **settings: Any) -> Path:
        key = (name, *(f"{setting}={value}" for setting, value in sorted(settings.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("masked")
            made[key] = export_model(str(tiny_encoders.save(folder / "source", name)), folder / name, **settings).directory
            shutil.rmtree(folder / "source")
        return made[key]

    return make


@pytest.fixture
def data(write_rows: Callable[..., str]) -> str:
    return write_rows([{"text": text, "label": label} for text, label in ROWS])


def candidates(directory: Path, *texts: str, template: str = TEMPLATE, words: str = WORDS, limit: int = 64) -> tuple[list[Masked], int]:
    """The masked candidates of some texts, and how many rows were cut."""
    rows = [Row({"text": text, "label": "0"}, f"row {number}") for number, text in enumerate(texts, 1)]
    model = EdgeModel(directory, threads=1)
    task = find_task(rows, template, parse_labels(words), "label", ModelFacts.of(model.manifest))
    made = make_examples(rows, task, model.text, limit)
    found = [pair for example in made.examples for pair in example.pairs if isinstance(pair, Masked)]
    assert len(found) == len(texts) * len(words.split(","))
    return found, made.truncated


def torch_log_probs(name: str, ids: list[int]) -> npt.NDArray[np.float64]:
    """transformers' own log-probabilities of every token of the vocabulary at every position."""
    with torch.no_grad():
        logits = tiny_encoders.make_model(name)(torch.tensor([ids])).logits[0]
    found: npt.NDArray[np.float64] = torch.log_softmax(logits.double(), -1).numpy()
    return found


# scores


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_the_label_words_are_scored_at_the_mask_as_transformers_scores_them(name: str, export: Export) -> None:
    texts = ["a great film", "the plot is terrible and the film is great", "user"]
    model, tokenizer = EdgeModel(export(name), threads=1), tiny_encoders.make_tokenizer(name)
    pairs, cut = candidates(export(name), *texts)
    found = np.concatenate(Sequences(model).log_probs(pairs)).reshape(3, 2)
    expected = []
    for text in texts:
        ids = tokenizer(f"{text} It was {tokenizer.mask_token} .")["input_ids"]
        place = ids.index(tokenizer.mask_token_id)
        words = [tokenizer(f"{text} It was {word} .")["input_ids"][place] for word in ("terrible", "great")]
        expected.append(torch_log_probs(name, ids)[place, words])
    assert cut == 0
    assert np.abs(found - np.array(expected)).max() < TOLERANCE
    assert np.ptp(np.array(expected)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_the_manifest_says_masked_has_no_generation_graph_and_names_every_parameter(name: str, export: Export) -> None:
    manifest = read_manifest(export(name))
    parameters = dict(tiny_encoders.make_model(name).named_parameters())
    assert manifest.version == 8
    assert manifest.origin.family == "masked"
    assert manifest.origin.context_length == 64
    assert manifest.generation is None
    assert manifest.classes == []
    assert manifest.tokenizer.mask_token_id == tiny_encoders.make_tokenizer(name).mask_token_id
    assert manifest.scoring.inputs == ["input_ids", "attention_mask", "hidden_rows", "pair_rows", "pair_targets"]
    assert {tensor.name for tensor in manifest.tunable} == parameters.keys()
    assert manifest.verification is not None
    assert manifest.verification.greedy_tokens_equal is None
    assert 0 < manifest.verification.largest_log_prob_difference < 1e-4
    assert not (export(name) / "generation.onnx").exists()


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_row_scores_alone_as_beside_longer_ones(name: str, export: Export) -> None:
    sequences = Sequences(EdgeModel(export(name), threads=1))
    short, _ = candidates(export(name), "user")
    long, _ = candidates(export(name), "the plot is terrible and the film is great and the plot is great")
    together = np.concatenate(sequences.log_probs([*short, *long]))
    apart = np.concatenate([*sequences.log_probs(short), *sequences.log_probs(long)])
    assert np.abs(together - apart).max() < 1e-4


def test_the_mask_at_the_very_start_is_scored_with_the_word_that_begins_a_text(export: Export) -> None:
    model, tokenizer = EdgeModel(export("roberta"), threads=1), tiny_encoders.make_tokenizer("roberta")
    pairs, _ = candidates(export("roberta"), "the film", template="{mask} {text}", words="a,b")
    assert [pair.target for pair in pairs] == [tokenizer.convert_tokens_to_ids(word) for word in "ab"]
    assert {pair.position for pair in pairs} == {1}
    assert len(Sequences(model).log_probs(pairs)) == 2


def test_roberta_words_have_the_space_before_them(export: Export) -> None:
    pairs, _ = candidates(export("roberta"), "the film")
    assert tiny_encoders.make_tokenizer("roberta").convert_ids_to_tokens([pair.target for pair in pairs]) == ["Ġterrible", "Ġgreat"]


# rows that are too long


def test_a_long_text_before_the_mask_loses_its_first_tokens_and_keeps_mask_and_special_tokens(export: Export) -> None:
    tokenizer = tiny_encoders.make_tokenizer("bert")
    whole = tokenizer("the film is great and the plot is terrible It was [MASK] .")["input_ids"]
    pairs, cut = candidates(export(), "the film is great and the plot is terrible", limit=9)
    assert cut == 1
    assert pairs[0].tokens == [whole[0], *whole[-8:]]
    assert pairs[0].tokens[pairs[0].position] == tokenizer.mask_token_id


def test_a_long_text_after_the_mask_loses_its_last_tokens(export: Export) -> None:
    tokenizer = tiny_encoders.make_tokenizer("bert")
    whole = tokenizer("It was [MASK] . the film is great and the plot is terrible")["input_ids"]
    pairs, cut = candidates(export(), "the film is great and the plot is terrible", template="It was {mask} . {text}", limit=9)
    assert cut == 1
    assert pairs[0].tokens == [*whole[:8], whole[-1]]
    assert pairs[0].position == whole.index(tokenizer.mask_token_id)


def test_the_mask_is_left_when_nothing_else_fits(export: Export) -> None:
    tokenizer = tiny_encoders.make_tokenizer("bert")
    for template in (TEMPLATE, "It was {mask} . {text}"):
        pairs, _ = candidates(export(), "the film is great", template=template, limit=3)
        assert pairs[0] == ([tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.sep_token_id], 1, pairs[0].target)
    with pytest.raises(DataError) as caught:
        candidates(export(), "the film is great", limit=2)
    assert str(caught.value) == "at most 2 tokens are allowed, 3 are the mask and the special tokens; raise --max-length"


# runs


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"adapter": "lora"}], ids=["full", "lora"])
def test_tuning_lowers_the_loss_and_replays_bit_for_bit(
    name: str, settings: dict[str, str], export: Export, data: str, tmp_path: Path
) -> None:
    tiny_encoders.check_tuning(
        export(name, **settings), tmp_path / "run", bool(settings), data=data, valid=data, template=TEMPLATE, labels=WORDS
    )


@pytest.mark.parametrize("weights", ["int8", "int4", "fp16"])
@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_rounded_bases_are_checked_and_tuned(name: str, weights: str, export: Export, data: str, tmp_path: Path) -> None:
    directory = export(name, adapter="lora", weights=weights)
    manifest = read_manifest(directory)
    assert any(tensor.is_quantized or tensor.dtype == "float16" for tensor in manifest.tensors)
    assert manifest.verification is not None
    assert manifest.verification.quantization_loss_change is not None
    assert (manifest.verification.half_log_prob_difference is not None) == (weights == "fp16")
    assert api.tune(directory, tmp_path / "run", data=data, template=TEMPLATE, labels=WORDS, steps=2).steps == 2


def test_a_regular_expression_chooses_weights(export: Export, data: str, tmp_path: Path) -> None:
    directory = export(tunable=r"attention\.self")
    assert {tensor.kind for tensor in read_manifest(directory).tunable} == {
        f"attention.self.{part}{end}" for part in ("query", "key", "value") for end in ("", ".bias")
    }
    assert api.tune(directory, tmp_path / "run", data=data, template=TEMPLATE, labels=WORDS, steps=2).steps == 2


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_merged_lora_scores_as_the_adapter_does_in_transformers(name: str, export: Export, data: str, tmp_path: Path) -> None:
    directory = export(name, adapter="lora")
    api.tune(directory, tmp_path / "run", data=data, template=TEMPLATE, labels=WORDS, steps=8, rank=2, lr=5e-2)
    model = EdgeModel(directory, threads=1, run=tmp_path / "run", step="last")
    (tmp_path / "hf").mkdir()
    write_hugging_face(model, tmp_path / "hf")
    merged = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    pairs, _ = candidates(directory, "the plot is great")
    with torch.no_grad():
        logits = merged(torch.tensor([pairs[0].tokens])).logits[0, pairs[0].position]
    expected = torch.log_softmax(logits.double(), -1)[[pair.target for pair in pairs]].numpy()
    found = np.concatenate(Sequences(model).log_probs(pairs))
    base = np.concatenate(Sequences(EdgeModel(directory, threads=1)).log_probs(pairs))
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.abs(found - base).max() > 5 * TOLERANCE


def test_labels_are_predicted_for_a_text(export: Export, data: str, invoke: Invoke) -> None:
    outcome = invoke("predict", str(export()), "--text", "a great film", "--template", TEMPLATE, "--labels", WORDS, "--json")
    assert outcome.code == 0
    pairs, _ = candidates(export(), "a great film")
    sums = np.concatenate(Sequences(EdgeModel(export(), threads=1)).log_probs(pairs))
    expected = dict(zip("01", np.exp(sums - np.logaddexp.reduce(sums)), strict=True))
    (found,) = api.predict(export(), texts=["a great film"], template=TEMPLATE, labels=WORDS)
    assert found.probabilities == pytest.approx(expected, abs=1e-6)
    assert f'"label": "{found.label}"' in outcome.out


# refusals


def test_a_label_word_of_several_tokens_is_refused_with_its_pieces(export: Export) -> None:
    message = refusal(DataError, candidates, export(), "a film", words="terrible,awful")
    pieces = tiny_encoders.make_tokenizer("bert").tokenize("awful")
    assert len(pieces) > 1
    assert message == (
        f"--labels: 'awful' is {len(pieces)} tokens of this model ({' '.join(pieces)}), the mask stands for one; "
        "choose a word that is one token, such as good, bad, great"
    )


def test_a_label_word_outside_the_vocabulary_is_refused(export: Export) -> None:
    message = refusal(DataError, candidates, export(), "a film", words="terrible,上")
    assert message == "--labels: '上' is not in this model's vocabulary; choose a word that is one token, such as good, bad, great"


def test_two_words_that_are_one_token_are_refused(export: Export) -> None:
    message = refusal(DataError, candidates, export(), "a film", words="great,Great")
    assert message == "--labels: 'Great' and 'great' are the same token of this model (great); choose another word for one of them"


@pytest.mark.parametrize(("template", "count"), [("{text} It was", 0), ("{mask} {text} {mask}", 2)])
def test_a_template_without_one_mask_is_refused(template: str, count: int, export: Export) -> None:
    assert refusal(DataError, candidates, export(), "a film", template=template) == (
        f"--template {template!r}: names {{mask}} {count} times; this is a masked language model, write it once where the label word belongs, as '{{text}} It was {{mask}} .'"
    )


def test_a_template_of_the_mask_alone_is_refused(export: Export) -> None:
    message = refusal(DataError, candidates, export(), "a film", template="It was {mask}")
    assert message == "--template 'It was {mask}': names no field; write for example '{text} It was {mask} .'"


def test_a_mask_on_a_causal_model_is_refused(exported_dir: Path) -> None:
    message = refusal(DataError, candidates, exported_dir, "a film")
    assert message == (
        f"--template {TEMPLATE!r}: names {{mask}}, but this is a causal language model; the label word continues the template, leave {{mask}} out"
    )


def test_a_text_that_holds_the_mask_token_is_refused(export: Export) -> None:
    message = refusal(DataError, candidates, export(), "a film", "a [MASK] film")
    assert message == "row 2: the text holds the mask token [MASK] itself; the template puts it in once, take it out of the data"


def test_rows_without_a_template_are_refused(export: Export, write_rows: Callable[..., str], tmp_path: Path) -> None:
    rows = write_rows([{"prompt": "a", "completion": "b"}])
    message = refusal(DataError, api.tune, export(), tmp_path / "run", data=rows)
    assert message == (
        "this is a masked language model, which learns labels of rows alone; give --template '{text} It was {mask} .' and --labels"
    )


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["generate", "--prompt", "a", "--chat"], ["chat"]])
def test_writing_text_is_refused(command: list[str], export: Export, invoke: Invoke) -> None:
    outcome = invoke(command[0], str(export()), *command[1:])
    assert outcome.code == 1
    assert outcome.err == (
        f"error: {export()}: is a masked language model, which writes no text; use edgezo predict with a template that has {{mask}}, or export a causal model\n"
    )


def test_scores_of_completions_are_refused(export: Export) -> None:
    message = refusal(ConfigError, EdgeModel(export(), threads=1).log_probs, ["a"], [" b"])
    assert message == f"{export()}: is a masked language model, which continues no prompt; use edgezo predict"


def test_a_prefix_is_refused(tmp_path: Path) -> None:
    source = tiny_encoders.save(tmp_path / "bert", "bert")
    message = refusal(ConfigError, export_model, str(source), tmp_path / "edge", adapter="prefix")
    assert message == (
        f"--adapter prefix: a prefix is put before the text of a causal model, {source} is a masked language model; use --adapter lora"
    )
    assert not (tmp_path / "edge").exists()


def test_an_encoder_without_its_head_is_refused(tmp_path: Path) -> None:
    source = tiny_encoders.save(tmp_path / "bert", "bert", "")
    message = refusal(ExportError, export_model, str(source), tmp_path / "edge")
    assert message == (
        f"{source}: an encoder without the head of a masked language model (cls.predictions.bias, cls.predictions.transform.LayerNorm.bias are missing); give --classes N to classify with a new head"
    )


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path) -> None:
    source = tiny_encoders.save(tmp_path / "bert", "bert")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink()
    tokenizer = tiny_encoders.make_tokenizer("bert")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]").save_pretrained(source)
    message = refusal(ExportError, export_model, str(source), tmp_path / "edge")
    assert message == f"{source}: its tokenizer has no mask token, which a masked language model needs; download the tokenizer again"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.model_copy(update={"generation": m.scoring}), "it is masked, with a generation graph"),
        (
            lambda m: m.model_copy(update={"tokenizer": m.tokenizer.model_copy(update={"mask_token_id": None})}),
            "it is masked, without a mask token",
        ),
        (lambda m: m.model_copy(update={"classes": ["a", "b"]}), "it is masked, with classes"),
        (
            lambda m: m.model_copy(update={"origin": m.origin.model_copy(update={"family": "causal"})}),
            "it is causal, without a generation graph",
        ),
    ],
)
def test_a_manifest_that_contradicts_its_family_is_refused(
    change: Callable[..., Any], problem: str, export: Export, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(export(), tmp_path / "edge"))
    change(read_manifest(copy)).write(copy)
    assert refusal(EdgeModelError, read_manifest, copy) == f"{copy / 'manifest.json'}: {problem}; export the model again"


def test_rows_to_predict_need_no_label(export: Export) -> None:
    model = EdgeModel(export(), threads=1)
    row = Row({"text": "a film"}, "row 1")
    task = find_task([row], TEMPLATE, parse_labels(WORDS), "label", ModelFacts.of(model.manifest))
    assert len(make_candidates(row, task, model.text, 64)[0]) == 2


@pytest.mark.parametrize("name", tiny_encoders.CONFIGS)
def test_peft_loads_the_adapter_onto_the_source_and_the_edge_model_reads_it_back(
    name: str, export: Export, data: str, tmp_path: Path
) -> None:
    directory = export(name, adapter="lora")
    api.tune(directory, tmp_path / "run", data=data, template=TEMPLATE, labels=WORDS, steps=8, rank=2, lr=5e-2)
    model = EdgeModel(directory, threads=1, run=tmp_path / "run", step="last")
    assert isinstance(model.adapter, Lora)
    (tmp_path / "adapter").mkdir()
    write_peft(model.adapter, model.manifest, tmp_path / "adapter", model.head)
    adapted = peft.PeftModel.from_pretrained(tiny_encoders.make_model(name), str(tmp_path / "adapter")).eval()
    pairs, _ = candidates(directory, "the plot is great")
    with torch.no_grad():
        logits = adapted(torch.tensor([pairs[0].tokens])).logits[0, pairs[0].position]
    expected = torch.log_softmax(logits.double(), -1)[[pair.target for pair in pairs]].numpy()
    found = np.concatenate(Sequences(model).log_probs(pairs))
    back = np.concatenate(Sequences(EdgeModel(directory, threads=1, adapter=tmp_path / "adapter")).log_probs(pairs))
    assert np.abs(found - expected).max() < TOLERANCE
    assert np.array_equal(found, back)


@pytest.mark.parametrize("settings", [{"calibrate": "N/A"}, {"choices": ["a", "b"]}, {"stop": "#"}])
def test_what_belongs_to_causal_models_is_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    facts = ModelFacts("masked", ())
    with pytest.raises(
        DataError, match=rf"^--{name}: belongs to the prompts of a causal model, this is a masked language model; leave it out$"
    ):
        find_task(
            [Row({"text": "a film", "label": 0}, "rows:1")], "{text} It was {mask}", {"0": "bad", "1": "good"}, "label", facts, **settings
        )
