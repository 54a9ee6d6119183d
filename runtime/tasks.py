"""What kind of data rows are, told by the options and the first row's fields, and how a row's texts are read."""

import math
import re
import string
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from edgezo.errors import DataError, nearest
from edgezo.manifest import FAMILY_WORDS, Family
from edgezo.runtime.data import Row
from edgezo.runtime.masked import CAUSAL, MASK, ModelFacts, check_mask, check_unprompted, class_labels

Kind = Literal["classification", "choice", "answer", "completion", "preference", "chat", "text"]
NAMED_FIELDS: dict[Kind, set[str]] = {
    "preference": {"prompt", "chosen", "rejected"},
    "chat": {"messages"},
    "completion": {"prompt", "completion"},
}
OPTIONS = ("choices", "answer_field", "replace", "stop", "calibrate")  # settings that `find_task` takes by name
NO_REPLACEMENTS: Mapping[str, Mapping[str, str]] = MappingProxyType({})
CHOICE_NAME = re.compile(r"(choice|option|ending|answer|solution|sol)_?[0-9a-e]", re.IGNORECASE)


class Task(NamedTuple):
    """How rows are read.

    template: of the prompt; empty where the field `prompt` holds it, or another field of its own.
    labels: the label as written in the data to its label word; empty unless classification.
    label_field: holds the label of a classification.
    choices: templates of the choices; empty where the field `choices` lists them.
    answer_field: holds the right choice (text, or number from 0) or the texts of a right answer.
    replace: words that stand in a template for values of a field.
    stop: learned after an answer in place of the end-of-text token; generation ends at both.
    calibrate: neutral prompt; the log-probability of a candidate after it is taken off its own (Zhao et al. 2021, arXiv 2102.09690;
        Holtzman et al. 2021, arXiv 2104.08315).
    family: of the model that reads the rows.
    room: tokens that a generated answer may take after a prompt; 0 where none is generated.
    prefix: text before every prompt, the neutral one too: worked rows (runtime/shots.py).
    """

    kind: Kind
    template: str = ""
    labels: Mapping[str, str] = MappingProxyType({})
    label_field: str = "label"
    choices: tuple[str, ...] = ()
    answer_field: str = "answer"
    replace: Mapping[str, Mapping[str, str]] = NO_REPLACEMENTS
    stop: str | None = None
    calibrate: str | None = None
    family: Family = "causal"
    prefix: str = ""
    room: int = 0

    @property
    def words(self) -> list[str]:
        """The label words, each once, in order of the label."""
        return list(dict.fromkeys(self.labels.values()))

    @property
    def classes(self) -> list[str]:
        """A label of every word: the longest that is a word itself and no number, or else the first."""
        own = [[label for label, known in self.labels.items() if known == word] for word in self.words]
        return [max(filter(is_word, labels), key=len, default=labels[0]) for labels in own]

    @property
    def has_candidates(self) -> bool:
        """Whether a row has several texts of which one is right."""
        return self.kind in {"classification", "choice", "preference"}

    def prompt(self, row: Row) -> str:
        """The filled template, or the field `prompt`, after the prefix."""
        return self.prefix + (fill(self.template, row, self.replace) if self.template else text_of(row, "prompt"))


def find_task(
    rows: Sequence[Row],
    template: str | None,
    labels: Mapping[str, str] | None,
    label_field: str,
    model: ModelFacts = CAUSAL,
    *,
    choices: Sequence[str] | None = None,
    answer_field: str | None = None,
    replace: Mapping[str, Mapping[str, str]] | None = None,
    stop: str | None = None,
    calibrate: str | None = None,
) -> Task:
    """Tell the kind of data from the options and the first row's fields.

    Args:
        rows: of the training file; when `labels` is None its label strings are the label words.
        template: such as '{sentence} It was', or None.
        labels: label as written in the data to label word; for a classifier to class name.
        model: what reads the rows.
        label_field, choices, answer_field, replace, stop, calibrate: as in `Task`.

    Raises:
        DataError: the fields fit no kind, or the template names a field that does not exist or is what the model is to find.
    """
    first = rows[0]
    for field in replace or {}:
        if field not in first.fields:
            raise DataError(f"replace: field {field!r} does not exist; {first.place} has {_names(first)}")
    for pattern in (*([template] if template is not None else []), *(choices or ())):
        _check_template(pattern, first, "--template" if pattern == template else "--choices", model)
    given = Task("text", template or "", {}, label_field, tuple(choices or ()), answer_field or "answer", replace or {}, stop, calibrate)
    if model.family != "causal":
        task = _classification(rows, given._replace(family=model.family), labels, model)
    else:
        task = _find_kind(rows, given, labels, answer_field is not None)
    if model.family != "causal":
        for option, value in (("--calibrate", calibrate), ("--choices", choices), ("--stop", stop)):
            if value is not None:
                raise DataError(f"{option}: belongs to the prompts of a causal model, this is {FAMILY_WORDS[model.family]}; leave it out")
    target = {"classification": label_field, "choice": task.answer_field, "answer": task.answer_field}.get(task.kind)
    if template is not None and target in template_fields(template, model):
        raise DataError(f"--template {template!r}: has the field {target!r}, which is what the model is to find; take {{{target}}} out")
    if choices is not None and (len(choices) < 2 or task.kind != "choice"):
        raise DataError(
            f"--choices: {len(choices)} given for rows of kind {task.kind}; give a template for each of at least two choices, and no --labels"
        )
    if calibrate is not None and task.kind not in {"classification", "choice"}:
        raise DataError(f"--calibrate: compares candidates, and rows of kind {task.kind} have none; leave it out")
    if stop is not None and task.kind not in {"completion", "answer", "preference"}:
        raise DataError(f"--stop: ends an answer, and rows of kind {task.kind} have none; leave it out")
    return task


def _find_kind(rows: Sequence[Row], given: Task, labels: Mapping[str, str] | None, asked_answer: bool) -> Task:
    first = rows[0]
    fields = first.fields
    prompted = bool(given.template) or "prompt" in fields
    if labels is None and not (given.template or given.choices or asked_answer):
        for kind, needed in NAMED_FIELDS.items():
            if needed <= fields.keys():
                return given._replace(kind=kind)
    if labels is None and (given.choices or "choices" in fields):
        if not prompted:
            raise DataError(f"{first.place}: choices continue a prompt, and there is none; give --template or a field 'prompt'")
        return given._replace(kind="choice")
    if labels is None and prompted and (asked_answer or (given.answer_field in fields and given.label_field not in fields)):
        return given._replace(kind="answer")
    if given.template:
        return _classification(rows, given, labels, CAUSAL)
    if labels is not None:
        raise DataError("--labels needs a --template such as '{text} It was', which the label word continues")
    if "text" in fields and given.label_field not in fields:
        return given
    if given.label_field in fields and (
        texts := [name for name in first.fields if isinstance(first.fields[name], str) and name != given.label_field]
    ):
        if len(choices := [name for name in texts if CHOICE_NAME.fullmatch(name)]) > 1:
            given_choices = " ".join(f"--choices '{{{name}}}'" for name in choices)
            raise DataError(
                f"{first.place}: has a {given.label_field!r} and the texts {' and '.join(choices)}; to choose between them give --template '{{field}} ...' for what they continue, {given_choices} and --answer-field {given.label_field}; for label words --template and --labels"
            )
        longest = max(texts, key=lambda name: len(first.fields[name]))
        raise DataError(
            f"{first.place}: has a {given.label_field!r}, and a label is learned after a prompt; give --template '{{{longest}}} It was' or the like, and --labels where labels are numbers"
        )
    if not first.fields:
        raise DataError(f"{first.place}: a row without fields; give it a prompt and completion, text and label, or the like (docs/data.md)")
    raise DataError(
        f"{first.place}: fields {_names(first)} are neither prompt and completion, prompt and choices, prompt and answer, prompt, chosen and rejected, messages, nor text; for other names give --template '{{field}} ...'"
    )


def _classification(rows: Sequence[Row], given: Task, labels: Mapping[str, str] | None, model: ModelFacts) -> Task:
    first = rows[0]
    if not given.template:
        check_unprompted(model)
    if model.family == "classifier":
        found = label_of(first, given.label_field) if given.label_field in first.fields else None
        return given._replace(kind="classification", labels=class_labels(labels, model.classes, found))
    words = labels or {word: word for word in sorted({_label_word(row, given.label_field) for row in rows})}
    if len(set(words.values())) < 2:
        where = first.place if labels is None else "--labels"
        raise DataError(
            f"{where}: one {'label' if labels is None else 'word'} only ({', '.join(words.values())}); classification needs two"
        )
    return given._replace(kind="classification", labels=words)


def _label_word(row: Row, label_field: str) -> str:
    """The label of a row as a word of its own, where no --labels say otherwise."""
    label = label_of(row, label_field)
    if not is_word(label):
        raise DataError(
            f"{row.place}: label {label} in field {label_field!r} is a number; give the words of the labels with --labels word0,word1,..."
        )
    return label


def label_of(row: Row, label_field: str) -> str:
    """The label as written in the data."""
    if label_field not in row.fields:
        raise DataError(f"{row.place}: no field {label_field!r}; it has {_names(row)} (--label-field names the label's field)")
    value = row.fields[label_field]
    label = "" if value is None else str(value).strip()
    if not label:
        raise DataError(f"{row.place}: field {label_field!r}: it is empty; every row needs a label")
    return label


def template_fields(template: str, model: ModelFacts = CAUSAL) -> list[str]:
    """The names of the fields in a template, each once; {mask} is none of a masked language model's."""
    names = dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
    return [name for name in names if model.family != "masked" or name != MASK]


def _check_template(template: str, first: Row, option: str, model: ModelFacts) -> None:
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"{option} {template!r}: {error}; write a brace of the text as {{{{ or }}}}") from None
    if option == "--template":
        check_mask(template, model.family, list(first.fields))
    masked = [MASK] if model.family == "masked" else []
    if len(fields) == len(masked) and option == "--template":
        longest = max(first.fields, key=lambda name: len(str(first.fields[name])), default="text")
        raise DataError(f"{option} {template!r}: names no field; write for example '{{{longest}}} It was{' {mask} .' if masked else ''}'")
    for name, spec, conversion in fields:
        if spec or conversion:
            raise DataError(f"{option} {template!r}: field {name!r} has a format; fields are put in as they are, write {{{name}}}")
        if name not in first.fields and name not in masked:
            near = nearest(name, first.fields)
            raise DataError(f"{option} {template!r}: field {name!r} does not exist{near}; {first.place} has {_names(first)}")


def fill(template: str, row: Row, replace: Mapping[str, Mapping[str, str]] = NO_REPLACEMENTS) -> str:
    """The template with a row's fields in it."""
    return fill_parts(template, row, replace)[0]


def fill_parts(template: str, row: Row, replace: Mapping[str, Mapping[str, str]], family: Family = "causal") -> list[str]:
    """The template with a row's fields in it, cut in two at the mask of a masked language model.

    Raises:
        DataError: a field is missing, empty or no text, or has a value without a replacement (file and line).
    """
    parts = [""]
    for literal, name, _, _ in string.Formatter().parse(template):
        parts[-1] += literal
        if name == MASK and family == "masked":
            parts.append("")
        elif name is not None:
            value = text_of(row, name)
            if name in replace and value not in replace[name]:
                raise DataError(f"{row.place}: field {name!r} is {value!r}, replace has words for {', '.join(map(repr, replace[name]))}")
            parts[-1] += replace[name][value] if name in replace else value
    return parts


def seen_labels(labels: Mapping[str, str], label_field: str, rows: Sequence[Row]) -> dict[str, str]:
    """The labels that rows have; where none of a word's labels in them is a word itself, but a number, all of these."""
    found = {str(row.fields.get(label_field)).strip() for row in rows}
    words = {word for label, word in labels.items() if label in found and is_word(label)}
    return {label: word for label, word in labels.items() if label in found or word not in words}


def is_word(label: str) -> bool:
    """Whether a label is no number."""
    return not label.lstrip("-").isdigit()


def text_of(row: Row, name: str) -> str:
    """A field as text."""
    value: Any = row.fields.get(name)
    missing = isinstance(value, float) and math.isnan(value)  # as pandas writes it
    if value is None or missing or isinstance(value, dict | list) or not str(value).strip():
        found = "no such field" if name not in row.fields else "it is empty or no text"
        if isinstance(value, dict):
            raise DataError(
                f"{row.place}: field {name!r}: an object of {len(value)} entries, no text; write a row a line, with a text each"
            )
        raise DataError(f"{row.place}: field {name!r}: {found}; every row needs it")
    return str(value)


def _names(row: Row) -> str:
    return ", ".join(map(repr, row.fields)) or "none"
