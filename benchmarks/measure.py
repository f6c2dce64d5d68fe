"""What every benchmark measures with: clocks, memory, medians with their range."""

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable

import torch


def clock(call: Callable[[], object], device: str) -> float:
    """Seconds of one call, the device's queue drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(dtype: torch.dtype, device: str) -> float:
    """Floating-point operations a second of a large matrix product: the roof that the E-step is held against."""
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, dtype=dtype, device=device)
    times = [clock(lambda: a @ a, device) for _ in range(6)]
    return 2 * size**3 / min(times)


class PeakMemory:
    """Peak of resident memory above its level at entry, sampled every millisecond.

    Args:
        mapped: Whether pages of files count.
    """

    def __init__(self, mapped: bool = True):
        self.mapped = mapped

    def __enter__(self) -> "PeakMemory":
        _trim()
        self.base = self.peak = resident(self.mapped)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.001):
            self.peak = max(self.peak, resident(self.mapped))

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()
        self.extra = max(self.peak, resident(self.mapped)) - self.base


def _trim() -> None:
    """Give back what earlier work freed, else its memory is used again and goes uncounted."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def resident(mapped: bool = True) -> int:
    """Resident memory of this process, in bytes, with or without pages of files."""
    with open("/proc/self/statm") as file:
        _, pages, shared, *_ = map(int, file.read().split())
    return (pages if mapped else pages - shared) * os.sysconf("SC_PAGESIZE")


def spread(values: list[float]) -> str:
    """Median with the range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def per_iteration(run: Callable, few: int, many: int, device: str = "cpu") -> float:
    """Seconds per EM iteration: the difference of two runs, so that set-up cancels."""
    short, long = clock(lambda: run(few), device), clock(lambda: run(many), device)
    return max(long - short, 1e-9) / (many - few)
