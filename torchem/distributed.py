"""EM over several processes: each holds a shard of the data, all hold the same parameters.

Statistics are additive, so one sum of one flat buffer per M-step is all the communication there is. Start the processes
with ``torchrun`` and initialise ``torch.distributed``; `torchem.fit` then does the rest.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchem import errors
from torchem.stats import Stats


def active() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if active() else 0


def all_reduce(stats: Stats) -> Stats:
    """The sum of every process's statistics, the same on each; a no-op when alone."""
    if not active():
        return stats
    flat = stats.flatten().contiguous()
    dist.all_reduce(flat)
    return stats.unflatten(flat)


def agree(error: BaseException | None = None) -> None:
    """Make the failure of one process the failure of all, before a collective that the others would wait in.

    Every process calls this once for each of its collectives, with what stopped it or with nothing.

    Raises:
        BaseException: ``error`` where it happened; elsewhere the same kind with the rank's name, or `KeyboardInterrupt`
            if that is all that happened.
    """
    if not active():
        if error is not None:
            raise error
        return
    code = 0 if error is None else 1 if isinstance(error, KeyboardInterrupt) else 2
    # The backend decides where the flag has to lie.
    flag = torch.tensor([code], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if int(flag) == 1:
        raise KeyboardInterrupt
    if int(flag) == 2:
        failures = gather(None if code != 2 else (type(error).__name__, str(error)))
        if code == 2 and error is not None:
            raise error
        place, (kind, message) = next((r, f) for r, f in enumerate(failures) if f is not None)
        known = getattr(errors, kind, RuntimeError)
        raise known(f"rank {place}: {message}")


def gather(value: Any) -> list[Any]:
    """One small picklable value from each process, in the order of ranks, on all of them."""
    if not active():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(module: nn.Module) -> None:
    """Give every process the parameters of rank 0."""
    if not active():
        return
    for tensor in module.state_dict().values():
        if isinstance(tensor, Tensor):
            # Booleans travel as bytes: not every backend reduces them.
            wire = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
            dist.broadcast(wire, 0)
            tensor.copy_(wire.to(tensor.dtype))
