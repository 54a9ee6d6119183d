"""Answers under many copies of an adapter: both signs of all directions share forwards."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from edgezo.runtime.batch_generate import answer, most_rows, must_be_alike
from edgezo.runtime.model import EdgeModel
from edgezo.runtime.packing import packed
from edgezo.runtime.prompt_cache import Beginning, make_batches
from edgezo.runtime.sampling import make_pick
from edgezo.runtime.scoring import BATCH_TOKENS

Beginnings = Callable[[Sequence[int], Sequence[int]], Beginning]
# Bytes of whole copies that one forward is fed, by as many tokens as it may have: 12 copies of LoRA's B at all layers of SmolLM2-135M, rank 8
COPIES_BYTES = 1 << 26


class _Tile(NamedTuple):
    """Rows of one group that are answered in one batch, and the tokens of the longest, its answer included."""

    group: int
    rows: list[int]
    width: int


def generate_stacked(
    model: EdgeModel,
    groups: Sequence[Sequence[list[int]]],
    sides: Sequence[int],
    beginnings: Beginnings,
    copy_bytes: int,
    max_tokens: int,
    stop: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[list[str]]]:
    """The answers to every group of prompts under its own copies of the adapter, as `generate_batch` gives them copy after copy.

    What prompts begin with is read by each of them.

    Args:
        groups: prompts of each direction, as of `generate_batch`.
        sides: the copies of each direction, +1 and -1 or one of them.
        beginnings: by numbers of some groups, and sides, their copies.
        copy_bytes: of one copy.
        max_tokens, stop, batch_tokens: as of `generate_batch`; fewer `batch_tokens` take fewer copies, too.

    Returns:
        [group][side][prompt].

    Raises:
        NonFiniteLossError: the model gives no finite logits.
    """
    answers = [[[""] * len(prompts) for _ in sides] for prompts in groups]
    alike = must_be_alike(model, model.adapter.prefix_tokens if model.adapter is not None else 0)
    rows, copies = most_rows(model), COPIES_BYTES * batch_tokens // (BATCH_TOKENS * max(copy_bytes, 1))

    def fits(tiles: list[_Tile]) -> bool:
        count = len(sides) * len(tiles) * max(len(tile.rows) for tile in tiles)
        same = not alike or tiles[-1].width == tiles[0].width
        return same and count * tiles[0].width <= batch_tokens and count <= rows and len(sides) * len(tiles) <= copies

    tiles = [
        _Tile(group, batch, len(prompts[batch[0]]) + max_tokens)
        for group, prompts in enumerate(groups)
        for batch in make_batches(
            [len(prompt) + max_tokens for prompt in prompts], [len(sides)] * len(prompts), batch_tokens // len(sides), rows, alike=alike
        )
    ]
    for chosen in packed(sorted(tiles, key=lambda tile: (-tile.width, -len(tile.rows))), fits):
        prompts = [[groups[tile.group][row] for row in tile.rows] for tile in chosen for _ in sides]
        picks = [make_pick(None, 0)] * sum(map(len, prompts))
        found = iter(answer(model, beginnings([tile.group for tile in chosen], sides), prompts, max_tokens, stop, picks))
        for tile in chosen:
            for side in range(len(sides)):
                for row in tile.rows:
                    answers[tile.group][side][row] = next(found)[1]
    return answers
