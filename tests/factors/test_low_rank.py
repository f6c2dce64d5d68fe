"""Covariances of low rank: against dense normal densities, scikit-learn, principal components; and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.decomposition import FactorAnalysis
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws import test_model as laws
from tests.laws.cases import ModelCase, close, rand, randn
from tests.regressions.common import as_users_run_it
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Gaussian, LowRankGaussian


def family(k: int, d: int, q: int, noise: Any = "diag", seed: int = 0) -> LowRankGaussian:
    g = LowRankGaussian(k, d, q, noise).double()
    g.means = 3 * randn(k, d, seed=seed)
    g.loadings = randn(k, d, q, seed=seed + 1)
    g.noise_variances = 0.2 + rand(*g.noise_scale.shape, seed=seed + 2)
    return g


def wine() -> Tensor:
    bunch: Any = load_wine()
    x = torch.from_numpy(bunch.data)
    return (x - x.mean(0)) / x.std(0)


def full(g: LowRankGaussian) -> Gaussian:
    other = Gaussian(g.n_components, g.n_features).double()
    other.means, other.covariances = g.means.detach(), g.covariances.detach()
    return other


# ---- against others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["diag", "spherical"])
@pytest.mark.parametrize("holes", [False, True])
def test_density_and_imputation_are_those_of_the_dense_normal(noise: str, holes: bool) -> None:
    g = family(3, 5, 2, noise)
    x = 3 * randn(30, 5, seed=9)
    if holes:
        x[rand(30, 5) < 0.4] = torch.nan
        x[0] = torch.nan
    batch = Batch(x)
    close(g.log_prob(batch), full(g).log_prob(batch), rtol=1e-10)
    for ours, theirs in zip(g.conditional(batch), full(g).conditional(batch), strict=True):
        close(ours, theirs, rtol=1e-9, atol=1e-12)
    close(g.moments(batch)[1].flatten(), g.covariances.diagonal(dim1=-2, dim2=-1).flatten())


def test_density_does_not_cancel_where_noise_is_small() -> None:
    g = family(1, 6, 2)
    g.noise_variances = torch.full((1, 6), 1e-6)
    x = g.sample(torch.zeros(20, dtype=torch.long), generator=cases.rng(0))
    small = LowRankGaussian(1, 6, 2)
    small.load_state_dict(g.float().state_dict())
    found = small.log_prob(Batch(x.float())).detach()
    exact = full(small.double()).log_prob(Batch(x.float().double()))
    close(found.double(), exact, rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_one_component_is_scikit_learns_factor_analysis(rank: int) -> None:
    x = wine()
    peer = FactorAnalysis(rank, tol=1e-9, max_iter=100_000, svd_method="lapack").fit(x.numpy())
    model = torchem.GaussianMixture(1, 13, "low_rank", rank).double()
    result = torchem.fit(model, x, seed=0, tol=1e-12, max_iter=3000, accelerate="squarem")
    assert result.bound == pytest.approx(peer.score(x.numpy()) * len(x), abs=1e-3)
    close(model.covariances[0], torch.from_numpy(peer.get_covariance()), rtol=0, atol=1e-3)


def test_spherical_noise_gives_probabilistic_principal_components() -> None:
    """M. E. Tipping, C. M. Bishop (1999), equations 7 and 8."""
    x, q = wine(), 3
    model = torchem.Mixture(Categorical(1), LowRankGaussian(1, 13, q, "spherical")).double()
    result = torchem.fit(model, x, seed=0, tol=1e-12, max_iter=3000)
    values, axes = torch.linalg.eigh(torch.cov(x.mT, correction=0))
    noise = values[:-q].mean()
    covariance = (axes[:, -q:] * (values[-q:] - noise)) @ axes[:, -q:].mT + noise * torch.eye(13)
    g: Any = model.component
    close(g.noise_variances, noise.expand(1), rtol=1e-6)
    close(g.covariances[0], covariance, rtol=0, atol=1e-5)
    normal = torch.distributions.MultivariateNormal(x.mean(0), covariance)
    assert result.bound == pytest.approx(float(normal.log_prob(x).sum()), abs=1e-6)
    scores = g.scores(Batch(x))[:, 0].detach()
    along = (x - x.mean(0)) @ torch.linalg.pinv(g.loadings[0].detach()).mT
    # Ordinary scores, shrunken.
    assert float((scores - along).norm()) < float(along.norm())


def test_em_with_missing_entries_is_that_of_the_dense_covariance() -> None:
    """With q = D − 1 = 1 two columns have any covariance: both families have the same optimum."""
    x = randn(60, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]).double()
    x[::4, 0], x[1::5, 1] = torch.nan, torch.nan
    low, dense = torchem.GaussianMixture(1, 2, "low_rank", 1).double(), torchem.GaussianMixture(1, 2).double()
    bounds = [torchem.fit(m, x, seed=0, tol=1e-13, max_iter=2000).bound for m in (low, dense)]
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-6)
    close(low.covariances, dense.covariances, rtol=1e-4, atol=1e-4)


# ---- EM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate": "incremental"}, {"restarts": 3}, {"e_step": "hard"}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_objective_never_falls(frozen: bool, options: dict[str, Any]) -> None:
    truth = family(2, 5, 2)
    x = truth.sample(torch.arange(160) % 2, generator=cases.rng(3))
    x[rand(160, 5) < 0.1] = torch.nan
    given: dict[str, Any] = dict(options)
    if given.get("accumulate"):
        given |= {"accumulate": torchem.Incremental(), "batch_size": 40}
    model = torchem.GaussianMixture(2, 5, "low_rank", 2).double()
    if frozen:
        model.component.freeze("noise_variances", mask=torch.tensor([True, False]))
    result = torchem.fit(model, x, seed=1, init="random", max_iter=15, tol=0, **given)
    assert result.bound > result.history[0]
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history[1:], result.history[2:], strict=False))


def test_the_expansion_makes_em_faster() -> None:
    x = family(1, 8, 2, "spherical").sample(torch.zeros(400, dtype=torch.long), generator=cases.rng(1))
    passes = []
    for plain in (False, True):
        g = LowRankGaussian(1, 8, 2, "spherical").double()
        if plain:
            g.freeze("means", mask=torch.tensor([False]))  # a mask of nothing
        model = torchem.Mixture(Categorical(1), g).double()
        passes.append(torchem.fit(model, x, seed=0, tol=1e-11, max_iter=2000).n_iter)
    assert 3 * passes[0] < passes[1]


def test_a_heywood_case_is_named() -> None:
    x = randn(100, 4)
    x[:, 1] = x[:, 0]  # a factor without noise
    model = torchem.GaussianMixture(1, 4, "low_rank", 1).double()
    result = torchem.fit(model, x, seed=0, tol=1e-9, max_iter=2000)
    assert result.floored == [0]
    assert math.isfinite(result.bound)


def mixed(holes: float = 0.0) -> ModelCase:
    model = torchem.GaussianMixture(3, 4, "low_rank", 2).double()
    model.component = family(3, 4, 2, "diag", seed=3)
    x = cases.blobs(40, 4, 3)
    return ModelCase(model, Batch(torch.where(rand(40, 4, seed=8) < holes, torch.nan, x)))


@pytest.mark.parametrize("holes", [0.0, 0.25])
@pytest.mark.parametrize(
    "law",
    [
        laws.test_bound_is_the_log_likelihood_where_it_was_computed,
        laws.test_bound_lies_below_the_log_likelihood_elsewhere,
        laws.test_fisher_identity,
        laws.test_invariance_to_chunks_and_order,
        laws.test_weights_are_repetitions,
        laws.test_float32_near_float64,
        laws.test_em_map_under_vmap,
        laws.test_em_map_of_many_problems_at_once,
    ],
    ids=lambda law: law.__name__.removeprefix("test_"),
)
def test_laws_of_a_mixture(law: Any, holes: float, device: torch.device) -> None:
    law(lambda: mixed(holes), device)


def test_derivatives_of_a_mixture(device: torch.device) -> None:
    laws.test_em_map_is_differentiable_in_parameters_and_data(mixed, device)
    laws.test_log_prob_gradcheck_twice(mixed)


# ---- the class ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "d", "q"), [(1, 4, 1), (3, 5, 2), (2, 10, 3)])
def test_parameters_are_counted_without_rotations(k: int, d: int, q: int) -> None:
    model = torchem.GaussianMixture(k, d, "low_rank", q)
    assert model.n_parameters() == k - 1 + k * (d + d * q - q * (q - 1) // 2 + d)
    assert LowRankGaussian(k, d, q, "spherical").n_parameters() == k * (d + d * q - q * (q - 1) // 2 + 1)
    model.component.freeze("loadings")
    assert model.n_parameters() == k - 1 + 2 * k * d


def test_saved_and_pruned(tmp_path: Any) -> None:
    model = torchem.GaussianMixture(3, 4, "low_rank", 2)
    model.component.loadings = randn(3, 4, 2)
    torchem.save(model, tmp_path / "m.safetensors")
    again: Any = torchem.load(tmp_path / "m.safetensors")
    x = randn(5, 4).float()
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    again.prune(torch.tensor([True, False, True]))
    assert torch.equal(again.component.loadings, model.component.loadings[[0, 2]])
    assert again.log_prob(x).shape == (5,)


def test_no_tensor_of_a_dense_covariance() -> None:
    """20 000 columns: one dense matrix would take three gigabytes."""
    g = LowRankGaussian(2, 20_000, 2)
    x = Batch(torch.randn(3, 20_000, generator=cases.rng(0)))
    stats = g.stats(x, torch.full((3, 2), 0.5))
    assert max(leaf.numel() for leaf in stats.leaves()) <= 2 * 20_000 * 2
    assert all(value.isfinite().all() for value in g.maximize(stats).values())


def test_bad_input() -> None:
    with as_users_run_it(), pytest.raises(InvalidArgument, match="rank: expected a whole number from 1"):
        LowRankGaussian(2, 3, 3)
    with as_users_run_it(), pytest.raises(InvalidArgument, match="rank: expected a number of scores"):
        torchem.GaussianMixture(2, 3, "low_rank")
    with as_users_run_it(), pytest.raises(InvalidArgument, match="rank: expected a number of scores"):
        torchem.GaussianMixture(2, 3, "full", 1)
    model = torchem.GaussianMixture(2, 3, "low_rank", 1)
    with as_users_run_it(), pytest.raises(InvalidArgument, match=r"component\.loadings"):
        model.covariances = np.eye(3)
    with as_users_run_it(), pytest.raises(InvalidArgument, match="noise_variances: expected positive"):
        model.component.noise_variances = torch.zeros(2, 3)
