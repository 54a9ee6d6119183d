"""What was understood of a run's rows, in lines to read before minutes are spent."""

from collections import Counter

from edgezo.runtime.dataset import Dataset
from edgezo.runtime.scoring import Candidate, Classified, Masked
from edgezo.runtime.text import TextCodec

PROMPT, COMPLETION, MOST_LABELS = 70, 40, 10  # characters, and label words, that are shown at most


def data_summary(dataset: Dataset, text: TextCodec) -> list[str]:
    """How many rows of which kind, how often each label, and the first row as the model reads it; nothing of plain text, which is packed.

    Args:
        dataset: as read.
        text: of the model.
    """
    task, examples = dataset.task, dataset.train.examples
    if task.kind == "text":
        return []
    others = f"; {len(dataset.valid.examples)} for validation" if dataset.valid is not None else ""
    labels, warnings = "", []
    if task.kind == "classification":
        words, counts = task.words, Counter(dict.fromkeys(task.words, 0))
        counts.update(words[example.gold] for example in examples)
        more = f", {len(counts) - MOST_LABELS} more" if len(counts) > MOST_LABELS else ""
        labels = f" ({', '.join(f'{word} {count}' for word, count in counts.most_common(MOST_LABELS))}{more})"
        unseen = [word for word, count in counts.items() if not count]
        if len(examples) in counts.values():
            only = words[examples[0].gold]
            warnings.append(
                f"warning: all training rows have the label {only!r}, so nothing is learned but to prefer it; give rows of others"
            )
        elif unseen:
            warnings.append(
                f"warning: no training row has the label {' or '.join(map(repr, unseen[:MOST_LABELS]))}; check --labels and the rows"
            )
    read = _shown(examples[0].pairs[examples[0].gold], task.words, text)
    return [f"{len(examples)} rows of kind {task.kind}{labels}{others}", f"the first reads {read}", *warnings]


def _shown(candidate: Candidate, words: list[str], text: TextCodec) -> str:
    if isinstance(candidate, Masked):
        before, after = text.decode(candidate.tokens[: candidate.position]), text.decode(candidate.tokens[candidate.position + 1 :])
        return f"{_last_characters(before)} [{text.decode([candidate.target]).strip()}] {_first_characters(after)}"
    if isinstance(candidate, Classified):
        return f"{_last_characters(text.decode(candidate.tokens))} -> {words[candidate.target]}"
    return f"{_last_characters(text.decode(candidate[0]))} -> {_first_characters(text.decode(candidate[1]))}"


def _last_characters(shown: str) -> str:
    return repr(shown if len(shown) <= PROMPT else f"...{shown[-PROMPT:]}")


def _first_characters(shown: str) -> str:
    return repr(shown if len(shown) <= COMPLETION else f"{shown[:COMPLETION]}...")
