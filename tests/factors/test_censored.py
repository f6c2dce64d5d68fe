"""Limits: what lies beyond is censored, or never recorded. Densities, references, far tails, draws."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import close, rand, randn, rng, soft
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factor import Factor
from torchem.factors import Bernoulli, Categorical, Censored, Exponential, Gamma, Gaussian, Poisson, Truncated
from torchem.factors.gaussian import CovarianceType


def normal(k: int = 2, d: int = 2, kind: CovarianceType = "diag") -> Gaussian:
    g = Gaussian(k, d, kind).double()
    g.means = randn(k, d, seed=1)
    g.scale.data = 0.3 * randn(*g.scale.shape, seed=2)
    return g


def alone(factor: Factor, x: Tensor, **options) -> torchem.Result:
    """A fit of one component."""
    model = torchem.Mixture(Categorical(1), factor).double()
    result = torchem.fit(model, x, seed=0, tol=1e-13, max_iter=5000, progress=False, **options)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(result.history))
    return result


def cut(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(min=low, max=high)


# ---- densities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diag", "spherical"])
def test_censored_densities_are_those_of_scipy(kind: CovarianceType) -> None:
    g = normal(kind=kind)
    c, x = Censored(g, low=-1.0, high=[None, 1.5]), with_holes(2 * randn(40, 2, seed=3), 0.2)
    scales = g.structure.variances(g.scale, 2, 2).sqrt().detach().numpy()
    for k in range(2):
        law = scipy_stats.norm(g.means[k].detach().numpy(), scales[k])
        each = np.where(x <= -1.0, law.logcdf(-1.0), law.logpdf(x))  # pyright: ignore[reportAttributeAccessIssue]
        each[:, 1] = np.where(x[:, 1] >= 1.5, law.logsf(1.5)[1], each[:, 1])
        close(c.log_prob(Batch(x))[:, k], torch.from_numpy(np.where(x.isnan(), 0.0, each)).sum(-1))


def test_truncated_densities_are_those_of_scipy() -> None:
    g, x = normal(), with_holes(3 * rand(30, 2, seed=4) - 1, 0.2)
    t = Truncated(g, low=-1.0, high=2.0)
    scales = g.structure.variances(g.scale, 2, 2).sqrt().detach().numpy()
    for k in range(2):
        mean, scale = g.means[k].detach().numpy(), scales[k]
        each = scipy_stats.truncnorm.logpdf(x, (-1 - mean) / scale, (2 - mean) / scale, loc=mean, scale=scale)
        close(t.log_prob(Batch(x))[:, k], torch.from_numpy(np.where(x.isnan(), 0.0, each)).sum(-1))
    outside = t.log_prob(Batch(torch.tensor([[0.0, 2.5]], dtype=torch.float64)))
    assert (outside == -torch.inf).all()


@pytest.mark.parametrize("low", [-60.0, 60.0])
def test_far_tails_keep_their_digits(low: float) -> None:
    """All of a normal law's mass, or nothing, lies between limits that are 60 standard deviations away."""
    t = Truncated(Gaussian(1, 1, "diag").double(), low=low, high=low + 1)
    batch = Batch(torch.full((1, 1), low + 0.25, dtype=torch.float64))
    a, y = torch.tensor(abs(low) - (low < 0), dtype=torch.float64), torch.tensor(0.25).double()
    y = y if low > 0 else 1 - y
    # φ(a + y) / ∫ φ(a + s) ds, with weights of Gauss and Legendre
    nodes, weights = np.polynomial.legendre.leggauss(200)
    s = torch.from_numpy((nodes + 1) / 2)
    total = ((-a * s - s.square() / 2).exp() @ torch.from_numpy(weights / 2)).log()
    close(t.log_prob(batch)[0, 0], -a * y - y.square() / 2 - total, rtol=1e-7)
    stats = t.stats(batch, torch.ones(1, 1).double())
    assert all(leaf.isfinite().all() for leaf in stats.leaves())
    values = torch.autograd.grad(t.log_prob(batch).sum(), list(t.parameters()))
    assert all(value.isfinite().all() for value in values)


# ---- references ---------------------------------------------------------------------------------------------------


def test_tobit_is_the_censored_fit_of_scipy() -> None:
    x = cut(2 * randn(200, 1, seed=5) + 1, -0.5, 3.0)
    result = alone(c := Censored(Gaussian(1, 1, "diag"), low=-0.5, high=3.0), x)
    data = scipy_stats.CensoredData(
        uncensored=x[(x > -0.5) & (x < 3)].numpy(), left=x[x <= -0.5].numpy(), right=x[x >= 3].numpy()
    )
    mean, scale = scipy_stats.norm.fit(data)
    close(c.means[0, 0], torch.tensor(mean).double(), atol=2e-4)
    close(c.covariances[0, 0].sqrt(), torch.tensor(scale).double(), atol=2e-4)
    c.means, c.covariances = [[mean]], [[scale**2]]
    assert result.bound >= float(c.log_prob(Batch(x)).detach().sum()) - 1e-6


def test_rates_of_cut_off_times_are_events_by_exposure() -> None:
    times, marks = 3 * rand(80, 2, seed=6), (rand(80, 2, seed=7) < 0.4).double()
    c = Censored(Exponential(1, 2), marked=True)
    alone(c, times, inputs=marks)
    close(c.rates[0], (1 - marks).sum(0) / times.sum(0), rtol=1e-6)
    # At a limit common to all the same by either way of saying so.
    common = Censored(Exponential(3, 2).double(), high=2.0)
    common.rates = 0.2 + rand(3, 2, seed=8)
    own = Censored(common.factor, marked=True)
    x = with_holes(cut(times, 0.0, 2.0), 0.1)
    marked, expected = Batch(x, u=(x >= 2.0).double()), soft(80, 3)
    close(own.log_prob(marked), common.log_prob(Batch(x)))
    for a, b in zip(own.stats(marked, expected).leaves(), common.stats(Batch(x), expected).leaves(), strict=True):
        close(a, b)


def test_marks_of_both_kinds_are_the_censored_fit_of_scipy() -> None:
    x, marks = 2 + randn(120, 1, seed=9), torch.randint(-1, 2, (120, 1), generator=rng(9)).double()
    alone(c := Censored(Gaussian(1, 1, "diag"), marked=True), x, inputs=marks)
    data = scipy_stats.CensoredData(
        uncensored=x[marks == 0].numpy(), left=x[marks < 0].numpy(), right=x[marks > 0].numpy()
    )
    mean, scale = scipy_stats.norm.fit(data)
    close(c.means[0, 0], torch.tensor(mean).double(), atol=3e-4)
    close(c.covariances[0, 0].sqrt(), torch.tensor(scale).double(), atol=3e-4)


def best(loss, start: list[float]) -> float:
    return -float(optimize.minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-11}).fun)


def test_truncated_laws_reach_what_an_optimiser_finds() -> None:
    x = 3.5 * rand(60, 1, seed=10) ** 1.5
    found = alone(Truncated(Exponential(1, 1), high=3.5), x).bound
    law = scipy_stats.truncexpon
    exact = best(lambda p: -law.logpdf(x, 3.5 * math.exp(p[0]), scale=math.exp(-p[0])).sum(), [0.0])
    assert found == pytest.approx(exact, abs=1e-6)
    y = randn(400, 1, seed=11)
    y = y[(y[:, 0] > -0.8) & (y[:, 0] < 1.7)]
    found = alone(Truncated(Gaussian(1, 1, "diag"), low=-0.8, high=1.7), y, accelerate="squarem").bound

    def loss(p: np.ndarray) -> float:
        # By scipy's own truncnorm the same takes some hundred times as long.
        law = scipy_stats.norm(p[0], math.exp(p[1]))
        return len(y) * math.log(law.cdf(1.7) - law.cdf(-0.8)) - law.logpdf(y).sum()

    assert found == pytest.approx(best(loss, [0.0, 0.0]), abs=1e-5)


def test_counts_without_zeros_are_those_of_vgam_and_pscl() -> None:
    """R 4.2, VGAM 1.1.7: vglm(art ~ 1, pospoisson, subset(bioChemists, art > 0)); pscl's hurdle has the same rate."""
    table = {1: 246, 2: 178, 3: 84, 4: 67, 5: 27, 6: 17, 7: 12, 8: 1, 9: 2, 10: 1, 11: 1, 12: 2, 16: 1, 19: 1}
    x = torch.tensor([float(x) for x, n in table.items() for _ in range(n)], dtype=torch.float64).unsqueeze(-1)
    result = alone(t := Truncated(Poisson(1, 1), low=1), x)
    assert result.bound == pytest.approx(-1120.02724921, abs=1e-7)
    assert float(t.rates.detach()) == pytest.approx(2.1337720, rel=1e-6)


def test_censored_counts_reach_what_an_optimiser_finds() -> None:
    x = torch.poisson(torch.full((100, 1), 4.0).double(), generator=rng(12)).clamp(max=5.0)
    result = alone(Censored(Poisson(1, 1), high=5), x)

    def loss(p: np.ndarray) -> float:
        law = scipy_stats.poisson(math.exp(p[0]))
        return -np.where(x >= 5, law.logsf(4), law.logpmf(x)).sum()  # pyright: ignore[reportAttributeAccessIssue]

    assert result.bound == pytest.approx(best(loss, [1.0]), abs=1e-6)


# ---- use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factor",
    [
        Censored(Gaussian(2, 1, "diag"), low=-3.0, high=4.0),
        Censored(Gaussian(2, 1, "full"), high=4.0),
        Truncated(Gaussian(2, 1, "diag"), low=-7.0),
    ],
    ids=["limits", "one-column", "truncated"],
)
def test_mixtures_climb_and_recover(factor: Factor) -> None:
    truth = type(factor)(Gaussian(2, 1, "diag").double(), factor.low, factor.high)  # pyright: ignore
    truth.means, truth.covariances = [[-2.0], [3.0]], [[2.0], [1.0]]
    x = truth.sample(torch.arange(3000) % 2, generator=rng(13))
    model = torchem.Mixture(Categorical(2), factor).double()
    result = torchem.fit(model, x, seed=0, tol=1e-7, max_iter=500, progress=False)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(result.history))
    means = factor.means[:, 0].detach()  # pyright: ignore
    close(means.sort().values, torch.tensor([-2.0, 3.0]), atol=0.25)


def test_a_shift_of_the_origin_changes_nothing() -> None:
    """Statistics of normal columns are about an origin of their own, and limits far from it."""
    x = randn(200, 1, seed=14).clamp(max=0.8)
    for shift in (0.0, 1e4):
        c = Censored(Gaussian(1, 1, "diag"), high=0.8 + shift)
        alone(c, x + shift)
        close(c.means[0, 0] - shift, torch.tensor(0.0), atol=0.2)
        close(c.covariances, torch.ones(1, 1), atol=0.3)


@pytest.mark.parametrize("factor", [Truncated(normal(), -1.0, 2.0), Truncated(Exponential(2, 2).double(), high=1.5)])
def test_moments_and_draws_within_limits(factor: Truncated) -> None:
    x = factor.sample(torch.arange(40_000) % 2, generator=rng(15))
    low, high = factor.limits()
    assert ((x >= low) & (x <= high)).all()
    mean, variance = factor.moments(Batch(x))
    for k in range(2):
        close(x[k::2].mean(0), mean[0, k], rtol=0.03, atol=0.01)
        close(x[k::2].var(0), variance[0, k], rtol=0.05)


def test_limits_keep_their_digits_in_either_precision() -> None:
    c = Censored(Exponential(1, 1), high=0.1)
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([[0.1]], dtype=dtype)
        close(c.to(dtype).log_prob(Batch(x))[0, 0], torch.tensor(-0.1), rtol=1e-6)


def test_priors_stand_over_what_is_inside() -> None:
    c = Censored(Exponential(1, 1), high=1.0)
    c.factor.prior = priors.Gamma(3.0, 2.0)
    x = rand(50, 1, seed=16).mul(2).clamp(max=1.0)
    alone(c, x)
    close(c.rates[0, 0], ((x < 1).sum() + 2) / (x.sum() + 2), rtol=1e-6)


def posterior(family: Factor, low: float, high: float, truncated: bool) -> tuple[Factor, Batch]:
    """Of a factor with limits that has seen data."""
    x = (rand(30, 2, seed=17) * 6).round() if family.discrete else 5 * rand(30, 2, seed=17) - (2.5 if low < 0 else 0)
    x = with_holes(x.clamp(min=low, max=high), 0.15)
    factor = (Truncated if truncated else Censored)(torchem.Variational(family), low, high)
    for name, value in factor.maximize(factor.stats(Batch(x), soft(30, 2))).items():
        factor.get_parameter(name).data = value.detach()
    return factor, Batch(x)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(
    ("build", "low", "high"),
    [
        (lambda: normal(kind="diag"), -1.5, 1.0), (lambda: normal(kind="spherical"), -1.5, 1.0),
        (lambda: Exponential(2, 2).double(), 0.4, 2.0), (lambda: Poisson(2, 2).double(), 1.0, 4.0),
    ],
)  # fmt: skip
def test_what_is_hidden_is_integrated_out(build, low: float, high: float, truncated: bool) -> None:
    """Sums and quadratures of exp E log f, entry by entry: its mass beyond a limit, or over all but what is hidden."""
    factor, batch = posterior(build(), low, high, truncated)
    inner: Any = factor.factor
    step = 1.0 if inner.discrete else 5e-3
    grid = torch.arange(0.0, 80.0, step).double() if inner.discrete else torch.arange(-30, 60, step).double() + step / 2
    grid = grid[grid > 0] if isinstance(inner.factor, Exponential) else grid
    sides = (grid < low, grid > high) if truncated or not inner.discrete else (grid <= low, grid >= high)
    wanted = torch.zeros(30, 2, dtype=torch.float64)
    for d in range(2):
        column = torch.full((len(grid), 2), torch.nan, dtype=torch.float64)
        column[:, d] = grid
        law = inner.log_potential(Batch(column)) + math.log(step)
        below, above = (law[side].logsumexp(0) for side in sides)
        x = batch.x[:, d]
        row = batch.x.clone()
        row[:, 1 - d] = torch.nan
        exact = inner.log_potential(Batch(row))
        if truncated:
            value = exact - (1 - below.exp() - above.exp()).log()
        else:
            value = torch.where((x >= high).unsqueeze(-1), above, torch.where((x <= low).unsqueeze(-1), below, exact))
        wanted = wanted + torch.where(x.isnan().unsqueeze(-1), 0.0, value)
    close(factor.kernel().log_potential(batch), wanted, rtol=1e-5, atol=1e-5)
    close(factor.log_prob(batch), type(factor)(inner.factor, low, high).log_prob(batch))


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", ["normal", "times", "counts"])
def test_bounds_of_posteriors_never_fall(kind: str, truncated: bool) -> None:
    inner, low, high = {
        "normal": (normal(3), -1.5, 1.0), "times": (Exponential(3, 2).double(), 0.2, 2.0),
        "counts": (Poisson(3, 2).double(), 1.0, 6.0),
    }[kind]  # fmt: skip
    x = inner.sample(torch.arange(60) % 3, None, rng(1)) * (3 if kind == "counts" else 1)
    x = with_holes(cut(x, low, high), 0.1)
    model = torchem.Mixture(Categorical(3), (Truncated if truncated else Censored)(inner, low, high)).double()
    torchem.variational(model)
    result = torchem.fit(model, x, seed=0, restarts=2, max_iter=20, tol=0, progress=False)
    for history in result.histories:
        assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(history))
    stats = model.e_step(model.batch(x))
    close(stats["log_likelihood"] + model.log_prior(), model.bound(stats), rtol=1e-9)


def test_limits_of_rows_are_those_of_all_under_a_posterior() -> None:
    factor, batch = posterior(normal(), -1.5, 1.0, False)
    inner: Any = factor
    marks = (batch.x >= 1.0).double() - (batch.x <= -1.5).double()
    each = Censored(inner.factor, marked=True)
    rows, share = Batch(batch.x, u=marks), soft(30, 2)
    close(each.kernel().log_potential(rows), factor.kernel().log_potential(batch))
    one, other = each.maximize(each.stats(rows, share)), factor.maximize(factor.stats(batch, share))
    for name, value in other.items():
        close(one[name], value)


def test_the_bound_is_below_the_evidence_of_times_that_are_cut_off() -> None:
    """Known for exponential times with limits above and a gamma law of the rate."""
    x = cut(rand(20, 1, seed=18) * 3, 0.0, 2.0)
    model = torchem.Mixture(Categorical(1), Censored(Exponential(1, 1), high=2.0)).double()
    torchem.variational(model, component=priors.Gamma(2.0, 3.0))
    result = torchem.fit(model, x, seed=0, max_iter=300, tol=1e-12, progress=False)
    events, total = float((x < 2).sum()), float(x.sum())
    evidence = math.lgamma(2 + events) - math.lgamma(2) + 2 * math.log(3) - (2 + events) * math.log(3 + total)
    assert evidence - 1.0 < result.bound < evidence


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: Censored(Gaussian(2, 2, "diag")), "low, high"),
        (lambda: Truncated(Gaussian(2, 2, "diag")), "low, high"),
        (lambda: Censored(Gaussian(2, 2), low=0.0), "factor"),
        (lambda: Censored(Gamma(2, 2), low=0.0), "factor"),
        (lambda: Censored(Bernoulli(2, 2), low=0.0), "factor"),
        (lambda: Censored(Exponential(2, 2), low=2.0, high=1.0), "high"),
        (lambda: Censored(Exponential(2, 2), high=[1.0, 2.0, 3.0]), "high"),
        (lambda: Censored(Exponential(2, 2), high=math.inf), "high"),
        (lambda: Truncated(Poisson(2, 2), low=0.5), "low"),
        (lambda: Truncated(Poisson(1, 1), low=1).check(Batch(torch.tensor([[0.0]]))), "data"),
        (lambda: Censored(Exponential(1, 1), high=1.0).check(Batch(torch.tensor([[-1.0]]))), "data"),
        (lambda: Censored(Exponential(1, 1), marked=True).check(Batch(torch.tensor([[1.0]]))), "inputs"),
        (
            lambda: Censored(Exponential(1, 1), marked=True).check(
                Batch(torch.tensor([[1.0]]), u=torch.tensor([[0.5]]))
            ),
            "inputs",
        ),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()
