"""Log-probabilities of token sequences through the scoring graph, in micro-batches of like length."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.runtime.model import Array, EdgeModel

BATCH_TOKENS = 2048  # padded tokens of one forward; beyond it a forward gains no speed, only memory
BATCH_LOGITS_BYTES = 1 << 28  # logits of one forward at most, float32 [hidden rows, vocabulary]

Pair = tuple[list[int], list[int]]  # token ids of prompt and completion


class _Layout(NamedTuple):
    """Where the log-probabilities of the pairs come from.

    sequences: token ids to run, without repeats. hidden: (sequence, position) of each hidden row.
    scored: (hidden row, target id) of each completion token, pair after pair.
    """

    sequences: list[tuple[int, ...]]
    hidden: list[tuple[int, int]]
    scored: list[tuple[int, int]]


class Sequences:
    """Scores (prompt, completion) pairs with one edge model at its present weights.

    Candidates of one prompt that are one token long share a forward row and a hidden state.
    """

    def __init__(self, model: EdgeModel) -> None:
        self.session = model.scoring
        self.inputs = model.manifest.scoring.inputs
        self.pad = model.manifest.tokenizer.pad_token_id
        self.batch_hidden = max(1, BATCH_LOGITS_BYTES // (4 * model.manifest.origin.vocab_size))

    def log_probs(self, pairs: Sequence[Pair]) -> list[npt.NDArray[np.float64]]:
        """log p of every completion token given all before it.

        Args:
            pairs: prompt and completion token ids, neither empty.

        Returns:
            For each pair float64 [completion tokens], in nats.
        """
        if not pairs:
            return []
        layout = _lay_out(pairs)
        scores = np.empty(len(layout.scored))
        targets = np.array(layout.scored, np.int64).reshape(-1, 2)
        order = np.argsort(targets[:, 0], kind="stable")
        for rows in self._micro_batches(layout):
            # the scored tokens whose hidden state is in this micro-batch
            place = np.full(len(layout.hidden), -1, np.int64)
            place[rows] = np.arange(len(rows), dtype=np.int64)
            chosen = order[place[targets[order, 0]] >= 0]
            feeds = self._feeds(layout, rows)
            feeds["pair_rows"], feeds["pair_targets"] = place[targets[chosen, 0]], targets[chosen, 1]
            scores[chosen] = self.session.run(["log_probs"], {name: feeds[name] for name in self.inputs})[0]
        return np.split(scores, np.cumsum([len(completion) for _, completion in pairs])[:-1])

    def _micro_batches(self, layout: _Layout) -> Iterator[npt.NDArray[np.int64]]:
        """Hidden rows of sequences sorted by length, as many at a time as one forward may hold."""
        rows_of: dict[int, list[int]] = {}
        for row, (sequence, _) in enumerate(layout.hidden):
            rows_of.setdefault(sequence, []).append(row)
        rows: list[int] = []
        held = longest = 0
        for sequence in sorted(rows_of, key=lambda s: -len(layout.sequences[s])):
            longest = longest or len(layout.sequences[sequence])
            if held and ((held + 1) * longest > BATCH_TOKENS or len(rows) + len(rows_of[sequence]) > self.batch_hidden):
                yield np.array(rows)
                rows, held, longest = [], 0, len(layout.sequences[sequence])
            rows += rows_of[sequence]
            held += 1
            while len(rows) > self.batch_hidden:  # one long text: its forward runs again for every part of its hidden rows
                yield np.array(rows[: self.batch_hidden])
                rows = rows[self.batch_hidden :]
        if rows:
            yield np.array(rows)

    def _feeds(self, layout: _Layout, rows: npt.NDArray[np.int64]) -> dict[str, Array]:
        """Right-padded token ids [batch, longest] and the flat positions of the hidden rows."""
        sequences = list(dict.fromkeys(layout.hidden[row][0] for row in rows))
        place = {sequence: index for index, sequence in enumerate(sequences)}
        width = max(len(layout.sequences[sequence]) for sequence in sequences)
        ids = np.full((len(sequences), width), self.pad, np.int64)
        mask = np.zeros((len(sequences), width), np.int64)
        for index, sequence in enumerate(sequences):
            tokens = layout.sequences[sequence]
            ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens, 1
        flat = np.array([place[layout.hidden[row][0]] * width + layout.hidden[row][1] for row in rows], np.int64)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.tile(np.arange(width, dtype=np.int64), (len(sequences), 1)),
            "hidden_rows": flat,
        }


def _lay_out(pairs: Sequence[Pair]) -> _Layout:
    sequences: dict[tuple[int, ...], int] = {}
    hidden: dict[tuple[int, int], int] = {}
    scored = []
    for prompt, completion in pairs:
        sequence = sequences.setdefault((*prompt, *completion[:-1]), len(sequences))
        for index, target in enumerate(completion):
            scored.append((hidden.setdefault((sequence, len(prompt) - 1 + index), len(hidden)), target))
    return _Layout(list(sequences), list(hidden), scored)
