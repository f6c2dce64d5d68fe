"""Multivariate t: densities, missing entries, the expanded M-step, outliers."""

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
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, StudentT
from torchem.factors.student_t import _freedom, _Tails

KINDS = ("full", "tied", "diag", "spherical")


def student(k: int = 3, d: int = 2, kind: str = "full", seed: int = 0) -> StudentT:
    t = StudentT(k, d, kind).double()  # pyright: ignore[reportArgumentType]
    t.means = 2 * randn(k, d, seed=seed)
    t.normal.scale.data = 0.3 * randn(*t.normal.scale.shape, seed=seed + 1)
    if kind in ("full", "tied"):
        t.normal.scale.data = t.normal.scale.data.tril()
    t.dof = torch.linspace(1.0, 9.0, k)
    return t


def heavy(n: int = 600, freedom: float = 1.5) -> Tensor:
    """Two groups with outliers."""
    truth = student(2, 2)
    truth.means, truth.dof = [[-6.0, 0.0], [6.0, 1.0]], [freedom, freedom]
    return truth.sample(torch.arange(n) % 2, generator=rng(3))


def dense(t: StudentT) -> Tensor:
    root = t.normal.structure.dense(t.normal.scale, t.n_components, t.n_features)
    return (root @ root.mT).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_that_of_scipy_and_of_its_margins(kind: str) -> None:
    t, x = student(3, 3, kind), 4 * randn(12, 3, seed=5)
    holes = with_holes(x, 0.4, seed=1)
    holes[0] = torch.nan
    whole, part, scales = t.log_prob(Batch(x)), t.log_prob(Batch(holes)), dense(t).numpy()
    for k in range(3):
        mean, freedom = t.means[k].detach().numpy(), float(t.dof[k].detach())
        law = scipy_stats.multivariate_t(mean, scales[k], df=freedom)  # pyright: ignore[reportArgumentType]
        close(whole[:, k], torch.as_tensor(law.logpdf(x.numpy())))
        for row, value in zip(holes, part[:, k], strict=True):
            seen = (~row.isnan()).numpy()
            # A margin of a t is a t with the same degrees of freedom.
            expected = 0.0
            if seen.any():
                law = scipy_stats.multivariate_t(mean[seen], scales[k][seen][:, seen], df=freedom)  # pyright: ignore[reportArgumentType]
                expected = float(law.logpdf(row[~row.isnan()].numpy()))
            close(value, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_never_falls(kind: str, share: float) -> None:
    model = torchem.Mixture(Categorical(2), StudentT(2, 2, kind)).double()  # pyright: ignore
    result = torchem.fit(model, with_holes(heavy(300), share), seed=0, max_iter=25, tol=0, progress=False)
    for before, after in itertools.pairwise(result.history):
        assert after >= before - 1e-9 * abs(before)


def test_the_expansion_leads_to_the_same_optimum_in_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixed point of EM at α = 1 is that of the expanded bound."""
    passes, bounds = [], []
    for expands in (True, False):
        monkeypatch.setattr(StudentT, "expands", expands)
        model = torchem.Mixture(Categorical(2), family := StudentT(2, 2)).double()
        family.dof = [2.0, 2.0]
        family.freeze("dof")
        result = torchem.fit(model, heavy(freedom=2.0), seed=0, max_iter=500, tol=1e-10, progress=False)
        passes.append(len(result.history))
        bounds.append(result.bound)
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-6)
    assert 3 * passes[0] < 2 * passes[1]


def test_the_m_step_reaches_what_an_optimiser_finds() -> None:
    t, x, expected = student(2, 2), with_holes(3 * randn(60, 2, seed=7), 0.2), soft(60, 2)
    stats = t.stats(Batch(x), expected).map(Tensor.detach)
    best = student(2, 2)
    for name, value in t.maximize(stats).items():
        best.get_parameter(name).data = value.detach()
    top = float(best.expected_log_prob(stats).detach())
    walk = torch.optim.LBFGS(t.parameters(), max_iter=300, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> float:
        walk.zero_grad()
        loss = -t.expected_log_prob(stats)
        loss.backward()
        return float(loss.detach())

    walk.step(closure)
    assert float(t.expected_log_prob(stats).detach()) == pytest.approx(top, abs=1e-6)


@pytest.mark.parametrize("freedom", [0.11, 0.5, 1.0, 3.0, 30.0, 3000.0])
def test_degrees_of_freedom_solve_their_equation(freedom: float) -> None:
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    close(_freedom(half.log() - half.digamma()), 2 * half, rtol=1e-7)


def test_bounds_of_the_degrees_of_freedom() -> None:
    assert _freedom(torch.tensor([1e-9, -1.0, 50.0], dtype=torch.float64)).tolist() == [1e6, 1e6, 0.1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truth_is_recovered_by_a_fit(dtype: torch.dtype) -> None:
    truth = student(2, 2).to(dtype)
    truth.means, truth.dof = [[-6.0, 0.0], [6.0, 1.0]], [1.5, 6.0]
    x = truth.sample(torch.arange(8000) % 2, generator=rng(4))
    found = StudentT(2, 2)
    torchem.fit(torchem.Mixture(Categorical(2), found).to(dtype), x, seed=0, tol=1e-6, max_iter=200, progress=False)
    order = found.means[:, 0].argsort()
    close(found.means[order], truth.means, rtol=0, atol=0.15)
    close(found.scales[order], truth.scales, rtol=0.1, atol=0.05)
    close(found.dof[order], truth.dof, rtol=0.2)


def test_a_fit_in_one_dimension_is_that_of_scipy() -> None:
    """`scipy.stats.t.fit` climbs the likelihood by a simplex."""
    x = scipy_stats.t(df=3.5, loc=1.0, scale=2.0).rvs(1500, random_state=3)
    freedom, location, scale = scipy_stats.t.fit(x)
    model: Any = torchem.Mixture(Categorical(1), StudentT(1, 1)).double()
    result = torchem.fit(model, x[:, None], seed=0, tol=1e-12, max_iter=2000, accelerate="anderson")
    assert result.bound >= scipy_stats.t.logpdf(x, freedom, location, scale).sum() - 1e-6
    found = [model.component.dof, model.component.means, model.component.scales.sqrt()]
    assert [float(v.detach()) for v in found] == pytest.approx([freedom, location, scale], rel=1e-3)


def ecme(x: np.ndarray, passes: int = 80) -> tuple[list[float], float]:
    """Log-likelihoods and ν of C. Liu, D. B. Rubin (1995): Σ divided by Σ u, ν by a line search of the likelihood."""
    freedom, center, scale, history = 10.0, x.mean(0), np.cov(x.T, bias=True), []

    def score(freedom: float) -> float:
        return float(scipy_stats.multivariate_t(center, scale, df=freedom).logpdf(x).sum())  # pyright: ignore

    for _ in range(passes):
        history.append(score(freedom))
        distance = np.einsum("ni,ij,nj->n", x - center, np.linalg.inv(scale), x - center)
        u = (freedom + x.shape[1]) / (freedom + distance)
        center = u @ x / u.sum()
        scale = (u[:, None] * (x - center)).T @ (x - center) / u.sum()
        ends = (math.log(0.1), math.log(1e6))
        found = optimize.minimize_scalar(lambda t: -score(math.exp(t)), bounds=ends, options={"xatol": 1e-8})
        freedom = math.exp(found.x)  # pyright: ignore[reportAttributeAccessIssue]
    return history, freedom


def of_one(x: Any, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[StudentT, Any]:
    model = torchem.Mixture(Categorical(1), family := StudentT(1, x.shape[1])).to(dtype)
    return family, torchem.fit(model, torch.as_tensor(x, dtype=dtype), seed=0, progress=False, **options)


@pytest.mark.parametrize(("freedom", "passes"), [(3.0, 15), (10.0, 15), (50.0, 10)])
def test_the_degrees_of_freedom_do_not_crawl(freedom: float, passes: int) -> None:
    """Passes to within a thousandth of a nat: ECME takes 9, 6 and 3, climbing Q took 26, 124 and more than 3000."""
    law = scipy_stats.multivariate_t([0.0, 0.0], [[1.0, 0.3], [0.3, 2.0]], df=freedom)  # pyright: ignore
    x = law.rvs(500, random_state=1)
    history, expected = ecme(x)
    family, result = of_one(x, tol=0, max_iter=60)
    assert result.bound == pytest.approx(history[-1], abs=1e-5)
    assert next(i for i, value in enumerate(result.history) if value > history[-1] - 1e-3) <= passes
    if expected < 1e5:  # else all that is left of a slope is rounding
        assert float(family.dof.detach()) == pytest.approx(expected, rel=1e-5)


def test_a_fit_of_two_groups_by_default_comes_near_the_degrees_of_freedom() -> None:
    truth = student(2, 2)
    truth.means, truth.dof = [[-8.0, 0.0], [8.0, 1.0]], [5.0, 5.0]
    x = truth.sample(torch.arange(2000) % 2, generator=rng(5))
    found = []
    for options in ({}, {"tol": 1e-9, "max_iter": 200}):
        model = torchem.Mixture(Categorical(2), family := StudentT(2, 2)).double()
        torchem.fit(model, x, seed=0, progress=False, **options)
        found.append(family.dof.detach().sort().values)
    close(found[0], found[1], rtol=0.12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_tails_end_at_many_degrees_of_freedom(dtype: torch.dtype) -> None:
    """The likelihood is flat where tails are normal: climbing Q is on its way at ν = 141 after 1500 passes."""
    x = randn(1000, 2)
    normal = torchem.fit(torchem.GaussianMixture(1, 2).double(), x, seed=0)
    family, result = of_one(x, dtype, tol=1e-8, max_iter=40)
    assert result.converged
    assert result.bound == pytest.approx(normal.bound, abs=0.05)
    assert float(family.dof.detach()) > 200


@pytest.mark.parametrize("freedom", [0.5, 3.0, 40.0])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_bound_in_the_degrees_of_freedom_touches_and_stays_below(freedom: float, share: float) -> None:
    """What statistics tell of ν against the likelihood itself, on both sides; no other ν has more of it."""
    t = StudentT(1, 2).double()
    t.dof = [freedom]
    batch = Batch(with_holes(heavy(200), share))
    tails, best = _Tails(t.stats(batch, torch.ones(200, 1).double())), []
    here = float((tails.log_likelihood(t.dof.double()) - t.log_prob(batch).sum()).detach())
    for ratio in (0.2, 0.5, 0.99, 1.01, 1.5, 4.0, 100.0):
        t.dof = [max(0.1, freedom * ratio)]
        best.append(float(tails.log_likelihood(t.dof.double()).detach()))
        assert best[-1] - float(t.log_prob(batch).sum().detach()) <= here + 1e-9
        if abs(ratio - 1) < 0.1:
            assert best[-1] - float(t.log_prob(batch).sum().detach()) == pytest.approx(here, abs=1e-5)
    top = tails.maximum(torch.full((1,), torch.nan, dtype=torch.float64))
    assert float(tails.log_likelihood(top).detach()) >= max(best)


def test_both_bounds_are_one_where_statistics_were_taken() -> None:
    """Kept statistics (incremental EM) hold what one leaves out of the other's log-likelihood."""
    for kind in ("full", "tied"):
        t = student(2, 2, kind)
        stats = t.stats(Batch(with_holes(heavy(100), 0.2)), soft(100, 2))
        close(t.expected_log_prob(stats.mix()), t.expected_log_prob(stats))


def test_statistics_of_several_degrees_of_freedom_take_the_step_of_q() -> None:
    """Stochastic EM averages over parameters: what the likelihood says of ν is then of none of them."""
    t, x = student(2, 2), Batch(heavy(100))
    one = t.stats(x, soft(100, 2)).map(Tensor.detach)
    close(t.maximize(one + one)["log_freedom"], t.maximize(one)["log_freedom"])
    target = one["scale"].log() - one["count"].log() - one["log"] / one["count"]
    t.dof = 1.5 * t.dof.detach()
    two = one + t.stats(x, soft(100, 2)).map(Tensor.detach) * 1e-3
    close(t.maximize(two)["log_freedom"].exp(), _freedom(target), rtol=1e-2)


def test_jumps_keep_freedom_within_its_bounds() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3)) * np.array([1.0, 10.0, 0.1])
    x[:20, 2], x[20:30] = 0.1 * x[:20, 0], x[20].copy()
    x[:, 1] += 5
    model = torchem.Mixture(Categorical(3), StudentT(3, 3)).double()
    # Normal tails, and a component on one point: both bounds are where EM leads.
    result = torchem.fit(model, x, seed=0, accelerate="anderson", max_iter=150, tol=1e-12, progress=False)
    assert result.status == "converged"
    freedom = model.component.dof.detach()  # pyright: ignore
    assert float(freedom.amin()) == pytest.approx(0.1)
    assert float(freedom.amax()) == pytest.approx(1e6)


def test_outliers_do_not_move_it() -> None:
    x = torch.cat([randn(200, 2, seed=6), torch.full((6, 2), 80.0, dtype=torch.float64)])
    robust, normal = torchem.Mixture(Categorical(1), StudentT(1, 2)).double(), torchem.GaussianMixture(1, 2).double()
    for model in (robust, normal):
        torchem.fit(model, x, seed=0, tol=1e-8, max_iter=300, progress=False)
    assert float(robust.component.means.detach().norm()) < 0.3  # pyright: ignore
    assert float(normal.means.detach().norm()) > 2


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_floored_scales_still_climb(kind: str) -> None:
    x = heavy(200)
    x[:, 1] = 0.5 + 1e-9 * randn(200, seed=8)
    model = torchem.Mixture(Categorical(2), StudentT(2, 2, kind, 1e-2, "absolute")).double()  # pyright: ignore
    result = torchem.fit(model, x, seed=0, max_iter=40, tol=0, progress=False)
    assert result.floored == [0, 1]
    for before, after in itertools.pairwise(result.history):
        assert after >= before - 1e-9 * abs(before)


def test_frozen_views() -> None:
    t, x, expected = student(), 3 * randn(40, 2, seed=9), soft(40, 3)
    free = t.n_parameters()
    t.freeze("dof", "means")
    values = t.maximize(t.stats(Batch(x), expected))
    assert torch.equal(values["log_freedom"], t.log_freedom)
    assert torch.equal(values["normal.mean"], t.normal.mean)
    assert t.n_parameters() == free - 3 - 6
    t.unfreeze()
    t.freeze("dof", mask=torch.tensor([True, False, False]))
    values = t.maximize(t.stats(Batch(x), expected))
    assert (values["log_freedom"] == t.log_freedom).tolist() == [True, False, False]
    t.unfreeze("dof", "normal.means").freeze("means", mask=torch.tensor([True, False, False])).freeze("scales")
    values = t.maximize(t.stats(Batch(x), expected))
    assert (values["normal.mean"] == t.means).all(-1).tolist() == [True, False, False]
    assert torch.equal(values["normal.scale"], t.normal.scale)
    t.unfreeze("means", "scales").freeze()
    assert t.n_parameters() == 0
    assert all(torch.equal(v, t.get_parameter(n)) for n, v in t.maximize(t.stats(Batch(x), expected)).items())
    with pytest.raises(InvalidArgument, match="freeze"):
        t.freeze("covariances")


def test_moments_and_pruning() -> None:
    t = student()
    t.dof = [1.0, 4.0, 10.0]
    mean, variance = t.moments(Batch(torch.zeros(1, 2)))
    close(mean[0], t.means)
    spread = dense(t).diagonal(dim1=-2, dim2=-1)
    assert variance[0, 0].isinf().all()
    close(variance[0, 1:], spread[1:] * torch.tensor([[2.0], [1.25]]))
    small = t.select(torch.tensor([2, 0]))
    x = Batch(randn(5, 2))
    close(small.log_prob(x), t.log_prob(x)[:, [2, 0]])


def test_a_chain_of_them() -> None:
    model = torchem.HMM(Categorical(2), Categorical(2, 2), StudentT(2, 2)).double()
    result = torchem.fit(model, heavy(300).view(6, 50, 2), seed=0, max_iter=20, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


def test_a_prior_of_the_part_and_no_posterior_over_all() -> None:
    model = torchem.Mixture(Categorical(2), family := StudentT(2, 2)).double()
    with pytest.raises(InvalidArgument, match="its part normal has one"):
        torchem.Variational(family)
    family.normal.prior = torchem.priors.NormalInverseWishart()
    result = torchem.fit(model, heavy(200), seed=0, max_iter=20, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: StudentT(0, 2), "n_components"),
        (lambda: setattr(StudentT(2, 2), "dof", [1.0]), "dof"),
        (lambda: setattr(StudentT(2, 2), "dof", [1.0, 0.0]), "dof"),
        (lambda: StudentT(2, 2).check(Batch(rand(3, 5))), "data"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_scales_are_integrated_out_of_expected_densities(kind: str) -> None:
    """log ∫ exp(E log N(x; μ, (uΛ)⁻¹)) Gamma(u) du under a posterior of μ and Λ, by quadrature."""
    t: Any = student(2, 2, kind)
    x = with_holes(2 * randn(20, 2, seed=4), 0.25) if kind in ("diag", "spherical") else 2 * randn(20, 2, seed=4)
    batch, share = Batch(x), soft(20, 2)
    t.normal = torchem.Variational(t.normal)
    for name, value in t.maximize(t.stats(batch, share)).items():
        t.get_parameter(name).data = value.detach()
    natural = t.normal.factor.expected_natural(t.normal.posterior())
    z, seen = torch.where(x.isnan(), 0.0, x - t.normal.origin), (~x.isnan()).double()
    if kind in ("diag", "spherical"):
        square = natural["second"].unsqueeze(-1).expand(2, 2) if kind == "spherical" else natural["second"]
        constant, slope = seen @ natural["dof"].mT, seen @ natural["count"].mT + z @ natural["first"].mT
        slope = slope + z.square() @ square.mT
    else:
        square = natural["second"].expand(2, 2, 2)
        constant, slope = natural["dof"].expand(20, 2), natural["count"] + z @ natural["first"].mT
        slope = slope + torch.einsum("ni,kij,nj->nk", z, square, z)
    log_u = torch.linspace(-140, 12, 15201, dtype=torch.float64)
    half = (t.dof / 2).unsqueeze(-1)
    law = half * half.log() - half.lgamma() + half * log_u - half * log_u.exp()  # of log u
    size = seen.sum(-1)[:, None, None] / 2
    value = (constant - size[..., 0] * math.log(2 * math.pi)).unsqueeze(-1) + size * log_u
    value = value + slope.unsqueeze(-1) * log_u.exp() + law
    kernel = t.kernel()
    close(kernel.log_potential(batch), value.logsumexp(-1) + math.log(0.01))
    kernel.collect(batch, share)
    close(kernel.inner(), t.expected_log_prob(t.stats(batch, share)))


def test_draws_and_density_under_a_posterior() -> None:
    """The location's variance is not that of observations; the density that stands for the predictive is one."""
    t: Any = student(1, 1)
    t.dof, x = [6.0], 3 * randn(12, 1, seed=2)
    t.normal = torchem.Variational(t.normal, torchem.priors.NormalInverseWishart(0.0, 0.3, 6.0, 9.0))
    for name, value in t.normal.maximize(t.normal.stats(Batch(x[:2]), torch.ones(2, 1).double())).items():
        t.normal.get_parameter(name).data = value.detach()
    posterior = t.normal.posterior().map(Tensor.detach)
    nu, kappa = float(posterior["dof"] + 1), float(posterior["count"])
    draws = t.sample(torch.zeros(200_000, dtype=torch.long), None, rng(0))
    close(draws.var(), t.scales.flatten()[0] * nu / (nu - 2) * (6 / 4 + 1 / kappa), rtol=0.05)
    grid = torch.linspace(-3000, 3000, 600_001, dtype=torch.float64).unsqueeze(-1)
    close(t.log_prob(Batch(grid)).exp().sum() * 0.01, torch.ones(()), rtol=1e-6)
