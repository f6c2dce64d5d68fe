"""The compiled passes over rows with missing entries, against those that tensors make."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from torchem.ops import dispatch, gaussian, missing, threads
from torchem.ops.numba_ import completed

DOUBLE = torch.float64
#: Rows, columns, components and replicas: blocks hold eight rows, vectors four or eight components, tiles four columns.
SHAPES = [(1, 1, 1, ()), (30, 3, 3, ()), (67, 5, 9, (2,)), (40, 8, 17, ()), (33, 10, 2, (2, 3))]


def law(name: str, d: int, k: int, lead: tuple[int, ...]) -> tuple[Any, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(d + k)
    structure = gaussian.STRUCTURES[name]
    shape = (*lead, *structure.shape(k, d))
    raw = (0.4 * torch.randn(shape, generator=generator, dtype=DOUBLE)).tril()
    mean = 3 * torch.randn(*lead, k, d, generator=generator, dtype=DOUBLE)
    return structure, mean, raw, torch.randn(1, d, generator=generator, dtype=DOUBLE)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Some complete, some wholly missing, some patterns more than once in a row."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, d, generator=generator, dtype=DOUBLE)
    x[torch.rand(n, d, generator=generator) < 0.4] = torch.nan
    x[n // 4 : n // 3] = torch.where(x[n // 4].isnan(), torch.nan, x[n // 4] + torch.arange(n // 3 - n // 4)[:, None])
    x[1::11] = torch.randn(len(x[1::11]), d, generator=generator, dtype=DOUBLE)
    x[2::13] = torch.nan
    return x


def both(name: str, d: int, k: int, lead: tuple[int, ...]) -> tuple[Any, missing.CompiledPass]:
    given = law(name, d, k, lead)
    return missing.CompletedPass(*given), missing.CompiledPass(completed, *given)


def agree(found: Any, wanted: Any, tolerance: float = 1e-11) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["full", "tied"])
@pytest.mark.parametrize(("n", "d", "k", "lead"), SHAPES)
@pytest.mark.parametrize("least", [0.0, 1e9])
def test_densities_and_moments(
    name: str, n: int, d: int, k: int, lead: tuple[int, ...], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(missing, "_WORTH_SORTING", least)
    plain, loops = both(name, d, k, lead)
    generator = torch.Generator().manual_seed(1)
    for piece in range(2):
        x = rows(n, d, piece)
        weight, left = (torch.rand(*lead, k, n, generator=generator, dtype=DOUBLE) for _ in range(2))
        weight[..., 0, ::3] = 0
        agree([loops.log_prob(x)], [plain.log_prob(x)])
        for sweep in (plain, loops):
            sweep.collect(weight, left if piece else None)
    agree([loops.inner(), *loops.moments()], [plain.inner(), *plain.moments()])


@pytest.mark.parametrize("name", ["full", "tied"])
@pytest.mark.parametrize(("n", "d", "k", "lead"), SHAPES)
def test_whole_passes_of_mixtures(name: str, n: int, d: int, k: int, lead: tuple[int, ...]) -> None:
    plain, loops = both(name, d, k, lead)
    x, generator = rows(n, d), torch.Generator().manual_seed(2)
    log_weight = torch.randn(*lead, k, generator=generator, dtype=DOUBLE).log_softmax(-1)
    if k > 2:
        log_weight[..., 1] = -torch.inf
    for weight in (None, torch.rand(n, generator=generator, dtype=DOUBLE)):
        counts = torch.ones(n, dtype=DOUBLE) if weight is None else weight
        joint = plain.log_prob(x) + log_weight.unsqueeze(-1)
        share = joint.softmax(-2) * counts
        plain.collect(share)
        value, mass = loops.mixed(x, weight, log_weight)
        agree([value, mass], [joint.logsumexp(-2) @ counts, share.sum(-1)])
    agree([loops.inner(), *loops.moments()], [plain.inner(), *plain.moments()])


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found, x, before = [], rows(500, 4), torch.get_num_threads()
    monkeypatch.setattr(threads, "TASK", 1)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            _, loops = both("full", 4, 9, ())
            loops.log_prob(x)
            loops.collect(torch.rand(9, 500, generator=torch.Generator().manual_seed(0), dtype=DOUBLE))
            value = loops.mixed(x, None, torch.zeros(9, dtype=DOUBLE))
            found.append([*value, loops.inner(), *loops.moments()])
    finally:
        torch.set_num_threads(before)
    agree(*found)


def test_what_is_no_covariance_is_seen() -> None:
    one = torch.eye(3, dtype=DOUBLE).expand(2, 3, 3).clone()
    one[1, 0, 1] = one[1, 1, 0] = 1.5  # of two negative pivots, or one, no logarithm may be had
    one[1, 0, 2] = one[1, 2, 0] = one[1, 1, 2] = one[1, 2, 1] = 1.5
    zero, unit = torch.zeros(2, 3, dtype=DOUBLE), torch.ones(2, 3, dtype=DOUBLE)
    for holes in ([0, 1], [0, 1, 2]):
        x = torch.zeros(1, 4, dtype=DOUBLE)
        x[:, holes] = torch.nan
        loops = completed.Rows(*wider(zero, unit, one))
        value, _ = loops.densities(x, torch.arange(1))
        assert value[0].isfinite().all()
        assert value[1].isnan().all()


def wider(zero: Tensor, unit: Tensor, matrix: Tensor) -> list[Tensor]:
    """With a fourth column, which is observed and stands apart."""
    matrix = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    matrix[:, 3, 3] = 1
    zero, unit = (torch.nn.functional.pad(v, (0, 1), value=fill) for v, fill in ((zero, 0.0), (unit, 1.0)))
    return [zero, unit, zero, zero, zero[:, 0], matrix, matrix]


def test_many_missing_columns_of_nearly_no_variance() -> None:
    """Products of pivots stay within the range of numbers."""
    d, generator = 40, torch.Generator().manual_seed(0)
    structure = gaussian.STRUCTURES["full"]
    factor = torch.randn(1, d, 3, generator=generator, dtype=DOUBLE)
    raw = structure.raw(factor @ factor.mT + 1e-7 * torch.eye(d, dtype=DOUBLE))
    mean = torch.zeros(1, d, dtype=DOUBLE)
    plain, loops = (build(structure, mean, raw, mean) for build in (missing.CompletedPass, _compiled))
    x = (factor @ torch.randn(1, 3, 50, generator=generator, dtype=DOUBLE)).mT[0]
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.7, torch.nan)
    wanted = plain.log_prob(x)
    torch.testing.assert_close(loops.log_prob(x), wanted, rtol=1e-7, atol=1e-6)


def _compiled(*given: Any) -> missing.CompiledPass:
    return missing.CompiledPass(completed, *given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_and_strides(dtype: torch.dtype) -> None:
    given = [value.to(dtype) if isinstance(value, Tensor) else value for value in law("full", 3, 4, ())]
    x = rows(20, 6).to(dtype)[:, ::2]
    value = _compiled(*given).log_prob(x)
    assert value.dtype == dtype
    wanted = missing.CompletedPass(*given).log_prob(x)
    torch.testing.assert_close(value, wanted, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-4)


@pytest.mark.parametrize(
    ("watch", "wanted"), [(lambda x: x, True), (lambda x: x.requires_grad_(), False)], ids=["plain", "followed"]
)
def test_where_they_are_taken(watch: Callable[[Tensor], Tensor], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MANY", 0)
    sweep = missing.Pass(*law("full", 3, 4, ()), True)
    sweep.log_prob(watch(rows(20, 3)))
    assert isinstance(sweep.incomplete, missing.CompiledPass) == wanted
    assert missing.Pass(*law("full", 3, 4, ()), True).mixed(rows(20, 3), None, torch.zeros(4), True) is not None
    # Few components of complete rows go the other way.
    assert missing.Pass(*law("full", 3, 1, ()), True).mixed(rows(20, 3)[1:2], None, torch.zeros(1), False) is None
