"""Variational Bayes over parameters: exact where the posterior is known, a bound that climbs where it is not."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem import Variational, factors, priors
from torchem.batch import Batch
from torchem.factor import Prior
from torchem.factors import Bernoulli, Categorical, Exponential, Gaussian, LinearGaussian, Poisson, Product
from torchem.model import LatentModel
from torchem.ops import dispatch, gaussian

#: Untyped: what its stubs say of laws is not so.
laws: Any = scipy.stats
KINDS = cases.COVARIANCE_TYPES


def normal_prior(kind: str, d: int = 2) -> torchem.factor.Prior:
    mean = [0.3, -0.2, 0.1][:d]
    if kind in ("full", "tied"):
        return priors.NormalInverseWishart(mean, 0.7, d + 1.5, torch.eye(d) + 0.3)
    return priors.NormalInverseGamma(mean, 0.7, 3.5, 1.5)


def holes(x: Tensor, share: float = 0.25) -> Tensor:
    return x.masked_fill(cases.rand(*x.shape, seed=71) < share, torch.nan)


def families(k: int) -> dict[str, Callable[[], tuple[Variational, Batch]]]:
    """Posteriors that have seen something, over every conjugate family, and data for each."""
    n = 25
    x, u = 1.5 * cases.randn(n, 2, seed=72) + 0.5, cases.randn(n, 2, seed=73)
    counts = torch.poisson(3 * cases.rand(n, 2, seed=74), generator=cases.rng(75))
    ones = (x > 0.4).double()
    classes = torch.randint(0, 4, (n, 1), generator=cases.rng(76))

    def table() -> Categorical:
        c = Categorical(k, 4)
        c.probs = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.3, 0.3, 0.2, 0.2], [0.25] * 4])[:k]
        return c

    def seen(factor: Any, prior: Any, batch: Batch) -> tuple[Variational, Batch]:
        out = Variational(factor.double(), prior)
        cases.assign(out, out.maximize(out.stats(batch, cases.soft(n, k, seed=77))))
        return out, batch

    found: dict[str, Callable[[], tuple[Variational, Batch]]] = {
        "Categorical": lambda: seen(table(), priors.Dirichlet([0.5, 1.0, 2.0, 0.3]), Batch(classes)),
        "Bernoulli": lambda: seen(Bernoulli(k, 2), priors.Beta([0.5, 2.0], 1.5), Batch(ones)),
        "Bernoulli-missing": lambda: seen(Bernoulli(k, 2), priors.Beta(0.5, 0.7), Batch(holes(ones))),
        "Poisson": lambda: seen(Poisson(k, 2), priors.Gamma([0.5, 2.0], 0.7), Batch(counts)),
        "Exponential-missing": lambda: seen(Exponential(k, 2), priors.Gamma(1.5, 0.7), Batch(holes(counts + 0.5))),
        "Poisson-missing": lambda: seen(Poisson(k, 2), priors.Gamma(1.5, 0.7), Batch(holes(counts))),
    }
    for kind in KINDS:
        found[f"Gaussian-{kind}"] = lambda kind=kind: seen(Gaussian(k, 2, kind), normal_prior(kind), Batch(x))
        regression = priors.MatrixNormalInverseWishart([[0.1, 0.2], [0.3, -0.1]], [[1.0, 0.2], [0.2, 0.5]], 4.0, 1.5)
        found[f"LinearGaussian-{kind}"] = lambda kind=kind, r=regression: seen(
            LinearGaussian(k, 2, 2, kind), r, Batch(x, u=u)
        )
    for kind in ("EEI", "EII"):
        found[f"Gaussian-{kind}"] = lambda kind=kind: seen(Gaussian(k, 2, kind), normal_prior(kind), Batch(x))
    for kind in ("diag", "spherical"):
        found[f"Gaussian-{kind}-missing"] = lambda kind=kind: seen(
            Gaussian(k, 2, kind), normal_prior(kind), Batch(holes(x))
        )
    return found


def every_family(k: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in families(k).items()])


def one_hot(n: int, k: int, row: int, state: int) -> Tensor:
    out = torch.zeros(n, k, dtype=torch.float64)
    out[row, state] = 1.0
    return out


# ---- the posterior ------------------------------------------------------------------------------------------------


@every_family(3)
def test_the_posterior_is_the_prior_and_the_statistics(build) -> None:
    q, batch = build()
    stats = q.stats(batch, cases.soft(len(batch), 3, seed=5))
    cases.assign(q, q.maximize(stats))
    assert q.prior is not None
    found, wanted = q.posterior(), q.prior.posterior_stats(q.factor) + stats
    for name in wanted:
        if name == "count" and isinstance(q.factor, LinearGaussian):
            continue  # no density depends on it
        a, b = found[name], wanted[name]
        if name == "second" and getattr(q.factor, "geometry", None) is not None:
            # Nor does it how the scatter of common variances is.
            a, b = a.sum(0), b.sum(0)
        if name == "dof" and isinstance(q.factor, Gaussian):
            # How the ν of a common covariance is spread over what has it in common says nothing.
            a, b = (q.factor.structure.freedom(leaf, 2) for leaf in (a, b))
        elif name == "dof" and q.factor.structure.shared:  # pyright: ignore[reportAttributeAccessIssue]
            a, b = a.sum(), b.sum()
        close(a, b, rtol=1e-10, atol=1e-10)


@every_family(3)
def test_potentials_are_expected_log_densities(build) -> None:
    """What rises with the statistics is ⟨E η, t(x)⟩; what does not is the base measure of the family itself."""
    q, batch = build()
    assert q.prior is not None
    natural = q.prior.expected_natural(q.factor, q.posterior())
    other, _ = build()
    cases.assign(other, other.maximize(other.stats(batch, cases.soft(len(batch), 3, seed=6) * 2)))
    second = q.prior.expected_natural(other.factor, other.posterior())
    for row, state in itertools.product((0, 3, 11), range(3)):
        stats = q.stats(batch, one_hot(len(batch), 3, row, state))
        base = q.factor.log_prob(batch)[row, state] - q.factor.expected_log_prob(stats)
        close(q.log_potential(batch)[row, state], q.expected_log_prob(stats) + base)
        close(q.kernel().log_potential(batch)[row, state], q.log_potential(batch)[row, state])
        gap = (natural - second).map(lambda a, b: (a * b).sum(), stats)
        close(q.expected_log_prob(stats) - other.expected_log_prob(stats), torch.stack(gap.leaves()).sum())


@every_family(3)
def test_the_kernel_tells_q_of_what_it_collected(build) -> None:
    q, batch = build()
    expected = cases.soft(len(batch), 3, seed=8)
    kernel = q.kernel()
    kernel.log_potential(batch)
    kernel.collect(batch, expected)
    close(kernel.inner(), q.expected_log_prob(q.stats(batch, expected)))


@every_family(3)
def test_divergence_is_positive_and_zero_at_the_prior(build) -> None:
    q, batch = build()
    assert float(q.divergence().detach()) > 0.1
    nothing = q.stats(batch, torch.zeros(len(batch), 3, dtype=torch.float64))
    cases.assign(q, q.maximize(nothing))
    close(q.divergence(), torch.zeros(()), atol=1e-9)


@every_family(1)
def test_one_component_is_exact(build) -> None:
    """Nothing is latent: the bound is the log marginal likelihood, which is the product of predictive densities."""
    q, batch = build()
    n = len(batch)
    model = torchem.Mixture(Categorical(1).double(), q)
    ones = torch.ones(n, 1, dtype=torch.float64)
    cases.assign(q, q.maximize(q.stats(batch, ones)))
    bound = model.bound(model.e_step(batch))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        before = torch.where(torch.arange(n).unsqueeze(-1) < i, ones, 0.0)
        cases.assign(q, q.maximize(q.stats(batch, before)))
        total = total + q.log_prob(batch[i : i + 1]).sum()
    close(bound, total, rtol=1e-9)


@pytest.mark.parametrize("kind", ["EEI", "EII", "diag"])
def test_components_that_are_known_are_exact(kind: str) -> None:
    """Of rows whose components are known the bound is the product of predictive densities, one row after the other."""
    q, batch = families(3)[f"Gaussian-{kind}"]()
    n, states = len(batch), torch.arange(len(batch)) % 3
    known = torch.nn.functional.one_hot(states, 3).double()
    cases.assign(q, q.maximize(q.stats(batch, known)))
    bound = q.expected_log_prob(q.stats(batch, known)) - q.divergence()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        before = torch.where(torch.arange(n).unsqueeze(-1) < i, known, 0.0)
        cases.assign(q, q.maximize(q.stats(batch, before)))
        total = total + q.log_prob(batch[i : i + 1])[0, states[i]]
    close(bound, total, rtol=1e-9)


#: What may be kept of each family, by its views.
KEPT: dict[str, list[tuple[str, ...]]] = {
    "Gaussian": [("means",), ("covariances",), ("means", "covariances")],
    "LinearGaussian": [("weight",), ("covariances",), ("weight", "covariances")],
    "Categorical": [("probs",)],
    "Bernoulli": [("probs",)],
    "Poisson": [("rates",)],
    "Exponential": [("rates",)],
}
CELLS = torch.tensor([[True, False, False, True], [False] * 4, [True] * 4])


def partly_frozen(k: int) -> pytest.MarkDecorator:
    """Every family with the first component of each set of views frozen, or what all share; cells of a table."""
    found = []
    for name, build in families(k).items():
        family, *rest = name.split("-")
        for views in KEPT[family] if "spherical-missing" not in name else []:
            common = bool({"tied", "EEI", "EII"} & {*rest})

            def frozen(build=build, views=views, family=family, tied=common) -> tuple[Variational, Batch]:
                q, batch = build()
                for view in views:
                    first = None if tied and view == "covariances" else torch.arange(k) == 0
                    q.freeze(view, mask=CELLS[:k] if family == "Categorical" else first)
                return q, batch

            found.append(pytest.param(frozen, id="-".join([name, *views])))
    return pytest.mark.parametrize("build", found)


@partly_frozen(1)
def test_one_component_of_which_a_part_is_known_is_exact(build) -> None:
    """The bound is log p(x | what is kept), and so the product of predictive densities given it."""
    test_one_component_is_exact(build)


@partly_frozen(3)
def test_what_is_kept_stays_and_the_rest_maximises_the_bound(build) -> None:
    q, batch = build()
    before = {name: value.detach().clone() for name, value in q.named_parameters()}
    stats = q.stats(batch, cases.soft(len(batch), 3, seed=5) * 2)
    values = q.maximize(stats)
    cases.assign(q, values)
    slopes = torch.autograd.grad(q.expected_log_prob(stats) - q.divergence(), [*q.parameters()], allow_unused=True)
    for (name, value), slope in zip(q.named_parameters(), slopes, strict=True):
        mask = q.frozen(name)
        if isinstance(q.factor, Categorical) and name == "factor.logits":
            assert mask is not None
            close(value.exp()[mask], before[name].exp()[mask], rtol=1e-12)
            close(value.exp().sum(-1), torch.ones(3), rtol=1e-12)
            continue
        rows = value.shape[0] if value.dim() else ()
        free = torch.tensor(True).expand(rows) if mask is None else ~mask.expand(rows)
        close(value[~free], before[name][~free], rtol=0, atol=0)
        if slope is not None:
            if name == "log_freedom" and isinstance(q.factor, LinearGaussian) and slope.dim() == 2:
                slope = slope.sum(-1)  # columns of a regression count the same rows
            if getattr(q.factor, "geometry", None) is not None and name in ("factor.scale", "log_freedom"):
                slope = slope.sum(0).expand_as(slope)  # components move together
            close(slope[free], torch.zeros_like(slope[free]), rtol=0, atol=1e-6)
    # At no data the posterior is the prior, given what is kept.
    cases.assign(q, q.maximize(stats * 0.0))
    close(q.divergence(), torch.zeros(()), rtol=0, atol=1e-8)


def test_a_table_of_which_cells_are_known() -> None:
    """A Dirichlet law is neutral: the free cells of a row share what is left as their own Dirichlet law says."""
    from torch.distributions import Dirichlet, kl_divergence

    alpha = torch.tensor([0.5, 1.0, 2.0, 0.3], dtype=torch.float64)
    q: Any = Variational(Categorical(4).double(), priors.Dirichlet(alpha))
    q.probs = [0.1, 0.3, 0.2, 0.4]
    q.freeze("probs", mask=CELLS[0])
    counts = torch.tensor([3.0, 4.0, 1.5, 7.0], dtype=torch.float64)
    cases.assign(q, q.maximize(torchem.Stats(counts=counts)))
    law = Dirichlet((alpha + counts)[1:3])
    close(q.probs, torch.cat([torch.tensor([0.1]), 0.5 * law.mean, torch.tensor([0.4])]), rtol=1e-7, atol=1e-7)
    close(q.divergence(), kl_divergence(law, Dirichlet(alpha[1:3])))
    expected = (law.concentration.digamma() - law.concentration.sum().digamma()) + math.log(0.5)
    found = q.table_potential(Batch(torch.zeros(1, 1)))[0]
    close(found[1:3], expected, rtol=1e-7)
    close(found[[0, 3]], torch.tensor([0.1, 0.4]).log(), rtol=1e-6, atol=1e-6)


def test_a_family_that_says_nothing_of_it_keeps_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gaussian, "splits", frozenset())
    q = Variational(Gaussian(2, 1))
    with pytest.raises(torchem.errors.InvalidArgument, match=r"or none.*freeze the rest"):
        q.freeze("means")
    assert q.factor.frozen("mean") is None
    q.freeze()
    batch = Batch(torch.randn(5, 1))
    close(q.log_potential(batch), q.factor.log_prob(batch))
    close(q.log_prob(batch), q.factor.log_prob(batch))
    assert float(q.divergence()) == 0


@pytest.mark.parametrize("kept", ["means", "covariances", "probs"])
def test_a_fit_with_a_part_that_is_known(kept: str) -> None:
    x = cases.blobs(90, 2, 3)
    model: Any = torchem.variational(torchem.GaussianMixture(3, 2).double())
    torchem.fit(model, x, seed=0, max_iter=3, tol=0, progress=False)
    mask = torch.tensor([True, False, False])
    if kept == "probs":
        model.mixing.freeze("probs", mask=mask)
        known = model.weights[0].detach().clone()
    else:
        model.component.freeze(kept, mask=mask)
        known = getattr(model, kept)[0].detach().clone()
    result = torchem.fit(model, x + 0.3, init=None, max_iter=15, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    close((model.weights if kept == "probs" else getattr(model, kept))[0], known, rtol=1e-12)
    many = torchem.fit(copy.deepcopy(model), x + 0.3, seed=1, restarts=2, max_iter=8, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for h in many.histories for a, b in itertools.pairwise(h))
    close((many.model.weights if kept == "probs" else getattr(many.model, kept))[0], known, rtol=1e-12)
    model.component.unfreeze()
    model.mixing.unfreeze()
    assert torchem.fit(model, x + 0.3, init=None, max_iter=15, tol=0, progress=False).n_iter == 15
    assert not torch.equal((model.weights if kept == "probs" else getattr(model, kept))[0], known)


def test_a_divergence_of_torch() -> None:
    q, _ = families(3)["Categorical"]()
    from torch.distributions import Dirichlet, kl_divergence

    alpha = torch.tensor([0.5, 1.0, 2.0, 0.3], dtype=torch.float64).expand(3, 4)
    close(q.divergence(), kl_divergence(Dirichlet(q.posterior()["counts"]), Dirichlet(alpha)).sum())


def test_sticks_are_betas() -> None:
    from torch.distributions import Beta, kl_divergence

    q = Variational(Categorical(4).double(), priors.StickBreaking(0.7))
    cases.assign(q, q.maximize(torchem.Stats(counts=torch.tensor([9.0, 4.0, 0.5, 2.0], dtype=torch.float64))))
    prior, posterior = q.prior, q.posterior()
    assert isinstance(prior, priors.StickBreaking)
    a, b = prior.sticks(posterior)
    close(a, torch.tensor([10.0, 5.0, 1.5, 3.0], dtype=torch.float64))
    close(b, torch.tensor([7.2, 3.2, 2.7, 0.7], dtype=torch.float64))
    close(q.divergence(), kl_divergence(Beta(a, b), Beta(torch.ones_like(a), 0.7 * torch.ones_like(a))).sum())
    slope = torch.func.grad(lambda c: prior.log_normalizer(q.factor, torchem.Stats(counts=c)))(posterior["counts"])
    close(prior.expected_natural(q.factor, posterior)["counts"], slope)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = Beta(a.detach(), b.detach()).sample(torch.Size([200_000]))
    weights = draws * torch.cat([torch.ones(len(draws), 1), (1 - draws).cumprod(-1)[:, :-1]], -1)
    close(q.probs, weights.mean(0) / weights.mean(0).sum(), rtol=0, atol=5e-3)
    close(q.table_potential(Batch(torch.zeros(1, 1)))[0], weights.log().mean(0), rtol=0, atol=3e-2)


# ---- the predictive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_normal_predictive_is_students_t(kind: str) -> None:
    q, batch = families(3)[f"Gaussian-{kind}"]()
    assert isinstance(q.factor, Gaussian)
    post, x = q.posterior(), batch.x.numpy()
    count, means = post["count"].detach().numpy(), q.means.detach().numpy()
    cov = q.factor.structure.dense(q.factor.scale, 3, 2)
    cov = (cov @ cov.mT).detach().numpy()
    freedom = q.factor.structure.freedom(post["dof"], 2).detach().numpy()
    found = q.log_prob(batch).detach()
    for k in range(3):
        if kind == "diag":
            each = [
                scipy.stats.t.logpdf(
                    x[:, d], freedom[k, d], means[k, d], math.sqrt(cov[k, d, d] * (1 + 1 / count[k, d]))
                )
                for d in range(2)
            ]
            wanted = sum(each)
        else:
            nu = freedom if kind == "tied" else freedom[k]
            degrees = nu if kind == "spherical" else nu - 1
            wider = (1 + 1 / (count[k, 0] if kind == "spherical" else count[k])) * nu / degrees
            wanted = laws.multivariate_t(means[k], cov[k] * wider, df=degrees).logpdf(x)
        close(found[:, k], torch.as_tensor(wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_entry_is_integrated_out(kind: str) -> None:
    q, batch = families(3)[f"Gaussian-{kind}"]()
    x = batch.x[:1].clone()
    x[0, 1] = torch.nan
    grid = torch.linspace(-400, 400, 400_001, dtype=torch.float64)
    both = torch.stack([x[0, 0].expand_as(grid), grid], -1)
    wanted = (q.log_prob(Batch(both)).logsumexp(0) + math.log(800 / 400_000)).detach()
    close(q.log_prob(Batch(x))[0], wanted, rtol=2e-5, atol=2e-5)
    nothing = torch.full((1, 2), torch.nan, dtype=torch.float64)
    close(q.log_prob(Batch(nothing)), torch.zeros(1, 3))
    close(q.log_potential(Batch(nothing)), torch.zeros(1, 3))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("rows", [False, True])
def test_what_is_missing_is_not_blurred_by_compiled_passes(
    kind: str, direct: bool, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows missing throughout say nothing, of whatever component, and single entries that are missing neither."""
    pytest.importorskip("numba")
    model = torchem.variational(torchem.GaussianMixture(3, 2, kind).double())
    x = holes(cases.randn(60, 2, seed=78))
    x = x[~x.isnan().all(-1)]
    if rows:
        x[::5] = torch.nan
    torchem.fit(model, x, max_iter=2, tol=0, seed=0, progress=False)
    component: Any = model.component
    component.factor.direct = direct
    with torch.no_grad():
        plain = model.e_step(Batch(x))
        monkeypatch.setattr(dispatch, "_MANY", 0)
        monkeypatch.setattr(gaussian, "_FEW", 1)
        close(model.e_step(Batch(x)).flatten(), plain.flatten())


def test_counts_are_negative_binomial() -> None:
    q, batch = families(3)["Poisson"]()
    post = q.posterior()
    a, b = post["total"].detach().numpy(), post["count"].detach().numpy()
    x = batch.x.numpy()
    for k in range(3):
        wanted = scipy.stats.nbinom.logpmf(x, a[k], b[k] / (b[k] + 1)).sum(-1)
        close(q.log_prob(batch)[:, k], torch.as_tensor(wanted))


@pytest.mark.parametrize("name", ["Gaussian-full", "Gaussian-tied", "Gaussian-diag", "Gaussian-spherical"])
def test_draws_are_of_the_predictive(name: str) -> None:
    q, _ = families(3)[name]()
    draws = q.sample(torch.ones(4000, dtype=torch.long), None, cases.rng(3)).detach()
    grid = torch.linspace(-300, 300, 200_001, dtype=torch.float64)
    blank = torch.full_like(grid, torch.nan)
    for column in range(2):
        pair = (grid, blank) if column == 0 else (blank, grid)
        density = q.log_prob(Batch(torch.stack(pair, -1)))[:, 1].exp().detach()
        law = density.cumsum(0) * (600 / 200_000)
        reached = torch.searchsorted(grid, draws[:, column].contiguous())
        u = law[reached.clamp(max=len(law) - 1)]
        assert scipy.stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_regressions_are_of_the_predictive(kind: str) -> None:
    q, _ = families(3)[f"LinearGaussian-{kind}"]()
    u = torch.tensor([[1.5, -0.7]], dtype=torch.float64)
    n, z = 4000, torch.ones(4000, dtype=torch.long)
    draws = q.sample(z, Batch(z, u=u.expand(n, 2)), cases.rng(5)).detach()
    # The law of x_1 alone, by the grid over both columns.
    line = torch.cat(
        [torch.linspace(-40, -8, 60), torch.linspace(-8, 8, 641)[1:], torch.linspace(8, 40, 61)[1:]]
    ).double()
    grid = torch.cartesian_prod(line, line)
    step = torch.gradient(line)[0]
    density = q.log_prob(Batch(grid, u=u.expand(len(grid), 2)))[:, 1].detach().exp().view(len(line), -1)
    for column, each in ((0, density @ step), (1, step @ density)):
        law = (each * step).cumsum(0) - each * step / 2
        place = torch.as_tensor(np.interp(draws[:, column].numpy(), line.numpy(), law.numpy()))
        assert scipy.stats.kstest(place.numpy(), "uniform").pvalue > 1e-3


def test_draws_of_counts_are_of_the_predictive() -> None:
    q, _ = families(3)["Poisson"]()
    draws = q.sample(torch.zeros(20_000, dtype=torch.long), None, cases.rng(4)).detach()
    a, b = (q.posterior()[name][0].detach() for name in ("total", "count"))
    mean, variance = a / b, a / b * (1 + 1 / b)
    assert bool(((draws.mean(0) - mean).abs() < 5 * (variance / 20_000).sqrt()).all())
    close(draws.var(0) / variance, torch.ones(2), rtol=0, atol=0.1)


def test_the_likelihood_of_a_model_is_predictive_and_its_posterior_is_not() -> None:
    x = cases.blobs(60, 2, 2)
    model = torchem.variational(torchem.GaussianMixture(2, 2).double())
    torchem.fit(model, x, seed=0, max_iter=20, tol=0, progress=False)
    batch = model.batch(x)
    joint = model.mixing.log_table(batch) + model.component.log_prob(batch)
    close(model.log_prob(x), joint.logsumexp(-1))
    fed = model.mixing.table_potential(batch) + model.component.log_potential(batch)
    close(model.posterior(x), fed.softmax(-1))
    # Jensen: an expected log-density is below the log of an expected one.
    assert bool((fed < joint).all())


# ---- the bound ----------------------------------------------------------------------------------------------------


def chain(emission: Any, k: int = 3) -> LatentModel:
    return torchem.HMM(Categorical(k), Categorical(k, k), emission).double()


def climbing() -> dict[str, Callable[[], tuple[LatentModel, Any, dict[str, Any]]]]:
    """Variational models, and data to fit them to."""
    x = cases.blobs(60, 2, 3)
    sequences = cases.frames(2)
    u = cases.randn(60, 2, seed=81)
    counts, classes = cases.counts(), cases.classes(4)
    found: dict[str, Callable[[], tuple[LatentModel, Any, dict[str, Any]]]] = {}
    for kind in KINDS:
        found[f"mixture-{kind}"] = lambda kind=kind: (
            torchem.variational(torchem.GaussianMixture(4, 2, kind).double()), x, {},
        )  # fmt: skip
        found[f"mixture-{kind}-missing"] = lambda kind=kind: (
            torchem.variational(torchem.GaussianMixture(3, 2, kind).double()), holes(x), {},
        )  # fmt: skip
        found[f"regressions-{kind}"] = lambda kind=kind: (
            torchem.variational(torchem.Mixture(Categorical(3), LinearGaussian(3, 2, 2, kind)).double()),
            x, {"inputs": u},
        )  # fmt: skip
        found[f"chain-{kind}"] = lambda kind=kind: (
            torchem.variational(chain(Gaussian(3, 2, kind))), sequences, {},
        )  # fmt: skip
    found["mixture-EEI-missing"] = lambda: (
        torchem.variational(torchem.GaussianMixture(3, 2, "EEI").double()), holes(x), {},
    )  # fmt: skip
    found["chain-EII"] = lambda: (torchem.variational(chain(Gaussian(3, 2, "EII"))), sequences, {})
    weights = cases.rand(60, seed=82) * 2
    found["weighted"] = lambda: (
        torchem.variational(torchem.GaussianMixture(3, 2).double()), x, {"weights": weights},
    )  # fmt: skip
    found["chain-counts"] = lambda: (torchem.variational(chain(Poisson(3, 2))), counts, {})
    found["chain-ones"] = lambda: (torchem.variational(chain(Bernoulli(3, 2))), (counts > 2).double(), {})
    found["chain-classes"] = lambda: (torchem.variational(chain(Categorical(3, 4))), classes, {})

    def zeros() -> Any:
        model: Any = chain(Categorical(3, 4))
        model.restrict(torchem.masks.cyclic(3))
        return torchem.variational(model, transition=priors.StickyDirichlet(3.0, 0.2)), classes, {}

    def mixed() -> Any:
        model: Any = chain(Gaussian(3, 2))
        model.transition = Variational(model.transition)
        model.emission.prior = priors.NormalInverseWishart()
        return model, sequences, {}

    def emission_only() -> Any:
        model: Any = torchem.GaussianMixture(4, 2).double()
        model.component = Variational(model.component)
        return model, x, {}

    def columns() -> Any:
        model = torchem.Mixture(Categorical(3), Product([Gaussian(3, 2), Poisson(3, 2), Categorical(3, 4)])).double()
        data = torch.cat([x[:40], counts.flatten(0, 1), classes.flatten(0, 1).double()], -1)
        return torchem.variational(model), holes(data, 0.1).where(torch.arange(5) > 1, data), {}

    def nested() -> Any:
        return torchem.variational(chain(factors.Mixture(Categorical(3, 2), Gaussian(6, 2, "diag")))), sequences, {}

    def lagged() -> Any:
        return torchem.variational(chain(factors.Autoregressive.gaussian(3, 2, lags=1))), sequences, {}

    def sticks() -> Any:
        return torchem.variational(torchem.GaussianMixture(5, 2).double(), mixing=priors.StickBreaking(0.5)), x, {}

    def analysers(noise: Any, prior: Any, gaps: bool) -> Any:
        model = torchem.Mixture(Categorical(3), factors.LowRankGaussian(3, 2, 1, noise)).double()
        return torchem.variational(model, component=prior), holes(x) if gaps else x, {}

    def noise() -> Any:
        components = factors.Stacked([Gaussian(3, 2), factors.Uniform(1, 2)])
        model: Any = torchem.variational(torchem.Mixture(Categorical(4), components).double())
        assert isinstance(model.component.factors[1], factors.Uniform)  # nothing is learnt of it
        return model, x, {}

    def students(kind: Any, gaps: bool) -> Any:
        model = torchem.Mixture(Categorical(3), factors.StudentT(3, 2, kind)).double()
        return torchem.variational(model), holes(x) if gaps else x, {}

    found["students"] = lambda: students("full", False)
    found["students-diag-missing"] = lambda: students("diag", True)
    found["clusters-and-noise"] = noise
    unknown = priors.FactorLoadings(relevance=(0.1, 0.1))
    found["analysers-missing"] = lambda: analysers("diag", priors.FactorLoadings(), True)
    found["analysers-relevance"] = lambda: analysers("spherical", unknown, False)
    found["factor-analysis"] = lambda: (torchem.variational(torchem.FactorAnalysis(2, 1).double()), x, {})
    return found | {
        "structural-zeros": zeros, "mixed-with-map": mixed, "mixed-with-ml": emission_only, "product": columns,
        "nested": nested, "autoregressive": lagged, "stick-breaking": sticks,
    }  # fmt: skip


CLIMBING = pytest.mark.parametrize("build", [pytest.param(b, id=name) for name, b in climbing().items()])


@CLIMBING
def test_the_bound_never_falls_and_is_reported(build) -> None:
    model, data, options = build()
    result = torchem.fit(model, data, seed=0, max_iter=30, tol=0, progress=False, **options)
    falls = [b - a for a, b in itertools.pairwise(result.history)]
    assert min(falls) >= -1e-9 * abs(result.bound)
    assert result.status != "diverged"
    assert result.history[-1] > result.history[0] + 1e-6
    batch = model.batch(data, **{{"inputs": "u", "weights": "weight"}[k]: v for k, v in options.items()})
    stats = model.e_step(batch)
    close(torch.tensor(result.bound, dtype=torch.float64), model.bound(stats), rtol=1e-9)
    close(stats["log_likelihood"] + model.log_prior(), model.bound(stats), rtol=1e-9)


@CLIMBING
def test_replicas_are_fits_of_their_own(build) -> None:
    model, data, options = build()
    # Starts of responsibilities at random: others may end in the same clusters by other numbers.
    result = torchem.fit(model, data, init="random", seed=0, restarts=2, max_iter=4, tol=0, progress=False, **options)
    assert len(set(result.restarts)) == 2
    batch = model.batch(data, **{{"inputs": "u", "weights": "weight"}[k]: v for k, v in options.items()})
    both = model.replicate(3)
    close(both.bound(both.e_step(batch)), model.bound(model.e_step(batch)).expand(3))
    new = both.maximize(both.e_step(batch))
    for name, value in model.maximize(model.e_step(batch)).items():
        close(new[name], value.expand(3, *value.shape), rtol=1e-8)
    close(both.log_prob(batch), model.log_prob(batch).expand(3, -1))


@CLIMBING
def test_files_and_the_pure_map(build, tmp_path) -> None:
    model, data, options = build()
    torchem.fit(model, data, seed=0, max_iter=3, tol=0, progress=False, **options)
    batch = model.batch(data, **{{"inputs": "u", "weights": "weight"}[k]: v for k, v in options.items()})
    torchem.save(model, tmp_path / "m.safetensors")
    other = torchem.load(tmp_path / "m.safetensors")
    assert torch.equal(other.log_prob(batch), model.log_prob(batch))
    assert torch.equal(torch.as_tensor(other.log_prior()), torch.as_tensor(model.log_prior()))
    before = dict(model.named_parameters())
    kept = {name: value.detach().clone() for name, value in before.items()}
    new = torchem.em_map(model)(before, batch)
    assert new.keys() == before.keys()
    assert all(torch.equal(value, kept[name]) for name, value in model.named_parameters())
    other.m_step(other.e_step(batch))
    for name, value in other.named_parameters():
        close(new[name], value, rtol=1e-8, atol=1e-8)


def test_the_map_of_posteriors_is_differentiable() -> None:
    model = torchem.variational(torchem.GaussianMixture(2, 2, "diag").double())
    x = cases.blobs(20, 2, 2)
    torchem.fit(model, x, seed=0, max_iter=3, tol=0, progress=False)
    step, batch = torchem.em_map(model), model.batch(x)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def moved(shift: Tensor) -> Tensor:
        return step({**params, "component.factor.mean": params["component.factor.mean"] + shift}, batch)[
            "component.log_count"
        ].sum()

    slope = torch.func.grad(moved)(torch.zeros((), dtype=torch.float64))
    close(slope, (moved(torch.tensor(1e-5)) - moved(torch.tensor(-1e-5))) / 2e-5, rtol=1e-5, atol=1e-8)


def test_memoised_updates_climb() -> None:
    """Statistics are a vector space: the posterior follows those of one batch after the other (Hughes, Sudderth)."""
    x = cases.blobs(90, 2, 3)
    model = torchem.variational(torchem.GaussianMixture(5, 2).double())
    torchem.fit(model, x, seed=0, max_iter=1, tol=0, progress=False)
    batches = [model.batch(x[i::3]) for i in range(3)]
    memo = [model.e_step(batch) for batch in batches]
    total = memo[0] + memo[1] + memo[2]
    bounds = []
    for i in range(45):
        fresh = model.e_step(batches[i % 3])
        total, memo[i % 3] = total - memo[i % 3] + fresh, fresh
        model.m_step(total)
        bounds.append(float(model.bound(total).detach()))
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(bounds))
    assert bounds[-1] > bounds[0] + 0.1


def test_the_bound_is_below_the_evidence() -> None:
    """The evidence of six coins of two kinds, by listing who is of which kind."""
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    model = torchem.Mixture(Categorical(2), Bernoulli(2, 2)).double()
    model = torchem.variational(model, mixing=priors.Dirichlet(0.8), component=priors.Beta(0.6, 1.1))
    terms = []
    for z in itertools.product((0, 1), repeat=6):
        n = [z.count(0), z.count(1)]
        value = scipy.special.betaln(0.8 + n[0], 0.8 + n[1]) - scipy.special.betaln(0.8, 0.8)
        for k, d in itertools.product((0, 1), (0, 1)):
            heads = sum(float(x[i, d]) for i in range(6) if z[i] == k)
            value += scipy.special.betaln(0.6 + heads, 1.1 + n[k] - heads) - scipy.special.betaln(0.6, 1.1)
        terms.append(value)
    evidence = float(scipy.special.logsumexp(terms))
    result = torchem.fit(model, x, seed=0, restarts=5, init="random", max_iter=300, tol=1e-9, progress=False)
    assert max(result.restarts) < evidence
    # Near enough that a forgotten term would show.
    assert result.bound > evidence - 2.5


# ---- what it is good for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [None, priors.StickBreaking(0.1)])
def test_components_that_are_not_needed_lose_their_weight(prior) -> None:
    found = []
    for seed in range(20):
        centers = torch.tensor([[-8.0, 0.0], [8.0, 0.0], [0.0, 12.0]], dtype=torch.float64)
        x = centers[torch.arange(300) % 3] + cases.randn(300, 2, seed=seed)
        model: Any = torchem.GaussianMixture(8, 2).double()
        model = torchem.variational(model, **({} if prior is None else {"mixing": prior}))
        torchem.fit(model, x, seed=seed, restarts=3, max_iter=200, tol=1e-6, progress=False)
        found.append(int((model.weights > 0.01).sum()))
    assert found.count(3) >= 19, found


def test_pruning_keeps_the_rest_of_the_posterior() -> None:
    x = cases.blobs(200, 2, 2, seed=20, spread=8.0)
    model: Any = torchem.variational(torchem.GaussianMixture(6, 2).double(), mixing=priors.Dirichlet([0.01] * 6))
    result = torchem.fit(model, x, seed=0, max_iter=100, tol=1e-6, dead="prune", progress=False)
    assert result.pruned
    assert model.n_components == 6 - len(result.pruned)
    again = torchem.fit(model, x, init=None, max_iter=20, tol=1e-8, progress=False)
    assert again.history[0] == pytest.approx(again.bound, abs=1.0)
    assert len(model.mixing.prior.concentration) == model.n_components


def test_sticks_of_pruned_components_stay_unused() -> None:
    x = cases.blobs(200, 2, 2, seed=20, spread=8.0)
    model: Any = torchem.variational(torchem.GaussianMixture(6, 2).double(), mixing=priors.StickBreaking(0.5))
    result = torchem.fit(model, x, seed=0, max_iter=100, tol=1e-6, dead="prune", progress=False)
    assert result.pruned
    close(model.weights.sum(), torch.ones(()))


def test_components_that_nobody_needs_are_no_symmetry() -> None:
    """They stand at the prior, all of them alike, without a warning; equal ones that are needed are warned of."""
    x = cases.blobs(200, 2, 2, seed=20, spread=8.0)
    model: Any = torchem.variational(torchem.GaussianMixture(6, 2).double())
    result = torchem.fit(model, x, seed=0, init="random", restarts=3, max_iter=300, tol=1e-7, progress=False)
    assert len(result.dead) >= 2
    torchem.fit(model, x, init=None, max_iter=3, tol=1e-3, progress=False)
    equal: Any = torchem.variational(torchem.GaussianMixture(2, 2).double())
    with pytest.warns(torchem.errors.SymmetryWarning):
        torchem.fit(equal, x, init=None, max_iter=2, tol=1.0, progress=False)


def test_states_that_no_frame_needs_are_no_symmetry() -> None:
    """As components; a pair with mass is still named."""
    truth = torchem.GaussianHMM(2, 2).double()
    truth.means, truth.transition_matrix = [[-4.0, 0.0], [4.0, 1.0]], [[0.9, 0.1], [0.2, 0.8]]
    x = truth.sample(6, 15, generator=cases.rng(0))
    model: Any = torchem.variational(torchem.GaussianHMM(4, 2, "full").double())
    result = torchem.fit(model, x, seed=0, init="random", max_iter=150, tol=1e-6, progress=False)
    assert len(result.dead) == 2
    assert result.redundant == []
    torchem.fit(model, x, init=None, max_iter=3, tol=1e-3, progress=False)
    equal: Any = torchem.variational(torchem.GaussianHMM(2, 2).double())
    with pytest.warns(torchem.errors.SymmetryWarning):
        found = torchem.fit(equal, x, init=None, max_iter=2, tol=1.0, progress=False)
    assert found.redundant == [(0, 1)]


def test_float32_follows_float64() -> None:
    x = cases.blobs(300, 3, 3, seed=4) + 100.0
    fine: Any = torchem.variational(torchem.GaussianMixture(3, 3).double())
    coarse: Any = torchem.variational(torchem.GaussianMixture(3, 3))
    a = torchem.fit(fine, x, seed=0, max_iter=10, tol=0, progress=False)
    b = torchem.fit(coarse, x.float(), seed=0, max_iter=10, tol=0, progress=False)
    assert b.bound == pytest.approx(a.bound, rel=1e-4)
    close(coarse.means, fine.means.float(), rtol=1e-4, atol=1e-3)


def test_open_hyperparameters_are_taken_from_the_data_of_each_fit() -> None:
    x = cases.blobs(50, 2, 2)
    model: Any = torchem.variational(torchem.GaussianMixture(2, 2).double())
    for shift in (0.0, 30.0):
        torchem.fit(model, x + shift, seed=0, max_iter=2, tol=0, progress=False)
        close(model.component.prior.mean, (x + shift).mean(0))
        close(model.component.prior.scale, torch.diag((x + shift).var(0, correction=0)))


def test_views_are_those_of_what_is_wrapped() -> None:
    model: Any = torchem.variational(torchem.GaussianMixture(2, 2, "diag").double())
    model.means, model.covariances, model.weights = [[0.0, 1.0], [2.0, 3.0]], torch.ones(2, 2), [0.25, 0.75]
    close(model.component.means, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    close(model.component.factor.covariances, torch.ones(2, 2))
    close(model.weights, torch.tensor([0.25, 0.75]))
    close(model.component.posterior()["first"] / model.component.posterior()["count"] + model.component.origin,
          model.means)  # fmt: skip
    assert model.component.unwrapped is model.component.factor
    assert model.n_parameters() == torchem.GaussianMixture(2, 2, "diag").n_parameters()


def test_a_factor_keeps_its_prior_and_one_posterior_serves_two_slots() -> None:
    table = Categorical(3, 3)
    table.prior = priors.StickyDirichlet(2.0)
    model: Any = torchem.HMM(Categorical(3), table, table).double()
    torchem.variational(model)
    assert model.transition is model.emission
    assert isinstance(model.transition.prior, priors.StickyDirichlet)
    assert table.prior is None
    result = torchem.fit(model, cases.classes(3), seed=0, max_iter=20, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


FIRST = torch.tensor([True, False])


def fitted_with_stationary() -> None:
    model: Any = torchem.HMM("stationary", Categorical(2, 2), Gaussian(2, 1))
    model.transition = Variational(model.transition)
    torchem.fit(model, torch.zeros(5, 1), progress=False)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Variational(factors.SoftmaxRegression(2, 2)), "conjugate prior"),
        (lambda: Variational(Product([Gaussian(2, 1), Poisson(2, 1)])), "conjugate prior"),
        (lambda: Variational(Variational(Gaussian(2, 1))), "conjugate prior"),
        (lambda: Variational(factors.Gamma(2, 1)), r"none \(the normaliser of one over shapes has no closed form\)"),
        (lambda: torchem.variational(torchem.GaussianHSMM(2, 2, 9, "poisson")), r"none \(the normaliser of a law that"),
        (lambda: Variational(factors.Uniform(2, 1)), "conjugate prior"),
        (lambda: Variational(Categorical(2), priors.StickBreaking()).freeze("probs", mask=FIRST), "Dirichlet"),
        (lambda: Variational(Gaussian(2, 1), priors.Dirichlet(1.0)), "table of probabilities"),
        (lambda: Variational(Gaussian(2, 1), priors.NormalInverseGamma()), "diag or spherical"),
        (lambda: torchem.variational(torchem.GaussianMixture(2, 2, "VEV")), "shared in part are factors"),
        (lambda: torchem.variational(torchem.GaussianMixture(2, 2, "VEI")), "shared in part are factors"),
        (lambda: Variational(Gaussian(2, 2), priors.NormalInverseWishart(scale=[[1.0, 2.0], [2.0, 1.0]])), "proper"),
        (lambda: Variational(Gaussian(2, 2), priors.NormalInverseWishart(dof=1.0)), "degrees of freedom"),
        (lambda: Variational(Categorical(2, 2), priors.StickBreaking()), "mixing weights"),
        (lambda: setattr(Categorical(2), "prior", priors.StickBreaking(0.9)), "no mode.*Variational"),
        (lambda: setattr(Categorical(2, 2), "prior", priors.StickBreaking()), "mixing weights"),
        (lambda: priors.StickBreaking(0.0), "concentration"),
        (lambda: torchem.variational(torchem.GaussianMixture(2, 1), weights=priors.Dirichlet(1.0)), "slots"),
        (lambda: torchem.variational(torchem.HMM("stationary", Categorical(2, 2), Gaussian(2, 1))), "Stationary"),
        (fitted_with_stationary, "free initial law"),
    ],
)
def test_refusals(build, said: str) -> None:
    with pytest.raises(torchem.errors.TorchemError, match=said):
        build()


def test_a_model_with_a_part_that_cannot_is_left_as_it_was() -> None:
    gate = factors.SoftmaxRegression(2, 1)
    model: Any = torchem.Mixture(gate, Gaussian(2, 1))
    before = copy.copy(model.component)
    with pytest.raises(torchem.errors.TorchemError, match="one by one"):
        torchem.variational(model)
    assert type(model.component) is type(before)


def test_the_map_of_many_small_problems_at_once() -> None:
    model = torchem.variational(torchem.GaussianMixture(2, 2).double())
    x = torch.stack([cases.blobs(15, 2, 2, seed=s) for s in range(3)])
    torchem.fit(model, x[0], seed=0, max_iter=2, tol=0, progress=False)
    step = torchem.em_map(model)
    params = {name: value.detach() for name, value in model.named_parameters()}
    both = torch.func.vmap(lambda rows: step(params, Batch(rows)))(x)
    for i in range(3):
        for name, value in step(params, Batch(x[i])).items():
            close(both[name][i], value, rtol=1e-8)


@pytest.mark.parametrize("replicas", [0, 2])
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_the_divergence_of_normal_families_is_its_definition(kind: Any, replicas: int) -> None:
    model: Any = torchem.variational(torchem.GaussianMixture(3, 2, kind).double())
    x = cases.randn(60, 2, seed=1) * torch.tensor([1.0, 50.0]) + 7
    torchem.fit(model, x, max_iter=3, tol=0, seed=0, progress=False)
    model = model.replicate(replicas) if replicas else model
    factor: Any = model.component
    prior, inner, posterior = factor.prior, factor.factor, factor.posterior()
    start = prior.posterior_stats(inner)
    plain = Prior.divergence(prior, inner, posterior, start, prior.log_normalizer(inner, start))
    assert plain.shape == inner.replicas
    close(factor.divergence(), plain, rtol=1e-10)


def test_a_prior_is_read_again_when_it_or_its_factor_changes() -> None:
    model: Any = torchem.variational(torchem.GaussianMixture(3, 2).double(), mixing=priors.StickBreaking(1.0))
    torchem.fit(model, cases.randn(60, 2, seed=1), max_iter=2, tol=0, seed=0, progress=False)
    changes: list[Callable[[], Any]] = [
        lambda: setattr(model.mixing.prior, "concentration", 5.0),
        lambda: setattr(model.mixing, "prior", priors.Dirichlet(3.0)),
        lambda: model.mixing.prior.concentration.fill_(7.0),
    ]
    found = [model.mixing.divergence()]
    for change in changes:
        change()
        found.append(model.mixing.divergence())
        fresh = copy.deepcopy(model.mixing)
        fresh._known = None
        assert torch.equal(found[-1], fresh.divergence())
    assert len({float(value.detach()) for value in found}) == 4
    both = model.replicate(2)
    close(both.mixing.divergence(), found[-1].expand(2))
    # The origin is moved: as far as the divergence knows, nothing has changed.
    before = model.component.divergence()
    model.component.factor.origin = model.component.factor.origin + 100.0
    close(model.component.divergence(), before, rtol=1e-9)
