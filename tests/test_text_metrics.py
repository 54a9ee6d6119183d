"""Exact match and F1 against a second implementation of SQuAD's definition, on answers cut from the demo's notes."""

import json
import random
import string
from pathlib import Path

import pytest
from transformers.data.metrics import squad_metrics

from edgezo.runtime.text_metrics import best_of, exact_match, f1

NOTES = Path(__file__).resolve().parent.parent / "examples" / "notes"
ARTICLES = {"a", "an", "the"}
ODD = ["", "the", "A, the!", "?!", "theatre", "The-an", "“the” end", "a.m.", "an\u00a0a b", "$1,000 the", "İn THE end", "naïve a naïve"]


def words_of(text: str) -> list[str]:
    """Lower case, ASCII punctuation deleted, articles between non-letters blanked, split at white space: letter by letter."""
    runs: list[str] = []  # of letters and digits, and what is between them
    for letter in text.lower():
        if letter in string.punctuation:
            continue
        if runs and runs[-1][-1].isalnum() == letter.isalnum():
            runs[-1] += letter
        else:
            runs.append(letter)
    return "".join(" " if run in ARTICLES else run for run in runs).split()


def figures(answer: str, references: list[str]) -> tuple[float, float]:
    """Exact match and F1 of one answer, the largest over the references."""
    matches, scores = [], []
    for reference in references:
        found, wanted = words_of(answer), words_of(reference)
        matches.append(1.0 if found == wanted else 0.0)
        left, shared = list(wanted), 0
        for word in found:
            if word in left:
                left.remove(word)
                shared += 1
        precision, recall = (shared / len(found), shared / len(wanted)) if shared else (0.0, 0.0)
        scores.append(2 * precision * recall / (precision + recall) if shared else 0.0)
    return max(matches), max(scores)


def answered() -> list[tuple[str, list[str]]]:
    """An answer and one to three right ones for every note: pieces of it, changed, or of another."""
    notes = [json.loads(line)["text"] for name in ("train", "test") for line in (NOTES / f"{name}.jsonl").read_text("utf-8").splitlines()]
    draw = random.Random(0)

    def piece(note: str) -> str:
        words = note.split()
        first = draw.randrange(len(words))
        return " ".join(words[first : first + draw.randrange(1, 6)])

    rows = []
    for note in notes:
        right = [piece(note) for _ in range(draw.randrange(1, 4))]
        changed = [right[0].upper() + ".", f"the {right[-1]}, a", " ".join(reversed(right[0].split())), right[0] * 2, piece(note), note]
        rows.append((draw.choice([*changed, piece(draw.choice(notes))]), right))
    return rows + [(odd, [draw.choice(ODD), other]) for odd in ODD for other in ODD]


def test_exact_match_and_f1_are_those_of_the_definition() -> None:
    rows = answered()
    expected = [figures(answer, right) for answer, right in rows]
    assert len(rows) > 500
    for (answer, right), (match, score) in zip(rows, expected, strict=True):
        assert best_of(exact_match, answer, right) == match, (answer, right)
        assert best_of(f1, answer, right) == pytest.approx(score, abs=1e-12), (answer, right)
    matches, scores = zip(*expected, strict=True)
    assert 0.1 < sum(matches) / len(rows) < sum(scores) / len(rows) < 0.9
    assert sum(match < score < 1 for match, score in expected) > 100


def test_texts_of_articles_and_punctuation_alone_match_without_a_word_in_common() -> None:
    """As in the script of SQuAD 1.1; that of 2.0, where no answer may be right, gives them an F1 of 1."""
    assert (exact_match("The!", ""), f1("The!", "")) == (1.0, 0.0)


def test_figures_are_those_of_the_official_functions() -> None:
    """transformers carries those of SQuAD's script; they differ from version 1.1 only where nothing is left of a text."""
    rows = [(answer, right) for answer, right in answered() if all(words_of(text) for text in (answer, *right))]
    assert len(rows) > 300
    for answer, right in rows:
        assert best_of(exact_match, answer, right) == max(squad_metrics.compute_exact(reference, answer) for reference in right)
        assert best_of(f1, answer, right) == pytest.approx(
            max(squad_metrics.compute_f1(reference, answer) for reference in right), abs=1e-12
        )
    assert 0.1 < sum(best_of(f1, answer, right) for answer, right in rows) / len(rows) < 0.9
