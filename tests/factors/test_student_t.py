"""Multivariate t: densities, missing entries, the expanded M-step, outliers."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import close, rand, randn, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, StudentT
from torchem.factors.student_t import _freedom

KINDS = ("full", "tied", "diag", "spherical")


def student(k: int = 3, d: int = 2, kind: str = "full", seed: int = 0) -> StudentT:
    t = StudentT(k, d, kind).double()  # pyright: ignore[reportArgumentType]
    t.means = 2 * randn(k, d, seed=seed)
    t.normal.scale.data = 0.3 * randn(*t.normal.scale.shape, seed=seed + 1)
    if kind in ("full", "tied"):
        t.normal.scale.data = t.normal.scale.data.tril()
    t.freedom = torch.linspace(1.0, 9.0, k)
    return t


def heavy(n: int = 600, freedom: float = 1.5) -> Tensor:
    """Two groups with outliers."""
    truth = student(2, 2)
    truth.means, truth.freedom = [[-6.0, 0.0], [6.0, 1.0]], [freedom, freedom]
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
        mean, freedom = t.means[k].detach().numpy(), float(t.freedom[k].detach())
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
        family.freedom = [2.0, 2.0]
        family.freeze("freedom")
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
    assert _freedom(torch.tensor([1e-9, -1.0, 50.0], dtype=torch.float64)).tolist() == [1e4, 1e4, 0.1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truth_is_recovered_by_a_fit(dtype: torch.dtype) -> None:
    truth = student(2, 2).to(dtype)
    truth.means, truth.freedom = [[-6.0, 0.0], [6.0, 1.0]], [1.5, 6.0]
    x = truth.sample(torch.arange(8000) % 2, generator=rng(4))
    found = StudentT(2, 2)
    torchem.fit(torchem.Mixture(Categorical(2), found).to(dtype), x, seed=0, tol=1e-6, max_iter=200, progress=False)
    order = found.means[:, 0].argsort()
    close(found.means[order], truth.means, rtol=0, atol=0.15)
    close(found.scales[order], truth.scales, rtol=0.1, atol=0.05)
    close(found.freedom[order], truth.freedom, rtol=0.2)


def test_a_fit_in_one_dimension_is_that_of_scipy() -> None:
    """`scipy.stats.t.fit` climbs the likelihood by a simplex."""
    x = scipy_stats.t(df=3.5, loc=1.0, scale=2.0).rvs(1500, random_state=3)
    freedom, location, scale = scipy_stats.t.fit(x)
    model: Any = torchem.Mixture(Categorical(1), StudentT(1, 1)).double()
    result = torchem.fit(model, x[:, None], seed=0, tol=1e-12, max_iter=2000, accelerate="anderson")
    assert result.bound >= scipy_stats.t.logpdf(x, freedom, location, scale).sum() - 1e-6
    found = [model.component.freedom, model.component.means, model.component.scales.sqrt()]
    assert [float(v.detach()) for v in found] == pytest.approx([freedom, location, scale], rel=1e-3)


def test_many_degrees_of_freedom_are_found_in_few_accelerated_passes() -> None:
    """The likelihood is flat where tails are normal: EM alone is on its way at ν = 141 after 1500 passes."""
    x = randn(1000, 2)
    normal = torchem.fit(torchem.GaussianMixture(1, 2).double(), x, seed=0)
    model: Any = torchem.Mixture(Categorical(1), StudentT(1, 2)).double()
    result = torchem.fit(model, x, seed=0, tol=1e-8, max_iter=150, accelerate="anderson")
    assert result.converged
    assert normal.bound - 0.05 < result.bound < normal.bound
    assert float(model.component.freedom.detach()) > 200


def test_jumps_keep_freedom_within_its_bounds() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3)) * np.array([1.0, 10.0, 0.1])
    x[:20, 2], x[20:30] = 0.1 * x[:20, 0], x[20].copy()
    x[:, 1] += 5
    model = torchem.Mixture(Categorical(3), StudentT(3, 3)).double()
    # Normal tails, and a component on one point: both bounds are where EM leads.
    result = torchem.fit(model, x, seed=0, accelerate="anderson", max_iter=150, tol=1e-12, progress=False)
    assert result.status == "converged"
    freedom = model.component.freedom.detach()  # pyright: ignore
    assert float(freedom.amin()) == pytest.approx(0.1)
    assert float(freedom.amax()) == pytest.approx(1e4)


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
    t.freeze("freedom", "normal.means")
    values = t.maximize(t.stats(Batch(x), expected))
    assert torch.equal(values["log_freedom"], t.log_freedom)
    assert torch.equal(values["normal.mean"], t.normal.mean)
    assert t.n_parameters() == free - 3 - 6
    t.unfreeze()
    t.freeze("freedom", mask=torch.tensor([True, False, False]))
    values = t.maximize(t.stats(Batch(x), expected))
    assert (values["log_freedom"] == t.log_freedom).tolist() == [True, False, False]
    t.unfreeze("freedom", "normal.means").freeze()
    assert t.n_parameters() == 0
    assert all(torch.equal(v, t.get_parameter(n)) for n, v in t.maximize(t.stats(Batch(x), expected)).items())
    with pytest.raises(InvalidArgument, match="freeze"):
        t.freeze("covariances")


def test_moments_and_pruning() -> None:
    t = student()
    t.freedom = [1.0, 4.0, 10.0]
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
    with pytest.raises(InvalidArgument, match="conjugate prior"):
        torchem.variational(model)
    family.normal.prior = torchem.priors.NormalInverseWishart()
    result = torchem.fit(model, heavy(200), seed=0, max_iter=20, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: StudentT(0, 2), "n_components"),
        (lambda: setattr(StudentT(2, 2), "freedom", [1.0]), "freedom"),
        (lambda: setattr(StudentT(2, 2), "freedom", [1.0, 0.0]), "freedom"),
        (lambda: StudentT(2, 2).check(Batch(rand(3, 5))), "data"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()
