"""Ratings through the command line: what is shown, what is kept, and that a file is continued."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, Outcome
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

import edgezo
from edgezo.config import Sampling
from edgezo.manifest import StoredFile
from edgezo.manifest_reader import read_manifest
from edgezo.rate import TRIES
from edgezo.runtime.data import Row
from edgezo.runtime.examples import make_candidates
from edgezo.runtime.generate import generate
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.tasks import find_task
from edgezo.storage import sha256_file

KEYS = "1 or 2 the better one, 0 skip, r two others, q quit"
ONE_KEYS = "+ good, - bad, 0 skip, r another, q quit"
SPACE = "  an answer follows its prompt without a space, tuning will put one there; a prompt that ends in one avoids it\n"
PROMPTS = ["the film is ", "a plot so ", "it was "]
Rate = Callable[..., Outcome]


@pytest.fixture
def rate(monkeypatch: pytest.MonkeyPatch, invoke: Command, edge_dir: Path, tmp_path: Path) -> Rate:
    """Run `edgezo rate edge -o ratings.jsonl ...` in the test's folder with the given lines on standard input."""
    monkeypatch.chdir(tmp_path)
    assert edge_dir == tmp_path / "edge"

    def call(lines: Any, *options: str, output: str = "ratings.jsonl") -> Outcome:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines) if isinstance(lines, str) else lines)
        return invoke("rate", "edge", "-o", output, "--threads", "1", "--max-tokens", "5", *options)

    return call


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of three prompts, one a line."""
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    return "prompts.txt"


def answer(model: EdgeModel, prompt: str, seed: int, temperature: float = 0.8) -> str:
    return "".join(generate(model, prompt, 5, Sampling(temperature, seed=seed)))


def shown(name: str, text: str) -> str:
    """A text after its name, further lines below its first."""
    lines = text.strip().splitlines() or [""]
    return "".join(f"{name if number == 0 else ' ' * len(name)}  {line}\n" for number, line in enumerate(lines))


def pair_shown(texts: list[str]) -> str:
    return shown("1", texts[0]) + shown("2", texts[1])


def rows(path: str = "ratings.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def row(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def next_step(directory: str = "edge", path: str = "ratings.jsonl") -> str:
    return f"; tune on them: edgezo tune {directory} --data {path} -o RUN\n"


def test_the_better_of_two_answers_becomes_a_row(rate: Rate, model: EdgeModel) -> None:
    texts = [answer(model, PROMPTS[0], seed) for seed in (0, 1)] + [answer(model, PROMPTS[1], seed) for seed in (2, 3)]
    found = rate(f"{PROMPTS[0]}\n2\n{PROMPTS[1]}\n1\nq\n")
    last = "2 rows written to ratings.jsonl, which has 2" + next_step()
    assert found == (0, pair_shown(texts[:2]) + pair_shown(texts[2:]) + last, "")
    assert rows() == [row(PROMPTS[0], texts[1], texts[0]), row(PROMPTS[1], texts[2], texts[3])]


def test_skip_again_and_a_wrong_key(rate: Rate, model: EdgeModel, prompts: str) -> None:
    first = [answer(model, PROMPTS[0], seed) for seed in (7, 8)]
    again = [answer(model, PROMPTS[1], seed) for seed in (9, 10, 11, 12)]
    last = [answer(model, PROMPTS[2], seed) for seed in (13, 14)]
    found = rate("0\nR\n+\n2\nq\n", "--prompts", prompts, "--seed", "7")
    expected = shown("prompt", PROMPTS[0]) + pair_shown(first) + shown("prompt", PROMPTS[1]) + pair_shown(again[:2]) + pair_shown(again[2:])
    expected += shown("prompt", PROMPTS[2]) + pair_shown(last)
    assert found == (0, expected + "1 row written to ratings.jsonl, which has 1" + next_step(), f"  '+': give {KEYS}\n")
    assert rows() == [row(PROMPTS[1], again[3], again[2])]


def test_one_at_a_time_a_plus_and_a_minus_make_a_row(rate: Rate, model: EdgeModel) -> None:
    texts = [answer(model, PROMPTS[0], seed, 1.5) for seed in range(6)]
    assert len(set(texts)) == 6
    found = rate(f"{PROMPTS[0]}\n-\nr\n1\n-\n0\n{PROMPTS[0]}\n-\n+\n", "--one", "--temperature", "1.5")
    last = "1 row written to ratings.jsonl, which has 1" + next_step()
    assert found.out == "".join(shown("answer", text) for text in texts) + last
    assert (found.code, found.err) == (0, f"  '1': give {ONE_KEYS}\n")
    assert rows() == [row(PROMPTS[0], texts[5], texts[4])]


def test_a_file_is_continued_and_rated_prompts_are_skipped(rate: Rate, prompts: str) -> None:
    assert rate("1\nq\n", "--prompts", prompts).code == 0
    first = Path("ratings.jsonl").read_text(encoding="utf-8")
    Path("ratings.jsonl").write_text(first.rstrip("\n"), encoding="utf-8")  # an editor's last line
    found = rate("1\n2\n", "--prompts", prompts)
    assert found.err == f"  rated already, skipped: {PROMPTS[0]}\n"
    assert found.out.endswith("2 rows written to ratings.jsonl, which has 3" + next_step())
    assert Path("ratings.jsonl").read_text(encoding="utf-8").startswith(first)
    assert [found["prompt"] for found in rows()] == PROMPTS
    done = rate("", "--prompts", prompts)
    assert done.out == "0 rows written to ratings.jsonl, which has 3" + next_step()
    assert done.err == "".join(f"  rated already, skipped: {prompt}\n" for prompt in PROMPTS)


@pytest.mark.parametrize("lines", ["", "\n\n", f"{PROMPTS[0]}\n", f"{PROMPTS[0]}\nq\n", f"{PROMPTS[0]}\n0\n", "q\n"])
def test_the_end_of_the_input_or_q_leaves(rate: Rate, lines: str) -> None:
    found = rate(lines)
    assert (found.code, found.err) == (0, "")
    assert found.out.endswith("0 rows written, ratings.jsonl has none\n")
    assert not Path("ratings.jsonl").exists()


def test_what_was_rated_is_on_the_disk_before_the_next_prompt(rate: Rate) -> None:
    seen = list[int]()

    class Lines(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            seen.append(len(rows()) if Path("ratings.jsonl").exists() else 0)
            return super().readline()

    assert rate(Lines(f"{PROMPTS[0]}\n1\n{PROMPTS[1]}\n1\n")).code == 0
    assert seen == [0, 0, 1, 1, 2]


def test_a_chat_prompt_is_kept_as_it_was_generated_from(rate: Rate, model: EdgeModel) -> None:
    prompt = model.text.chat([{"role": "user", "content": "who?"}], reply=True)
    texts = ["".join(generate(model, prompt, 5, Sampling(0.8, seed=seed), special=False)) for seed in (0, 1)]
    found = rate("who?\n1\n", "--chat")
    assert (found.code, found.err) == (0, "")
    assert rows() == [row(prompt, *texts)]
    read = [Row(fields, "ratings.jsonl:1") for fields in rows()]
    pairs, cut = make_candidates(read[0], find_task(read, None, None, "label"), model.text, 64)
    ends = model.manifest.tokenizer.eos_token_ids[:1]
    for (head, tail), text in zip(pairs, texts, strict=True):
        assert head + tail == model.text.encode(prompt + text) + ends  # no space is put between
    assert not cut


def test_a_chat_prompt_has_one_beginning_of_text_token_in_tuning(rate: Rate, edge_dir: Path) -> None:
    path = edge_dir / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.save(str(path))
    template = edge_dir / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    changed = {file.name: StoredFile(bytes=file.stat().st_size, sha256=sha256_file(file)) for file in (path, template)}
    manifest = read_manifest(edge_dir)
    manifest.model_copy(update={"files": {**manifest.files, **changed}}).write(edge_dir)
    model = EdgeModel(edge_dir, threads=1)
    prompt = model.text.chat([{"role": "user", "content": "who?"}], reply=True)
    assert model.text.encode(prompt)[:2] == [0, 0]
    texts = ["".join(generate(model, prompt, 5, Sampling(0.8, seed=seed), special=False)) for seed in (0, 1)]
    assert rate("who?\n1\n", "--chat").code == 0
    assert rows() == [row(prompt.removeprefix("<|begin|>"), *texts)]
    read = Row(rows()[0], "ratings.jsonl:1")
    pairs, _ = make_candidates(read, find_task([read], None, None, "label"), model.text, 64)
    assert all((head + tail)[:2] == model.text.encode(prompt, special=False)[:2] for head, tail in pairs)


def test_ratings_can_be_tuned_on(rate: Rate, exported_dir: Path) -> None:
    assert rate("".join(f"{prompt}\n1\n" for prompt in PROMPTS)).code == 0
    result = edgezo.tune(exported_dir, "run", data="ratings.jsonl", valid="ratings.jsonl", steps=1, batch=2, threads=1)
    assert result.before is not None
    assert {"preferred", "margin"} <= result.before.others.keys()


def test_the_answers_are_the_tuned_models(rate: Rate, exported_dir: Path, reviews: str) -> None:
    edgezo.tune(
        exported_dir, "run", data=reviews, template="{text} It was", labels="bad,good", steps=2, batch=4, lr=0.05, eval_every=9, threads=1
    )
    tuned = EdgeModel(exported_dir, run="run", threads=1)
    texts = [answer(tuned, PROMPTS[0], seed) for seed in (0, 1)]
    assert texts[0] != answer(EdgeModel(exported_dir, threads=1), PROMPTS[0], 0)
    assert rate(f"{PROMPTS[0]}\n", "--run", "run").out.startswith(pair_shown(texts))


def test_a_missing_space_is_told_once(rate: Rate) -> None:
    found = rate("the film\n1\nit was\n1\n", "--temperature", "1.5")
    assert (found.code, found.err) == (0, SPACE)


def test_a_model_that_always_says_the_same_is_skipped(rate: Rate) -> None:
    advice = "skipped; --temperature or --max-tokens may be raised"
    cold = ("--temperature", "1e-6")
    assert rate(f"{PROMPTS[0]}\n", *cold).err == f"  no two different answers in {TRIES} tries, {advice}\n"
    assert rate(f"{PROMPTS[0]}\n+\n", "--one", *cold).err == f"  no other answer in {TRIES} tries, {advice}\n"


def test_a_prompt_that_fills_the_context_is_told_and_the_next_one_is_asked(rate: Rate) -> None:
    found = rate(f"{'z' * 200}\n{PROMPTS[0]}\n1\n")
    assert found.err == "error: the prompt has 200 tokens, the model's context is 128; shorten it\n"
    assert [row["prompt"] for row in rows()] == [PROMPTS[0]]


def test_prompts_come_from_rows_too(rate: Rate, write_rows: Callable[..., str]) -> None:
    write_rows([{"prompt": "two\nlines ", "more": 1}, {"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0]}], "prompts.jsonl")
    found = rate("1\n1\n", "--prompts", "prompts.jsonl")
    assert found.out.startswith("prompt  two\n        lines\n1  ")
    assert [row["prompt"] for row in rows()] == ["two\nlines ", PROMPTS[0]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a"', "ratings.jsonl:2: not a JSON object (Expecting ',' delimiter); "
         "one object a line is expected"),
        (b'{"prompt": "a", "completion": "b"}\n', "ratings.jsonl:1: field 'chosen': no such field; every row needs it"),
        (b"caf\xe9\n", "ratings.jsonl: not UTF-8 text (invalid continuation byte at byte 3); save it as UTF-8"),
    ],
)  # fmt: skip
def test_a_file_of_other_things_is_refused_and_left_alone(rate: Rate, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "ratings.jsonl").write_bytes(content)
    assert rate("a\n1\n") == (1, "", f"error: {message}\n")
    assert (tmp_path / "ratings.jsonl").read_bytes() == content


def test_wrong_settings_are_one_line(rate: Rate, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \n")
    for options, message in (
        (("--prompts", "none.txt"), "none.txt: no such file of prompts; give rows with a field prompt, or a text file with one a line"),
        (("--prompts", "blank.txt"), "blank.txt: no prompts in it; write one a line"),
        (("--prompts", "latin.txt"), "latin.txt: not UTF-8 text (invalid continuation byte at byte 3); save it as UTF-8"),
        (("--temperature", "0"), "temperature must be above 0 and finite, top-k at least 0 and top-p in (0, 1]; got 0.0, 0, 1.0"),
        (("--step", "3"), "--step 3: says a step of a run, but no --run is given; add --run RUN or leave --step out"),
    ):
        assert rate("", *options) == (1, "", f"error: {message}\n")
    assert rate("", output="ratings.txt").err == "error: ratings.txt: ratings are rows of a .jsonl file; give it that suffix\n"
    shown = Path("none/r.jsonl")
    assert rate("", output=str(shown)).err == f"error: {shown}: no folder none; make it first\n"


def test_a_model_without_chat_template_is_told_first(rate: Rate, edge_dir: Path) -> None:
    manifest = json.loads((edge_dir / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"][manifest["tokenizer"]["chat_template"]]
    manifest["tokenizer"]["chat_template"] = None
    (edge_dir / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert rate("a\n", "--chat") == (1, "", "error: edge: has no chat template; leave --chat out\n")
