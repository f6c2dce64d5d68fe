"""Overdispersed counts: densities, the limit of Poisson counts, references, frozen views."""

import itertools

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import close, rand, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, NegativeBinomial, Poisson

#: Days absent from school of 146 children: quine of R's MASS (S. Quine, in M. Aitkin 1978), values and how often.
QUINE = {0: 9, 1: 4, 2: 6, 3: 6, 4: 1, 5: 19, 6: 8, 7: 6, 8: 4, 9: 2, 10: 4, 11: 7, 12: 2, 13: 3, 14: 8, 15: 3, 16: 3,
         17: 4, 18: 1, 19: 1, 20: 3, 21: 1, 22: 4, 23: 3, 24: 1, 25: 2, 27: 2, 28: 2, 30: 2, 32: 2, 33: 1, 34: 1, 36: 3,
         37: 1, 38: 1, 40: 2, 41: 1, 43: 1, 45: 1, 46: 1, 47: 1, 48: 1, 53: 2, 54: 1, 57: 1, 60: 1, 67: 1, 69: 1,
         81: 1}  # fmt: skip


def negative(k: int = 3, d: int = 2, scale: float = 5.0, seed: int = 0) -> NegativeBinomial:
    n = NegativeBinomial(k, d).double()
    n.means, n.dispersions = scale * (0.2 + rand(k, d, seed=seed)), 0.1 + 2 * rand(k, d, seed=seed + 1)
    return n


def repeated(table: dict[int, int]) -> Tensor:
    return torch.tensor([float(x) for x, n in table.items() for _ in range(n)], dtype=torch.float64).unsqueeze(-1)


@pytest.mark.parametrize("scale", [1e-2, 5.0, 1e5])
@pytest.mark.parametrize("dispersion", [1e-6, 0.5, 100.0])
def test_density_is_that_of_scipy(scale: float, dispersion: float) -> None:
    n = negative(scale=scale)
    n.dispersions = dispersion * (1 + rand(3, 2))
    x = torch.poisson(scale * (0.2 + rand(20, 2, seed=3)), generator=rng(1))
    found = n.log_prob(Batch(x))
    for k in range(3):
        mean, size = n.means[k].detach(), 1 / n.dispersions[k].detach()
        exact = scipy_stats.nbinom.logpmf(x.numpy(), size.numpy(), (size / (size + mean)).numpy()).sum(-1)
        close(found[:, k], torch.from_numpy(exact), rtol=1e-6, atol=1e-6)
    single = n.float().log_prob(Batch(x.float()))
    close(single.double(), found, rtol=1e-3, atol=1e-3)


def test_one_component_is_the_fit_of_mass() -> None:
    """R 4.2, MASS 7.3-58.2: fitdistr(quine$Days, "negative binomial")."""
    model = torchem.Mixture(Categorical(1), n := NegativeBinomial(1, 1)).double()
    result = torchem.fit(model, repeated(QUINE), seed=0, tol=1e-13, max_iter=1000, progress=False)
    assert result.bound == pytest.approx(-559.133481351, abs=1e-8)
    assert float(n.means.detach()) == pytest.approx(16.4589041096, rel=1e-9)
    assert 1 / float(n.dispersions.detach()) == pytest.approx(1.06679317554, rel=1e-4)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


def test_means_are_those_of_the_data_after_one_step() -> None:
    """What the expansion buys: EM without it moves the mean a share of the way."""
    n, x, expected = negative(), with_holes(torch.poisson(4 * rand(40, 2, seed=4)), 0.2), soft(40, 3)
    means = n.maximize(n.stats(Batch(x), expected))["log_mean"].exp()
    close(means, (expected.mT @ x.nan_to_num()) / (expected.mT @ (~x.isnan()).double()))


def test_counts_that_vary_too_little_end_as_poisson() -> None:
    x = torch.tensor([3.0, 4.0, 5.0] * 20, dtype=torch.float64).unsqueeze(-1)
    counts, wide = (torchem.Mixture(Categorical(1), f(1, 1)).double() for f in (Poisson, NegativeBinomial))
    best = torchem.fit(counts, x, seed=0, progress=False).bound
    result = torchem.fit(wide, x, seed=0, accelerate="squarem", tol=1e-6, max_iter=3000, progress=False)
    assert best - 0.05 < result.bound <= best + 1e-6
    wide.component.dispersions = [[1e-6]]
    close(wide.log_prob(x), counts.log_prob(x), atol=1e-4)


def test_columns_of_zeros_and_frozen_views() -> None:
    n, x = negative(2, 1), torch.zeros(10, 1, dtype=torch.float64)
    stats = n.stats(Batch(x), soft(10, 2))
    values = n.maximize(stats)
    assert all(value.isfinite().all() for value in values.values())
    n.freeze("dispersions", mask=torch.tensor([True, False]))
    assert n.n_parameters() == 3
    assert torch.equal(n.maximize(stats)["log_dispersion"][0], n.log_dispersion[0])


def test_frozen_means_still_climb_to_the_best_dispersion() -> None:
    x = repeated(QUINE)
    model = torchem.Mixture(Categorical(1), n := NegativeBinomial(1, 1)).double()
    n.means = [[12.0]]
    n.freeze("means")
    result = torchem.fit(model, x, init=None, tol=1e-13, max_iter=2000, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    n.dispersions = n.dispersions.detach()
    slope = torch.autograd.grad(n.log_prob(Batch(x)).sum(), n.log_dispersion)[0]
    assert abs(float(slope)) < 1e-3
    assert float(n.means.detach()) == pytest.approx(12.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truth_is_recovered_by_a_fit(dtype: torch.dtype) -> None:
    truth = NegativeBinomial(2, 1).to(dtype)
    truth.means, truth.dispersions = [[2.0], [40.0]], [[0.5], [0.2]]
    x = truth.sample(torch.arange(8000) % 2, generator=rng(4))
    mean, variance = truth.moments(Batch(x))
    close(x[1::2].mean(0), mean[0, 1], rtol=0.03)
    close(x[1::2].var(0), variance[0, 1], rtol=0.1)
    model = torchem.Mixture(Categorical(2), n := NegativeBinomial(2, 1)).to(dtype)
    torchem.fit(model, x, seed=0, tol=1e-6, max_iter=300, progress=False)
    order = n.means[:, 0].argsort()
    close(n.means[order], truth.means, rtol=0.08)
    close(n.dispersions[order], truth.dispersions, rtol=0.25)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: NegativeBinomial(2, 0), "n_features"),
        (lambda: setattr(NegativeBinomial(1, 1), "means", [[-1.0]]), "means"),
        (lambda: setattr(NegativeBinomial(1, 1), "dispersions", [[0.0]]), "dispersions"),
        (lambda: NegativeBinomial(1, 1).check(Batch(torch.tensor([[1.5]]))), "data"),
        (lambda: NegativeBinomial(1, 1).check(Batch(torch.tensor([[-1.0]]))), "data"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()
