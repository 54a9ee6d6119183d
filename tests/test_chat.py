"""A conversation: what is said stays, and commands switch the model that answers."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Chat, Command
from conversations import InterruptingOutput, replies, reply, said, shown

from edgezo.chat import ANSWER_TOKENS
from edgezo.config import Sampling
from edgezo.export import export_model
from edgezo.manifest_reader import read_manifest
from edgezo.runtime.generate import generate
from edgezo.runtime.lora import Lora
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.peft_folder import write_peft
from edgezo.runtime.prefix import Prefix


def random_adapter(directory: Path, folder: Path, seed: int = 0) -> Path:
    """A PEFT folder with an adapter that changes what the model says."""
    random, model = np.random.default_rng(seed), EdgeModel(directory, threads=1)
    adapter = model.adapter
    if isinstance(adapter, Prefix):
        adapter.array[...] = random.normal(size=adapter.array.shape)
    else:
        assert model.manifest.adapter is not None
        adapter = Lora(model.manifest.adapter.targets, rank=2, alpha=4.0)
        adapter.a[...], adapter.b[...] = random.normal(size=adapter.a.shape), random.normal(size=adapter.b.shape)
    folder.mkdir()
    write_peft(adapter, model.manifest, folder)
    return folder


@pytest.fixture
def run(invoke: Command, exported_dir: Path, reviews: str, tmp_path: Path) -> str:
    """A short run of the shared edge model, called `my run`, with steps that tell."""
    options = ["--data", reviews, "--template", "{text} It was", "--labels", "terrible,great", "--steps", "4", "--lr", "1e-2"]
    assert invoke("tune", str(exported_dir), "-o", str(tmp_path / "my run"), *options, "--threads", "1").code == 0
    return "my run"


def labels_told(directory: Path, step: str = "") -> str:
    """What is said of that run, which learned labels."""
    use = f"edgezo predict {directory} --run 'my run'{step} --text '...'"
    return f"  note: this run learned to choose among labels, not to write text; for a label: {use}\n"


GOES_ON = "; the conversation goes on, /reset forgets it"


# what is said


def test_each_answer_is_that_of_the_whole_conversation(chat: Chat, model: EdgeModel) -> None:
    expected = replies(model, "the film", "is great", "Paris?")
    assert len(set(expected)) == 3
    assert chat("the film\nis great\nParis?\n") == (0, shown(expected), "")


def test_a_system_message_stays_in_front(chat: Chat, model: EdgeModel) -> None:
    expected = replies(model, "the film", "is great", system="terrible")
    assert expected != replies(model, "the film", "is great")
    assert chat("the film\nis great\n", "--system", "terrible") == (0, shown(expected), "")


def test_lines_without_words_are_no_messages_and_the_last_needs_no_line_break(chat: Chat, model: EdgeModel) -> None:
    assert chat("\n  \n the film \n\t\nis great") == (0, shown(replies(model, "the film", "is great")), "")


def test_a_message_may_begin_with_a_slash_after_a_space(chat: Chat, model: EdgeModel) -> None:
    assert chat(" /quit\n") == (0, shown(replies(model, "/quit")), "")


def test_nothing_said_is_nothing_answered(chat: Chat) -> None:
    assert chat("") == (0, "", "")


def test_an_answer_ends_at_256_tokens_unless_told() -> None:
    assert ANSWER_TOKENS == 256


def test_every_answer_is_drawn_with_the_next_seed(chat: Chat, model: EdgeModel) -> None:
    first = reply(model, said("a"), 6, Sampling(seed=5))
    second = reply(model, said("a", first, "a"), 6, Sampling(seed=6))
    assert chat("a\na\n", "--temperature", "1", "--seed", "5") == (0, shown([first, second]), "")
    assert chat("a\na\n", "--seed", "5") == (0, shown(replies(model, "a", "a")), "")


def test_answers_are_written_piece_by_piece(chat: Chat, model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = list(generate(model, model.text.chat(said("a"), reply=True), 6, special=False))
    assert len(pieces) > 2
    monkeypatch.setattr("sys.stdout", output := InterruptingOutput())
    assert chat("a\n").code == 0
    assert output.writes == [*pieces, "\n"]


# commands


def test_help_shows_the_commands(chat: Chat) -> None:
    assert chat("/help\n") == (
        0,
        "",
        "  /run PATH [STEP]  use the tuned model of a run directory; STEP is a number, best or last\n"
        "  /adapter PATH     use an adapter of elsewhere\n"
        "  /base             use the base\n"
        "  /reset            forget the conversation\n"
        "  /help             show the commands; a message that begins with / wants a space before it\n"
        "  /quit             leave; so do Ctrl-D and, at the prompt, Ctrl-C\n",
    )


def test_quit_leaves_the_rest_unread(chat: Chat, model: EdgeModel) -> None:
    assert chat("the film\n/quit\nis great\n") == (0, shown(replies(model, "the film")), "")


def test_reset_forgets_what_was_said_but_not_the_system_message(chat: Chat, model: EdgeModel) -> None:
    alone = replies(model, "the film", system="terrible")
    assert chat("the film\n/reset\nthe film\n", "--system", "terrible") == (0, shown(alone * 2), "  the conversation is forgotten\n")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/foo", "/foo: no such command; /help shows them"),
        ("/", "/: no such command; /help shows them"),
        ("/reset all", "/reset: takes nothing after it; /help shows how to write it"),
        ("/run", "/run: wants a path; /help shows how to write it"),
        ("/adapter ", "/adapter: wants a path; /help shows how to write it"),
        (
            "/run none",
            "none: no such run directory; make one with: edgezo tune DIR --data FILE -o none",
        ),
        (
            "/run none here 12",
            "none here: no such run directory; make one with: edgezo tune DIR --data FILE -o none here",
        ),
        (
            "/adapter none here",
            "none here: this edge model has no branch points for adapters; export it again with --adapter lora or prefix",
        ),
    ],
)
def test_a_command_that_fails_is_one_line_and_the_conversation_goes_on(chat: Chat, model: EdgeModel, line: str, error: str) -> None:
    expected = replies(model, "the film", "is great")
    assert chat(f"the film\n{line}\nis great\n") == (0, shown(expected), f"error: {error}\n")


def test_a_path_that_the_system_refuses_is_one_line_too(chat: Chat, model: EdgeModel) -> None:
    code, out, err = chat(f"/run {'a' * 5000}\nthe film\n")
    assert (code, out, err.count("\n")) == (0, shown(replies(model, "the film")), 1)
    assert err.startswith("error: aaaa")


def test_the_model_is_switched_and_what_was_said_stays(chat: Chat, model: EdgeModel, exported_dir: Path, run: str) -> None:
    tuned = EdgeModel(exported_dir, threads=1, run=run, step=4)
    history = ["the film"]
    history += [reply(model, said(*history)), "is great"]
    history += [reply(tuned, said(*history)), "Paris?"]
    history += [reply(model, said(*history))]
    assert history[3] != reply(model, said(*history[:3]))
    lines = "the film\n/run my run 4\nis great\n/base\nParis?\n"
    assert chat(lines) == (0, shown(history[1::2]), f"  my run, step 4{GOES_ON}\n{labels_told(exported_dir, ' --step 4')}  base{GOES_ON}\n")


def test_a_run_is_given_at_the_start_or_later_and_at_any_step(chat: Chat, exported_dir: Path, run: str) -> None:
    expected = shown(replies(EdgeModel(exported_dir, threads=1, run=run, step=2), "the film"))
    best, second, last = (labels_told(exported_dir, step) for step in ("", " --step 2", " --step last"))
    assert chat("the film\n", "--run", run, "--step", "2") == (0, expected, second)
    assert chat("/run my run\n/run my run last\n/run my run 2\nthe film\n") == (
        0,
        expected,
        f"  my run, step 4\n{best}  my run, step 4\n{last}  my run, step 2\n{second}",
    )


def test_a_switch_that_fails_leaves_the_model_that_answered(chat: Chat, exported_dir: Path, run: str) -> None:
    expected = replies(EdgeModel(exported_dir, threads=1, run=run), "the film", "is great")
    code, out, err = chat("the film\n/run my run 9\nis great\n", "--run", run)
    told = labels_told(exported_dir)
    assert (code, out, err) == (0, shown(expected), f"{told}error: my run: step 9 was asked for, the run has steps 0 to 4\n")


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters_are_switched_between_messages(chat: Chat, request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    directory: Path = request.getfixturevalue(f"{kind}_dir")
    folders = [random_adapter(directory, tmp_path / name, seed) for seed, name in enumerate(["first one", "other"])]
    models = [EdgeModel(directory, threads=1), *(EdgeModel(directory, threads=1, adapter=folder) for folder in folders)]
    history: list[str] = []
    for model, text in zip([models[1], models[2], models[0], models[1]], ["the film", "is great", "Paris?", "a"], strict=True):
        history += [text, reply(model, said(*history, text))]
    assert len({reply(model, said("the film")) for model in models}) == 3
    lines = "the film\n/adapter other\nis great\n/base\nParis?\n/adapter first one\na\n"
    found = chat(lines, "--adapter", "first one", directory=directory)
    assert found == (0, shown(history[1::2]), f"  other{GOES_ON}\n  base{GOES_ON}\n  first one{GOES_ON}\n")


# what is refused at the start


def test_a_model_without_chat_template_is_refused(chat: Chat, edge_dir: Path) -> None:
    manifest = read_manifest(edge_dir)
    facts = manifest.tokenizer.model_copy(update={"chat_template": None})
    files = {name: file for name, file in manifest.files.items() if name != manifest.tokenizer.chat_template}
    manifest.model_copy(update={"tokenizer": facts, "files": files}).write(edge_dir)
    assert chat("the film\n", directory="edge") == (
        1,
        "",
        "error: edge: has no chat template to converse by; write text with: edgezo generate edge --prompt TEXT\n",
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--temperature", "0"], "temperature must be above 0 and finite, top-k at least 0 and top-p in (0, 1]; got 0.0, 0, 1.0"),
        (["--step", "3"], "--step 3: says a step of a run, but no --run is given; add --run RUN or leave --step out"),
        (["--run", "none"], "none: no such run directory; make one with: edgezo tune DIR --data FILE -o none"),
        (["--run", "a", "--adapter", "b"], "--run a and --adapter b: two models were asked for; give one of the two"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_refused_before_anything_is_said(chat: Chat, options: list[str], error: str) -> None:
    assert chat("the film\n", *options) == (1, "", f"error: {error}\n")


def test_a_system_message_that_the_template_refuses_is_told_at_the_start(chat: Chat, source_dir: Path, tmp_path: Path) -> None:
    strict = Path(shutil.copytree(source_dir, tmp_path / "strict"))
    (strict / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}{{ messages[-1]['content'] }}",
        encoding="utf-8",
    )
    directory = export_model(str(strict), tmp_path / "edge-strict").directory
    error = "error: the model's chat template refuses these messages: no system message\n"
    assert chat("the film\n", "--system", "s", directory=directory) == (1, "", error)
    assert chat("the film\n", directory=directory).code == 0


def test_standard_input_that_is_no_text_is_refused(chat: Chat) -> None:
    stream = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8")
    assert chat(stream) == (1, "", "error: standard input: not UTF-8 text (invalid start byte); save it as UTF-8\n")
