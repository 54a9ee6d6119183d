"""Log-probabilities of token sequences through the scoring graph, in micro-batches of like length, of one copy of the weights or many."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgezo.adapters import ATTENTION, PROBE_ROWS
from edgezo.errors import EdgeModelError
from edgezo.runtime.model import Array, EdgeModel
from edgezo.runtime.packing import packed

BATCH_TOKENS = 2048  # padded tokens of one forward; beyond it a forward gains no speed, only memory
# Logits of one forward are float32 [hidden rows, vocabulary], and it holds them more than once. Of a forward of some texts at most the first, or LEAST_HIDDEN rows: 256 MB took no less
# time (docs/decisions.md). Of one long text at most the second, since its forward runs again for what is left; on a device always
LOGITS_BYTES, LONG_LOGITS_BYTES = 1 << 26, 1 << 28
LEAST_HIDDEN = 256

Pair = tuple[list[int], list[int]]  # token ids of prompt and completion


class Masked(NamedTuple):
    """A token id at one position of a whole text."""

    tokens: list[int]
    position: int
    target: int


class Classified(NamedTuple):
    """A class of a whole text."""

    tokens: list[int]
    target: int


Candidate = Pair | Masked | Classified
# feeds of the copies of some groups, in order, every side of each after the other
Copies = Callable[[Sequence[int], Sequence[int]], dict[str, Array]]
Scores = list[npt.NDArray[np.float64]]  # of each pair, [completion tokens], in nats


class States(NamedTuple):
    """Candidates as a forward saw them.

    scores: as `Sequences.log_probs`. hidden: float32 [n, width], what the head read to score the first token of the n pairs asked for.
    attention: float32 [n, layers * in_features], the attention outputs there that a probe may read; no columns where none were asked for.
    """

    scores: Scores
    hidden: npt.NDArray[np.float32]
    attention: npt.NDArray[np.float32]


class TokenStates(NamedTuple):
    """Tokens of completions, and what a forward made of the text before each.

    hidden: float32 [n, width], final hidden states. log_probs: float32 [n, K], of the tokens asked for. tokens: int64 [n], those that stand there.
    """

    hidden: npt.NDArray[np.float32]
    log_probs: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]


def forward_tokens(candidate: Candidate) -> int:
    """Tokens that a forward reads of a candidate; the last token of a completion is only a target."""
    return len(candidate.tokens) if isinstance(candidate, Masked | Classified) else len(candidate[0]) + len(candidate[1]) - 1


def _scored_count(candidate: Candidate) -> int:
    """How many log-probabilities a candidate has."""
    return 1 if isinstance(candidate, Masked | Classified) else len(candidate[1])


class Layout(NamedTuple):
    """Where the log-probabilities of the candidates come from.

    sequences: token ids to run, without repeats. hidden: (sequence, position) of each hidden row; position 0 of a classifier's.
    scored: (hidden row, target id) of each completion token, candidate after candidate.
    """

    sequences: list[tuple[int, ...]]
    hidden: list[tuple[int, int]]
    scored: list[tuple[int, int]]


class _Tile(NamedTuple):
    """Sequences of one group that run in one forward, with the hidden rows that are wanted of them."""

    group: int
    sequences: list[int]
    hidden: list[int]
    width: int  # tokens of the longest


class Sequences:
    """Scores candidates with one edge model at its present weights and adapter: completions of prompts, tokens at masks, or classes.

    Candidates of one prompt that are one token long share a forward row and a hidden state.

    Args:
        model: the edge model.
        batch_tokens: padded tokens of one forward at most, unless one row has more.

    Attributes:
        forward_rows: rows of all forwards so far; a row counts in each copy of the weights, a written answer once.
    """

    def __init__(self, model: EdgeModel, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model = model
        self.inputs = model.manifest.scoring.inputs
        self.pad = model.manifest.tokenizer.pad_token_id
        self.batch_tokens = batch_tokens
        self.whole = model.manifest.origin.family == "classifier"  # hidden rows are rows of the batch
        self.forward_rows = 0
        vocabulary = model.manifest.origin.vocab_size
        self.long_hidden = max(1, LONG_LOGITS_BYTES // (4 * vocabulary))
        few = max(LEAST_HIDDEN, LOGITS_BYTES // (4 * vocabulary))
        self.batch_hidden = min(few, self.long_hidden) if model.device is None else self.long_hidden

    def log_probs(self, pairs: Sequence[Candidate]) -> Scores:
        """log p of every completion token given all before it.

        Args:
            pairs: prompt and completion token ids, neither empty; or what the family of the model has instead.

        Returns:
            For each pair float64 [completion tokens], in nats.
        """
        if not pairs:
            return []
        feeds = self.model.feeds()
        return self._run([pairs], (1,), lambda groups, sides: feeds, together=1)[0][0]

    def hidden_states(self, texts: Sequence[list[int] | Masked | Classified]) -> npt.NDArray[np.float32]:
        """What the last projection reads of every text; equal texts run once.

        Args:
            texts: one or more. Of token ids, none empty, the final hidden state at the last token, after the last norm; of a masked
                text that at its position, after the transform; of a text to classify what the last layer of the head reads.

        Returns:
            float32 [texts, width].

        Raises:
            EdgeModelError: a classifier exported before edge models had this output.
        """
        if "hidden" not in self.model.manifest.scoring.outputs:
            raise EdgeModelError(f"{self.model.directory}: its scoring graph has no output hidden; export the model again")
        # a target of no meaning: the graph wants one a row
        pairs = [(text, [self.pad]) if isinstance(text, list) else text._replace(target=0) for text in texts]
        return self.states(pairs).hidden

    def states(self, pairs: Sequence[Candidate], attention: bool = False, stride: int = 1) -> States:
        """Scores of all pairs, and what every stride-th was made from; attention outputs of a model that can be given a probe of them."""
        layout, feeds = lay_out(pairs), self.model.feeds()
        scores = np.empty(len(layout.scored))
        ends = np.cumsum([_scored_count(pair) for pair in pairs])
        firsts = [layout.scored[end - _scored_count(pair)][0] for end, pair in zip(ends, pairs, strict=True)][::stride]
        kept = set(firsts)
        read: dict[int, list[Array]] = {}
        for tile in self._tiles(0, layout, sides=1):
            own, (wanted,) = self._feeds([layout], [tile], sides=1)
            self.forward_rows += len(tile.sequences)
            places = [place for place, row in enumerate(tile.hidden) if row in kept]
            given = {**{name: own[name] for name in self.inputs}, **feeds}
            if attention:
                given[PROBE_ROWS] = own["hidden_rows"][places]
            scores[wanted], hidden, *found = self.model.scoring.run(["log_probs", "hidden", *([ATTENTION] if attention else [])], given)
            for place, *parts in zip(places, hidden[places], *found, strict=True):
                read[tile.hidden[place]] = parts
        stacked = [np.stack(parts) for parts in zip(*(read[row] for row in firsts), strict=True)]
        return States(np.split(scores, ends[:-1]), *stacked, *([] if attention else [np.empty((len(firsts), 0), np.float32)]))

    def token_states(self, pairs: Sequence[Pair], tokens: npt.NDArray[np.int64]) -> TokenStates:
        """Hidden states that all tokens of completions are scored from, and log p there of other tokens.

        Args:
            pairs: prompt and completion token ids, neither empty.
            tokens: int64 [K].
        """
        layout, feeds = lay_out(pairs), self.model.feeds()
        parts: list[tuple[list[int], Array, Array]] = []
        for tile in self._tiles(0, layout, sides=1):
            own, _ = self._feeds([layout], [tile], sides=1)
            self.forward_rows += len(tile.sequences)
            count = len(tile.hidden)
            own["pair_rows"], own["pair_targets"] = np.repeat(np.arange(count), len(tokens)), np.tile(tokens, count)
            given = {**{name: own[name] for name in self.inputs}, **feeds}
            found, states = self.model.scoring.run(["log_probs", "hidden"], given)
            parts.append((tile.hidden, states, found.reshape(count, len(tokens))))
        places, hidden, log_probs = (np.concatenate(part) for part in zip(*parts, strict=True))
        rows, targets = np.array(layout.scored, np.int64).T
        order = np.argsort(places)[rows]
        return TokenStates(hidden[order], log_probs[order], targets)

    def stacked(self, groups: Sequence[Sequence[Candidate]], sides: Sequence[int], copies: Copies) -> list[list[Scores]]:
        """Scores of every group of pairs under its own copies of the weights, as many copies in one forward as fit.

        Args:
            groups: pairs of each direction.
            sides: the copies of each direction, +1 and -1.
            copies: feeds of the copies for some of the groups.

        Returns:
            [group][side], as `log_probs`.
        """
        return self._run(groups, sides, copies, together=len(groups))

    def _run(self, groups: Sequence[Sequence[Candidate]], sides: Sequence[int], copies: Copies, together: int) -> list[list[Scores]]:
        session = self.model.scoring  # made at first use, which checks the graph's inputs
        layouts = [lay_out(pairs) for pairs in groups]
        scores = [np.empty((len(sides), len(layout.scored))) for layout in layouts]
        tiles = [tile for group, layout in enumerate(layouts) for tile in self._tiles(group, layout, len(sides))]
        for chosen in self._forwards(tiles, len(sides), together):
            feeds, wanted = self._feeds(layouts, chosen, len(sides))
            self.forward_rows += len(sides) * sum(len(tile.sequences) for tile in chosen)
            given = {**{name: feeds[name] for name in self.inputs}, **copies([tile.group for tile in chosen], sides)}
            found = iter(np.split(session.run(["log_probs"], given)[0], np.cumsum([len(part) for part in wanted])[:-1]))
            parts = iter(wanted)
            for tile in chosen:
                for side in range(len(sides)):
                    scores[tile.group][side, next(parts)] = next(found)
        ends = [np.cumsum([_scored_count(pair) for pair in pairs])[:-1] for pairs in groups]
        return [[np.split(side, end) for side in group] for group, end in zip(scores, ends, strict=True)]

    def _tiles(self, group: int, layout: Layout, sides: int) -> Iterator[_Tile]:
        """Sequences sorted by length, as many at a time as one forward may hold."""
        rows_of: dict[int, list[int]] = {}
        for row, (sequence, _) in enumerate(layout.hidden):
            rows_of.setdefault(sequence, []).append(row)
        limit, long = (max(1, most // sides) for most in (self.batch_hidden, self.long_hidden))
        held: list[int] = []
        rows: list[int] = []
        longest = 0
        for sequence in sorted(rows_of, key=lambda s: -len(layout.sequences[s])):
            longest = longest or len(layout.sequences[sequence])
            if held and (sides * (len(held) + 1) * longest > self.batch_tokens or len(rows) + len(rows_of[sequence]) > limit):
                yield _Tile(group, held, rows, longest)
                held, rows, longest = [], [], len(layout.sequences[sequence])
            held.append(sequence)
            rows += rows_of[sequence]
            while len(rows) > long:  # one long text: its forward runs again for every part of its hidden rows
                yield _Tile(group, list(held), rows[:long], longest)
                rows = rows[long:]
        if rows:
            yield _Tile(group, held, rows, longest)

    def _forwards(self, tiles: list[_Tile], sides: int, together: int) -> Iterator[list[_Tile]]:
        """Tiles of like shape, at most `together` and as many as one forward may hold."""

        def fits(chosen: list[_Tile]) -> bool:
            rows, hidden = max(len(tile.sequences) for tile in chosen), sum(len(tile.hidden) for tile in chosen)
            tokens = sides * len(chosen) * rows * chosen[0].width
            return len(chosen) <= together and tokens <= self.batch_tokens and sides * hidden <= self.batch_hidden

        return packed(sorted(tiles, key=lambda tile: (-tile.width, -len(tile.sequences))), fits)

    def _feeds(self, layouts: list[Layout], tiles: list[_Tile], sides: int) -> tuple[dict[str, Array], list[npt.NDArray[np.int64]]]:
        """Right-padded token ids [tiles * sides * rows, width], and for each tile and side the places of its scores."""
        rows, width = max(len(tile.sequences) for tile in tiles), max(tile.width for tile in tiles)
        ids = np.full((len(tiles), sides, rows, width), self.pad, np.int64)
        mask = np.zeros(ids.shape, np.int64)
        mask[..., 0] = 1  # a row that only fills up its group is one token long
        hidden_rows: list[npt.NDArray[np.int64]] = []
        pair_rows, pair_targets, wanted = [], [], []
        count, stride = 0, 1 if self.whole else width
        for index, tile in enumerate(tiles):
            layout = layouts[tile.group]
            place = {sequence: row for row, sequence in enumerate(tile.sequences)}
            for sequence, row in place.items():
                tokens = layout.sequences[sequence]
                ids[index, :, row, : len(tokens)], mask[index, :, row, : len(tokens)] = tokens, 1
            kept = {row: number for number, row in enumerate(tile.hidden)}
            scored = np.array([number for number, (row, _) in enumerate(layout.scored) if row in kept], np.int64)
            flat = np.array([place[layout.hidden[row][0]] * stride + layout.hidden[row][1] for row in tile.hidden], np.int64)
            own = np.array([kept[layout.scored[number][0]] for number in scored], np.int64)
            for side in range(sides):
                pair_rows.append(own + count)
                hidden_rows.append(flat + (index * sides + side) * rows * stride)
                pair_targets.append(np.array([layout.scored[number][1] for number in scored], np.int64))
                wanted.append(scored)
                count += len(flat)
        before = self.model.adapter.prefix_tokens if self.model.adapter is not None else 0
        total = len(tiles) * sides * rows
        feeds = {
            "input_ids": ids.reshape(total, width),
            "attention_mask": np.concatenate([np.ones((total, before), np.int64), mask.reshape(total, width)], axis=1),
            "position_ids": np.tile(np.arange(before, before + width, dtype=np.int64), (total, 1)),
            "hidden_rows": np.concatenate(hidden_rows),
            "pair_rows": np.concatenate(pair_rows),
            "pair_targets": np.concatenate(pair_targets),
        }
        return feeds, wanted


def lay_out(pairs: Sequence[Candidate]) -> Layout:
    """Where the scores of candidates come from: equal sequences run once, and candidates of one token share a hidden row."""
    sequences: dict[tuple[int, ...], int] = {}
    hidden: dict[tuple[int, int], int] = {}
    scored = []
    for pair in pairs:
        if isinstance(pair, Masked | Classified):
            sequence = sequences.setdefault(tuple(pair.tokens), len(sequences))
            place = (sequence, pair.position if isinstance(pair, Masked) else 0)
            scored.append((hidden.setdefault(place, len(hidden)), pair.target))
            continue
        prompt, completion = pair
        sequence = sequences.setdefault((*prompt, *completion[:-1]), len(sequences))
        for index, target in enumerate(completion):
            scored.append((hidden.setdefault((sequence, len(prompt) - 1 + index), len(hidden)), target))
    return Layout(list(sequences), list(hidden), scored)
