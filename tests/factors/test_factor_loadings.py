"""Posteriors of factor analysers' parameters: against bounds written out, quadrature, and what is known exactly."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, MultivariateNormal, Normal, kl_divergence

import torchem
from tests.laws import cases
from tests.laws.cases import close, rand, randn
from torchem import Variational, priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Gaussian, LowRankGaussian

RELEVANCE = (0.7, 0.4)


def rows(n: int, d: int = 3, share: float = 0.25) -> Tensor:
    """Correlated columns, some entries missing, a row without any."""
    x = randn(n, 1, seed=1) * torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])[:d] + 0.6 * randn(n, d, seed=2) + 1.0
    x = x.masked_fill(rand(n, d, seed=3) < share, torch.nan)
    x[-1] = torch.nan if share else x[-1]
    return x


def posterior(k: int, q: int, noise: Any = "diag", prior: Any = None, x: Tensor | None = None) -> tuple[Any, Batch]:
    """Of parameters that have seen the rows under soft responsibilities."""
    x = rows(8) if x is None else x
    prior = priors.FactorLoadings([0.5, 0.0, -0.5], 0.7, 1.3, dof=2.5, scale=0.8) if prior is None else prior
    factor = Variational(LowRankGaussian(k, x.shape[-1], q, noise).double(), prior)
    batch, share = Batch(x), cases.soft(len(x), k, seed=7)
    cases.assign(factor, factor.initialize(batch, share))
    for _ in range(2):
        cases.assign(factor, factor.maximize(factor.stats(batch, share)))
    return factor, batch


def law(factor: Any, k: int, d: int) -> tuple[Gamma, Tensor, Tensor]:
    """Of a column: that of its precision λ, and the mean and the covariance times λ of (μ, w)."""
    coefficient = torch.cat([factor.means[k, d, None], factor.loadings[k, d]])
    nu = factor.log_freedom.exp().expand(factor.noise_variances.shape)
    entry = (k, d) if factor.noise == "diag" else (k,)
    precision = Gamma(nu[entry] / 2, nu[entry] * factor.noise_variances[entry] / 2)
    root = factor.log_precision[k, d].tril(-1) + factor.log_precision[k, d].diagonal().exp().diag()
    return precision, coefficient, torch.linalg.inv(root @ root.mT)


def expected_density(factor: Any, k: int, d: int, x: Tensor, z: Tensor) -> Tensor:
    """E log N(x; μ + wᵀ z, 1/λ) of a column."""
    precision, coefficient, spread = law(factor, k, d)
    one = torch.cat([torch.ones_like(z[..., :1]), z], -1)
    log_precision = precision.concentration.digamma() - precision.rate.log()
    distance = precision.mean * (x - one @ coefficient).square() + ((one @ spread) * one).sum(-1)
    return 0.5 * (log_precision - math.log(2 * math.pi) - distance)


@pytest.mark.parametrize("noise", ["diag", "spherical"])
def test_scores_are_integrated_out_of_expected_densities(noise: str) -> None:
    """log ∫ exp(E log p(x | z)) N(z) dz over the columns that a row has, by quadrature."""
    factor, batch = posterior(2, 1, noise)
    grid = torch.linspace(-12, 12, 1001, dtype=torch.float64).unsqueeze(-1)
    wanted = torch.empty(len(batch), 2, dtype=torch.float64)
    for n, k in itertools.product(range(len(batch)), range(2)):
        value = Normal(0.0, 1.0).log_prob(grid[:, 0])
        for d in range(3):
            if not batch.x[n, d].isnan():
                value = value + expected_density(factor, k, d, batch.x[n, d], grid).detach()
        wanted[n, k] = value.logsumexp(0) + math.log(24 / 1000)
    close(factor.log_potential(batch), wanted, rtol=1e-8, atol=1e-9)
    whole = Batch(rows(8, share=0.0))
    kernel = factor.kernel()
    close(torch.cat([kernel.log_potential(whole[i : i + 5]) for i in (0, 5)]), factor.log_potential(whole))


def divergence(factor: Any, alpha: Tensor) -> Tensor:
    """Σ KL of the columns from a prior whose loadings have precisions ``alpha [K, q]``."""
    prior, total = factor.prior, torch.zeros((), dtype=torch.float64)
    k, d, q = factor.loadings.shape
    start = Gamma(torch.tensor(prior.dof / 2).double(), torch.as_tensor(prior.scale) / 2)
    for i, j in itertools.product(range(k), range(d)):
        precision, coefficient, spread = law(factor, i, j)
        center = torch.cat([prior.mean[j, None], torch.zeros(q)])
        wide = torch.cat([torch.tensor([prior.mean_precision]).double(), alpha[i]]).reciprocal().diag()
        # Given λ both are normal, of covariances over λ: what depends on λ is its mean alone.
        gap = (coefficient - center).double()
        normal = kl_divergence(MultivariateNormal(0 * gap, spread), MultivariateNormal(0 * gap, wide))
        total = total + normal + 0.5 * precision.mean * (gap * (gap / wide.diagonal())).sum()
        if factor.noise == "diag" or j == 0:
            total = total + kl_divergence(precision, start)
    return total


@pytest.mark.parametrize("relevance", [None, RELEVANCE])
@pytest.mark.parametrize("noise", ["diag", "spherical"])
def test_the_bound_is_that_written_out(noise: str, relevance: Any) -> None:
    """Σ E log p(x, z, state | θ) + entropies − KL, entry by entry, of rows some of whose entries are missing."""
    fixed: dict[str, Any] = {"precision": 1.3} if relevance is None else {"relevance": relevance}
    factor, batch = posterior(2, 1, noise, priors.FactorLoadings([0.5, 0.0, -0.5], 0.7, dof=2.5, scale=0.8, **fixed))
    weights: Any = Categorical(2).double()
    weights.probs = torch.tensor([0.3, 0.7], dtype=torch.float64)
    model = torchem.Mixture(weights, factor)
    share = model.posterior(batch)
    mean, covariance = factor.factor.score_law(batch, factor.kernel())
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
    masses = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)  # exact for what is quadratic in z
    total = torch.zeros((), dtype=torch.float64)
    for n, k in itertools.product(range(len(batch)), range(2)):
        deviation = covariance[n, k, 0, 0].sqrt()
        z = mean[n, k] + deviation * nodes.unsqueeze(-1)
        value = weights.probs[k].log() - share[n, k].log() + Normal(0.0, deviation).entropy()
        value = value + (masses * Normal(0.0, 1.0).log_prob(z[:, 0])).sum()
        for d in range(3):
            if not batch.x[n, d].isnan():
                value = value + (masses * expected_density(factor, k, d, batch.x[n, d], z)).sum()
        total = total + share[n, k] * value
    if relevance is None:
        total = total - divergence(factor, torch.full((2, 1), 1.3, dtype=torch.float64))
    else:
        sizes = torch.zeros(2, 1, dtype=torch.float64)
        for k, d in itertools.product(range(2), range(3)):
            precision, coefficient, spread = law(factor, k, d)
            sizes[k] += (spread[1, 1] + precision.mean * coefficient[1].square()).detach()
        alpha = Gamma(RELEVANCE[0] + 1.5, RELEVANCE[1] + sizes / 2)
        close(factor.prior.precisions(factor.factor, factor.posterior()), alpha.mean)
        shape, rate = torch.tensor(RELEVANCE, dtype=torch.float64)
        start = Gamma(shape, rate)
        log_mean = alpha.concentration.digamma() - alpha.rate.log()
        total = total - divergence(factor, alpha.mean) - kl_divergence(alpha, start).sum()
        total = total + 1.5 * (log_mean - alpha.mean.log()).sum()
    close(model.bound(model.e_step(batch)), total, rtol=1e-9)


@pytest.mark.parametrize("views", [(), ("means",), ("loadings",), ("noise_variances",), ("means", "noise_variances")])
@pytest.mark.parametrize("noise", ["diag", "spherical"])
def test_an_m_step_is_where_the_bound_is_flat(noise: str, views: tuple[str, ...]) -> None:
    """Of the first component the views are known, and stay."""
    factor, batch = posterior(2, 1, noise)
    for view in views:
        factor.freeze(view, mask=torch.tensor([True, False]))
    before = {name: value.detach().clone() for name, value in factor.named_parameters()}
    stats = factor.stats(batch, cases.soft(len(batch), 2, seed=9) * 2).map(Tensor.detach)
    cases.assign(factor, factor.maximize(stats))
    objective = factor.expected_log_prob(stats) - factor.divergence()
    slopes = torch.autograd.grad(objective, [*factor.parameters()], allow_unused=True)
    for (name, value), slope in zip(factor.named_parameters(), slopes, strict=True):
        mask = factor.frozen(name)
        free = torch.ones(2, dtype=torch.bool) if mask is None else ~mask
        assert torch.equal(value[~free], before[name][~free])
        if slope is not None:
            slope = slope.tril() if name == "log_precision" else slope
            close(slope[free], torch.zeros_like(slope[free]), rtol=0, atol=1e-7)
    cases.assign(factor, factor.maximize(stats * 0.0))
    close(factor.divergence(), torch.zeros(()), rtol=0, atol=1e-9)


def test_with_loadings_known_to_be_zero_it_is_a_normal_of_independent_columns() -> None:
    """Nothing is latent then: the bound is the log evidence, as that of a diagonal normal is.

    Two loadings of zero are two degrees of freedom more for the noise, under which they are likely as it is small.
    """
    x = rows(15)
    other = Variational(Gaussian(1, 3, "diag").double(), priors.NormalInverseGamma([0.5, 0.0, -0.5], 0.7, 4.5, 0.8))
    found = []
    for component in (posterior(1, 2, x=x)[0], other):
        if component is not other:
            component.loadings = torch.zeros(1, 3, 2)
            component.freeze("loadings")
        model = torchem.Mixture(Categorical(1).double(), component)
        found.append(torchem.fit(model, x, init=None, max_iter=5, tol=0, progress=False).bound)
        close(component.means, other.means) if component is other else None
    assert found[0] == pytest.approx(found[1], rel=1e-10)


def test_the_predictive_has_the_mean_and_covariance_of_its_draws() -> None:
    factor, _ = posterior(2, 1, x=rows(40))
    draws = factor.sample(torch.ones(60_000, dtype=torch.long), None, cases.rng(0))
    center, root = factor.means[1].detach(), draws.var(0).sqrt()
    at = torch.stack([center, center + root, center + torch.eye(3).double()[1]])
    flat = factor.factor.select(torch.tensor([1]))
    spread = factor.factor.unsure(factor.posterior())[1].diagonal(dim1=-2, dim2=-1).sum(-1).detach()
    nu = factor.log_freedom[1].exp().detach()
    noise = flat.noise_variances[0].detach() * nu / (nu - 2) * (1 + spread)
    whole = flat.loadings[0].detach() @ flat.loadings[0].detach().mT + noise.diag()
    close(draws.mean(0), center, rtol=0, atol=0.05)
    close(draws.mT.cov(), whole, rtol=0.05, atol=0.05)
    close(factor.log_prob(Batch(at))[:, 1], MultivariateNormal(center, whole).log_prob(at))


@pytest.mark.parametrize("how", ["full", "float"])
def test_what_scores_explain_nothing_is_switched_off(how: str) -> None:
    """Two scores of three are needed: relevance finds them, and the bound without it is best at two."""
    truth = torchem.FactorAnalysis(6, 2).double()
    truth.loadings = 1.2 * torch.stack([torch.ones(6), torch.tensor([1.0, -1, 1, -1, 1, -1])], -1)
    truth.noise_variance = torch.linspace(0.2, 0.5, 6)
    x = truth.sample(200, generator=cases.rng(1))
    prior = priors.FactorLoadings(relevance=(1e-3, 1e-3))
    model: Any = torchem.variational(torchem.FactorAnalysis(6, 3).double(), component=prior)
    model, x = (model.float(), x.float()) if how == "float" else (model, x)
    result = torchem.fit(model, x, max_iter=45, tol=0, seed=0, progress=False)
    alpha = model.component.prior.precisions(model.component.factor, model.component.posterior())
    assert int((alpha < 20).sum()) == 2
    assert int((alpha > 100).sum()) == 1
    slack = 1e-9 if how != "float" else 1e-6
    assert all(b >= a - slack * abs(a) for a, b in itertools.pairwise(result.history))
    if how == "full":
        bounds = {}
        for q in (1, 2, 3):
            plain = torchem.variational(torchem.FactorAnalysis(6, q).double())
            bounds[q] = torchem.fit(plain, x, max_iter=20, tol=0, seed=0, progress=False).bound
        assert max(bounds, key=lambda q: bounds[q]) == 2


def test_what_may_be_kept_depends_on_the_prior() -> None:
    factor = Variational(LowRankGaussian(2, 3, 1), priors.FactorLoadings(relevance=RELEVANCE))
    with pytest.raises(InvalidArgument, match=r"all of a factor under FactorLoadings with a relevance"):
        factor.freeze("means")
    factor.freeze()
    assert float(factor.divergence()) == 0
    model = torchem.variational(torchem.GaussianMixture(2, 3, "low_rank", 1))
    with pytest.raises(InvalidArgument, match=r"component\.loadings"):
        model.covariances = torch.eye(3)
