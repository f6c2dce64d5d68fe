"""Rows of counts: densities, categories that were not counted, posteriors, recovery."""

import itertools

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import close, rand, randn, rng, soft
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Multinomial

VOTES = [[8, 1, 1], [7, 2, 1], [9, 0, 1], [1, 6, 3], [2, 5, 3], [0, 7, 4], [5, 3, 2], [1, 1, 8], [6, 1, 0], [2, 8, 2]]


def multinomial(k: int = 3, c: int = 4, seed: int = 0) -> Multinomial:
    m = Multinomial(k, c, trials=9).double()
    m.probs = randn(k, c, seed=seed).softmax(-1)
    return m


def rows(n: int = 40, c: int = 4, most: int = 6, seed: int = 1) -> Tensor:
    return (most * rand(n, c, seed=seed)).floor()


def climbs(result: torchem.Result) -> bool:
    return all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(result.history))


@pytest.mark.parametrize("most", [6, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_is_that_of_scipy(most: int, dtype: torch.dtype) -> None:
    m, x = multinomial().to(dtype), rows(most=most)
    found = m.log_prob(Batch(x.to(dtype)))
    for k in range(3):
        probs = m.probs[k].detach().double()
        exact = scipy_stats.multinomial.logpmf(x.numpy(), x.sum(-1).numpy(), (probs / probs.sum()).numpy())
        close(found[:, k].double(), torch.as_tensor(exact), rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=2e-4)


def test_what_was_seen_is_a_multinomial_given_its_sum() -> None:
    """The same for every size that the row may have had: it needs not be known."""
    m = multinomial(2, 4)
    batch = Batch(torch.tensor([[2.0, torch.nan, 1.0, torch.nan]], dtype=torch.float64))
    for k, probs in enumerate(m.probs.detach().numpy()):
        for size in (3, 7):
            left = size - 3
            joint = sum(
                scipy_stats.multinomial.pmf([2, i, 1, left - i], size, probs / probs.sum()) for i in range(left + 1)
            )
            sums = scipy_stats.binom.pmf(3, size, float(probs[[0, 2]].sum()))
            close(m.log_prob(batch)[0, k].exp(), torch.tensor(joint / sums, dtype=torch.float64))


def test_rows_of_which_nothing_or_zeros_were_seen_say_nothing() -> None:
    m, nan = multinomial(), torch.nan
    x = torch.tensor([[nan] * 4, [0.0, nan, 0.0, nan], [0.0] * 4], dtype=torch.float64)
    assert (m.log_prob(Batch(x)) == 0).all()
    assert (m.stats(Batch(x), soft(3, 3))["counts"] == 0).all()


def test_em_with_missing_counts_reaches_what_an_optimiser_finds() -> None:
    x = with_holes(rows(60, 4, 9), 0.3)
    model = torchem.Mixture(Categorical(1), found := Multinomial(1, 4)).double()
    result = torchem.fit(model, x, seed=0, tol=1e-13, max_iter=500, progress=False)
    assert climbs(result)
    other = multinomial(1, 4)
    walk = torch.optim.LBFGS(other.parameters(), max_iter=200, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        walk.zero_grad()
        loss = -other.log_prob(Batch(x)).sum()
        loss.backward()
        return loss

    walk.step(closure)
    close(found.probs, other.probs, atol=1e-6)


def test_zeros_stay_and_forbid() -> None:
    m = multinomial(2, 3)
    m.probs = [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
    assert m.n_parameters() == 1 + 2
    x = torch.tensor([[1.0, 2.0, 1.0], [3.0, 0.0, 0.0], [1.0, torch.nan, 2.0]], dtype=torch.float64)
    assert (m.log_prob(Batch(x)) == -torch.inf).tolist() == [[True, False], [False, False], [True, False]]
    new = m.maximize(m.stats(Batch(x), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 1.0]]).double()))
    m.logits.data = new["logits"].detach()
    assert (m.probs == 0).tolist() == [[False, False, True], [False, False, False]]
    close(m.probs[0], torch.tensor([1.0, 0.0, 0.0]), atol=1e-100)


def test_a_mixture_is_that_of_mixtools() -> None:
    """R 4.2, mixtools 2.0.0: multmixEM(VOTES, lambda=c(.5,.5), theta=rbind(c(.7,.2,.1),c(.2,.5,.3)), epsilon=1e-14)."""
    model = torchem.Mixture(Categorical(2), family := Multinomial(2, 3)).double()
    family.probs = [[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]
    x = torch.tensor(VOTES, dtype=torch.float64)
    result = torchem.fit(model, x, init=None, tol=1e-14, max_iter=1000, progress=False)
    assert result.bound == pytest.approx(-37.1823913927, abs=1e-7)
    close(model.weights, torch.tensor([0.495569263662, 0.504430736338]).double(), atol=1e-6)
    theirs = [[0.746852862221, 0.147601034046, 0.105546103733], [0.116545038859, 0.507611552134, 0.375843409007]]
    close(family.probs, torch.tensor(theirs), atol=1e-6)


def test_the_bound_of_one_component_is_the_evidence() -> None:
    model, x = torchem.Mixture(Categorical(1), Multinomial(1, 3)).double(), torch.tensor(VOTES, dtype=torch.float64)
    torchem.variational(model, component=priors.Dirichlet([0.5, 1.0, 2.0]))
    result = torchem.fit(model, x, seed=0, progress=False)
    # Sizes are given: rows one after the other, each by the predictive of those before.
    alpha, evidence = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), 0.0
    for row in x:
        evidence += scipy_stats.dirichlet_multinomial.logpmf(row.long().numpy(), alpha.numpy(), int(row.sum()))
        alpha = alpha + row
    assert result.bound == pytest.approx(evidence, abs=1e-8)
    # What is not counted does not matter to the shares of the rest.
    y = torch.tensor([[3.0, 1.0, 2.0], [3.0, torch.nan, 2.0]], dtype=torch.float64)
    exact = [
        scipy_stats.dirichlet_multinomial.logpmf([3, 1, 2], alpha.numpy(), 6),
        scipy_stats.dirichlet_multinomial.logpmf([3, 2], alpha[[0, 2]].numpy(), 5),
    ]
    close(model.log_prob(y), torch.tensor(exact, dtype=torch.float64), rtol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_map_and_variational_objectives_never_fall(share: float) -> None:
    x = with_holes(torch.cat([rows(30), rows(30).flip(-1) + torch.tensor([6.0, 0, 0, 0])]), share)
    bayes = torchem.variational(torchem.Mixture(Categorical(3), Multinomial(3, 4)).double())
    assert climbs(torchem.fit(bayes, x, seed=0, tol=0, max_iter=40, progress=False))
    mode = torchem.Mixture(Categorical(3), Multinomial(3, 4)).double()
    mode.component.prior = priors.Dirichlet(2.0)
    assert climbs(torchem.fit(mode, x, seed=0, tol=0, max_iter=40, progress=False))
    with pytest.raises(InvalidArgument, match="freeze"):
        bayes.component.freeze("probs", mask=torch.tensor([True, False, False]))


def test_rows_are_drawn_at_their_size() -> None:
    m = multinomial(2, 3)
    x = m.sample(torch.arange(4000) % 2, generator=rng(2))
    assert (x.sum(-1) == 9).all()
    mean, variance = m.moments(Batch(x))
    for k in range(2):
        close(x[k::2].mean(0), mean[0, k], rtol=0.05, atol=0.05)
        close(x[k::2].var(0), variance[0, k], rtol=0.1)
    fitted = Multinomial(1, 3).double()
    torchem.fit(torchem.Mixture(Categorical(1), fitted), 2 * x, seed=0, progress=False)
    assert (fitted.sample(torch.zeros(5).long()).sum(-1) == 18).all()


def test_truth_is_recovered_by_a_fit() -> None:
    truth = Multinomial(2, 3, trials=20).double()
    truth.probs = [[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]
    x = truth.sample(torch.arange(2000) % 2, generator=rng(4))
    torchem.fit(torchem.Mixture(Categorical(2), found := Multinomial(2, 3)).double(), x, seed=0, progress=False)
    close(found.probs[found.probs[:, 0].argsort(descending=True)], truth.probs, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: Multinomial(0, 2), "n_components"),
        (lambda: Multinomial(2, 2, trials=0), "trials"),
        (lambda: setattr(Multinomial(2, 2), "probs", [[0.5, 0.5]]), "probs"),
        (lambda: setattr(Multinomial(1, 2), "probs", [[0.5, 0.6]]), "probs"),
        (lambda: Multinomial(2, 2).check(Batch(rand(3, 5))), "data"),
        (lambda: Multinomial(2, 2).check(Batch(torch.tensor([[1.0, -1.0]]))), "data"),
        (lambda: Multinomial(2, 2).check(Batch(torch.tensor([[1.0, 0.5]]))), "data"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()


def test_unseen_counts_are_those_of_the_law_that_em_takes_them_from() -> None:
    """A negative multinomial, by enumeration of two unseen counts."""
    family = Multinomial(2, 4, trials=5).double()
    family.probs = rand(2, 4, seed=2).softmax(-1)
    x = torch.tensor([[3.0, torch.nan, 2.0, torch.nan], [torch.nan] * 4, [0.0, 0.0, 0.0, torch.nan]]).double()
    mean, variance = family.conditional(Batch(x))
    covariance = family.conditional_covariance(Batch(x))
    a, b = torch.meshgrid(torch.arange(120.0).double(), torch.arange(120.0).double(), indexing="ij")
    for k in range(2):
        p = family.probs[k].detach()
        log = (5 + a + b).lgamma() - (a + 1).lgamma() - (b + 1).lgamma() + a * p[1].log() + b * p[3].log()
        share = log.flatten().softmax(0).reshape(a.shape)
        first, second = (share * a).sum(), (share * b).sum()
        close(mean[0, k], torch.stack([x[0, 0], first, x[0, 2], second]), rtol=1e-8)
        close(variance[0, k, 1], (share * (a - first).square()).sum(), rtol=1e-8)
        close(covariance[0, k, 1, 3], (share * (a - first) * (b - second)).sum(), rtol=1e-8)
    close(covariance.diagonal(dim1=-2, dim2=-1), variance)
    close(mean[1], 5 * family.probs)
    assert bool((mean[2, :, 3] == 0).all())
    model = torchem.Mixture(Categorical(2), family).double()
    value, spread = model.impute(x, variance=True)
    draws = model.impute(x, draws=20000, generator=rng(0))
    assert torch.equal(draws[:, 0, [0, 2]], x[:1, [0, 2]].expand(20000, 2))
    gap = (draws.mean(0) - value)[:2] / (spread[:2] / 20000).sqrt().clamp(min=1e-9)
    assert float(gap.abs().max()) < 4.5
    assert torch.equal(draws, draws.round())
    law = model.condition(x)
    close(law.covariance_matrix.diagonal(dim1=-2, dim2=-1), law.variance)
