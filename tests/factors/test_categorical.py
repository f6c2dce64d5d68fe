"""Tables: missing categories, errors that name a row, cells that are kept."""

import pytest
import torch

import torchem
from tests.factors.common import replicated, with_holes
from tests.laws.cases import assign, close, rand, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical
from torchem.stats import Stats


def table(k: int = 3, m: int = 4, seed: int = 0) -> Categorical:
    c = Categorical(k, m).double()
    c.probs = (2 * rand(k, m, seed=seed)).softmax(-1)
    return c


# ---- missing categories -------------------------------------------------------------------------------------------


def test_a_missing_category_says_nothing_and_is_not_counted() -> None:
    c, expected = table(), soft(12, 3)
    x = torch.randint(0, 4, (12, 1), generator=rng(1)).double()
    holes = x.clone()
    holes[::3] = torch.nan
    cast = c.cast(holes)
    assert cast.dtype == torch.long
    assert cast[::3].tolist() == [[-1]] * 4
    seen = torch.arange(12) % 3 != 0
    value = c.log_prob(Batch(cast))
    assert (value[~seen] == 0).all()
    assert torch.equal(value[seen], c.log_prob(Batch(c.cast(x)))[seen])
    assert torch.equal(
        c.stats(Batch(cast), expected)["counts"], c.stats(Batch(c.cast(x[seen])), expected[seen])["counts"]
    )


def test_complete_categories_take_the_table_as_it_is_bit_for_bit() -> None:
    c, expected = table().float(), soft(50, 3).float()
    x = torch.randint(0, 4, (50, 1), generator=rng(1))
    assert torch.equal(c.log_prob(Batch(x)), c.log_probs()[:, x[:, 0]].mT)
    counts = torch.zeros(3, 4, dtype=torch.float64).index_add(-1, x[:, 0], expected.mT.double())
    assert torch.equal(c.stats(Batch(x), expected)["counts"], counts)
    assert torch.equal(c.cast(x.float()), x)


def test_missing_categories_under_vmap_and_replicas() -> None:
    c = table()
    x = c.cast(with_holes(torch.randint(0, 4, (3, 10, 1), generator=rng(1)).double(), 0.3))
    batched = torch.func.vmap(lambda rows: c.log_prob(Batch(rows)))(x)
    close(batched, torch.stack([c.log_prob(Batch(rows)) for rows in x]))
    many = replicated(table(), 2)
    expected = soft(10, 3).expand(2, -1, -1)
    close(many.log_prob(Batch(x[0])), c.log_prob(Batch(x[0])).expand(2, -1, -1))
    close(many.stats(Batch(x[0]), expected)["counts"][1], c.stats(Batch(x[0]), expected[1])["counts"])


def test_gradients_with_missing_categories_and_structural_zeros() -> None:
    c = Categorical(2, 3).double()
    c.probs = [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
    value = c.log_prob(Batch(c.cast(torch.tensor([[2.0], [torch.nan], [0.0]]))))
    assert value[0, 0] == -torch.inf
    assert (value[1] == 0).all()
    (grad,) = torch.autograd.grad(torchem.ops.reduce.logsumexp(value, -1).sum(), [c.logits])
    assert grad.isfinite().all()


def test_a_fit_with_missing_categories_recovers_the_truth() -> None:
    truth = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)).double()
    truth.transition_matrix = [[0.95, 0.05], [0.1, 0.9]]
    truth.emission.probs = [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]  # pyright: ignore
    x = with_holes(truth.sample(4, 1500, generator=rng(5)).double(), 0.2)
    model = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)).double()
    result = torchem.fit(model, x, seed=1, restarts=4, max_iter=500, tol=1e-6, progress=False)
    order = model.emission.probs[:, 0].argsort(descending=True)  # pyright: ignore
    close(model.emission.probs[order], truth.emission.probs, atol=0.05)  # pyright: ignore
    close(model.transition_matrix[order][:, order], truth.transition_matrix, atol=0.04)
    history = torch.tensor(result.history, dtype=torch.float64)
    assert (history.diff() >= -1e-9 * history[:-1].abs()).all()


def test_hard_clusters_do_not_start_with_probabilities_of_zero() -> None:
    c, x = table(2, 3), torch.tensor([[0], [0], [1], [2]])
    hard = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)
    values = c.initialize(Batch(x), hard)
    assign(c, values)
    assert (c.probs > 1e-3).all()
    assert c.probs[0, 0] > 0.98


def test_random_responsibilities_of_many_rows_give_states_that_differ() -> None:
    """They average out: taken as they come, every state would start with the frequencies of all, on a saddle."""
    c = Categorical(3, 4).double()
    x = Batch(torch.randint(0, 4, (20_000, 1), generator=rng(2)))
    assign(c, c.initialize(x, rand(20_000, 3, seed=3)))
    gap = c.probs.log() - torch.tensor(0.25).double().log()
    close(gap.square().mean().sqrt(), torch.tensor(0.5), atol=0.1)
    # Equal responsibilities stay equal: rounding is not blown up, and rows that differ enough are left alone.
    assign(c, c.initialize(x, torch.full((20_000, 3), 1 / 3, dtype=torch.float64)))
    close(c.probs[0], c.probs[2], atol=1e-8)
    hard = torch.nn.functional.one_hot(x.x[:, 0].clamp(max=2), 3).double()
    assign(c, c.initialize(x, hard))
    close(c.probs[0, 0], torch.tensor(1.0), atol=0.02)


def test_moments_are_those_of_indicators() -> None:
    c = table()
    mean, variance = c.moments(Batch(torch.zeros(2, 5, 1, dtype=torch.long)))
    assert mean.shape == variance.shape == (1, 1, 3, 4)
    close(mean[0, 0], c.probs)
    close(variance, mean * (1 - mean))
    assert replicated(c, 2).moments(Batch(torch.zeros(5, 1)))[0].shape == (2, 1, 3, 4)


@pytest.mark.parametrize("bad", [[[0.0], [4.0]], [[0.5], [1.0]], [[-1.0], [torch.nan]], [[-1], [1]]])
def test_what_is_no_category_is_refused(bad: list[list[float]]) -> None:
    model = torchem.Mixture(Categorical(3), table())
    with pytest.raises(InvalidArgument, match="whole numbers from 0 to 3"):
        model.log_prob(bad)
    close(model.log_prob(torch.full((2, 1), torch.nan)), torch.zeros(2), atol=1e-7)


# ---- assignment ---------------------------------------------------------------------------------------------------


def test_a_state_without_successor_is_named() -> None:
    with pytest.raises(InvalidArgument, match="row 2 of probs has no successor"):
        Categorical(3, 3).probs = [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 0]]
    model = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3))
    with pytest.raises(InvalidArgument, match="row 0 of transition_matrix has no successor"):
        model.transition_matrix = [[0.0, 0.0], [0.5, 0.5]]
    with pytest.raises(InvalidArgument, match="row 1 of probs is zero throughout"):
        Categorical(2, 3).probs = [[0.5, 0.5, 0], [0, 0, 0]]


def test_a_row_that_does_not_sum_to_one_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"probs: .* got row 1 of probs that is off by 0\.2"):
        Categorical(2, 2).probs = [[0.5, 0.5], [0.5, 0.7]]
    with pytest.raises(InvalidArgument, match=r"row \(1, 0\) of probs that is off by 0\.5"):
        Categorical(2, 1, 2).probs = [[[0.5, 0.5]], [[0.5, 0.0]]]
    with pytest.raises(InvalidArgument, match=r"rows that sum to one, got one that is off by 0\.1"):
        Categorical(2).probs = [0.5, 0.6]


# ---- cells that are kept ------------------------------------------------------------------------------------------


def kept(c: Categorical, mask: list[list[bool]], counts: torch.Tensor) -> torch.Tensor:
    c.freeze("probs", mask=torch.tensor(mask))
    assign(c, c.maximize(Stats(counts=counts)))
    assert c.logits.isfinite().all()
    return c.probs.detach()


def test_a_row_whose_kept_cells_hold_all_of_its_mass() -> None:
    c = Categorical(2, 3).double()
    c.probs = [[0.3, 0.7, 0.0], [0.2, 0.3, 0.5]]
    found = kept(c, [[True, True, False], [True, True, True]], rand(2, 3) + 1)
    close(found, torch.tensor([[0.3, 0.7, 0.0], [0.2, 0.3, 0.5]]).double(), rtol=1e-7)
    assert found[0, 2] == 0
    assert c.n_parameters() == 0
    # All of the mass is kept though a third cell could have some.
    c = Categorical(1, 3).double()
    assign(c, c.maximize(Stats(counts=torch.tensor([[3.0, 7.0, 0.0]], dtype=torch.float64))))
    found = kept(c, [[True, True, False]], torch.tensor([[1.0, 1.0, 8.0]]).double())
    close(found, torch.tensor([[0.3, 0.7, 0.0]]).double(), rtol=1e-7)


def test_kept_cells_beside_structural_zeros() -> None:
    c = Categorical(2, 4).double()
    c.probs = [[0.4, 0.6, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]]
    counts = torch.tensor([[5.0, 1.0, 9.0, 9.0], [1.0, 2.0, 3.0, 4.0]]).double()
    found = kept(c, [[True, False, True, False], [False, False, False, True]], counts)
    close(found[0], torch.tensor([0.4, 0.6, 0.0, 0.0]).double(), rtol=1e-7)
    close(found[1], torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), rtol=1e-7)
    assert (found[0, 2:] == 0).all()


def test_kept_cells_with_replicas_equal_each_alone() -> None:
    mask = torch.tensor([[True, False, False, False], [False, True, True, False], [False, False, False, False]])
    many = replicated(table(), 2)
    many.logits.data = many.logits.data + 0.3 * rand(2, 3, 4, seed=3)  # pyright: ignore
    counts = rand(2, 3, 4, seed=4)
    new = many.freeze("probs", mask=mask).maximize(Stats(counts=counts))["logits"]
    for r in range(2):
        one = table()
        one.logits.data = many.logits.data[r]  # pyright: ignore
        alone = one.freeze("probs", mask=mask).maximize(Stats(counts=counts[r]))["logits"]
        close(new[r], alone)
        close(alone.softmax(-1)[mask], one.probs[mask])
