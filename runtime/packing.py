"""Many things in few batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def packed(items: Iterable[T], fits: Callable[[list[T]], bool]) -> Iterator[list[T]]:
    """Items in their order, as many together as `fits` allows, and at least one."""
    held: list[T] = []
    for item in items:
        if held and not fits([*held, item]):
            yield held
            held = []
        held.append(item)
    if held:
        yield held
