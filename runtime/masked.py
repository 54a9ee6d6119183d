"""Rows for encoders: a label word at the mask of a masked language model, or a class of a classifier."""

import string
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from edgezo.errors import DataError
from edgezo.manifest import FAMILY_WORDS, Family, Manifest
from edgezo.runtime.scoring import Classified, Masked
from edgezo.runtime.text import TextCodec, TextError

MASK = "mask"  # the field of a template that stands for the mask token
COMMON = ("good", "bad", "great", "true", "false", "yes", "no", "right", "wrong")  # looked through for a word of one token


class ModelFacts(NamedTuple):
    """What reading rows needs to know of an edge model: its family, and the names of a classifier's classes."""

    family: Family = "causal"
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> "ModelFacts":
        """Of an edge model."""
        return cls(manifest.origin.family, tuple(manifest.classes))


CAUSAL = ModelFacts()


class Place(NamedTuple):
    """Of a mask in its template: whether white space is before it, nothing at all, or a field somewhere."""

    spaced: bool
    first: bool
    after_field: bool


def check_mask(template: str, family: Family, fields: Sequence[str]) -> None:
    """Refuse a template whose {mask} does not fit the model.

    Args:
        fields: of the data; a causal model's may be called mask.
    """
    count = [name for _, name, _, _ in string.Formatter().parse(template)].count(MASK)
    if family == "masked" and count != 1:
        raise DataError(
            f"--template {template!r}: names {{mask}} {count} times; this is a masked language model, write it once where the label word belongs, as '{{text}} It was {{mask}} .'"
        )
    if family != "masked" and count and MASK not in fields:
        instead = "the label word continues the template" if family == "causal" else "its head gives the class"
        raise DataError(f"--template {template!r}: names {{mask}}, but this is {FAMILY_WORDS[family]}; {instead}, leave {{mask}} out")


def check_unprompted(model: ModelFacts) -> None:
    """Refuse rows without a template, which only a causal model can learn."""
    if model.family != "causal":
        example = "--template '{text} It was {mask} .' and --labels" if model.family == "masked" else "--template '{text}'"
        raise DataError(f"this is {FAMILY_WORDS[model.family]}, which learns labels of rows alone; give {example}")


def class_labels(labels: Mapping[str, str] | None, classes: Sequence[str], first_label: str | None) -> dict[str, str]:
    """Label as written in the data to class name, in order of the classes.

    Args:
        labels: as given: the data's labels in order of the classes, or label to class name; None takes the classes' own names, or
            their numbers where the data has those.
        classes: names of the model's classes.
        first_label: of the data's first row; None when there is none.

    Raises:
        DataError: the labels do not fit the classes.
    """
    if labels is None:
        numbered = first_label is not None and first_label not in classes and first_label.isdecimal()
        return {str(number) if numbered else name: name for number, name in enumerate(classes)}
    words = list(labels.values())
    if len(labels) != len(classes):
        raise DataError(
            f"--labels {', '.join(words)}: {len(labels)} labels, this model has the {len(classes)} classes {', '.join(classes)}; give one for each"
        )
    if set(words) == set(classes):
        return {label: word for name in classes for label, word in labels.items() if word == name}
    if list(labels) == [str(number) for number in range(len(classes))]:
        return dict(labels)  # the data's own words, in order of the classes
    strange = next(word for word in words if word not in classes)
    raise DataError(f"--labels: {strange!r} is no class of this model; its classes are {', '.join(classes)}, write label=class for each")


def mask_place(template: str) -> Place:
    """Where the mask of a template stands."""
    field = False
    for literal, name, _, _ in string.Formatter().parse(template):
        if name == MASK:
            return Place(literal[-1:].isspace(), not literal and not field, field)
        field = field or name is not None
    raise ValueError(f"{template!r} has no mask")


def masked_candidates(
    parts: Sequence[str], words: Sequence[str], place: Place, text: TextCodec, max_length: int
) -> tuple[list[Masked], bool]:
    """The label words at the mask of one row, and whether the row was cut.

    Args:
        parts: the filled template before and after the mask.
        words: the label words.
        place: of the mask in the template.
        text: the tokenizer.
        max_length: tokens of the row. A longer one loses its first tokens where a field stands before the mask, else its last, and where
            these do not suffice tokens of the other side; the mask and the special tokens stay.

    Raises:
        DataError: a label word has several tokens; the row names the mask token itself; the mask alone does not fit.
    """
    token, mask = text.facts.special_tokens.get("mask_token", ""), text.facts.mask_token_id
    before, after = parts
    targets = label_tokens(text, place.spaced, place.first, tuple(words))
    head, body, tail = text.around(before + token + after)
    if body.count(mask or 0) != 1:
        raise TextError(f"the text holds the mask token {token} itself; the template puts it in once, take it out of the data")
    at, room = body.index(mask or 0), max_length - len(head) - len(tail)
    if room < 1:
        raise DataError(
            f"at most {max_length} tokens are allowed, {len(head) + len(tail) + 1} are the mask and the special tokens; raise --max-length"
        )
    excess = max(0, len(body) - room)
    first = min(excess, at) if place.after_field else excess - min(excess, len(body) - at - 1)
    kept = [*head, *body[first : len(body) - (excess - first)], *tail]
    return [Masked(kept, len(head) + at - first, target) for target in targets], excess > 0


def class_candidates(filled: str, count: int, text: TextCodec, max_length: int) -> tuple[list[Classified], bool]:
    """The classes of one row, and whether it was cut: a longer text loses its last tokens, special tokens stay."""
    head, body, tail = text.around(filled)
    room = max_length - len(head) - len(tail)
    if room < 1:
        raise DataError(f"at most {max_length} tokens are allowed, {len(head) + len(tail)} of them are special tokens; raise --max-length")
    kept = [*head, *body[:room], *tail]
    return [Classified(kept, target) for target in range(count)], len(body) > room


@lru_cache(maxsize=16)
def label_tokens(text: TextCodec, spaced: bool, first: bool, words: tuple[str, ...]) -> list[int]:
    """The token of every label word, as it is written in running text.

    Args:
        text: the tokenizer.
        spaced: whether white space stands before the mask.
        first: whether nothing stands before it.
        words: the label words.

    Raises:
        DataError: a word is not one token of the vocabulary, or is the token of another.
    """
    found: dict[int, str] = {}
    for word in words:
        pieces = _pieces(text, word, spaced, first)
        shown = text.tokens(pieces)
        if shown == [text.facts.special_tokens.get("unk_token")]:
            raise DataError(f"--labels: {word!r} is not in this model's vocabulary; {_advice(text, words, spaced, first)}")
        if len(pieces) != 1:
            raise DataError(
                f"--labels: {word!r} is {len(pieces)} tokens of this model ({' '.join(shown)}), the mask stands for one; {_advice(text, words, spaced, first)}"
            )
        if pieces[0] in found:
            raise DataError(
                f"--labels: {word!r} and {found[pieces[0]]!r} are the same token of this model ({shown[0]}); choose another word for one of them"
            )
        found[pieces[0]] = word
    return list(found)


def _pieces(text: TextCodec, word: str, spaced: bool, first: bool) -> list[int]:
    """Tokens of a word behind another, since many tokenizers tell ' great' from 'great'."""
    if first:
        return text.encode(word, special=False)
    before = text.encode("a", special=False)
    whole = text.encode(f"a {word}" if spaced else f"a-{word}", special=False)
    if not spaced:  # as after an opening quote or bracket
        before = text.encode("a-", special=False)
    return whole[len(before) :] if whole[: len(before)] == before else whole


def _advice(text: TextCodec, words: Sequence[str], spaced: bool, first: bool) -> str:
    single = [word for word in COMMON if word not in words and len(_pieces(text, word, spaced, first)) == 1]
    known = [word for word in single if text.tokens(_pieces(text, word, spaced, first)) != [text.facts.special_tokens.get("unk_token")]]
    return f"choose a word that is one token, such as {', '.join(known[:3])}" if known else "choose a shorter or more common word"
