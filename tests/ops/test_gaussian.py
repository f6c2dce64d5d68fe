"""Gaussian kernels: both routes against torch.distributions, moments against sums, and the bound on rounding."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal

from tests.laws.cases import COVARIANCE_TYPES, close, rand, randn
from torchem.ops import gaussian as ops

DIMENSIONS = range(1, 10)
every_kind = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
every_dimension = pytest.mark.parametrize("d", DIMENSIONS)


def parameters(kind: str, k: int, d: int, seed: int = 0) -> tuple[ops.Structure, Tensor, Tensor, Tensor]:
    structure = ops.STRUCTURES[kind]
    raw = 0.4 * randn(*structure.shape(k, d), seed=seed)
    raw = raw.tril() if kind in ("full", "tied") else raw
    return structure, randn(k, d, seed=seed + 1), raw, 0.5 * randn(1, d, seed=seed + 2)


def dense(structure: ops.Structure, raw: Tensor, k: int, d: int) -> Tensor:
    factor = structure.dense(raw, k, d)
    return factor @ factor.mT


def densities(structure: ops.Structure, mean: Tensor, raw: Tensor, x: Tensor) -> Tensor:
    k, d = mean.shape
    factor = structure.dense(raw, k, d)
    return MultivariateNormal(mean, scale_tril=factor).log_prob(x.unsqueeze(1)).mT


@every_kind
@every_dimension
def test_both_routes_are_the_log_density(kind: str, d: int) -> None:
    structure, mean, raw, origin = parameters(kind, 3, d)
    x = 2 * randn(11, d, seed=9)
    truth = densities(structure, mean, raw, x)
    for route in (ops.FeaturesPass, ops.DirectPass):
        close(route(structure, mean, raw, origin).log_prob(x), truth, rtol=1e-11, atol=1e-10)


@every_kind
@every_dimension
def test_features_have_the_declared_number_of_rows(kind: str, d: int) -> None:
    structure, mean, raw, origin = parameters(kind, 2, d)
    z = ops.augment(randn(5, d), origin)
    assert z.shape == (d + 1, 5)
    assert structure.features(z).shape == (structure.n_features(d), 5)
    assert structure.coefficients(mean - origin, raw).shape == (2, structure.n_features(d))


@every_dimension
def test_full_features_hold_each_pair_once(d: int) -> None:
    """Cyclic shifts: p(p + 1)/2 distinct pairs, and p/2 repeated where p is even."""
    z = torch.cat([torch.ones(1, 1), torch.tensor([[float(q)] for q in (2, 3, 5, 7, 11, 13, 17, 19, 23)[:d]])]).double()
    found = ops.Full().features(z).reshape(-1).tolist()
    pairs = {float(a * b) for a in z.reshape(-1) for b in z.reshape(-1)}
    assert set(found) == pairs
    p = d + 1
    assert len(found) == p * (p + 1) // 2 + (p // 2 if p % 2 == 0 else 0)


@every_kind
@every_dimension
def test_moments_of_both_routes_are_weighted_sums(kind: str, d: int) -> None:
    structure, mean, raw, origin = parameters(kind, 3, d)
    x, weight = 2 * randn(13, d, seed=4), rand(3, 13, seed=5)
    gap = x - origin
    second = torch.einsum("kn,ni,nj->kij", weight, gap, gap)
    truth = {
        "full": second,
        "tied": second.sum(0),
        "diag": second.diagonal(dim1=-2, dim2=-1),
        "spherical": second.diagonal(dim1=-2, dim2=-1).sum(-1),
    }[kind]
    for route in (ops.FeaturesPass, ops.DirectPass):
        sweep = route(structure, mean, raw, origin)
        for rows in (slice(0, 6), slice(6, None)):
            sweep.log_prob(x[rows])
            sweep.collect(weight[:, rows])
        found = sweep.moments()
        assert all(leaf.dtype == torch.float64 for leaf in found)
        close(found[0], weight.sum(-1))
        close(found[1], weight @ gap)
        close(found[2], truth)


@every_kind
def test_no_rows(kind: str) -> None:
    structure, mean, raw, origin = parameters(kind, 2, 3)
    for route in (ops.FeaturesPass, ops.DirectPass):
        sweep = route(structure, mean, raw, origin)
        assert sweep.log_prob(torch.zeros(0, 3, dtype=torch.float64)).shape == (2, 0)
        sweep.collect(torch.zeros(2, 0, dtype=torch.float64))
        assert all((leaf == 0).all() for leaf in sweep.moments())


@every_kind
@every_dimension
def test_structure_is_consistent(kind: str, d: int) -> None:
    """Coordinates, covariances, determinants, traces and variances all speak of the same matrices."""
    k = 3
    structure, _, raw, _ = parameters(kind, k, d)
    factor = structure.dense(raw, k, d)
    dense = factor @ factor.mT
    covariances = structure.covariances(raw)
    assert covariances.shape == structure.shape(k, d)
    close(structure.covariances(structure.raw(covariances)), covariances)
    close(structure.log_det(raw, k, d).expand(k), dense.logdet())
    close(structure.variances(raw, k, d), dense.diagonal(dim1=-2, dim2=-1))
    assert structure.n_parameters(k, d) == {"full": k * d * (d + 1) // 2, "tied": d * (d + 1) // 2, "diag": k * d}.get(
        kind, k
    )
    unit = torch.ones(d, dtype=torch.float64)
    close(structure.smallest(covariances, unit, k), torch.linalg.eigvalsh(dense)[..., 0], rtol=1e-8)
    lifted = structure.add(covariances, 0.7)
    lifted_factor = structure.dense(structure.raw(lifted), k, d)
    close(lifted_factor @ lifted_factor.mT, dense + 0.7 * torch.eye(d, dtype=torch.float64), rtol=1e-8)


@every_kind
def test_estimate_about_any_origin_is_the_covariance(kind: str) -> None:
    """Moments about an origin, moved to the means, are the scatter; trace closes Q."""
    k, d = 3, 4
    structure, mean, raw, origin = parameters(kind, k, d)
    x, weight = randn(50, d, seed=4), rand(k, 50, seed=5)
    sweep = ops.DirectPass(structure, mean, raw, origin)
    sweep.log_prob(x)
    sweep.collect(weight)
    count, first, second = sweep.moments()
    gap = x - mean.unsqueeze(-2)
    scatter = torch.einsum("kn,kni,knj->kij", weight, gap, gap)
    counts = structure.counts(count, d)
    found = structure.scatter(counts, first, second, mean - origin)
    variances = scatter.diagonal(dim1=-2, dim2=-1)
    truth = {"full": scatter, "tied": scatter.sum(0), "diag": variances, "spherical": variances.sum(-1)}[kind]
    close(found, truth)
    factor = structure.dense(raw, k, d)
    precision = torch.cholesky_inverse(factor)
    close(structure.trace(raw, found), (precision * scatter).sum())
    shares = structure.estimate(found, count, d)
    close(structure.divided(found, structure.mass(counts)), shares, rtol=1e-14, atol=0)
    close(
        structure.normalizer(counts, raw, k, d),
        (count * (dense(structure, raw, k, d).logdet() + d * ops.LOG_2PI)).sum(),
    )
    per = count[:, None, None]
    estimates = {"full": scatter / per, "tied": scatter.sum(0) / count.sum(), "diag": variances / count[:, None]}
    close(shares, estimates.get(kind, variances.sum(-1) / count / d))


@every_kind
def test_clip_is_at_the_floor_in_the_data_s_own_units(kind: str) -> None:
    k, d = 2, 3
    structure = ops.STRUCTURES[kind]
    unit = torch.tensor([1e-4, 1.0, 1e4], dtype=torch.float64)
    _, _, raw, _ = parameters(kind, k, d)
    healthy = structure.covariances(raw)
    tiny = healthy * 1e-12
    clipped = structure.clip(tiny, unit, 1e-3)
    least = structure.smallest(clipped, unit, k)
    close(least, torch.full_like(least, 1e-3), rtol=1e-6, atol=0)
    if kind in ("full", "tied", "diag"):
        scale = unit if kind == "diag" else unit.sqrt().unsqueeze(-1) * unit.sqrt()
        assert torch.equal(structure.clip(healthy * scale, unit, 1e-9), healthy * scale) or kind != "diag"
        close(structure.clip(healthy * scale, unit, 1e-9), healthy * scale, rtol=1e-12, atol=0)


# ---- rounding -----------------------------------------------------------------------------------------------------


def observed_error(
    structure: ops.Structure, mean: Tensor, raw: Tensor, origin: Tensor, x: Tensor
) -> tuple[float, float]:
    """Largest error of the features route in float32 against differences in float64, and the bound on it."""
    low = [t.float() for t in (mean, raw, origin, x)]
    exact = [t.double() for t in low]
    found = ops.FeaturesPass(structure, *low[:3]).log_prob(low[3]).double()
    truth = ops.DirectPass(structure, *exact[:3]).log_prob(exact[3])
    bound = float(ops.rounding(structure, low[0], low[1], low[2]))
    return float((found - truth).abs().max()), bound


@every_kind
@given(
    d=st.integers(1, 9),
    shift=st.sampled_from([0.0, 1.0, 10.0, 100.0, 1e3]),
    spread=st.sampled_from([0.1, 1.0, 2.5]),
    seed=st.integers(0, 10_000),
)
def test_rounding_bounds_the_error_of_the_features_route(
    kind: str, d: int, shift: float, spread: float, seed: int
) -> None:
    """For points within three standard deviations of their mean, however ill conditioned the covariance."""
    k = 3
    structure = ops.STRUCTURES[kind]
    raw = spread * randn(*structure.shape(k, d), seed=seed)
    raw = raw.tril() if kind in ("full", "tied") else raw
    mean, origin = shift * randn(k, d, seed=seed + 1), torch.zeros(1, d, dtype=torch.float64)
    factor = structure.dense(raw, k, d)
    noise = randn(40, d, seed=seed + 2)
    noise = noise / noise.norm(dim=-1, keepdim=True) * 3 * rand(40, 1, seed=seed + 3)
    for j in range(k):  # the bound speaks of each component near itself
        one = (structure, mean[j : j + 1], raw if kind == "tied" else raw[j : j + 1], origin)
        error, bound = observed_error(*one, mean[j] + noise @ factor[j].mT)
        # Values themselves are rounded once more on output.
        assert error <= bound + 1e-6 * (1 + d)


@every_kind
def test_rounding_is_not_wildly_pessimistic(kind: str) -> None:
    """A bound that is always large would never let the fast route run."""
    d = 8
    structure, mean, raw, origin = parameters(kind, 4, d)
    factor = structure.dense(raw, 4, d)
    x = mean[0] + randn(2000, d, seed=3) @ factor[0].mT
    error, bound = observed_error(structure, mean, raw, origin, x)
    assert bound <= 1e3 * max(error, 1e-6)
    assert bound < 2e-3


@every_kind
def test_tight_clusters_far_apart_are_seen(kind: str) -> None:
    structure = ops.STRUCTURES[kind]
    raw = torch.full(structure.shape(2, 2), 0.0)
    raw = (
        raw.diagonal_scatter(torch.full((*raw.shape[:-2], 2), math.log(1e-4)), 0, -2, -1)
        if kind in ("full", "tied")
        else raw + math.log(1e-4)
    )
    mean = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert float(ops.rounding(structure, mean, raw, torch.zeros(1, 2))) > 1.0
    assert float(ops.spread(structure, mean, raw, torch.zeros(1, 2))) == pytest.approx(1e4, rel=1e-5)
    assert float(ops.spread(structure, mean, raw, mean)) == 0.0
