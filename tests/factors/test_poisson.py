"""Counts: densities, missing entries, rates of zero, large counts, recovery."""

import copy

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.factors.common import operations, replicated, with_holes
from tests.laws.cases import assign, close, rand, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Poisson
from torchem.stats import Stats


def poisson(k: int = 3, d: int = 4, scale: float = 6.0, seed: int = 0) -> Poisson:
    p = Poisson(k, d).double()
    p.rates = scale * (0.2 + rand(k, d, seed=seed))
    return p


def counts(n: int, d: int, rate: float = 5.0, seed: int = 1) -> Tensor:
    return torch.poisson(torch.full((n, d), rate, dtype=torch.float64), generator=rng(seed))


@pytest.mark.parametrize("scale", [1e-3, 6.0, 200.0, 1e6])
def test_density_is_that_of_scipy_and_torch(scale: float) -> None:
    p, x = poisson(scale=scale), counts(20, 4, scale)
    found = p.log_prob(Batch(x))
    for k in range(3):
        rate = p.rates[k].detach()
        exact = torch.from_numpy(scipy_stats.poisson.logpmf(x.numpy(), rate.numpy()).sum(-1))
        close(found[:, k], exact, rtol=1e-9, atol=1e-8)
        close(found[:, k], torch.distributions.Poisson(rate).log_prob(x).sum(-1), rtol=1e-9, atol=1e-8)


def test_small_and_large_counts_may_stand_side_by_side() -> None:
    p = Poisson(1, 1).double()
    p.rates = [[255.0]]
    x = torch.tensor([[0.0], [255.0], [256.0], [257.0], [1000.0]], dtype=torch.float64)
    together = p.log_prob(Batch(x))[:, 0]
    alone = torch.cat([p.log_prob(Batch(row.unsqueeze(0)))[:, 0] for row in x])
    exact = torch.from_numpy(scipy_stats.poisson.logpmf(x[:, 0].numpy(), 255.0))
    close(together, exact)
    close(alone, exact)


@pytest.mark.parametrize("rate", [200.0, 1e4, 1e6])
def test_float32_is_near_float64_for_large_counts(rate: float) -> None:
    """The terms cancel: of 1.4e7 at a million, a plain float32 sum would be wrong by a nat."""
    p, x = poisson(scale=rate), counts(50, 4, 0.7 * rate)
    p.rates = 0.7 * rate + (rand(3, 4) - 0.5) * rate**0.5
    small = copy.deepcopy(p).float()
    value = small.log_prob(Batch(x.float()))
    assert value.dtype == torch.float32
    close(value, p.log_prob(Batch(x)), rtol=1e-3, atol=2e-3)
    stats, exact = small.stats(Batch(x.float()), soft(50, 3).float()), p.stats(Batch(x), soft(50, 3))
    close(stats["total"], exact["total"], rtol=1e-6)


def test_a_missing_entry_is_summed_out() -> None:
    p, x = poisson(2, 3), counts(10, 3)
    holes = x.clone()
    holes[:, 1] = torch.nan
    every = [p.log_prob(Batch(x.index_fill(1, torch.tensor([1]), value))) for value in range(80)]
    close(p.log_prob(Batch(holes)), torch.stack(every).logsumexp(0))


def test_rows_without_any_entry_say_nothing_and_entries_are_counted_one_by_one() -> None:
    p, x, expected = poisson(), with_holes(counts(30, 4), 0.3), soft(30, 3)
    x[4] = torch.nan
    assert (p.log_prob(Batch(x))[4] == 0).all()
    found = p.stats(Batch(x), expected)
    close(found["count"], expected.mT @ (~x.isnan()).double())
    close(found["total"], expected.mT @ x.nan_to_num())
    new = p.maximize(found)["log_rate"].exp()
    close(new, found["total"] / found["count"])


@pytest.mark.parametrize("rate", [5.0, 5e3])
def test_complete_rows_take_one_product_and_never_a_cube(rate: float) -> None:
    n, k, d = 500, 20, 30
    p, x = poisson(k, d, rate), counts(n, d, rate)
    seen = operations(lambda: p.log_prob(Batch(x)))
    assert seen.products == 1
    assert seen.largest < n * k * d
    holes = operations(lambda: p.stats(Batch(with_holes(x, 0.1)), soft(n, k)))
    assert holes.products == 4
    assert holes.largest < n * k * d


def test_the_density_has_derivatives_in_the_counts() -> None:
    """Small counts are looked up only where nobody asks for the slope."""
    p = poisson(2, 2)
    x = torch.tensor([[1.0, 4.0], [0.0, torch.nan]], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(p.log_prob(Batch(x))[:, 0].sum(), x)
    exact = p.log_rate[0] - (x + 1).nan_to_num().digamma()
    close(grad, torch.where(x.isnan(), 0.0, exact))
    moved = torch.func.grad(lambda v: p.log_prob(Batch(v))[:, 0].sum())(x.detach())
    close(moved, grad)


# ---- rates of zero ------------------------------------------------------------------------------------------------


def test_rates_of_zero_are_structural() -> None:
    p = Poisson(2, 2).double()
    p.rates = [[0.0, 2.0], [1.0, 3.0]]
    assert p.n_parameters() == 3
    x = torch.tensor([[0, 1], [1, 1], [300, 1], [torch.nan, 1]], dtype=torch.float64)
    value = p.log_prob(Batch(x))
    assert (value[:, 0] == -torch.inf).tolist() == [False, True, True, False]
    close(value[0, 0], torch.tensor(2.0).double().log() - 2)
    expected = torch.where(value > -torch.inf, soft(4, 2), 0.0)
    stats = p.stats(Batch(x), expected)
    (grad,) = torch.autograd.grad(p.expected_log_prob(stats), [p.log_rate])
    assert grad.isfinite().all()
    assign(p, p.maximize(stats))
    assert p.rates[0, 0] == 0
    other = Poisson(2, 2).double()
    other.load_state_dict(p.state_dict())
    assert torch.equal(other.log_prob(Batch(x)), p.log_prob(Batch(x)))
    assert p.select(torch.tensor([1])).n_parameters() == 2
    many = replicated(copy.deepcopy(p), 2)
    close(many.log_prob(Batch(x)), p.log_prob(Batch(x)).expand(2, -1, -1))


def test_rates_of_zero_that_em_reaches_can_grow_again() -> None:
    for dtype in (torch.float32, torch.float64):
        p = Poisson(1, 1).to(dtype)
        count = torch.full((1, 1), 10.0, dtype=torch.float64)
        assign(p, p.maximize(Stats(count=count, total=torch.zeros_like(count))))
        assert p.log_rate.isfinite().all()
        assert p.support.all()
        assert p.log_prob(Batch(torch.tensor([[3.0]], dtype=dtype))).isfinite().all()
        assign(p, p.maximize(Stats(count=count, total=2 * count)))
        close(p.rates, torch.full((1, 1), 2.0), rtol=1e-6)


# ---- fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truth_is_recovered_by_a_fit(share: float, dtype: torch.dtype) -> None:
    truth = torchem.Mixture(Categorical(2), Poisson(2, 3)).double()
    truth.weights = [0.3, 0.7]
    truth.component.rates = [[1.0, 9.0, 4.0], [6.0, 2.0, 0.5]]  # pyright: ignore
    x = with_holes(truth.sample(6000, generator=rng(4)), share).to(dtype)
    model = torchem.Mixture(Categorical(2), Poisson(2, 3)).to(dtype)
    result = torchem.fit(model, x, seed=0, restarts=2, max_iter=300, tol=1e-7, progress=False)
    assert result.converged
    order = model.weights.argsort()
    close(model.weights[order], truth.weights, atol=0.03)
    close(model.component.rates[order], truth.component.rates, rtol=0.06)  # pyright: ignore
    slack = 1e-9 if dtype == torch.float64 else 1e-5
    history = torch.tensor(result.history, dtype=torch.float64)
    assert (history.diff() >= -slack * history[:-1].abs()).all()


def test_clusters_without_counts_do_not_start_at_a_rate_of_zero() -> None:
    x = torch.tensor([[0.0, 9.0]] * 10 + [[8.0, 0.0]] * 10)
    model = torchem.Mixture(Categorical(2), Poisson(2, 2))
    torchem.fit(model, x, seed=0, max_iter=0, progress=False, tol=0.0)
    assert (model.component.rates > 0.01).all()  # pyright: ignore


def test_moments_are_those_of_samples() -> None:
    p = poisson(2, 3)
    mean, variance = p.moments(Batch(torch.zeros(5, 3)))
    draws = p.sample(torch.ones(40_000, dtype=torch.long), generator=rng(1))
    close(draws.mean(0), mean[0, 1], rtol=0.02)
    close(draws.var(0), variance[0, 1], rtol=0.03)


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1.0, 2.5])
def test_what_is_no_count_is_refused(value: float) -> None:
    model = torchem.Mixture(Categorical(2), Poisson(2, 2))
    with pytest.raises(InvalidArgument, match=rf"whole numbers of at least zero, got {value:g}"):
        torchem.fit(model, [[0.0, 1.0], [value, 0.0]], progress=False)
    with pytest.raises(InvalidArgument, match="whole numbers"):
        model.log_prob(torch.tensor([[0, -1]]))


def test_wrong_rates_are_refused() -> None:
    p = Poisson(2, 2)
    for value, words in (([[0.5, 0.5]], "shape"), ([[-1.0, 1.5]] * 2, "negative"), ([[1.0, torch.inf]] * 2, "finite")):
        with pytest.raises(InvalidArgument, match=words):
            p.rates = value
    assert torch.equal(p.rates, torch.ones(2, 2))
