"""Chains of operations on strips of an image: a core per strip, not all cores per operation.

torch splits each operation over its threads and waits for the slowest. For a chain of many short
operations that is a wait every fraction of a millisecond, and ruinous as soon as another program
takes one of the cores (measured: 30 times slower). Here every thread of a small pool runs the whole
chain for its strips, single-threaded, and there is one wait at the end.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")


def for_each(function: Callable[[Item], None], items: Sequence[Item]) -> None:
    """Call ``function`` for every item, on as many threads as torch would use; no gradients."""
    threads = min(torch.get_num_threads(), len(items))
    inference = torch.is_inference_mode_enabled()

    def work(first: int) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for item in items[first::threads]:
                function(item)

    if threads <= 1:
        work(0)
        return
    for done in _pool(threads, os.getpid()).map(work, range(threads)):
        assert done is None


def even_parts(total: int, most: int) -> list[int]:
    """Few nearly equal parts of ``total``, none above ``most``, as many for every thread."""
    threads = torch.get_num_threads()
    parts = -(-total // most)
    parts = min(total, -(-parts // threads) * threads)
    return [total // parts + (index < total % parts) for index in range(parts)]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that each compute alone; one pool per process, threads do not survive a fork."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=f"strips-{process}")
    barrier = Barrier(threads)

    def compute_alone(_: int) -> None:
        torch.get_num_threads()  # a thread takes over the common setting at its first use: now
        barrier.wait()  # so that every thread of the pool takes one of these calls
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    list(pool.map(compute_alone, range(threads)))
    torch.set_num_threads(before)  # the setting is per thread, but new threads take over the last
    return pool
