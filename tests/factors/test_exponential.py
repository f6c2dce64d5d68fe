"""Waiting times: densities, the floor of means, missing entries, recovery."""

import copy
import itertools

import pytest
import torch
from scipy import stats as scipy_stats

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import assign, close, rand, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Exponential


def exponential(k: int = 3, d: int = 2, seed: int = 0) -> Exponential:
    e = Exponential(k, d).double()
    e.rates = 0.2 + 3 * rand(k, d, seed=seed)
    return e


def test_density_is_that_of_scipy() -> None:
    e, x = exponential(), 4 * rand(20, 2, seed=1)
    found = e.log_prob(Batch(x))
    for k in range(3):
        scale = 1 / e.rates[k].detach().numpy()
        close(found[:, k], torch.from_numpy(scipy_stats.expon.logpdf(x.numpy(), scale=scale).sum(-1)))
    mean, variance = e.moments(Batch(x))
    close(mean[0], 1 / e.rates)
    close(variance[0], e.rates**-2)


def test_missing_entries_are_left_out() -> None:
    e, x = exponential(), with_holes(rand(40, 2, seed=2), 0.3)
    each = [Exponential(3, 1).double() for _ in range(2)]
    total = torch.zeros(40, 3, dtype=torch.float64)
    for d, one in enumerate(each):
        one.rates = e.rates[:, d : d + 1].detach()
        total = total + torch.where(x[:, d : d + 1].isnan(), 0.0, one.log_prob(Batch(x[:, d : d + 1].nan_to_num())))
    close(e.log_prob(Batch(x)), total)
    expected = soft(40, 3)
    best = copy.deepcopy(e)
    assign(best, e.maximize(e.stats(Batch(x), expected)))
    seen = ~x.isnan()
    close(best.rates, (expected.mT @ seen.double()) / (expected.mT @ x.nan_to_num()))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_component_of_zeros_stays_at_the_floor(scale: float) -> None:
    """Whose likelihood would be infinite; the floor moves with the units of the data."""
    x = torch.cat([torch.zeros(30, 1), scale * (1 + rand(70, 1, seed=3)).float()]).double()
    times = Exponential(2, 1, mean_floor=1e-3)
    model = torchem.Mixture(Categorical(2), times).double()
    result = torchem.fit(model, x, seed=0, progress=False, max_iter=200)
    floor = 1e-3 * x.mean()
    means = 1 / times.rates[:, 0].detach()
    close(means.min(), floor, rtol=1e-6)
    assert result.floored == [int(means.argmin())]
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truth_is_recovered_by_a_fit(dtype: torch.dtype) -> None:
    truth = exponential(2, 2).to(dtype)
    truth.rates = [[0.2, 5.0], [4.0, 0.5]]
    z = torch.arange(6000) % 2
    x = truth.sample(z, generator=rng(4))
    times = Exponential(2, 2)
    model = torchem.Mixture(Categorical(2), times).to(dtype)
    torchem.fit(model, x, seed=0, restarts=2, tol=1e-6, max_iter=300, progress=False)
    order = times.rates[:, 0].argsort()
    close(times.rates[order], truth.rates, rtol=0.06)


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: Exponential(2, 1, mean_floor=0.0), "mean_floor"),
        (lambda: setattr(Exponential(2, 1), "rates", [[1.0], [0.0]]), "rates"),
        (lambda: setattr(Exponential(2, 1), "rates", [[1.0]]), "rates"),
        (lambda: torchem.Mixture(Categorical(2), Exponential(2, 1)).log_prob(torch.tensor([[-1.0]])), "data"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()
