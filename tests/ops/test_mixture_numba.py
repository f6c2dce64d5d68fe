"""The compiled passes of mixtures, against products and softmax written out."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from torchem.ops import dispatch, gaussian, missing, threads
from torchem.ops.numba_ import mixture, vectors

DOUBLE = torch.float64


def expected(x: Tensor, weight: Tensor | None, slope: Tensor, constant: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    joint = torch.einsum("nd,rkd->rnk", x, slope) + constant.unsqueeze(-2)
    weight = torch.ones(len(x), dtype=DOUBLE) if weight is None else weight
    share = torch.where(joint.isneginf().all(-1, keepdim=True), 0.0, joint.softmax(-1)) * weight.unsqueeze(-1)
    log_z = torch.where(weight > 0, joint.logsumexp(-1), 0.0) * weight
    return log_z.sum(-1), share.sum(1), torch.einsum("rnk,nd->rkd", share, x)


def tables(r: int, k: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    slope = torch.randn(r, k, d, dtype=DOUBLE, generator=generator)
    constant = 3 * torch.randn(r, k, dtype=DOUBLE, generator=generator)
    if k > 2:
        constant[:, 1] = -torch.inf
    return slope, constant


def agree(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


# Vectors hold four or eight components, tiles four of them and four rows or columns, blocks 32 rows.
@pytest.mark.parametrize("n", [1, 31, 33, 200])
@pytest.mark.parametrize(("d", "k", "r"), [(1, 1, 1), (4, 3, 2), (5, 8, 1), (7, 33, 2), (16, 40, 1), (3, 70, 1)])
def test_numbers(n: int, d: int, k: int, r: int) -> None:
    generator = torch.Generator().manual_seed(n + d)
    x = torch.poisson(torch.full((n, d), 2.0, dtype=DOUBLE), generator=generator)
    slope, constant = tables(r, k, d, generator)
    weight = torch.rand(n, dtype=DOUBLE, generator=generator) if n % 2 else None
    wanted = expected(x, weight, slope, constant)
    for dtype in (torch.float64, torch.float32, torch.int64):
        agree(mixture.of_numbers(x.to(dtype), weight, slope, constant), wanted)


@pytest.mark.parametrize("n", [1, 50])
@pytest.mark.parametrize(("sizes", "k", "r"), [([1], 1, 1), ([2, 3, 4], 9, 2), ([4] * 20, 40, 1)])
def test_categories(n: int, sizes: list[int], k: int, r: int) -> None:
    generator = torch.Generator().manual_seed(n)
    codes = torch.stack([torch.randint(0, size, (n,), generator=generator) for size in sizes], -1).to(torch.uint8)
    codes[torch.rand(codes.shape, generator=generator) < 0.2] = mixture.NONE
    slope, constant = tables(r, k, sum(sizes), generator)
    starts = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    columns = [(codes[:, d] == j).double() for d, size in enumerate(sizes) for j in range(size)]
    weight = torch.rand(n, dtype=DOUBLE, generator=generator) if n > 1 else None
    wanted = expected(torch.stack(columns, -1), weight, slope, constant)
    agree(mixture.of_categories(codes, starts, weight, slope, constant), wanted)


def test_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, (slope, constant) = torch.rand(1000, 6, dtype=DOUBLE, generator=generator), tables(2, 5, 6, generator)
    wanted = mixture.of_numbers(x, None, slope, constant)
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "TASK", 1)
    torch.set_num_threads(3)
    try:
        agree(mixture.of_numbers(x, None, slope, constant), wanted)
    finally:
        torch.set_num_threads(before)


def test_rows_that_nothing_explains_and_rows_that_nobody_counts() -> None:
    slope, constant = torch.zeros(1, 3, 2, dtype=DOUBLE), torch.full((1, 3), -torch.inf, dtype=DOUBLE)
    x = torch.ones(5, 2, dtype=DOUBLE)
    value, mass, total = mixture.of_numbers(x, None, slope, constant)
    assert value.item() == -torch.inf
    assert not mass.any()
    assert not total.any()
    value, mass, _ = mixture.of_numbers(x, torch.zeros(5, dtype=DOUBLE), slope, constant)
    assert value.item() == 0
    assert not mass.any()


@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_not_finite_stays_visible(weighted: bool) -> None:
    slope, constant = torch.full((1, 3, 2), torch.nan, dtype=DOUBLE), torch.zeros(1, 3, dtype=DOUBLE)
    weight = torch.ones(5, dtype=DOUBLE) if weighted else None
    value, mass, _ = mixture.of_numbers(torch.ones(5, 2, dtype=DOUBLE), weight, slope, constant)
    assert value.isnan().all()
    assert mass.isnan().all()


def test_far_from_the_origin_of_logs() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(300, 2, dtype=DOUBLE, generator=generator)
    slope, constant = tables(1, 6, 2, generator)
    for shift in (-1e4, 1e4):
        wanted = expected(x, None, 300 * slope, constant + shift)
        found = mixture.of_numbers(x, None, 300 * slope, constant + shift)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-13, atol=0)
        agree(found[1:], wanted[1:])


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("name", ["full", "diag", "spherical"])
def test_features(name: str, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    structure = gaussian.STRUCTURES[name]
    x, origin = (torch.randn(n, d, dtype=DOUBLE, generator=generator) for n in (70, 1))
    t = structure.features(gaussian.augment(x, origin)).mT
    slope = torch.randn(1, 9, t.shape[-1], dtype=DOUBLE, generator=generator)
    constant = torch.randn(1, 9, dtype=DOUBLE, generator=generator)
    wanted = expected(t, None, slope, constant)
    assert structure.compiled is not None
    kind = getattr(mixture, structure.compiled)
    if name == "full":
        agree(mixture.of_numbers(x, None, slope, constant, kind, origin[0]), wanted)
        return
    # The first feature is a constant one, left to what is added.
    found = mixture.of_numbers(x, None, slope[..., 1:], constant + slope[..., 0], kind, origin[0])
    agree((found[0], found[1], torch.cat([found[1].unsqueeze(-1), found[2]], -1)), wanted)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "n", "k", "r"), [("full", 70, 9, 2), ("diag", 31, 1, 1), ("spherical", 33, 40, 1)])
def test_distances(name: str, n: int, k: int, r: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    structure, d = gaussian.STRUCTURES[name], 3
    x, mean = (torch.randn(m, d, dtype=DOUBLE, generator=generator) for m in (n, r * k))
    x[::7] *= 1e4  # far out, where r is nearly one
    mean, origin = mean.view(r, k, d), torch.zeros(1, d, dtype=DOUBLE)
    raw = torch.randn(r, *structure.shape(k, d), dtype=DOUBLE, generator=generator) / 3
    raw = raw.tril() if name == "full" else raw
    freedom = (10 * torch.rand(r, k, dtype=DOUBLE, generator=generator)).exp()
    constant = torch.randn(r, k, dtype=DOUBLE, generator=generator)
    weight = torch.rand(n, dtype=DOUBLE, generator=generator) if weighted else None
    distance = structure.distance(x - mean.unsqueeze(-2), structure.root(raw)).mT
    t = structure.features(gaussian.augment(x, origin)).mT
    freedom_ = freedom.unsqueeze(-2)
    scale, beyond, ratio = (
        (freedom_ + d) / (freedom_ + distance), (distance / freedom_).log1p(), distance / (freedom_ + distance)
    )  # fmt: skip
    joint = constant.unsqueeze(-2) - (freedom_ + d) / 2 * beyond
    counted = torch.ones(n, dtype=DOUBLE) if weight is None else weight
    share = joint.softmax(-1) * counted.unsqueeze(-1)
    sums = [share * v for v in (torch.ones_like(scale), scale, beyond, ratio, ratio.square(), ratio**3)]
    wanted = (
        (joint.logsumexp(-1) * counted).sum(-1), torch.stack([v.sum(1) for v in sums], 1),
        torch.einsum("rnk,nf->rkf", share * scale, t),
    )  # fmt: skip
    slope = -2 * structure.coefficients(mean - origin, raw)
    offset = -structure.log_det(raw, k, d) - d * gaussian.LOG_2PI
    assert structure.compiled is not None
    kind = getattr(mixture, structure.compiled)
    if name != "full":
        slope, offset = slope[..., 1:], offset + slope[..., 0]
    found = mixture.of_distances(x, weight, slope, offset, freedom, constant, kind, origin[0])
    total = found[2] if name == "full" else torch.cat([found[1][:, 1].unsqueeze(-1), found[2]], -1)
    for a, b in zip((found[0], found[1], total), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_distances_that_overflow_and_that_are_not_numbers() -> None:
    slope, zero = torch.full((1, 3, 1), 1e10, dtype=DOUBLE), torch.zeros(1, 3, dtype=DOUBLE)
    for number, seen in ((1e300, torch.tensor([1.0, 0.0])), (torch.nan, torch.tensor([torch.nan] * 2))):
        x = torch.tensor([[number]], dtype=DOUBLE)
        _, sums, _ = mixture.of_distances(x, None, slope, zero, zero + 2, zero, mixture.NUMBERS, zero[0, :1])
        # All three alike: r of one where the distance is beyond all numbers, and no weight.
        torch.testing.assert_close(sums[0, [3, 1]].sum(-1), seen.double(), equal_nan=True, atol=1e-12, rtol=0)
    near = mixture.of_distances(-torch.ones(1, 1, dtype=DOUBLE), None, slope, zero, zero + 2, zero, 0, zero[0, :1])
    assert not near[1][0, 2:].any()  # rounding below zero is none


def test_log1p_to_the_last_digits() -> None:
    def logs(x, out):
        for j in range(0, len(x), vectors.WIDE):
            vectors.store(out, j, vectors.log1p(vectors.load_wide(x, j)))

    x = torch.cat([
        torch.tensor([0.0, 1e300, 1e-300, 5e-324, 1.0, 2**0.5 - 1, 2.0**53, torch.nan], dtype=DOUBLE),
        torch.logspace(-20, 20, 4096, dtype=DOUBLE), torch.linspace(0, 4, 4096, dtype=DOUBLE),
    ])  # fmt: skip
    out = torch.empty_like(x)
    vectors.kernel(logs)(x.numpy(), out.numpy())
    torch.testing.assert_close(out, x.log1p(), rtol=5e-16, atol=0, equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "k", "lead"), [("diag", 9, ()), ("spherical", 3, (2,))])
def test_entries_that_are_missing(name: str, k: int, lead: tuple[int, ...], weighted: bool) -> None:
    generator, d, n = torch.Generator().manual_seed(k), 5, 70
    structure = gaussian.STRUCTURES[name]
    mean = torch.randn(*lead, k, d, dtype=DOUBLE, generator=generator)
    raw = torch.randn(*lead, *structure.shape(k, d), dtype=DOUBLE, generator=generator) / 3
    x, origin = (torch.randn(m, d, dtype=DOUBLE, generator=generator) for m in (n, 1))
    x[torch.rand(n, d, generator=generator) < 0.4], x[3] = torch.nan, torch.nan
    weight = torch.rand(n, dtype=DOUBLE, generator=generator) if weighted else None
    log_weight = torch.randn(*lead, k, dtype=DOUBLE, generator=generator)
    plain, whole = (missing.EntryFeaturesPass(structure, mean, raw, origin) for _ in range(2))  # pyright: ignore[reportArgumentType]
    joint = plain.log_prob(x) + log_weight.unsqueeze(-1)
    counts = torch.ones(n, dtype=DOUBLE) if weight is None else weight
    share = joint.softmax(-2) * counts
    plain.collect(share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian, "_FEW", 1)
        patch.setattr(dispatch, "_MANY", 0)
        found = whole.mixed(x, weight, log_weight)
    assert found is not None
    agree((*found, *whole.moments()), (joint.logsumexp(-2) @ counts, share.sum(-1), *plain.moments()))
