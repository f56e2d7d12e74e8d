"""Running out of memory, told apart from other failures and turned into an error that helps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gesso_core.errors import OutOfMemory


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on an accelerator or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU allocator has no exception class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Failed allocations inside become `OutOfMemory`: ``what`` does not fit, and ``advice``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what} does not fit into memory; {advice}") from error


def release() -> None:
    """Give cached memory back to the device, so that a smaller piece of work may fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
