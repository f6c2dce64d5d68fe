"""Priors: their densities, their share in the M-step, and the objective that a fit then reports."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch.distributions import Dirichlet as Reference

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factor import Factor, Prior
from torchem.factors import (
    Bernoulli,
    Categorical,
    Exponential,
    Gaussian,
    LinearGaussian,
    LowRankGaussian,
    Poisson,
    PoissonDuration,
    Product,
)
from torchem.priors import (
    Beta,
    Dirichlet,
    FactorLoadings,
    Gamma,
    MatrixNormalInverseWishart,
    NormalInverseGamma,
    NormalInverseWishart,
    StickBreaking,
    StickyDirichlet,
)


def table(k: int = 3) -> Categorical:
    out = Categorical(k, k).double()
    out.probs = cases.randn(k, k, seed=1).softmax(-1)
    return out


def test_dirichlet_is_the_density_of_each_row() -> None:
    alpha = 1 + 3 * cases.rand(3, 3, seed=2)
    factor = table()
    factor.prior = Dirichlet(alpha)
    value = factor.log_prior()
    assert value is not None
    close(value, Reference(alpha).log_prob(factor.probs).sum())


def test_sticky_dirichlet_adds_to_the_diagonal() -> None:
    factor = table()
    factor.prior = StickyDirichlet(4.0, concentration=1.5)
    value = factor.log_prior()
    assert value is not None
    close(value, Reference(1.5 + 4 * torch.eye(3).double()).log_prob(factor.probs).sum())


@pytest.mark.parametrize("prior", [Dirichlet(2.0), StickyDirichlet(5.0), Dirichlet([[1.0, 2.0, 3.0]] * 3)])
def test_the_mode_maximises_likelihood_times_prior(prior: torchem.priors.Dirichlet) -> None:
    factor = table()
    factor.prior = prior
    stats = torchem.Stats(counts=5 * cases.rand(3, 3, seed=3))

    def objective(probs: torch.Tensor) -> torch.Tensor:
        factor.probs = probs
        value = factor.log_prior()
        assert value is not None
        return (factor.expected_log_prob(stats) + value).detach()

    logits = factor.maximize(factor.penalized(stats))["logits"]
    best = logits.softmax(-1)
    top = objective(best)
    for seed in range(20):
        other = (logits + 0.1 * cases.randn(3, 3, seed=seed)).softmax(-1)
        assert objective(other) <= top + 1e-12


@pytest.mark.parametrize("gamma", [1.0, 3.5])
@pytest.mark.parametrize("support", [[True] * 4, [True, False, True, False]])
def test_the_mode_of_sticks(gamma: float, support: list[bool]) -> None:
    """The density is that of Beta(1, γ) sticks, of which the last takes the rest; the mode is theirs."""
    weights = Categorical(4).double()
    kept = torch.tensor(support)
    share = torch.where(kept, cases.rand(4, seed=4) + 0.1, 0.0)
    weights.probs = share / share.sum()
    weights.prior = StickBreaking(gamma)
    counts = torch.tensor([3.0, 0.0, 5.0, 1.5], dtype=torch.float64)

    def broken(probs: torch.Tensor) -> torch.Tensor:
        pi = probs[kept]
        return (pi / pi.flip(0).cumsum(0).flip(0))[:-1]

    def objective(v: torch.Tensor) -> torch.Tensor:
        pi = torch.cat([v, v.new_ones(1)]) * torch.cat([v.new_ones(1), (1 - v).cumprod(0)])
        likelihood = (counts[kept] * pi.log()).sum()
        return likelihood + torch.distributions.Beta(torch.ones_like(v), torch.full_like(v, gamma)).log_prob(v).sum()

    value = weights.log_prior()
    assert value is not None
    at = broken(weights.probs.detach())
    close(value + (counts[kept] * weights.probs[kept].log()).sum(), objective(at))
    new = weights.maximize(weights.penalized(torchem.Stats(counts=counts)))["logits"]
    mode = torch.where(kept, new.exp(), 0.0)
    best = broken(mode / mode.sum())
    if all(support):
        # A component without mass has a stick at the bound zero.
        close(best, torch.stack([n / (n + gamma - 1 + r) for n, r in zip(counts[:3], (6.5, 6.5, 1.5), strict=True)]))
        return
    assert all(objective((best + d).clamp(1e-6, 1 - 1e-6)) < objective(best) for d in (-0.01, 0.01))


def test_a_fit_under_a_prior_of_sticks_climbs() -> None:
    x = cases.blobs(120, 2, 3)
    model = torchem.GaussianMixture(4, 2).double()
    model.mixing.prior = StickBreaking(2.0)
    result = torchem.fit(model, x, seed=0, max_iter=25, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
    close(torch.tensor(result.bound, dtype=torch.float64), model.log_prob(x).sum() + model.log_prior())


def test_a_prior_leaves_structural_zeros_alone() -> None:
    factor = table()
    factor.probs = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    factor.prior = StickyDirichlet(3.0, concentration=2.0)
    value = factor.log_prior()
    assert value is not None
    # Each row is Dirichlet over what it may reach; a row with one successor has density one.
    rows = [([5.0, 2.0], [0.5, 0.5]), ([5.0, 2.0], [0.5, 0.5])]
    laws = [Reference(torch.tensor(a).double()).log_prob(torch.tensor(p).double()) for a, p in rows]
    close(value, torch.stack(laws).sum())
    stats = factor.penalized(torchem.Stats(counts=torch.zeros(3, 3, dtype=torch.float64)))
    new = Categorical(3, 3).double()
    new.support, new.restricted = factor.support, True
    new.logits.data = factor.maximize(stats)["logits"]
    assert torch.equal(new.probs == 0, factor.probs == 0)
    close(new.probs.sum(-1), torch.ones(3))


def test_priors_are_replicated_with_the_factor() -> None:
    factor = table()
    factor.prior = StickyDirichlet(2.0)
    single = factor.log_prior()
    factor.replicate(4)
    many = factor.log_prior()
    assert many is not None
    assert single is not None
    close(many, single.expand(4))


@pytest.mark.parametrize("initial", ["free", "stationary"])
def test_a_fit_climbs_and_reports_the_log_posterior(initial: str) -> None:
    first = Categorical(3) if initial == "free" else "stationary"
    model = torchem.HMM(first, Categorical(3, 3), Categorical(3, 4)).double()  # pyright: ignore
    model.transition.prior = StickyDirichlet(5.0)
    model.emission.prior = Dirichlet(1.5)
    x = torch.randint(0, 4, (20, 8, 1), generator=cases.rng(0))
    result = torchem.fit(model, x, seed=0, max_iter=40, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
    prior = model.log_prior()
    assert isinstance(prior, torch.Tensor)
    close(torch.tensor(result.bound, dtype=torch.float64), (model.log_prob(x).sum() + prior).detach())


def test_a_stronger_prior_holds_the_chain_in_place() -> None:
    x = torch.randint(0, 3, (10, 30, 1), generator=cases.rng(3))
    stays = []
    for stickiness in (0.0, 30.0, 3000.0):
        model = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)).double()
        model.transition.prior = StickyDirichlet(stickiness)
        torchem.fit(model, x, seed=1, max_iter=30, tol=0, progress=False)
        stays.append(float(model.transition_matrix.diagonal().mean().detach()))
    assert stays[0] < stays[1] < stays[2]
    assert stays[2] > 0.9


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Dirichlet(0.0), "concentration"),
        (lambda: Dirichlet(float("nan")), "concentration"),
        (lambda: StickyDirichlet(-1.0), "stickiness"),
        (lambda: StickyDirichlet(1.0, concentration=float("inf")), "concentration"),
        (lambda: setattr(table(), "prior", Dirichlet(0.5)), "at least 1"),
        (lambda: setattr(Categorical(3), "prior", StickyDirichlet(1.0)), "square"),
        (lambda: setattr(Bernoulli(2, 1), "prior", Dirichlet(2.0)), "table of probabilities"),
    ],
)
def test_bad_priors(build, said: str) -> None:
    with pytest.raises(torchem.errors.TorchemError, match=said):
        build()


# ---- priors of normal families, probabilities and rates -----------------------------------------------------------

#: Untyped: what its stubs say of laws is not so.
stats: Any = scipy.stats
KINDS = cases.COVARIANCE_TYPES


def normal(kind: str) -> torchem.factor.Prior:
    if kind in ("full", "tied"):
        return NormalInverseWishart([0.5, 1.0], 0.7, 4.5, [[2.0, 0.3], [0.3, 1.0]])
    return NormalInverseGamma([0.5, 1.0], 0.7, 4.5, 2.0)


def regression(kind: str) -> MatrixNormalInverseWishart:
    scale = [[2.0, 0.3], [0.3, 1.0]] if kind in ("full", "tied") else 1.5
    return MatrixNormalInverseWishart([[0.1, 1.0], [-0.4, 0.2]], [[1.0, 0.3], [0.3, 2.0]], 4.5, scale)


def loadings() -> FactorLoadings:
    return FactorLoadings([0.5, 1.0], 0.7, 1.3, dof=4.5, scale=2.0)


def analysers(k: int, noise: Any) -> LowRankGaussian:
    g = LowRankGaussian(k, 2, 1, noise).double()
    g.means, g.loadings = cases.randn(k, 2, seed=1), cases.randn(k, 2, 1, seed=2)
    g.noise_variances = 0.2 + cases.rand(*g.noise_scale.shape, seed=3)
    return g


def families(k: int) -> dict[str, Callable[[], tuple[Factor, Prior, Batch]]]:
    """Factors away from their starts, priors with a mode inside, and data."""
    x, u = cases.randn(30, 2, seed=5) + 1, cases.randn(30, 2, seed=6)
    counts = torch.poisson(2 * x.abs(), generator=cases.rng(7))
    found: dict[str, Callable[[], tuple[Factor, Prior, Batch]]] = {
        "Bernoulli": lambda: (Bernoulli(k, 2).double(), Beta([2.0, 1.5], 3.0), Batch((x > 1).double())),
        "Poisson": lambda: (Poisson(k, 2).double(), Gamma([2.0, 1.5], 3.0), Batch(counts)),
        "Exponential": lambda: (Exponential(k, 2).double(), Gamma([2.0, 1.5], 3.0), Batch(x.abs())),
    }
    for noise in ("diag", "spherical"):
        found[f"LowRankGaussian-{noise}"] = lambda noise=noise: (analysers(k, noise), loadings(), Batch(x))
    for kind in ("EEI", "EII"):
        found[f"Gaussian-{kind}"] = lambda kind=kind: (cases.gaussian(k, 2, kind), normal(kind), Batch(x))
    for kind in KINDS:
        found[f"Gaussian-{kind}"] = lambda kind=kind: (cases.gaussian(k, 2, kind), normal(kind), Batch(x))
        found[f"LinearGaussian-{kind}"] = lambda kind=kind: (
            LinearGaussian(k, 2, 2, kind).double(), regression(kind), Batch(x, u=u),
        )  # fmt: skip
    return found


def every_family(k: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in families(k).items()])


def log_prior(factor: Factor) -> torch.Tensor:
    value = factor.log_prior()
    assert value is not None
    return value


@pytest.mark.parametrize("kind", KINDS)
def test_normal_priors_are_their_densities(kind: str) -> None:
    g = cases.gaussian(3, 2, kind)
    g.prior = normal(kind)
    means, cov = g.means.detach().numpy(), g.covariances.detach().numpy()
    m, scale = np.array([0.5, 1.0]), np.array([[2.0, 0.3], [0.3, 1.0]])
    total = 0.0
    if kind in ("full", "tied"):
        each = cov if kind == "full" else cov[None]
        total += sum(stats.invwishart(4.5, scale).logpdf(c) for c in each)
        full = np.broadcast_to(each, (3, 2, 2))
        total += sum(stats.multivariate_normal(m, full[k] / 0.7).logpdf(means[k]) for k in range(3))
    else:
        total += stats.invgamma(4.5 / 2, scale=1.0).logpdf(cov).sum()
        deviation = np.sqrt((cov if kind == "diag" else cov[:, None]) / 0.7)
        total += stats.norm(m, deviation).logpdf(means).sum()
    close(log_prior(g), torch.tensor(total, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_the_prior_of_a_regression_is_its_density(kind: str) -> None:
    g = LinearGaussian(2, 2, 2, kind).double()  # pyright: ignore
    g.weight = cases.randn(2, 2, 2, seed=8)
    g.prior = regression(kind)
    m, precision = np.array([[0.1, 1.0], [-0.4, 0.2]]), np.array([[1.0, 0.3], [0.3, 2.0]])
    cov = g.covariances.detach().numpy()
    total = 0.0
    for k in range(2):
        own = cov[k] if kind == "full" else np.diag(cov[k])
        if kind == "full":
            total += stats.invwishart(4.5, np.array([[2.0, 0.3], [0.3, 1.0]])).logpdf(own)
        else:
            total += stats.invgamma(4.5 / 2, scale=0.75).logpdf(cov[k]).sum()
        law = stats.matrix_normal(m, own, np.linalg.inv(precision))
        total += law.logpdf(g.weight[k].detach().numpy())
    close(log_prior(g), torch.tensor(total, dtype=torch.float64))


@pytest.mark.parametrize("noise", ["diag", "spherical"])
def test_the_prior_of_loadings_is_its_density(noise: str) -> None:
    g = analysers(3, noise)
    g.prior = loadings()
    psi, m = g.noise_variances.detach().numpy(), np.array([0.5, 1.0])
    total = stats.invgamma(4.5 / 2, scale=1.0).logpdf(psi).sum()
    deviation = np.sqrt(psi if noise == "diag" else psi[:, None])
    total += stats.norm(m, deviation / np.sqrt(0.7)).logpdf(g.means.detach().numpy()).sum()
    total += stats.norm(0, deviation / np.sqrt(1.3)).logpdf(g.loadings.detach().numpy()[..., 0]).sum()
    close(log_prior(g), torch.tensor(total, dtype=torch.float64))


def test_priors_of_probabilities_and_rates_are_their_densities() -> None:
    b, p = Bernoulli(2, 2).double(), Poisson(2, 2).double()
    b.probs, p.rates = [[0.2, 0.7], [0.4, 0.0]], [[1.0, 2.5], [0.0, 4.0]]
    b.prior, p.prior = Beta([2.0, 1.5], 3.0), Gamma([2.0, 1.5], 3.0)
    # What the user fixed is no parameter.
    e = Exponential(1, 2).double()
    e.rates, e.prior = [[0.4, 2.0]], Gamma([2.0, 1.5], 3.0)
    times = stats.gamma([2.0, 1.5], scale=1 / 3).logpdf([0.4, 2.0]).sum()
    close(log_prior(e), torch.tensor(times, dtype=torch.float64))
    coins = stats.beta([2.0, 1.5, 2.0], 3.0).logpdf([0.2, 0.7, 0.4]).sum()
    rates = stats.gamma([2.0, 1.5, 1.5], scale=1 / 3).logpdf([1.0, 2.5, 4.0]).sum()
    close(log_prior(b), torch.tensor(coins, dtype=torch.float64))
    close(log_prior(p), torch.tensor(rates, dtype=torch.float64))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", families(1))
def test_the_m_step_reaches_the_posterior_mode(name: str, k: int) -> None:
    """What a numerical optimiser of log-likelihood + log-prior finds, and no more."""
    factor, prior, batch = families(k)[name]()
    factor.prior = prior
    seen = factor.stats(batch, cases.soft(30, k)).map(torch.Tensor.detach)

    def objective() -> torch.Tensor:
        return factor.expected_log_prob(seen) + log_prior(factor)

    cases.assign(factor, factor.maximize(factor.penalized(seen)))
    if getattr(factor, "geometry", None) is not None:  # components move together
        mean, scale = torch.autograd.grad(objective(), [factor.mean, factor.scale])  # pyright: ignore
        assert torch.equal(factor.scale[0], factor.scale[-1])  # pyright: ignore
        for slope in (mean, scale.sum(0)):
            close(slope, torch.zeros_like(slope), rtol=0, atol=1e-8)
        return
    best = {n: p.detach().clone() for n, p in factor.named_parameters()}
    top = float(objective().detach())
    if "scale" in best and best["scale"].shape[-2:] == (2, 2) and getattr(factor, "covariance_type", "") != "diag":
        tril = torch.ones(2, 2, dtype=torch.float64).tril()
    else:
        tril = torch.ones((), dtype=torch.float64)
    for parameter_name, parameter in factor.named_parameters():
        noise = 0.2 * cases.randn(*parameter.shape, seed=9)
        parameter.data = parameter.data + noise * (tril if parameter_name == "scale" else 1.0)
    climber = torch.optim.LBFGS(
        factor.parameters(), max_iter=300, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        climber.zero_grad()
        value = -objective()
        value.backward()
        return value

    climber.step(loss)  # pyright: ignore
    assert float(objective().detach()) <= top + 1e-10 * abs(top)
    for parameter_name, parameter in factor.named_parameters():
        close(parameter, best[parameter_name], rtol=1e-5, atol=1e-5)


@every_family(3)
def test_fits_climb_the_log_posterior(build, tmp_path) -> None:
    factor, prior, batch = build()
    factor.prior = prior
    model = torchem.Mixture(Categorical(3).double(), factor)
    result = torchem.fit(model, batch, seed=0, restarts=2, max_iter=30, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
    value = model.log_prob(batch).sum() + model.log_prior()
    close(torch.tensor(result.bound, dtype=torch.float64), value.detach())
    torchem.save(model, tmp_path / "m.safetensors")
    other = torchem.load(tmp_path / "m.safetensors")
    assert torch.equal(other.log_prior(), torch.as_tensor(model.log_prior()))


@pytest.mark.parametrize(
    ("factor", "prior", "data"),
    [
        (lambda: cases.gaussian(2, 2, "full"), NormalInverseWishart, cases.randn(40, 2, seed=3)),
        (lambda: cases.gaussian(2, 2, "diag"), NormalInverseGamma, cases.randn(40, 2, seed=3)),
        (lambda: Poisson(2, 2).double(), Gamma, torch.poisson(cases.rand(40, 2) * 5, generator=cases.rng(1))),
        (lambda: Exponential(2, 2).double(), Gamma, cases.rand(40, 2, seed=1)),
    ],
)
def test_what_is_left_open_comes_from_the_data(factor, prior, data: torch.Tensor) -> None:
    model = torchem.Mixture(Categorical(2).double(), factor())
    model.component.prior = prior()
    for scale in (1.0, 3.0):
        torchem.fit(model, data * scale, seed=0, max_iter=3, tol=0, progress=False)
        found = model.component.prior
        if isinstance(found, Gamma):
            assert found.rate is not None
            rate = found.shape / found.rate
            close(1 / rate if isinstance(model.component, Exponential) else rate, (data * scale).mean(0))
        else:
            assert isinstance(found, (NormalInverseWishart, NormalInverseGamma))
            assert found.mean is not None
            assert found.scale is not None
            close(found.mean, (data * scale).mean(0))
            variance = (data * scale).var(0, correction=0)
            close(found.scale, torch.diag(variance) if isinstance(found, NormalInverseWishart) else variance)


def test_a_prior_keeps_a_component_of_one_point_from_collapsing() -> None:
    x = torch.cat([cases.randn(50, 2), torch.full((1, 2), 50.0, dtype=torch.float64)])
    model = torchem.GaussianMixture(2, 2).double()
    model.component.prior = NormalInverseWishart(dof=4.0, scale=1.0)
    result = torchem.fit(model, x, seed=0, max_iter=100, progress=False)
    assert result.floored == []
    assert float(torch.linalg.eigvalsh(model.covariances.detach()).min()) > 0.05


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: NormalInverseWishart(mean_precision=0.0), "mean_precision"),
        (lambda: NormalInverseWishart(dof=-1.0), "dof"),
        (lambda: NormalInverseWishart(mean=[float("nan")]), "mean"),
        (lambda: NormalInverseGamma(scale=0.0), "scale"),
        (lambda: MatrixNormalInverseWishart(precision=0.0), "precision"),
        (lambda: MatrixNormalInverseWishart(precision=[[1.0, 2.0], [2.0, 1.0]]), "positive definite"),
        (lambda: Beta(0.0, 1.0), "a: "),
        (lambda: Gamma(1.0, -1.0), "rate"),
        (lambda: setattr(Gaussian(2, 2), "prior", NormalInverseGamma()), "diag or spherical"),
        (lambda: setattr(Gaussian(2, 2, "diag"), "prior", NormalInverseWishart()), "full or tied"),
        (lambda: setattr(Gaussian(2, 3), "prior", NormalInverseWishart(dof=1.5)), "degrees of freedom"),
        (lambda: setattr(Gaussian(2, 2), "prior", NormalInverseWishart(mean=[0.0] * 3)), "broadcasts"),
        (lambda: setattr(Gaussian(2, 2), "prior", NormalInverseWishart(scale=[[1.0, 2], [2, 1.0]])), "definite"),
        (lambda: setattr(Bernoulli(2, 2), "prior", Beta(0.5, 1.0)), "at least 1"),
        (lambda: setattr(Poisson(2, 2), "prior", Gamma(0.5)), "at least 1"),
        (lambda: setattr(Poisson(2, 2), "prior", Beta(2.0, 2.0)), "Bernoulli"),
        (lambda: setattr(Gaussian(2, 2), "prior", Gamma(2.0)), "Poisson"),
        (lambda: setattr(Gaussian(2, 2), "prior", MatrixNormalInverseWishart()), "LinearGaussian"),
        (lambda: setattr(Gaussian(2, 2, "diag"), "prior", FactorLoadings()), "LowRankGaussian"),
        (lambda: setattr(analysers(2, "diag"), "prior", NormalInverseGamma()), "diag or spherical"),
        (lambda: setattr(analysers(2, "diag"), "prior", FactorLoadings(relevance=(1.0, 1.0))), "known precision"),
        (lambda: FactorLoadings(precision=-1.0), "precision"),
        (lambda: FactorLoadings(precision=1.0, relevance=(1.0, 1.0)), "one of the two"),
        (lambda: FactorLoadings(relevance=(1.0,)), "a shape and a rate"),
        (lambda: setattr(LinearGaussian(2, 2, 1, shared=[0]), "prior", MatrixNormalInverseWishart()), "shared"),
    ],
)
def test_bad_priors_of_other_families(build, said: str) -> None:
    with pytest.raises(torchem.errors.TorchemError, match=said):
        build()


def test_pruning_keeps_priors_and_those_of_parts() -> None:
    keep = torch.tensor([0, 2])
    mixture: Any = torchem.GaussianMixture(3, 2, "diag").double()
    mixture.mixing.prior = Dirichlet([2.0, 3.0, 4.0])
    mixture.component.prior = NormalInverseGamma([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], scale=[1.0, 2.0])
    before = log_prior(mixture.component)
    mixture.prune(keep)
    assert mixture.mixing.prior.config() == {"concentration": [2.0, 4.0]}
    assert mixture.component.prior.config()["mean"] == [[0.0, 0.0], [2.0, 2.0]]
    assert mixture.component.prior.config()["scale"] == [1.0, 2.0]
    assert torch.isfinite(log_prior(mixture.component))
    assert float(log_prior(mixture.component).detach()) != float(before.detach())

    parts: Any = [Poisson(3, 1), Bernoulli(3, 1)]
    parts[0].prior, parts[1].prior = Gamma([[1.0], [2.0], [3.0]], 0.5), Beta(2.0, [[1.0], [2.0], [3.0]])
    chain: Any = torchem.HMM(Categorical(3), Categorical(3, 3), Product(parts)).double()
    chain.initial.prior, chain.transition.prior = Dirichlet(2.0), StickyDirichlet(3.0)
    chain.prune(keep)
    kept = [part.prior.config() for part in chain.emission.parts().values()]
    assert kept == [{"shape": [[1.0], [3.0]], "rate": 0.5}, {"a": 2.0, "b": [[1.0], [3.0]]}]
    assert chain.initial.prior.config() == {"concentration": 2.0}
    assert chain.transition.prior.config()["stickiness"] == 3.0


def test_a_fit_that_prunes_goes_on_under_its_priors() -> None:
    x = torch.cat([cases.randn(100, 1, seed=1), cases.randn(100, 1, seed=2) + 9])
    model: Any = torchem.GaussianMixture(3, 1).double()
    model.component.prior = NormalInverseWishart()
    model.weights = [0.5, 0.5 - 1e-9, 1e-9]
    model.means = [[0.0], [9.0], [400.0]]
    result = torchem.fit(model, x, init=None, dead="prune", seed=0, progress=False)
    assert result.pruned == [2]
    assert isinstance(model.component.prior, NormalInverseWishart)
    objective = float((model.log_prob(x).sum() + model.log_prior()).detach())
    again = torchem.fit(model, x, init=None, seed=0, progress=False)
    assert again.history[0] == pytest.approx(objective, rel=1e-9)


# ---- durations ----------------------------------------------------------------------------------------------------


def test_a_prior_of_durations_integrates_to_one_and_is_gamma_where_nothing_is_cut_off() -> None:
    rates = torch.linspace(-60, 60, 60_001, dtype=torch.float64).exp()
    for shape, rate, most in ((1.0, 0.5, 9), (2.0, 5.0, 4), (40.0, 8.0, 12), (300.0, 100.0, 30)):
        many = PoissonDuration(len(rates), most).double()
        many.rates = rates
        one = PoissonDuration(1, most).double()
        one.prior = Gamma(shape, rate)
        height = (many.log_probs().detach() * one.prior.mode_stats(one)["counts"]).sum(-1)
        mass = (height - one.prior_norm(torch.tensor([shape]), torch.tensor([rate]))).exp() * rates
        assert float(mass.sum() * 120 / 60_000) == pytest.approx(1.0, rel=1e-9)
    wide = PoissonDuration(2, 80).double()
    wide.prior, wide.rates = Gamma([3.0, 5.0], [2.0, 1.5]), [1.3, 4.0]
    expected = scipy.stats.gamma.logpdf([1.3, 4.0], [3.0, 5.0], scale=[0.5, 1 / 1.5]).sum()
    assert float(wide.log_prior().detach()) == pytest.approx(expected, rel=1e-12)  # pyright: ignore


def test_modes_of_durations_are_stationary_and_fits_climb_the_posterior(tmp_path: Any) -> None:
    law = PoissonDuration(3, 9).double()
    law.prior = Gamma([2.0, 1.0, 3.0], 0.8)
    counts = 5 * cases.rand(3, 9, seed=3)
    counts[2] = 0
    stats = law.penalized(torchem.stats.Stats(counts=counts))
    with torch.no_grad():
        law.log_rate.copy_(law.maximize(stats)["log_rate"])
    value = law.expected_log_prob(torchem.stats.Stats(counts=counts)) + law.log_prior()  # pyright: ignore
    (slope,) = torch.autograd.grad(value, law.log_rate)
    close(slope, torch.zeros(3), atol=1e-9)
    model = torchem.GaussianHSMM(2, 1, 9, "poisson").double()
    model.means = [[-1.0], [1.0]]
    x = model.sample(6, 40, generator=cases.rng(1))
    model.duration.prior = Gamma(4.0, 2.0)
    result = torchem.fit(model, x, init=None, max_iter=8, tol=0.0, progress=False)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(result.history))
    with torch.no_grad():
        prior = float(model.log_prior())
        assert result.bound == pytest.approx(float(model.log_prob(x).sum()) + prior)
    torchem.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert float(torchem.load(tmp_path / "m.safetensors").log_prior()) == pytest.approx(prior)
    free = torchem.GaussianHSMM(2, 1, 9, "poisson").double()
    free.duration.prior = Gamma(2.0)
    close(free.duration.prior.mode_stats(free.duration)["counts"].sum(-1), torch.full((2,), 8 / 9, dtype=torch.float64))
    torchem.fit(free, x, max_iter=2, tol=0.0, progress=False, seed=0, restarts=2)
    for prior, message in (
        (Gamma(0.5, 1.0), "shape: expected at least 1"), (Gamma(8.0, 1.0), "rate: expected above shape / 8"),
        (Gamma([1.0, 2.0, 3.0], 1.0), "broadcasts"), (Beta(2.0, 2.0), "Bernoulli"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=message):
            free.duration.prior = prior
    with pytest.raises(InvalidArgument, match="conjugate"):
        torchem.Variational(free.duration)
