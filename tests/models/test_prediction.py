"""Laws of what is to come, given covariates: against torch's mixtures, quadrature, sums and draws."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical as Choice
from torch.distributions import MixtureSameFamily
from torch.distributions import Normal as NormalLaw

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem import factors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import BinomialRegression, Categorical, LinearGaussian, PoissonRegression, SoftmaxRegression


def experts(component: Any) -> Any:
    model = torchem.Mixture(SoftmaxRegression(3, 2), component).double()
    model.mixing.weight = cases.randn(3, 2)
    model.component.weight = 0.7 * cases.randn(3, component.n_outputs, 2, seed=1)
    return model


def inputs(n: int = 5) -> torch.Tensor:
    u = cases.randn(n, 2, seed=2)
    u[:, 0] = 1.0
    return u


def test_normal_experts_are_mixtures_of_normals() -> None:
    model = experts(LinearGaussian(3, 2, 1))
    model.component.covariances = 0.2 + cases.rand(3, 1, 1)
    p = model.predict(inputs())
    means, sd = p.component_means[..., 0], p.component_variances[..., 0].sqrt()
    law = MixtureSameFamily(Choice(p.weights), NormalLaw(means, sd))
    close(p.mean[:, 0], law.mean)
    close(p.variance[:, 0], law.variance)
    grid = torch.linspace(-3, 3, 7, dtype=torch.float64)
    close(p.log_density(grid), law.log_prob(grid.unsqueeze(-1)).mT)
    shares = torch.tensor([0.001, 0.05, 0.5, 0.95, 0.999], dtype=torch.float64)
    q = p.quantile(shares)
    assert q.shape == (5, 5, 1)
    close(law.cdf(q[..., 0]), shares.unsqueeze(-1).expand(5, 5), rtol=0, atol=1e-12)
    close(p.quantile(0.5), q[2], rtol=0)
    close(p.covariance_matrix[:, 0], p.variance)
    (slope,) = torch.autograd.grad(p.mean.sum(), [model.mixing.coefficient])
    assert float(slope.abs().sum()) > 0


def _families() -> list[tuple[Any, Any, Any]]:
    """Families, what SciPy calls the law of their first column in each state, and where they have mass."""
    k, rates = 3, 0.5 + 3 * cases.rand(3, 1, seed=4)
    found = []
    for name, law in (("Poisson", lambda r: stats.poisson(r)), ("Exponential", lambda r: stats.expon(scale=1 / r))):
        family = getattr(factors, name)(k, 1)
        family.rates = rates
        found.append((family, law, rates))
    gamma = factors.Gamma(k, 1)
    gamma.shapes, gamma.rates = rates + 1, rates
    found.append((gamma, lambda r: stats.gamma(r + 1, scale=1 / r), rates))
    counts = factors.NegativeBinomial(k, 1)
    counts.means, counts.dispersions = rates, torch.full((k, 1), 0.5)
    found.append((counts, lambda r: stats.nbinom(2.0, 2.0 / (2.0 + r)), rates))
    odds = factors.Bernoulli(k, 1)
    odds.probs = rates / 4
    found.append((odds, lambda r: stats.bernoulli(r / 4), rates))
    normal = factors.Gaussian(k, 1)
    normal.means, normal.covariances = rates, rates.unsqueeze(-1)
    found.append((normal, lambda r: stats.norm(r, r**0.5), rates))
    inner = factors.Mixture(Categorical(k, 2), factors.Poisson(2 * k, 1))
    inner.mixing.probs, inner.component.rates = torch.tensor([[0.3, 0.7]] * k), rates.repeat_interleave(2, 0)
    found.append((inner, lambda r: stats.poisson(r), rates))
    return found


@pytest.mark.parametrize("which", range(7))
def test_distribution_functions_are_those_of_scipy(which: int) -> None:
    family, law, rates = _families()[which]
    points = torch.linspace(-1.3, 9.0, 23, dtype=torch.float64).unsqueeze(-1)
    points = torch.cat([points, torch.arange(6.0).double().unsqueeze(-1)])
    want = torch.tensor(np.stack([law(float(r)).cdf(points.numpy()) for r in rates], 1))
    close(family.double().cdf(Batch(points)), want, rtol=1e-6, atol=1e-9)
    # Gated, with its own columns beside others and states beside others.
    gate = SoftmaxRegression(3, 2)
    gate.weight = cases.randn(3, 2)
    p = torchem.Mixture(gate, family).double().predict(inputs())
    shares = torch.tensor([[0.1], [0.6]], dtype=torch.float64)
    q = p.quantile(shares[:, 0])
    close(p.mean, (p.weights.unsqueeze(-1) * p.component_means).sum(-2))
    enough = torch.stack([p.cdf(part) for part in q])
    assert bool((enough[..., 0] >= shares - 1e-9).all())
    assert bool((torch.stack([p.cdf(part - 1e-4) for part in q])[..., 0] < shares).all())
    beside = factors.Product([factors.Uniform(3, 1, 0.0, 2.0), copy.deepcopy(family)])
    close(torchem.Mixture(gate, beside).double().predict(inputs()).quantile([0.1, 0.6])[..., 1:], q, atol=1e-6)
    if which < 6:
        stacked = factors.Stacked([family.select(torch.tensor([0, 1])), family.select(torch.tensor([2]))])
        close(torchem.Mixture(gate, stacked).double().predict(inputs()).quantile([0.1, 0.6]), q, atol=1e-6)


def test_more_distribution_functions() -> None:
    points = torch.linspace(-1.0, 4.0, 11).double().unsqueeze(-1)
    inflated = factors.ZeroInflated(factors.Poisson(2, 1)).double()
    points = points.clamp(min=0.0)
    law = [inflated.log_prob(Batch(torch.full((1, 1), float(i)).double()))[0].exp() for i in range(5)]
    sums = torch.stack(law).cumsum(0)
    close(inflated.cdf(Batch(points))[..., 0], sums[points[:, 0].long()])
    low = factors.LowRankGaussian(1, 2, 1).double()
    low.loadings, low.noise_variances = [[[2.0], [0.0]]], [[5.0, 9.0]]
    close(low.cdf(Batch(torch.tensor([[3.0, 3.0]]).double()))[0, 0], torch.special.ndtr(torch.ones(2).double()))
    censored = factors.Censored(factors.Gaussian(2, 1, "diag"), high=1.0).double()
    close(censored.cdf(Batch(points)), censored.factor.cdf(Batch(points)))


@pytest.mark.parametrize(
    "family", [factors.VonMises(2, 1), factors.StudentT(2, 1), factors.Categoricals(2, [3]), Categorical(2, 3)]
)
def test_quantiles_of_other_families_are_refused_by_name(family: Any) -> None:
    p = torchem.Mixture(SoftmaxRegression(2, 2), family).predict(inputs().float())
    with pytest.raises(InvalidArgument, match=rf"^quantile: .*{type(family).__name__} has no distribution function"):
        p.quantile(0.5)


def test_angles_have_mean_directions() -> None:
    family = factors.VonMises(2, 1)
    family.means, family.concentrations = [[3.0], [-3.0]], [[5.0], [5.0]]
    p = torchem.Mixture(SoftmaxRegression(2, 2), family).predict(inputs().float())
    assert p.mean.abs().squeeze(-1).tolist() == pytest.approx([math.pi] * 5, abs=1e-5)


@pytest.mark.parametrize(("which", "odd"), [(0, 0.5), (0, -1.0), (1, -0.5), (2, 0.0), (4, 2.0)])
def test_there_is_no_density_where_a_family_cannot_be(which: int, odd: float) -> None:
    family = _families()[which][0]
    gate = SoftmaxRegression(3, 2)
    found = torchem.Mixture(gate, family).double().predict(inputs()).density([odd, 1.0])
    assert bool((found[:, 0] == 0).all())
    assert bool((found[:, 1] > 0).all())
    p = experts(BinomialRegression(3, 2, 1)).predict(inputs(), trials=[3, 7, 1, 12, 5])
    assert (p.density([4.0, 2.5])[:, 0] > 0).tolist() == [False, True, False, True, True]


def test_a_model_without_covariates_predicts_nothing() -> None:
    with pytest.raises(InvalidArgument, match=r"^inputs: .*reads none; .*most_likely\(X\)"):
        torchem.GaussianMixture(2, 2).predict(torch.zeros(3, 2))
    with pytest.raises(InvalidArgument, match=r"^inputs: .*a single number"):
        experts(LinearGaussian(3, 2, 1)).predict(1.0)


@pytest.mark.parametrize("kind", [PoissonRegression, BinomialRegression])
def test_counts(kind: Any) -> None:
    model = experts(kind(3, 2, 1))
    fields: dict[str, Any] = {"offset": [0.5, 0.0, 1.0, -1.0, 0.2]}
    fields |= {} if kind is PoissonRegression else {"trials": [3, 7, 1, 12, 5]}
    p = model.predict(inputs(), **fields)
    outcomes = torch.arange(60.0, dtype=torch.float64)
    most = torch.tensor(fields.get("trials", [59.0] * 5)).double().unsqueeze(-1)
    probs = torch.where(outcomes <= most, p.density(outcomes), 0.0)
    close(probs.sum(-1), torch.ones(5), rtol=1e-7)
    close(p.mean[:, 0], probs @ outcomes, rtol=1e-6)
    close(p.variance[:, 0], probs @ outcomes.square() - (probs @ outcomes).square(), rtol=1e-5)
    for share in (0.05, 0.5, 0.9):
        least = (probs.cumsum(-1) < share - 1e-12).sum(-1)
        close(p.quantile(share)[:, 0], least.double(), rtol=0)
    x = model.sample(4000, inputs=inputs().repeat(800, 1), generator=cases.rng(3), **{
        name: torch.tensor(value).repeat(800) for name, value in fields.items()
    })  # fmt: skip
    close(x.view(800, 5).mean(0), p.mean[:, 0].detach(), rtol=0.1, atol=0.1)


def test_columns_are_predicted_each_by_itself_and_bad_input_is_named() -> None:
    model = experts(LinearGaussian(3, 2, 2))
    p = model.predict(inputs())
    assert p.mean.shape == p.variance.shape == p.quantile(0.1).shape == (5, 2)
    assert p.density(torch.zeros(4, 2)).shape == (5, 4)
    flat = torchem.Mixture(Categorical(3), LinearGaussian(3, 2, 2)).predict(inputs().float())
    close(flat.weights, torch.full((5, 3), 1 / 3), rtol=1e-6)
    for q in (0.0, 1.0, [0.5, 2.0], torch.nan):
        with pytest.raises(InvalidArgument, match="q: expected"):
            p.quantile(q)
    with pytest.raises(InvalidArgument, match="x: expected points"):
        p.density(torch.zeros(4, 3))
    with pytest.raises(InvalidArgument, match="inputs"):
        model.predict(torch.zeros(4, 5))


@pytest.mark.parametrize("name", ["offset", "trials"])
def test_the_picture_takes_offsets_and_trials(name: str) -> None:
    family = PoissonRegression(3, 2, 1) if name == "offset" else BinomialRegression(3, 2, 1)
    model, u = experts(family), inputs(20)
    known: dict[str, Any] = {name: torch.full((20,), 3.0)}
    ax = torchem.plot.prediction(model, torch.ones(20), u, **known)
    high = float(ax.collections[0].get_paths()[0].vertices[:, 1].max())
    span = torch.linspace(float(u[:, 1].min()), float(u[:, 1].max()), 300, dtype=torch.float64)
    rows = torch.stack([torch.ones_like(span), span], -1)
    law = model.predict(rows, **{name: torch.full((300,), 3.0)})
    assert high == pytest.approx(float(law.quantile(0.95).max()))
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        torchem.plot.prediction(model, torch.ones(20), u, **{name: known[name][:3]})
