"""Priors over tables: their densities, their share in the M-step, and the objective that a fit then reports."""

import pytest
import torch
from torch.distributions import Dirichlet as Reference

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem.factors import Bernoulli, Categorical
from torchem.priors import Dirichlet, StickyDirichlet


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


def test_a_prior_leaves_structural_zeros_alone() -> None:
    factor = table()
    factor.probs = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    factor.prior = StickyDirichlet(3.0, concentration=2.0)
    value = factor.log_prior()
    assert value is not None
    # Each row is Dirichlet over what it may reach; a row with one successor has density one.
    rows = [([5.0, 2.0], [0.5, 0.5]), ([5.0, 2.0], [0.5, 0.5])]
    close(value, sum(Reference(torch.tensor(a).double()).log_prob(torch.tensor(p).double()) for a, p in rows))
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
