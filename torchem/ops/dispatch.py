"""How large a piece and in which precision: pure functions of shapes, dtype and device type."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

#: Bytes of one piece. On CPU what the caches of a few cores hold, so that a piece's features are still there when its
#: moments are taken; on an accelerator enough to fill it.
PIECE = {"cpu": 8 << 20, "cuda": 256 << 20}


def rows_per_piece(row_bytes: int, device: torch.device, budget: int | None = None) -> int:
    """Number of rows of a piece: the largest power of two within the budget, between 128 and 2^20.

    Example:
        >>> rows_per_piece(1024, torch.device("cpu"))
        8192
    """
    budget = PIECE.get(device.type, PIECE["cuda"]) if budget is None else budget
    rows = max(1, budget // max(1, row_bytes))
    return min(max(1 << (rows.bit_length() - 1), 128), 1 << 20)


#: Numbers touched per pass below which waking a second thread costs more than it does.
_ONE_THREAD = 1 << 18
#: Threads that compiled kernels may use while torch has one; None where they may use as many as torch.
_kernel_threads: ContextVar[int | None] = ContextVar("_kernel_threads", default=None)


@contextmanager
def fitting_threads(numbers: int, device: torch.device) -> Iterator[None]:
    """Compute on one thread while a pass is tiny; the number of threads is left as found."""
    with _one_thread(device.type == "cpu" and numbers <= _ONE_THREAD):
        yield


@contextmanager
def threads_for_kernels(wanted: bool) -> Iterator[None]:
    """Leave the cores to the threads of compiled kernels: torch computes on one; the number is left as found.

    After each parallel loop OpenMP's threads wait actively, for milliseconds, on the cores that a kernel which follows
    needs. That costs more than they are worth where torch has little to do.
    """
    token = _kernel_threads.set(kernel_threads() if wanted else None)
    try:
        with _one_thread(wanted):
            yield
    finally:
        _kernel_threads.reset(token)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    threads = torch.get_num_threads()
    if not wanted or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def kernel_threads() -> int:
    """How many threads a compiled kernel may use."""
    return _kernel_threads.get() or torch.get_num_threads()


@contextmanager
def declared_precision(device: torch.device) -> Iterator[None]:
    """Compute in the dtype that parameters declare, whatever autocast and TF32 or bfloat16 settings the user has.

    Likelihoods and second moments do not survive ten bits of mantissa. The settings are left as found.
    """
    if torch.compiler.is_compiling():
        yield
        return
    setting = torch.get_float32_matmul_precision()
    autocast = torch.is_autocast_enabled(device.type)
    if setting != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        if autocast:
            with torch.autocast(device.type, enabled=False):
                yield
        else:
            yield
    finally:
        if setting != "highest":
            torch.set_float32_matmul_precision(setting)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what one pass frees for the next, which else faults every page of it in anew.

    Freeing a block raises the sizes above which glibc maps blocks apart and gives memory back to the system to that of
    the block and twice that, up to these 32 MiB: what any program has done that once freed a tensor as large. The block
    is never touched. Elsewhere nothing happens.

    Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    torch.empty((32 << 20) - (8 << 10), dtype=torch.uint8)


#: Cost of one step of a sweep over time (its few kernel calls), in seconds, and operations per second beside that.
_STEP = {"cpu": (1e-5, 4e9), "cuda": (3e-5, 2e12)}
#: Numbers of all blocks' transfer matrices together: on CPU what stays in a core's own cache from step to step.
_TRANSFERS = {"cpu": 1 << 16, "cuda": 1 << 26}


def time_blocks(sequences: int, frames: int, states: int, device: torch.device) -> int:
    """Number of blocks, a power of two, that a chain's frames are cut into, by the estimated cost of sweeping them.

    Example:
        >>> time_blocks(1, 50_000, 8, torch.device("cpu")) > 1, time_blocks(1000, 100, 4, torch.device("cpu"))
        (True, 1)
    """
    call, rate = _STEP.get(device.type, _STEP["cuda"])
    room = _TRANSFERS.get(device.type, _TRANSFERS["cuda"]) // max(1, sequences * states**2)
    most = min(max(1, frames), max(1, room)).bit_length()

    def cost(i: int) -> float:
        blocks = 1 << i
        size = -(-frames // blocks)
        sweep = size * (call + 2 * sequences * blocks * states**2 / rate)
        if blocks == 1:
            return 2 * sweep
        tree = 6 * i * call  # up and down, each level a few products and their rescaling
        return 2 * sweep + size * (call + 2 * sequences * blocks * states**3 / rate) + tree

    return 1 << min(range(most), key=cost)


def kalman_blocks(groups: int, frames: int, latents: int, device: torch.device) -> int:
    """Number of blocks that the frames of a Gauss–Markov chain are cut into, by the estimated cost of sweeping them.

    A step of any sweep is some twenty calls; two of the three sweeps over blocks cost about as much as the plain one.

    Example:
        >>> kalman_blocks(1, 100_000, 4, torch.device("cpu")) > 1, kalman_blocks(64, 500, 8, torch.device("cpu"))
        (True, 1)
    """
    call, rate = _STEP.get(device.type, _STEP["cuda"])

    def cost(blocks: int) -> float:
        size = -(-frames // blocks)
        if blocks == 1:
            return frames * (20 * call + 60 * groups * latents**3 / rate)
        step = 20 * call + 60 * groups * blocks * latents**3 / rate
        return 3 * size * step + blocks * step

    return min((1 << i for i in range(max(1, frames).bit_length() - 3 if frames > 64 else 1)), key=cost)


@cache
def _numba_kalman() -> ModuleType | None:
    return (
        import_module("torchem.ops.numba_.kalman") if find_spec("numba") and find_spec("torchem.ops.numba_") else None
    )


def compiled_kalman(device: torch.device) -> ModuleType | None:
    """The compiled recursions of Gauss–Markov chains on a device, where there are any: numba's on CPU."""
    return _numba_kalman() if device.type == "cpu" else None


@cache
def _numba_chain() -> ModuleType | None:
    return import_module("torchem.ops.numba_.chain") if find_spec("numba") and find_spec("torchem.ops.numba_") else None


def compiled_chain(device: torch.device) -> ModuleType | None:
    """The compiled kernels for chains on a device, where there are any: numba's on CPU, if it is installed.

    A fused kernel for CUDA has its place here.
    """
    return _numba_chain() if device.type == "cpu" else None


@cache
def _numba_cells() -> ModuleType | None:
    return import_module("torchem.ops.numba_.cells") if _numba_chain() else None


def compiled_cells(device: torch.device) -> ModuleType | None:
    """The compiled sums over cells of tables on a device, where there are any."""
    return _numba_cells() if device.type == "cpu" else None


@cache
def _numba_semi_markov() -> ModuleType | None:
    return import_module("torchem.ops.numba_.semi_markov") if _numba_chain() else None


def compiled_semi_markov(device: torch.device) -> ModuleType | None:
    """The compiled kernels for segments with durations on a device, where there are any."""
    return _numba_semi_markov() if device.type == "cpu" else None


#: Multiply–adds of a pass from which on a compiler is worth loading for it.
_MANY = 1 << 19


@cache
def _numba_mixture() -> ModuleType | None:
    return (
        import_module("torchem.ops.numba_.mixture") if find_spec("numba") and find_spec("torchem.ops.numba_") else None
    )


def compiled_mixture(device: torch.device, work: int) -> ModuleType | None:
    """The compiled passes of mixtures on a device, where there are any and the work is worth it."""
    return _numba_mixture() if device.type == "cpu" and work >= _MANY else None


@cache
def _numba_completed() -> ModuleType | None:
    return import_module("torchem.ops.numba_.completed") if _numba_mixture() else None


def compiled_completed(device: torch.device, work: int) -> ModuleType | None:
    """The compiled passes over rows with missing entries on a device, where there are any and the work is worth it."""
    return _numba_completed() if device.type == "cpu" and work >= _MANY else None
