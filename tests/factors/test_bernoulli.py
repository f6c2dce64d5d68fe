"""Binary columns: densities, missing entries, certain cells, recovery."""

import copy

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.factors.common import operations, replicated, with_holes
from tests.laws.cases import assign, close, close_dict, rand, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Bernoulli, Categorical
from torchem.stats import Stats


def bernoulli(k: int = 3, d: int = 4, seed: int = 0) -> Bernoulli:
    b = Bernoulli(k, d).double()
    b.probs = 0.1 + 0.8 * rand(k, d, seed=seed)
    return b


def bits(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 2, (n, d), generator=rng(seed)).double()


CERTAIN = [[0.0, 0.5, 1.0], [0.2, 0.7, 0.4]]


def test_density_is_that_of_scipy_and_torch() -> None:
    b, x = bernoulli(), bits(20, 4)
    found = b.log_prob(Batch(x))
    for k in range(3):
        p = b.probs[k].detach()
        close(found[:, k], torch.from_numpy(scipy_stats.bernoulli.logpmf(x.numpy(), p.numpy()).sum(-1)))
        close(found[:, k], torch.distributions.Bernoulli(p).log_prob(x).sum(-1))


@pytest.mark.parametrize("probs", [None, CERTAIN])
def test_density_sums_to_one(probs: list[list[float]] | None) -> None:
    b = bernoulli(2, 3)
    if probs is not None:
        b.probs = probs
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)
    close(b.log_prob(Batch(x)).exp().sum(0), torch.ones(2))


def test_a_missing_entry_is_summed_out() -> None:
    b, x = bernoulli(), bits(20, 4)
    holes = x.clone()
    holes[:, 2] = torch.nan
    both = torch.stack([b.log_prob(Batch(x.index_fill(1, torch.tensor([2]), value))) for value in (0.0, 1.0)])
    close(b.log_prob(Batch(holes)), both.logsumexp(0))


def test_rows_without_any_entry_say_nothing_and_entries_are_counted_one_by_one() -> None:
    b, x, expected = bernoulli(), with_holes(bits(30, 4), 0.3), soft(30, 3)
    x[4] = torch.nan
    assert (b.log_prob(Batch(x))[4] == 0).all()
    found = b.stats(Batch(x), expected)
    seen = (~x.isnan()).double()
    close(found["count"], expected.mT @ seen)
    close(found["total"], expected.mT @ x.nan_to_num())
    close(b.stats(Batch(x[4:5]), expected[4:5]).flatten(), torch.zeros(24))


def test_complete_rows_take_one_product_and_never_a_cube() -> None:
    n, k, d = 500, 20, 30
    b, x = bernoulli(k, d), bits(n, d)
    seen = operations(lambda: b.log_prob(Batch(x)))
    assert seen.products == 1
    assert seen.largest < n * k * d
    holes = operations(lambda: b.stats(Batch(with_holes(x, 0.1)), soft(n, k)))
    assert holes.products == 4  # two for potentials, two for statistics
    assert holes.largest < n * k * d


def test_missing_entries_elsewhere_leave_complete_rows_as_they_are() -> None:
    b, x = bernoulli(), bits(10, 4)
    holes = x.clone()
    holes[3, 1] = torch.nan
    keep = torch.arange(10) != 3
    close(b.log_prob(Batch(holes))[keep], b.log_prob(Batch(x))[keep], rtol=1e-14, atol=1e-14)


# ---- cells that the user fixes at 0 or 1 --------------------------------------------------------------------------


def test_certain_cells_forbid_what_contradicts_them() -> None:
    b = Bernoulli(2, 3).double()
    b.probs = CERTAIN
    close(b.probs, torch.tensor(CERTAIN).double(), rtol=1e-7)
    x = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 0], [torch.nan, 0, 1], [torch.nan] * 3], dtype=torch.float64)
    value = b.log_prob(Batch(x))
    assert (value[:, 0] == -torch.inf).tolist() == [False, True, True, False, False]
    assert value[:, 1].isfinite().all()
    close(value[[0, 3, 4], 0], torch.tensor([0.5, 0.5, 1.0]).double().log())
    (grad,) = torch.autograd.grad(torchem.ops.reduce.logsumexp(value, -1).sum(), [b.logits])
    assert grad.isfinite().all()
    assert (grad[0, [0, 2]] == 0).all()


def test_certain_cells_stay_through_every_m_step() -> None:
    b = Bernoulli(2, 3).double()
    b.probs = CERTAIN
    x, expected = with_holes(bits(40, 3), 0.1), soft(40, 2)
    expected = torch.where(b.log_prob(Batch(x)) > -torch.inf, expected, 0.0)
    stats = b.stats(Batch(x), expected)
    (grad,) = torch.autograd.grad(b.expected_log_prob(stats), [b.logits])
    assert grad.isfinite().all()
    close(b.expected_log_prob(stats), torch.where(expected > 0, b.log_prob(Batch(x)) * expected, 0.0).sum())
    before = b.logits.detach().clone()
    assign(b, b.maximize(stats))
    assert torch.equal(b.probs[0, [0, 2]], torch.tensor([0.0, 1.0]).double())
    assert torch.equal(b.logits[0, [0, 2]], before[0, [0, 2]])
    close(b.probs[1], (stats["total"] / stats["count"])[1])
    assert b.n_parameters() == 4
    natural = b.expected_natural(stats + stats.map(torch.ones_like))
    assert (natural["total"][0, [0, 2]] == 0).all()


def test_certain_cells_survive_copies_files_pruning_and_replicas(tmp_path) -> None:
    b = Bernoulli(2, 3).double()
    b.probs = CERTAIN
    b.freeze("probs", mask=torch.tensor([True, False]))
    x = Batch(bits(8, 3))
    other = Bernoulli(2, 3).double()
    other.load_state_dict({name: v for name, v in b.state_dict().items() if "frozen" not in name})
    assert torch.equal(other.log_prob(x), b.log_prob(x))
    torchem.save(b, tmp_path / "b")
    again = torchem.load(tmp_path / "b")
    assert torch.equal(again.log_prob(x), b.log_prob(x))
    assert again.n_parameters() == b.n_parameters() == 3
    one = b.select(torch.tensor([False, True]))
    close(one.log_prob(x), b.log_prob(x)[:, 1:])
    assert not one.restricted
    assert one.frozen("logits").tolist() == [False]  # pyright: ignore
    many = replicated(copy.deepcopy(b), 3)
    assert torch.equal(many.log_prob(x), b.log_prob(x).expand(3, -1, -1))


def test_zeros_that_em_reaches_can_grow_again() -> None:
    for dtype in (torch.float32, torch.float64):
        b = Bernoulli(1, 2).to(dtype)
        count = torch.full((1, 2), 10.0, dtype=torch.float64)
        assign(b, b.maximize(Stats(count=count, total=torch.tensor([[0.0, 10.0]], dtype=torch.float64))))
        assert b.logits.isfinite().all()
        assert b.support.all()
        assert b.log_prob(Batch(torch.tensor([[1.0, 0.0]], dtype=dtype))).isfinite().all()
        assign(b, b.maximize(Stats(count=count, total=torch.tensor([[5.0, 5.0]], dtype=torch.float64))))
        close(b.probs, torch.full((1, 2), 0.5))


def test_small_probabilities_keep_their_digits() -> None:
    count = torch.full((1, 2), 1e12, dtype=torch.float64)
    b = Bernoulli(1, 2).double()
    assign(b, b.maximize(Stats(count=count, total=torch.tensor([[1.0, 1e12 - 1]], dtype=torch.float64))))
    value = b.log_prob(Batch(torch.tensor([[1.0, 0.0]], dtype=torch.float64)))
    close(value.exp(), torch.tensor([[1e-24]], dtype=torch.float64), rtol=1e-9, atol=0)


# ---- fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truth_is_recovered_by_a_fit(share: float, dtype: torch.dtype) -> None:
    truth = torchem.Mixture(Categorical(2), Bernoulli(2, 8)).double()
    truth.weights = [0.3, 0.7]
    truth.component.probs = torch.where(rand(2, 8, seed=3) < 0.5, 0.15, 0.8)  # pyright: ignore
    x = with_holes(truth.sample(6000, generator=rng(4)), share).to(dtype)
    model = torchem.Mixture(Categorical(2), Bernoulli(2, 8)).to(dtype)
    result = torchem.fit(model, x, seed=0, max_iter=300, tol=1e-7, progress=False)
    assert result.converged
    order = model.weights.argsort()
    close(model.weights[order], truth.weights, atol=0.03)
    close(model.component.probs[order], truth.component.probs, atol=0.04)  # pyright: ignore
    slack = 1e-9 if dtype == torch.float64 else 1e-5
    history = torch.tensor(result.history, dtype=torch.float64)
    assert (history.diff() >= -slack * history[:-1].abs()).all()


def test_moments_are_those_of_samples() -> None:
    b = bernoulli(2, 3)
    mean, variance = b.moments(Batch(torch.zeros(5, 3)))
    assert mean.shape == variance.shape == (1, 2, 3)
    draws = b.sample(torch.ones(40_000, dtype=torch.long), generator=rng(1))
    close(draws.mean(0), mean[0, 1], atol=0.01)
    close(draws.var(0), variance[0, 1], atol=0.01)
    assert replicated(b, 4).moments(Batch(torch.zeros(2, 5, 3)))[0].shape == (4, 1, 1, 2, 3)


def test_frozen_components_stay() -> None:
    b, x, expected = bernoulli(), bits(30, 4), soft(30, 3)
    free = b.maximize(b.stats(Batch(x), expected))["logits"]
    b.freeze("probs", mask=torch.tensor([False, True, False]))
    kept = b.maximize(b.stats(Batch(x), expected))["logits"]
    assert torch.equal(kept[1], b.logits[1])
    close_dict({"a": kept[[0, 2]]}, {"a": free[[0, 2]]}, rtol=0)


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"n_components: expected a positive whole number, got 0"):
        Bernoulli(0, 1)
    b = Bernoulli(2, 2)
    for value, words in (([[0.5, 0.5]], "shape"), ([[0.5, 1.5]] * 2, "from 0 to 1"), ([[0.5, torch.nan]] * 2, "NaN")):
        with pytest.raises(InvalidArgument, match=words):
            b.probs = value
    assert torch.equal(b.probs, torch.full((2, 2), 0.5))
    model = torchem.Mixture(Categorical(2), b)
    with pytest.raises(InvalidArgument, match="zeros and ones, got 2"):
        torchem.fit(model, [[0.0, 1.0], [2.0, 0.0]], progress=False)
    with pytest.raises(InvalidArgument, match="2 features"):
        model.log_prob([[0.0, 1.0, 0.0]])
