"""Batches that are halved where they do not fit into memory; nothing else about them changes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from portllm.errors import out_of_memory

Item = TypeVar("Item")


def in_halves(batch: Sequence[Item], work: Callable[[Sequence[Item]], None]) -> int:
    """`work` on a batch, or on its halves where that runs out of memory; returns how often one was halved.

    What `work` leaves behind of a batch that it could not finish, it must overwrite when it is called again. Raises
    the error of a batch of one.
    """
    if len(batch) == 1:
        work(batch)
        return 0
    if fits(lambda: work(batch)):
        return 0
    half = len(batch) // 2
    return 1 + in_halves(batch[:half], work) + in_halves(batch[half:], work)


def fits(work: Callable[[], None]) -> bool:
    """Does `work`; False where it ran out of memory. Raises every other error."""
    try:
        work()
        return True
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(type(error).__name__, str(error)):
            raise
    # Outside the handler, which holds the frames of the failed pass and with them its tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False
