"""`sample` draws from the density that `log_prob` states, for every covariance type."""

import math

import pytest
import torch

import torchem
from tests.regressions.common import COVARIANCE_TYPES, DTYPES, dense, mixture

N = 20_000


def target(covariance_type: str, dtype: torch.dtype, device: torch.device) -> torchem.GaussianMixture:
    """Strongly unequal and, where the type allows, correlated covariances: standard deviations from 0.5 to 9."""
    model = mixture(3, 2, covariance_type, dtype, device)
    full = torch.tensor([[[9.0, 4.0], [4.0, 4.0]], [[0.25, -0.2], [-0.2, 1.0]], [[81.0, 0.0], [0.0, 0.5]]])
    model.weights, model.means = [0.5, 0.2, 0.3], [[0.0, 0.0], [20.0, -5.0], [-60.0, 7.0]]
    model.covariances = {
        "full": full, "tied": full[0], "diag": full.diagonal(dim1=-2, dim2=-1), "spherical": [9.0, 0.25, 81.0],
    }[covariance_type]  # fmt: skip
    return model


def draw(model: torchem.GaussianMixture, n: int = N, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(model.device).manual_seed(seed)
    return model.sample(n, latents=True, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_moments_of_each_component(covariance_type: str, dtype: torch.dtype, device: torch.device) -> None:
    model = target(covariance_type, dtype, device)
    x, z = draw(model)
    assert (x.shape, x.dtype, x.device.type, z.shape) == ((N, 2), dtype, device.type, (N,))
    x, z, covariances = x.double().cpu(), z.cpu(), dense(model)
    share = torch.bincount(z, minlength=3) / N
    weights = model.weights.detach().cpu().double()
    # Five standard errors.
    assert bool(((share - weights).abs() < 5 * (weights * (1 - weights) / N).sqrt()).all())
    for k in range(3):
        part = x[z == k]
        n, variance = len(part), covariances[k].diagonal()
        mean = model.means[k].detach().cpu().double()
        assert bool(((part.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())
        error = (variance.outer(variance) + covariances[k].square()).div(n).sqrt()
        assert bool(((part.mT.cov() - covariances[k]).abs() < 5 * error).all())


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_log_prob_of_draws(covariance_type: str, device: torch.device) -> None:
    """Mahalanobis distances are χ² with D degrees of freedom: their mean and variance are known."""
    model = target(covariance_type, torch.float64, device)
    x, z = draw(model)
    log_prob = model.component.log_prob(torchem.Batch(x)).gather(-1, z.unsqueeze(-1))[:, 0].detach().cpu()
    half_log_det = (2 * math.pi * dense(model)).logdet()[z.cpu()] / 2
    chi2 = -2 * (log_prob + half_log_det)
    assert float(chi2.mean()) == pytest.approx(2, abs=5 * math.sqrt(4 / N))
    assert float(chi2.var()) == pytest.approx(4, abs=5 * math.sqrt((12 * 4 + 2 * 16) / N))


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_density_of_draws_in_one_dimension(covariance_type: str, device: torch.device) -> None:
    """Kolmogorov–Smirnov against the integral of exp log_prob."""
    model = mixture(2, 1, covariance_type, device=device)
    model.weights, model.means = [0.3, 0.7], [[-4.0], [2.0]]
    model.covariances = {
        "full": [[[9.0]], [[0.25]]],
        "tied": [[9.0]],
        "diag": [[9.0], [0.25]],
        "spherical": [9.0, 0.25],
    }[covariance_type]
    x = draw(model)[0][:, 0].sort().values.cpu()
    grid = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    density = model.log_prob(grid.unsqueeze(-1).to(device)).detach().exp().cpu()
    cumulative = torch.cumulative_trapezoid(density, grid)
    assert float(cumulative[-1]) == pytest.approx(1, abs=1e-8)
    expected = cumulative[torch.searchsorted(grid, x).clamp(max=len(cumulative)) - 1]
    distance = float((expected - torch.arange(1, N + 1) / N).abs().max())
    assert distance < 1.95 / math.sqrt(N)  # one in a thousand, and the seed is fixed


def test_truth_is_recovered_from_draws(device: torch.device) -> None:
    model = target("full", torch.float64, device)
    x, _ = draw(model)
    found = torchem.GaussianMixture(3, 2).double().to(device)
    result = torchem.fit(found, x, seed=0, progress=False)
    assert result.converged
    assert result.bound >= float(model.log_prob(x).sum().detach())
    order, wanted = (m.means.detach()[:, 0].argsort() for m in (found, model))
    torch.testing.assert_close(found.means[order], model.means[wanted], rtol=0.02, atol=0.15)
    torch.testing.assert_close(found.covariances[order], model.covariances[wanted], rtol=0.06, atol=0.5)


@pytest.mark.parametrize("n", [0, 1])
def test_few_draws(n: int, device: torch.device) -> None:
    x, z = draw(target("full", torch.float64, device), n)
    assert (x.shape, z.shape) == ((n, 2), (n,))
    assert z.dtype == torch.long


def test_draws_repeat_and_leave_the_global_generator_alone(device: torch.device) -> None:
    model = target("full", torch.float64, device)
    before = torch.get_rng_state()
    first, second = draw(model, 50), draw(model, 50)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], draw(model, 50, seed=4)[0])


def test_categories(device: torch.device) -> None:
    model = torchem.Mixture(torchem.factors.Categorical(2), torchem.factors.Categorical(2, 3)).double().to(device)
    model.weights = [0.25, 0.75]
    model.component.probs = [[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]  # pyright: ignore
    x, z = model.sample(N, latents=True, generator=torch.Generator(device).manual_seed(1))
    assert x.shape == (N, 1)
    for k, probs in enumerate([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]):
        part = x[z == k][:, 0].cpu()
        share = torch.bincount(part, minlength=3) / len(part)
        torch.testing.assert_close(share.double(), torch.tensor(probs).double(), rtol=0, atol=0.03)
    # What the support forbids never comes.
    assert not bool(((x[:, 0] == 2) & (z == 0)).any())


def test_weight_zero_is_never_drawn(device: torch.device) -> None:
    model = target("diag", torch.float64, device)
    model.weights = [0.5, 0.0, 0.5]
    assert not bool((draw(model)[1] == 1).any())
