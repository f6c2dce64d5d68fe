"""Threads for compiled kernels, which release the interpreter's lock."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeVar

from torchem.ops.dispatch import kernel_threads

T = TypeVar("T")
#: Multiply–adds (a tenth to a quarter of a nanosecond each) that are worth waking a thread.
TASK = 1 << 19


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="torchem")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _shared(tasks: list[Callable[[], T]], threads: int) -> list[T]:
    """Results of the tasks in their order, whoever takes them. What raises is raised when all have ended."""
    waiting = list(enumerate(tasks))[::-1]
    results: dict[int, T] = {}

    def serve() -> None:
        while True:
            try:
                place, task = waiting.pop()
            except IndexError:
                return
            results[place] = task()

    helpers = [_pool().submit(serve) for _ in range(threads - 1)]
    try:
        serve()
    except BaseException:
        waiting.clear()
        raise
    finally:
        # One that never began has nothing left to do, and waiting for it could be for ever: others may wait likewise.
        begun = [helper for helper in helpers if not helper.cancel()]
        failures = [failure for helper in begun if (failure := helper.exception()) is not None]
    if failures:
        raise failures[0]
    return [results[place] for place in range(len(tasks))]


def run(kernel: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], work: int) -> list[Any]:
    """Results of a kernel for each of some arguments, on as many threads as torch may use and the work is worth."""
    calls = [partial(kernel, *task) for task in tasks]
    return _shared(calls, min(kernel_threads(), len(calls), work // TASK))


def ranges(count: int, work: int) -> list[tuple[int, int]]:
    """Cut ``count`` items into ranges for the threads."""
    pieces = min(count, max(1, work // TASK), 4 * kernel_threads()) if kernel_threads() > 1 else 1
    edges = [count * i // pieces for i in range(pieces + 1)] if count else [0]
    return list(pairwise(edges))
