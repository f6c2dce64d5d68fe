"""Gaussians with missing entries: marginal densities, completed or per-entry statistics, fits, gradients.

What is expected comes from another route: `torch.distributions` on the observed columns, an EM for the incomplete
multivariate normal in NumPy, one row after the other, and closed forms where they exist.
"""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.factors.common import operations
from tests.laws import test_factor as laws
from tests.laws.cases import (
    COVARIANCE_TYPES,
    FactorCase,
    close,
    close_dict,
    close_stats,
    gaussian,
    mixture,
    rand,
    randn,
    soft,
)
from tests.regressions.common import as_users_run_it, dense, fit, healthy, largest_fall, same
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Gaussian
from torchem.model import em_map
from torchem.ops import missing as ops
from torchem.ops.gaussian import DirectPass, FeaturesPass

every_kind = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
completing = pytest.mark.parametrize("kind", ["full", "tied"])
by_entry = pytest.mark.parametrize("kind", ["diag", "spherical"])
both_routes = pytest.mark.parametrize("direct", [True, False])


def holes(x: Tensor, share: float = 0.3, seed: int = 6) -> Tensor:
    return torch.where(rand(*x.shape, seed=seed) < share, torch.nan, x)


def rows(n: int = 40, d: int = 3, share: float = 0.3) -> Tensor:
    """Missing at random, with rows that are complete, missing throughout, and observed in one column."""
    x = holes(2 * randn(n, d, seed=5) + 0.5, share)
    x[0] = torch.nan
    x[1] = randn(d, seed=8)
    x[2, 1:] = torch.nan
    x[2, 0] = 0.7
    return x


def case(kind: str, k: int = 3, d: int = 3, n: int = 40) -> FactorCase:
    return FactorCase(gaussian(k, d, kind), Batch(rows(n, d)), soft(n, k))


def normal(g: Gaussian) -> tuple[Tensor, Tensor]:
    """Means and covariance matrices of all components."""
    factor = g.structure.dense(g.scale, *g.means.shape[-2:]).detach()
    return g.means.detach(), factor @ factor.mT


def marginal(g: Gaussian, x: Tensor) -> Tensor:
    """Log-densities ``[n, K]`` of the observed columns alone, row by row."""
    mean, covariance = normal(g)
    out = torch.zeros(len(x), len(mean), dtype=torch.float64)
    for i, row in enumerate(x):
        o = ~row.isnan()
        if o.any():
            for k, (m, c) in enumerate(zip(mean, covariance, strict=True)):
                out[i, k] = MultivariateNormal(m[o], c[o][:, o]).log_prob(row[o])
    return out


def completed(g: Gaussian, row: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Conditional mean and covariance of a row under a component, from the textbook's regression."""
    mean, covariance = (value[k] for value in normal(g))
    o, m = ~row.isnan(), row.isnan()
    x, left = row.clone(), torch.zeros_like(covariance)
    slope = torch.linalg.solve(covariance[o][:, o], covariance[o][:, m]).mT
    x[m] = mean[m] + slope @ (row[o] - mean[o])
    left[m.outer(m)] = (covariance[m][:, m] - slope @ covariance[o][:, m]).flatten()
    return x, left


def reference(g: Gaussian, x: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Statistics summed row by row."""
    d, k = x.shape[-1], weight.shape[-1]
    origin = g.origin.expand(k, d)
    count = torch.zeros(k, dtype=torch.float64)
    first, second = torch.zeros(k, d, dtype=torch.float64), torch.zeros(k, d, d, dtype=torch.float64)
    entries = torch.zeros(3, k, d, dtype=torch.float64)
    for row, each in zip(x, weight, strict=True):
        if row.isnan().all():
            continue
        for j in range(k):
            full, left = completed(g, row, j)
            gap = full - origin[j]
            count[j] += each[j]
            first[j] += each[j] * gap
            second[j] += each[j] * (gap.outer(gap) + left)
            seen = torch.where(row.isnan(), 0.0, row - origin[j])
            entries[:, j] += each[j] * torch.stack([~row.isnan(), seen, seen.square()])
    kind = g.covariance_type
    if kind in ("full", "tied"):
        return {"count": count, "first": first, "second": second if kind == "full" else second.sum(0)}
    count, first, second = entries
    return {"count": count, "first": first, "second": second if kind == "diag" else second.sum(-1)}


# ---- density and statistics ---------------------------------------------------------------------------------------


@every_kind
@both_routes
@pytest.mark.parametrize(("k", "d", "n"), [(3, 4, 60), (1, 2, 20), (2, 1, 12), (1, 1, 5), (2, 45, 12)])
def test_density_is_the_marginal_and_statistics_are_expected_moments(
    kind: str, direct: bool, k: int, d: int, n: int
) -> None:
    g = gaussian(k, d, kind)
    g.scale.data *= 3 / (3 + d)
    x, weight = rows(n, d), soft(n, k)
    truth = reference(g, x, weight)
    close(g.log_prob(Batch(x)), marginal(g, x), rtol=1e-9)
    g.direct = direct
    kernel = g.kernel()
    value = kernel.log_potential(Batch(x))
    kernel.collect(Batch(x), weight)
    close(value, marginal(g, x), rtol=1e-9)
    for stats in (kernel.stats(), g.stats(Batch(x), weight)):
        assert torch.equal(stats["count"], stats["dof"])
        for name, leaf in truth.items():
            close(stats[name], leaf, rtol=1e-9, atol=1e-9)
    close(kernel.inner(), g.expected_log_prob(kernel.stats()), rtol=1e-10)


@every_kind
def test_origins_per_component(kind: str) -> None:
    g, x, weight = gaussian(3, 3, kind), rows(), soft(40, 3)
    g.origin = g.means.detach() + randn(3, 3, seed=2)
    for name, leaf in reference(g, x, weight).items():
        close(g.stats(Batch(x), weight)[name], leaf)


@every_kind
def test_statistics_move_with_the_origin(kind: str) -> None:
    g, batch, weight = gaussian(3, 3, kind), Batch(rows()), soft(40, 3)
    g.tune(40)
    before = g.stats(batch, weight)
    g.scale.data = g.structure.raw(g.covariances.detach() * 1e-6)  # means are now far from the origin, in deviations
    conditional = g.stats(batch, weight)
    adjustment = g.tune(40)
    assert adjustment is not None
    assert adjustment.move is not None
    close_stats(adjustment.move(conditional), g.stats(batch, weight), rtol=1e-8)
    assert adjustment.move(before).version == g.version


@every_kind
@both_routes
def test_a_row_missing_throughout_is_absent(kind: str, direct: bool) -> None:
    g, x, weight = gaussian(2, 3, kind), rows(20), soft(20, 2)
    nothing = torch.full((5, 3), torch.nan, dtype=torch.float64)
    more, heavier = torch.cat([x, nothing]), torch.cat([weight, soft(5, 2, seed=3)])
    g.direct = direct
    assert (g.log_prob(Batch(nothing)) == 0).all()
    close_stats(g.stats(Batch(more), heavier), g.stats(Batch(x), weight), rtol=1e-12)
    kernel = g.kernel()
    assert (kernel.log_potential(Batch(nothing)) == 0).all()
    kernel.collect(Batch(nothing), soft(5, 2))
    assert all((leaf == 0).all() for leaf in kernel.stats().leaves())
    assert kernel.inner() == 0
    for name, value in g.maximize(kernel.stats()).items():
        close(value, g.get_parameter(name), rtol=1e-12)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_missing_entries_nothing_changes(kind: str, dtype: torch.dtype) -> None:
    g, x, weight = gaussian(3, 4, kind).to(dtype), randn(50, 4, seed=5).to(dtype), soft(50, 3).to(dtype)
    for direct, route in ((True, DirectPass), (False, FeaturesPass)):
        g.direct = direct
        plain, kernel = route(g.structure, g.mean, g.scale, g.origin), g.kernel()
        assert torch.equal(kernel.log_potential(Batch(x)), plain.log_prob(x).mT)
        plain.collect(weight.mT)
        kernel.collect(Batch(x), weight)
        count, first, second = plain.moments()
        stats = kernel.stats()
        assert torch.equal(stats["count"], g.structure.counts(count, 4))
        assert torch.equal(stats["first"], first)
        assert torch.equal(stats["second"], second)
        assert torch.equal(kernel.inner(), plain.inner())


def test_finding_out_costs_one_pass_over_the_rows() -> None:
    g, batch = gaussian(3, 4, "diag"), Batch(randn(50, 4))
    names = operations(lambda: g.log_prob(batch)).names
    assert sum(name.startswith(("isnan", "isfinite")) for name in names) == 0
    assert sum(name.startswith("_local_scalar_dense") for name in names) == 1


def test_a_sum_that_overflows_is_not_a_missing_entry() -> None:
    assert not ops.any_missing(torch.full((4, 1), 1e308, dtype=torch.float64))
    assert not ops.any_missing(torch.zeros(0, 3))
    assert ops.any_missing(torch.tensor([[1e308], [1e308], [torch.nan]], dtype=torch.float64))


@every_kind
@both_routes
def test_pieces_with_and_without_missing_entries(kind: str, direct: bool) -> None:
    g, x, weight = gaussian(3, 3, kind), torch.cat([randn(10, 3), rows(30), randn(5, 3, seed=2)]), soft(45, 3)
    g.direct = direct
    kernel, parts = g.kernel(), [slice(0, 10), slice(10, 22), slice(22, 40), slice(40, 45)]
    value = []
    for part in parts:
        value.append(kernel.log_potential(Batch(x[part])))
        kernel.collect(Batch(x[part]), weight[part])
    close(torch.cat(value), g.log_prob(Batch(x)))
    close_stats(kernel.stats(), g.stats(Batch(x), weight))
    close(kernel.inner(), g.expected_log_prob(kernel.stats()))


@every_kind
def test_float32_where_features_are_accurate_enough(kind: str) -> None:
    g, x, weight = gaussian(3, 4, kind), rows(60, 4), soft(60, 3)
    exact = g.stats(Batch(x), weight)
    small = copy.deepcopy(g).float()
    small.direct = False
    kernel = small.kernel()
    value = kernel.log_potential(Batch(x.float()))
    assert value.dtype == torch.float32
    close(value.double(), g.log_prob(Batch(x)), rtol=1e-5, atol=1e-4)
    kernel.collect(Batch(x.float()), weight.float())
    stats = kernel.stats()
    assert all(leaf.dtype == torch.float64 for leaf in stats.leaves())
    close_stats(stats, exact, rtol=1e-5)


@every_kind
def test_a_mask_says_the_same_as_nan(kind: str) -> None:
    g, x, weight = gaussian(2, 3, kind), rows(20), soft(20, 2)
    masked = Batch(torch.where(x.isnan(), 1e3, x), observed=~x.isnan())
    close(g.log_prob(masked), g.log_prob(Batch(x)), rtol=0)
    close_stats(g.stats(masked, weight), g.stats(Batch(x), weight), rtol=0)


@completing
@pytest.mark.parametrize("many", [1, 10**9])
@pytest.mark.parametrize("at_once", [1, 300, 10**9])
@pytest.mark.parametrize("small", [0, 10**9])
def test_however_patterns_are_grouped_and_inverted(
    kind: str, many: int, at_once: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    g, weight = gaussian(2, 4, kind), soft(300, 2)
    x = torch.cat([rows(200, 4), torch.where(torch.tensor([True, False, False, True]), torch.nan, randn(100, 4))])
    value, stats, conditional = g.log_prob(Batch(x)), g.stats(Batch(x), weight), g.conditional(Batch(x))
    monkeypatch.setattr(ops, "_MANY", many)
    monkeypatch.setattr(ops, "_AT_ONCE", at_once)
    monkeypatch.setattr(ops, "_HELD", at_once)
    monkeypatch.setattr(ops, "_SMALL", small)
    close(g.log_prob(Batch(x)), value, rtol=1e-12)
    close_stats(g.stats(Batch(x), weight), stats, rtol=1e-12)
    for a, b in zip(g.conditional(Batch(x)), conditional, strict=True):
        close(a, b, rtol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 5, 12])
@pytest.mark.parametrize("correlation", [0.0, 0.9, 1 - 1e-8])
def test_both_inverses(m: int, correlation: float) -> None:
    """To the accuracy that the condition of the matrices allows, in both types; NaN where there is none."""
    root = randn(2, 30, m, m) * (1 - correlation) ** 0.5 + correlation
    a = root @ root.mT + 1e-9 * torch.eye(m, dtype=torch.float64)
    scale = a.diagonal(dim1=-2, dim2=-1).rsqrt()
    a = a * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    condition = torch.linalg.cond(a)
    truth, log_det = torch.linalg.inv(a), a.logdet()
    for invert in (ops._exchanged, ops._factorised):
        for dtype in (torch.float64, torch.float32):
            found, value = invert(a.movedim(-3, -1).contiguous().to(dtype))
            assert found.dtype == value.dtype == dtype
            limit = 30 * m * condition * torch.finfo(dtype).eps
            usable = limit < 0.1
            gap = torch.linalg.matrix_norm(found.movedim(-1, -3).double() - truth) / torch.linalg.matrix_norm(truth)
            assert (gap <= limit)[usable].all()
            assert ((value - log_det).abs() <= limit)[usable].all()
        if m > 1:
            broken = a.movedim(-3, -1).clone()
            broken[0, 0, 1, 0] = broken[0, 1, 0, 0] = 2.0
            value = invert(broken)[1]
            assert value[0, 0].isnan()
            assert value[1].isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 40])
def test_patterns_wider_than_a_number(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_BITS", bits)
    missing = rand(200, 7, seed=1) < 0.4
    order, groups = ops._grouped(missing, 1)
    assert torch.equal(order.sort().values, torch.arange(200))
    seen = 0
    for group in groups:
        assert isinstance(group, ops._Patterns)
        assert group.rows.start == seen
        seen = group.rows.stop
        found = torch.zeros(seen - group.rows.start, 7, dtype=torch.bool)
        found.scatter_(1, group.columns[:, group.which].mT, True)
        assert torch.equal(found, missing[order][group.rows])
        assert group.columns.shape[1] == len(found.unique(dim=0))  # each pattern once
    assert seen == 200


def test_work_grows_with_patterns_and_memory_does_not() -> None:
    """Thousands of patterns share a few hundred operations."""
    g = gaussian(4, 12, "full")
    x, weight = holes(randn(2000, 12)), soft(2000, 4)
    assert len(x.isnan().unique(dim=0)) > 1000
    seen = operations(lambda: g.stats(Batch(x), weight))
    assert len(seen.names) < 3000
    assert seen.largest <= max(2 * ops._AT_ONCE, 2000 * 4 * 12)


# ---- the laws of a factor -----------------------------------------------------------------------------------------

LAWS = [
    laws.test_shapes,
    laws.test_more_observation_axes,
    laws.test_statistics_are_additive_in_observations_and_linear_in_weights,
    laws.test_weight_zero_is_absent_and_weight_two_is_twice,
    laws.test_no_rows_are_no_statistics,
    laws.test_maximize_is_stationary_and_beats_perturbations,
    laws.test_frozen_views_stay_and_the_rest_is_still_best,
    laws.test_frozen_components_stay_and_the_others_move_as_before,
    laws.test_maximize_is_pure,
    laws.test_maximize_under_vmap_and_grad,
    laws.test_empty_components_keep_their_parameters,
    laws.test_replicas_equal_each_alone,
    laws.test_float32_near_float64,
]


@every_kind
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
def test_laws(law, kind: str, device: torch.device) -> None:
    law(lambda: case(kind), device)


@every_kind
def test_gradient_of_q_is_that_of_the_density(kind: str) -> None:
    """Fisher's identity for what is missing inside a row."""
    factor, batch, expected = (c := case(kind)).factor, c.batch, c.expected
    stats = factor.stats(batch, expected).map(Tensor.detach)
    values = list(factor.parameters())
    ours = torch.autograd.grad(factor.expected_log_prob(stats), values)
    theirs = torch.autograd.grad((factor.log_prob(batch) * expected).sum(), values)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=1e-9)


@by_entry
def test_one_m_step_is_exact_where_columns_are_independent(kind: str) -> None:
    x = rows(50, 3)
    g = Gaussian(1, 3, kind).double()  # pyright: ignore
    new = g.maximize(g.stats(Batch(x), torch.ones(50, 1, dtype=torch.float64)))
    mean = x.nanmean(0)
    scatter = (x - mean).square()
    variance = scatter.nanmean(0) if kind == "diag" else scatter.nanmean()
    close(new["mean"][0], mean)
    close((2 * new["scale"]).exp()[0], variance)


@by_entry
def test_an_entry_that_no_row_of_a_component_has_keeps_its_parameters(kind: str) -> None:
    g, x = gaussian(2, 3, kind), randn(20, 3)
    x[:10, 2] = torch.nan
    expected = torch.zeros(20, 2, dtype=torch.float64)
    expected[:10, 0] = expected[10:, 1] = 1.0
    new = g.maximize(g.stats(Batch(x), expected))
    assert new["mean"][0, 2] == g.means[0, 2]
    assert new["mean"].isfinite().all()
    assert new["scale"].isfinite().all()
    if kind == "diag":
        assert new["scale"][0, 2] == g.scale[0, 2]


@completing
def test_a_column_that_no_row_of_a_component_has_follows_the_others(kind: str) -> None:
    model = mixture(2, 3, kind)
    x = torch.cat([randn(60, 3) - 4, randn(60, 3, seed=1) + 4])
    x[:60, 2] = torch.nan
    result = fit(model, x, init=None, max_iter=30, tol=0.0)
    assert largest_fall(result.history) < 1e-12
    healthy(model)


# ---- the M-step against others' EM --------------------------------------------------------------------------------


def numpy_em(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """EM for one incomplete multivariate normal, row by row (R. J. A. Little, D. B. Rubin 2002, section 11.2)."""
    for _ in range(steps):
        first, second = np.zeros_like(mean), np.zeros_like(covariance)
        for row in x:
            o, m = ~np.isnan(row), np.isnan(row)
            full, left = row.copy(), np.zeros_like(covariance)
            slope = np.linalg.solve(covariance[np.ix_(o, o)], covariance[np.ix_(o, m)]).T
            full[m] = mean[m] + slope @ (row[o] - mean[o])
            left[np.ix_(m, m)] = covariance[np.ix_(m, m)] - slope @ covariance[np.ix_(o, m)]
            first, second = first + full, second + np.outer(full, full) + left
        mean = first / len(x)
        covariance = second / len(x) - np.outer(mean, mean)
    return mean, covariance


@both_routes
def test_each_step_is_the_textbook_s(direct: bool) -> None:
    x = holes(randn(60, 4) @ randn(4, 4, seed=2), 0.25)
    x = x[~x.isnan().all(1)]
    model = mixture(1, 4, "full")
    model.component.direct = direct
    mean, covariance = (v[0].numpy() for v in normal(model.component))
    step, values = em_map(model), dict(model.named_parameters())
    for steps in (1, 2, 5):
        for _ in range(steps):
            values = step({k: v.detach() for k, v in values.items()}, Batch(x))
        mean, covariance = numpy_em(x.numpy(), mean, covariance, steps)
        close(values["component.mean"][0], torch.from_numpy(mean), rtol=1e-9)
        close(
            model.component.structure.covariances(values["component.scale"])[0],
            torch.from_numpy(covariance),
            rtol=1e-9,
        )


def test_the_optimum_of_an_incomplete_table_is_that_of_r() -> None:
    """New York's air: the maximum of the marginal likelihoods by another optimiser.

    R 4.2.2 with mvtnorm 1.1-3, x = read.csv(".../airquality.csv") scaled by columns, rows split by what they miss:
    ``optim(p, function(p) -sum(dmvnorm(z[i, o], mu[o], S[o, o], log = TRUE)), method = "BFGS")`` over the mean and the
    log-Cholesky factor of S, relative tolerance 1e-16.
    """
    path = Path(torchem.__file__).parent / "datasets" / "airquality.csv"
    x = torch.from_numpy(np.genfromtxt(path, delimiter=",", skip_header=1))
    model = torchem.GaussianMixture(1, 4).double()
    result = fit(model, x, tol=1e-12, max_iter=500)
    assert result.bound == pytest.approx(-2326.6973828, abs=1e-6)
    mean = torch.tensor([41.87117323, 184.84680641, 9.95751633, 77.88235296]).double()
    covariance = torch.tensor([
        [1044.0186339, 942.529835, -64.6359276, 209.5635015], [942.529835, 8090.701623, -17.335381, 238.07331],
        [-64.6359276, -17.335381, 12.3304174, -15.1723184], [209.5635015, 238.07331, -15.1723184, 89.0057668],
    ]).double()  # fmt: skip
    close(model.means[0].detach(), mean, rtol=1e-5)
    close(model.covariances[0].detach(), covariance, rtol=1e-4)


def test_the_optimum_of_monotone_data_in_closed_form() -> None:
    """Where only the second column misses entries the likelihood factors (T. W. Anderson 1957)."""
    x = randn(80, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64) + 100
    x[50:, 1] = torch.nan
    mean, variance = x[:, 0].mean(), x[:, 0].var(correction=0)
    both = x[:50] - x[:50].mean(0)
    slope = (both[:, 0] @ both[:, 1]) / both[:, 0].square().sum()
    noise = (both[:, 1] - slope * both[:, 0]).square().mean()
    second = x[:50, 1].mean() + slope * (mean - x[:50, 0].mean())
    model = torchem.GaussianMixture(1, 2).double()
    fit(model, x, tol=0.0, max_iter=200)
    close(model.means[0], torch.stack([mean, second]), rtol=1e-8)
    truth = torch.stack([variance, slope * variance, slope * variance, noise + slope.square() * variance])
    close(model.covariances[0].flatten(), truth, rtol=1e-7)


# ---- derivatives --------------------------------------------------------------------------------------------------


@every_kind
@both_routes
def test_gradients_of_the_density(kind: str, direct: bool) -> None:
    model, x = mixture(2, 3, kind), rows(8)
    model.component.direct = direct
    names = [name for name, _ in model.named_parameters()]

    def log_prob(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, named, (Batch(x),))  # pyright: ignore

    inputs = [x.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in model.parameters())]
    grads = torch.autograd.grad(log_prob(*inputs).sum(), inputs)
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][x.isnan()] == 0).all()
    assert (grads[0][~x.isnan()] != 0).all()
    others = [value.detach().requires_grad_() for value in inputs[1:]]
    assert torch.autograd.gradcheck(lambda *values: log_prob(x, *values), others)
    assert torch.autograd.gradgradcheck(lambda *values: log_prob(x, *values), others)
    seen = x[~x.isnan()].requires_grad_()
    assert torch.autograd.gradcheck(lambda v: log_prob(x.masked_scatter(~x.isnan(), v), *others), [seen])


@every_kind
@both_routes
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own, of complete rows
def test_the_em_map_under_torch_func(kind: str, direct: bool) -> None:
    model, x = mixture(2, 3, kind), rows(12)
    model.component.direct = direct
    step, start = em_map(model), {k: v.detach() for k, v in model.named_parameters()}
    plain = step(start, Batch(x))
    many = {name: torch.stack([value, 0.9 * value]) for name, value in start.items()}
    batched = torch.func.vmap(step, in_dims=(0, None))(many, Batch(x))
    close_dict({name: value[0] for name, value in batched.items()}, plain)
    # Problems with other patterns, one of them complete.
    problems = torch.stack([x, torch.where(x.isnan(), 0.3, x), x.roll(1, 1)])
    batched = torch.func.vmap(step, in_dims=(None, 0))(start, Batch(problems))
    for i, problem in enumerate(problems):
        close_dict({name: value[i] for name, value in batched.items()}, step(start, Batch(problem)))
    both = torch.func.vmap(torch.func.vmap(step, in_dims=(0, None)), in_dims=(None, 0))(many, Batch(problems))
    close_dict({name: value[0, 0] for name, value in both.items()}, plain)
    reverse, forward = torch.func.jacrev(step)(start, Batch(x)), torch.func.jacfwd(step)(start, Batch(x))
    for name in start:
        close_dict(reverse[name], forward[name])
    of_data = torch.func.jacrev(lambda x: step(start, Batch(x)))(x)
    assert all((slope[..., x.isnan()] == 0).all() and slope.isfinite().all() for slope in of_data.values())
    each = torch.func.vmap(torch.func.jacrev(lambda x: step(start, Batch(x))["component.mean"]))(problems)
    close(each[0], of_data["component.mean"])


@every_kind
def test_conditional_under_vmap(kind: str) -> None:
    g, x = gaussian(2, 3, kind), torch.stack([rows(9), rows(9).roll(1, 1)])
    found = torch.func.vmap(lambda x: g.conditional(Batch(x)))(x)
    for i in (0, 1):
        for a, b in zip(found, g.conditional(Batch(x[i])), strict=True):
            close(a[i], b)


# ---- what is missing, given what is not ---------------------------------------------------------------------------


@every_kind
def test_conditional_moments(kind: str) -> None:
    g, x = gaussian(3, 4, kind), rows(30, 4)
    mean, variance = g.conditional(Batch(x))
    for i, k in itertools.product(range(30), range(3)):
        full, left = completed(g, x[i], k)
        close(mean[i, k], full)
        close(variance[i, k], left.diagonal())
    seen = ~x.isnan().unsqueeze(1).expand_as(mean)
    assert torch.equal(mean[seen], x.unsqueeze(1).expand_as(mean)[seen])
    assert (variance[seen] == 0).all()
    mean, variance = g.conditional(Batch(randn(5, 4)))
    assert torch.equal(mean, randn(5, 4).unsqueeze(1).expand(5, 3, 4))
    assert (variance == 0).all()


@every_kind
def test_conditional_and_moments_with_replicas_and_axes(kind: str) -> None:
    g, x = gaussian(2, 3, kind), rows(12)
    many = laws.mixed_replicas(g)
    mean, variance = many.conditional(Batch(x.unflatten(0, (4, 3))))  # pyright: ignore
    assert mean.shape == variance.shape == (3, 4, 3, 2, 3)
    moments = many.moments(Batch(x.unflatten(0, (4, 3))))
    assert moments[0].shape == moments[1].shape == (3, 1, 1, 2, 3)
    for r in range(3):
        one = copy.deepcopy(many)
        one.take_replicas(r)
        for a, b in zip((mean, variance), one.conditional(Batch(x)), strict=True):  # pyright: ignore
            close(a[r].flatten(0, 1), b)
        for a, b in zip(moments, one.moments(Batch(x)), strict=True):
            close(a[r].squeeze(0), b)
    close(g.moments(Batch(x))[1][0], normal(g)[1].diagonal(dim1=-2, dim2=-1))


# ---- fits ---------------------------------------------------------------------------------------------------------


def truth(kind: str, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Three clusters in four columns: data with a third of the entries missing, means, covariances."""
    mean = torch.tensor([[-5.0, 5, 0, 5], [0, 0, 0, 0], [5, 5, -5, 0]], dtype=torch.float64)
    root = torch.eye(4, dtype=torch.float64) + 0.4 * randn(3, 4, 4, seed=seed)
    full = root @ root.mT
    variances = full.diagonal(dim1=-2, dim2=-1)
    covariance = {
        "full": full,
        "tied": full[:1].expand(3, 4, 4),
        "diag": torch.diag_embed(variances),
        "spherical": variances[:, :1, None] * torch.eye(4, dtype=torch.float64),
    }[kind]
    z = torch.arange(n) % 3
    noise = torch.linalg.cholesky(covariance)[z] @ randn(n, 4, 1, seed=seed + 1)
    return holes(mean[z] + noise.squeeze(-1)), mean, covariance


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_truth_is_recovered(kind: str, dtype: torch.dtype, offset: float, device: torch.device) -> None:
    x, mean, covariance = truth(kind, 6000)
    model = torchem.GaussianMixture(3, 4, kind).to(device, dtype)  # pyright: ignore
    result = fit(model, (x + offset).to(device, dtype), tol=1e-6)
    assert result.converged
    # Clusters overlap little: a rise of the bound is a few thousand times the rounding of float32.
    assert largest_fall(result.history) <= (1e-12 if dtype == torch.float64 else 1e-6)
    order = model.means[:, 0].argsort().cpu()
    close(model.means.cpu()[order], mean + offset, rtol=0, atol=0.15)
    close(dense(model)[order], covariance, rtol=0.1, atol=0.15)
    close(model.weights, torch.full((3,), 1 / 3), rtol=0, atol=0.02)


@every_kind
def test_fisher_s_identity(kind: str) -> None:
    model, x = mixture(3, 3, kind), rows(60)
    stats = model.e_step(Batch(x))
    close(model.bound(stats), stats["log_likelihood"], rtol=1e-12)
    close(stats["log_likelihood"], model.log_prob(x).sum(), rtol=1e-12)
    frozen = pytree.tree_map(Tensor.detach, stats)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(model.expected_log_prob(frozen), parameters)
    theirs = torch.autograd.grad(model.log_prob(x).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=1e-8)


@every_kind
def test_uses(kind: str) -> None:
    model, x = mixture(3, 3, kind), rows(60)
    joint = model.weights.detach().log() + marginal(model.component, x)
    close(model.log_prob(x), joint.logsumexp(-1))
    close(model.posterior(x), joint.softmax(-1))
    assert torch.equal(model.most_likely(x)[1:], joint.argmax(-1)[1:])
    close(model.posterior(x)[0], model.weights)  # nothing seen, nothing learned
    found = torchem.criteria(model, x)
    assert found.loglik == pytest.approx(float(joint.logsumexp(-1).sum()))
    for data in (x.numpy(), x.tolist(), x.float()):
        close(model.log_prob(data).double(), joint.logsumexp(-1), rtol=1e-5)


@every_kind
def test_fits_of_every_kind_of_data(kind: str) -> None:
    x = truth(kind, 200)[0]
    options = {"max_iter": 5, "tol": 0.0, "init": None}
    start, whole = mixture(3, 4, kind), mixture(3, 4, kind)
    fit(whole, x, **options)
    loader, parts = DataLoader(TensorDataset(x), batch_size=33), [Batch(x[:70]), Batch(x[70:])]
    for data in (x.tolist(), TensorDataset(x), loader, parts):
        model = copy.deepcopy(start)
        fit(model, data, **options)
        close_dict(dict(model.named_parameters()), dict(whole.named_parameters()), rtol=1e-9)


@every_kind
@pytest.mark.parametrize("init", ["auto", "kmeans++", "kmeans", "random", "random_from_data", "hierarchical"])
def test_starts(kind: str, init: str) -> None:
    x = truth(kind, 300)[0] * 0.01 + 50
    model = torchem.GaussianMixture(3, 4, kind).double()  # pyright: ignore
    result = fit(model, x, init=init, restarts=3, max_iter=20)
    assert len(result.restarts) == 3
    assert all(map(math.isfinite, result.restarts))
    assert largest_fall(result.history) <= 1e-10
    healthy(model)
    close(model.means, x.nanmean(0).expand(3, 4), rtol=0, atol=0.15)


@every_kind
def test_restarts_are_repeatable_and_the_best_is_returned(kind: str) -> None:
    x = truth(kind, 200)[0]
    one, two = (torchem.GaussianMixture(3, 4, kind).double() for _ in range(2))  # pyright: ignore
    result = fit(one, x, restarts=4, init="random", max_iter=15)
    fit(two, x, restarts=4, init="random", max_iter=15)
    assert same(one, two)
    assert result.bound == max(result.restarts)
    close(one.log_prob(x).sum(), torch.tensor(result.bound, dtype=torch.float64), rtol=1e-9)


@every_kind
def test_a_start_forgets_what_rows_were_first_completed_by(kind: str) -> None:
    """The first parameters are those of the clusters, not drawn to the middle by what is missing."""
    x, mean, _ = truth(kind, 3000)
    model = torchem.GaussianMixture(3, 4, kind).double()  # pyright: ignore
    model.component.prepare(_Moments(x.nanmean(0), torch.ones(4, dtype=torch.float64)))
    hard = torch.nn.functional.one_hot(torch.arange(3000) % 3, 3).double()
    first = model.component.initialize(Batch(x), hard)["mean"]
    close(first, mean, rtol=0, atol=0.25)


class _Moments:
    def __init__(self, mean: Tensor, variance: Tensor):
        self.mean, self.variance = mean, variance
        self.low = self.high = mean


@every_kind
def test_weights_count_rows(kind: str) -> None:
    x = truth(kind, 90)[0]
    weight = torch.tensor([0.0, 1.0, 2.0]).repeat(30)
    repeated = x.repeat_interleave(weight.long(), 0)
    start = mixture(3, 4, kind)
    one, two = copy.deepcopy(start), copy.deepcopy(start)
    fit(one, x, weights=weight, max_iter=5, tol=0.0, init=None)
    fit(two, repeated, max_iter=5, tol=0.0, init=None)
    close_dict(dict(one.named_parameters()), dict(two.named_parameters()), rtol=1e-8)


@every_kind
@pytest.mark.parametrize("dead", ["respawn", "prune"])
def test_dead_components(kind: str, dead: str) -> None:
    x = truth(kind, 200)[0]
    model = mixture(4, 4, kind)
    model.means = torch.cat([model.means.detach()[:3], torch.full((1, 4), 1e3, dtype=torch.float64)])
    fit(model, x, init=None, dead=dead, max_iter=20)
    healthy(model)


@every_kind
def test_pieces_and_batches_do_not_matter(kind: str) -> None:
    model, x = mixture(3, 3, kind), rows(700)
    whole = model.e_step(Batch(x))
    model.memory_budget = 1
    close_stats(model.e_step(Batch(x)), whole)
    parts = [model.e_step(Batch(x[i : i + 90])) for i in range(0, 700, 90)]
    close_stats(sum(parts[1:], parts[0]), whole)


@every_kind
def test_units_do_not_matter(kind: str) -> None:
    x = truth(kind, 300)[0]
    plain, scaled = (torchem.GaussianMixture(3, 4, kind).double() for _ in range(2))  # pyright: ignore
    one, two = fit(plain, x, max_iter=10, tol=0.0), fit(scaled, 1e-6 * x + 1e-3, max_iter=10, tol=0.0)
    close(scaled.means, 1e-6 * plain.means + 1e-3, rtol=1e-9, atol=1e-12)
    close(dense(scaled) * 1e12, dense(plain), rtol=1e-6)
    seen = int((~x.isnan()).sum())
    assert two.bound == pytest.approx(one.bound - seen * math.log(1e-6), rel=1e-9)


def test_a_column_missing_throughout_is_named() -> None:
    x = rows(30, 4)
    x[:, 2] = torch.nan
    model = torchem.GaussianMixture(2, 4)
    before = copy.deepcopy(model)
    with pytest.raises(InvalidArgument, match="data: expected an observed entry in each column, got none in column 2"):
        fit(model, x)
    assert same(model, before)
    # Only a fit must have seen every column.
    assert model.log_prob(x).isfinite().all()


def test_a_column_missing_in_the_first_pieces_only() -> None:
    x = randn(20_000, 2)
    x[:12_000, 1] = torch.nan
    model = torchem.GaussianMixture(1, 2, "diag").double()
    fit(model, x)
    close(model.means[0], x.nanmean(0), rtol=1e-8)
    close(model.covariances[0], (x - x.nanmean(0)).square().nanmean(0), rtol=1e-8)


@every_kind
def test_stochastic_and_incremental_numbering(kind: str) -> None:
    """Statistics of batches with and without missing entries have one form: they add, scale and travel flat."""
    g = gaussian(2, 3, kind)
    one, two = g.stats(Batch(randn(9, 3)), soft(9, 2)), g.stats(Batch(rows(9)), soft(9, 2))
    total = one * 0.5 + two
    close_stats(total.unflatten(total.flatten()), total)
    assert [leaf.shape for leaf in one.leaves()] == [leaf.shape for leaf in two.leaves()]


@completing
def test_nearly_singular_covariances(kind: str) -> None:
    """Columns that determine one another: the densities agree with those of the observed columns, which are healthy."""
    g = Gaussian(1, 3, kind).double()  # pyright: ignore
    root = torch.tensor([[1.0, 0, 0], [1.0, 1e-5, 0], [-1.0, 0, 1e-5]], dtype=torch.float64)
    g.covariances = root @ root.mT if kind == "tied" else (root @ root.mT).unsqueeze(0)
    x = torch.tensor([[0.5, torch.nan, -0.5], [torch.nan, 0.2, torch.nan]], dtype=torch.float64)
    close(g.log_prob(Batch(x)), marginal(g, x), rtol=1e-5)
    mean, variance = g.conditional(Batch(x))
    close(mean[:, 0], torch.tensor([[0.5, 0.5, -0.5], [0.2, 0.2, -0.2]], dtype=torch.float64), rtol=0, atol=1e-4)
    assert ((variance >= 0) & (variance < 1e-8)).all()


def test_samples_with_entries_removed_agree_with_the_density() -> None:
    """Averages of the density over what is missing: the chain rule of probabilities, by quadrature."""
    g = gaussian(2, 2, "full")
    axis = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    both = torch.stack([torch.full_like(axis, 0.4), axis], -1)
    found = g.log_prob(Batch(both)).exp().sum(0) * (axis[1] - axis[0])
    close(found.log(), g.log_prob(Batch(torch.tensor([[0.4, torch.nan]], dtype=torch.float64)))[0], rtol=1e-8)


@pytest.mark.parametrize(
    "kind", ["full", "diag", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("tied", "spherical"))]
)
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:The .grad attribute:UserWarning",
    "ignore:.*_prims_common:FutureWarning",
)
def test_compiles(kind: str) -> None:
    """Once, whether or not a batch misses entries."""
    model, x = mixture(2, 3, kind), rows(10)
    torch._dynamo.reset()
    run = torch.compile(lambda b: model.log_prob(b), backend="aot_eager")
    values = list(model.parameters())
    with as_users_run_it():
        for data in (x, torch.where(x.isnan(), 0.5, x), rows(10, 3, 0.6)):
            found, expected = run(Batch(data)), model.log_prob(Batch(data))
            close(found, expected)
            grads = (torch.autograd.grad(value.sum(), values) for value in (found, expected))
            for a, b in zip(*grads, strict=True):
                close(a, b, rtol=1e-8)


def test_generator_of_draws_is_untouched() -> None:
    state = torch.get_rng_state()
    gaussian(2, 3, "full").stats(Batch(rows()), soft(40, 2))
    assert torch.equal(torch.get_rng_state(), state)
