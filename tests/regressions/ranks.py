"""Run functions in several processes that talk over the loopback; bounded in time whatever goes wrong."""

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

#: Seconds after which a collective that waits for another rank gives up.
PATIENCE = 20.0
#: Seconds after which the processes are ended.
LIMIT = 60.0


@dataclass
class Outcome:
    """What a function did in one process.

    Attributes:
        value: What it returned, if it did.
        error: Name of the exception's class, if it raised.
        message: The exception's text.
        seconds: How long it took.
    """

    value: Any = None
    error: str | None = None
    message: str = ""
    seconds: float = 0.0


def run(world: int, functions: Sequence[Callable[[int, int], Any]]) -> list[list[Outcome]]:
    """Call each function as ``function(rank, world)`` in ``world`` processes, each in a process group of its own.

    Functions and what they return must be picklable. Returns one list per function, in the order of ranks.
    """
    context = multiprocessing.get_context("spawn")
    ports = _free_ports(len(functions))
    results = context.Queue()
    workers = [context.Process(target=_work, args=(r, world, ports, functions, results)) for r in range(world)]
    for worker in workers:
        worker.start()
    table: list[list[Outcome]] = [[Outcome(error="no answer")] * world for _ in functions]
    deadline = time.monotonic() + LIMIT
    try:
        for _ in range(world * len(functions)):
            place, rank, outcome = results.get(timeout=max(0.1, deadline - time.monotonic()))
            table[place] = [outcome if r == rank else old for r, old in enumerate(table[place])]
    except queue.Empty:
        pass
    finally:
        for worker in workers:
            worker.join(timeout=2)
            if worker.is_alive():
                worker.kill()
                worker.join()
    return table


def values(outcomes: list[Outcome]) -> list[Any]:
    """What all ranks returned; the first exception is shown in full."""
    for rank, outcome in enumerate(outcomes):
        assert outcome.error is None, f"rank {rank} raised {outcome.error}: {outcome.message}"
    return [outcome.value for outcome in outcomes]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _work(
    rank: int, world: int, ports: list[int], functions: Sequence[Callable[[int, int], Any]], results: Any
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for place, (port, function) in enumerate(zip(ports, functions, strict=True)):
        began = time.monotonic()
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://127.0.0.1:{port}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=PATIENCE),
            )
            outcome = Outcome(function(rank, world))
        except BaseException as error:  # noqa: BLE001  whatever it was, the test wants to see it
            text = "".join(traceback.format_exception(error)) if not str(error) else str(error)
            outcome = Outcome(error=type(error).__name__, message=text)
        outcome.seconds = time.monotonic() - began
        results.put((place, rank, outcome))
        if dist.is_initialized():
            dist.destroy_process_group()
