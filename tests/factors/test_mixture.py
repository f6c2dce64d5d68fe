"""Mixtures inside states: densities, starts that differ, fits, files."""

import copy

import pytest
import torch
from torch import Tensor

import torchem
from tests.factors.common import even, operations, replicated, with_holes
from tests.laws.cases import assign, close, close_stats, gaussian, rand, randn, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Bernoulli, Categorical, Gaussian, Mixture, Poisson, Product
from torchem.priors import Dirichlet


def nested(k: int = 2, m: int = 3, d: int = 2, kind: str = "full") -> Mixture:
    table = Categorical(k, m).double()
    table.probs = rand(k, m, seed=1).softmax(-1)
    return Mixture(table, gaussian(k * m, d, kind))


def clusters(n: int, means: Tensor, seed: int = 0) -> Tensor:
    z = torch.randint(0, len(means), (n,), generator=rng(seed))
    return means[z] + 0.5 * randn(n, means.shape[-1], seed=seed + 1)


# ---- the distribution ---------------------------------------------------------------------------------------------


def test_density_is_the_weighted_sum_over_parts() -> None:
    f, x = nested(), Batch(randn(15, 2))
    parts = f.component.log_prob(x).exp().unflatten(-1, (2, 3))
    close(f.log_prob(x), (f.mixing.probs * parts).sum(-1).log())  # pyright: ignore


def test_one_part_is_the_part_itself() -> None:
    f, x = nested(3, 1), Batch(randn(15, 2))
    close(f.log_prob(x), f.component.log_prob(x))
    found = f.stats(x, soft(15, 3))["component"].map(lambda leaf: leaf.squeeze(1))
    close_stats(found, f.component.stats(x, soft(15, 3)))


def test_statistics_are_those_of_parts_under_their_share() -> None:
    f, x, expected = nested(), Batch(randn(15, 2)), soft(15, 2)
    joint = f.mixing.probs.log() + f.component.log_prob(x).unflatten(-1, (2, 3))  # pyright: ignore
    each = expected.unsqueeze(-1) * joint.softmax(-1)
    found = f.stats(x, expected)
    close(found["mixing"]["counts"], each.sum(0))
    close(found["component"]["count"], each.sum(0))
    assert found["component"]["second"].shape == (2, 3, 2, 2)
    close_stats(found.select([1]), nested_part(f, x, expected, 1))


def nested_part(f: Mixture, x: Batch, expected: Tensor, state: int) -> torchem.Stats:
    one = f.select(torch.tensor([state]))
    one.component.origin = f.component.origin  # pyright: ignore
    return one.stats(x, expected[:, [state]])


def test_a_shared_leaf_keeps_its_shape() -> None:
    found = nested(kind="tied").stats(Batch(randn(15, 2)), soft(15, 2))["component"]
    assert found["second"].shape == (2, 2)
    assert found["first"].shape == (2, 3, 2)


def test_structural_zeros_close_a_part_for_good() -> None:
    f, x = nested(), Batch(randn(15, 2))
    f.mixing.probs = [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]  # pyright: ignore
    value = f.log_prob(x)
    close(value[:, 1], f.component.log_prob(x)[:, 4])
    grads = torch.autograd.grad(value.sum(), list(f.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    assign(f, f.maximize(f.stats(x, soft(15, 2))))
    assert torch.equal(f.mixing.probs == 0, torch.tensor([[False, True, False], [True, False, True]]))  # pyright: ignore


def test_an_impossible_row_is_impossible() -> None:
    bits = Bernoulli(4, 1).double()
    bits.probs = [[0.0], [0.0], [0.5], [0.5]]
    f = Mixture(Categorical(2, 2).double(), bits)
    x = Batch(torch.ones(3, 1, dtype=torch.float64))
    value = f.log_prob(x)
    assert (value[:, 0] == -torch.inf).all()
    kernel = f.kernel()
    assert torch.equal(kernel.log_potential(x) == -torch.inf, value == -torch.inf)
    kernel.collect(x, torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64))
    assert all(leaf.isfinite().all() for leaf in kernel.stats().leaves())
    grads = torch.autograd.grad(torchem.ops.reduce.logsumexp(value, -1).sum(), list(f.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


def test_missing_entries_pass_to_the_parts() -> None:
    counts = Poisson(4, 3).double()
    counts.rates = 1 + 5 * rand(4, 3)
    f = Mixture(Categorical(2, 2).double(), counts)
    assert f.handles_missing
    x = with_holes((6 * rand(20, 3, seed=2)).floor(), 0.3)
    x[4] = torch.nan
    parts = counts.log_prob(Batch(x)).unflatten(-1, (2, 2))
    close(f.log_prob(Batch(x)), (parts.exp().mean(-1)).log())
    assert (f.log_prob(Batch(x))[4].abs() < 1e-15).all()
    close(f.stats(Batch(x[4:5]), soft(1, 2))["component"]["total"], torch.zeros(2, 2, 3))


def test_samples_agree_with_the_density() -> None:
    f = nested(2, 3)
    z = torch.arange(60_000) % 2
    x = f.sample(z, generator=rng(3))
    mean, variance = f.moments(Batch(x[:1]))
    assert mean.shape == (1, 2, 2)
    for state in range(2):
        close(x[z == state].mean(0), mean[0, state], atol=0.05)
        close(x[z == state].var(0), variance[0, state], rtol=0.05)
    many = replicated(copy.deepcopy(f), 2)
    close(many.moments(Batch(torch.zeros(2, 3, 2)))[0], mean.expand(2, 1, 1, 2, 2))


def test_no_cube_of_rows_parts_and_columns() -> None:
    n, d = 400, 30
    f = nested(3, 4, d, "diag")
    f.component.direct = False  # pyright: ignore
    kernel, x, expected = f.kernel(), Batch(randn(n, d)), soft(n, 3)
    seen = operations(lambda: (kernel.log_potential(x), kernel.collect(x, expected), kernel.stats()))
    assert seen.largest < n * 12 * d


def test_two_observation_axes_with_replicas() -> None:
    f = replicated(nested(), 2)
    x, expected = randn(12, 2), soft(12, 2).expand(2, -1, -1)
    flat, folded = Batch(x), Batch(x.unflatten(0, (3, 4)))
    close(f.log_prob(folded).flatten(1, 2), f.log_prob(flat))
    close_stats(f.stats(folded, expected.unflatten(1, (3, 4))), f.stats(flat, expected))
    kernel = f.kernel()
    close(kernel.log_potential(folded).flatten(1, 2), f.log_prob(flat))
    kernel.collect(folded, expected.unflatten(1, (3, 4)))
    close_stats(kernel.stats(), f.stats(flat, expected))


# ---- starts -------------------------------------------------------------------------------------------------------


def different(values: Tensor, k: int, m: int) -> bool:
    """Whether the parts of every state differ from one another."""
    parts = values.reshape(k, m, -1)
    gap = (parts.unsqueeze(1) - parts.unsqueeze(2)).abs().amax(-1)
    return bool((gap + torch.eye(m) > 1e-3).all())


@pytest.mark.parametrize("start", ["kmeans", "even", "one state has no rows"])
def test_parts_start_different(start: str) -> None:
    """One centre tiled over the parts of a state would stay one."""
    f, x = nested(2, 3), Batch(clusters(200, 4 * randn(6, 2, seed=5)))
    expected = even(x, 2)
    if start == "kmeans":
        expected = (x.x[:, :1] > 0).double() * torch.tensor([1.0, -1.0]) + torch.tensor([0.0, 1.0])
    elif start != "even":
        expected = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(200, 2)
    values = f.initialize(x, expected)
    means = values["component.mean"]
    assert different(means[:3], 1, 3)
    if start != "one state has no rows":
        assert different(means, 2, 3)
        share = values["mixing.logits"].softmax(-1)
        assert (share > 0.02).all()


def test_parts_start_different_on_few_and_equal_rows() -> None:
    f = Mixture(Categorical(2, 3), Poisson(6, 2)).double()
    x = Batch(torch.tensor([[1.0, 2.0]] * 5 + [[4.0, 0.0]] * 5, dtype=torch.float64))
    expected = torch.nn.functional.one_hot(torch.arange(10) // 5, 2).double()
    values = f.initialize(x, expected)
    assert all(value.isfinite().all() for value in values.values())


def test_parts_at_observations_differ() -> None:
    f, x = nested(2, 3), Batch(clusters(100, 4 * randn(6, 2, seed=5)))
    index = torch.tensor([7, 50])
    values = f.initialize_at(x, index)
    assert different(values["component.mean"], 2, 3)
    close(values["component.mean"][[0, 3]], x.x[index])
    close(values["mixing.logits"].softmax(-1), torch.full((2, 3), 1 / 3, dtype=torch.float64))
    many = replicated(nested(2, 3), 2)
    both = many.initialize_at(x, torch.stack([index, index.flip(0)]))
    close(both["component.mean"][0], values["component.mean"])
    # Equal rows are passed over.
    rows = torch.cat([torch.zeros(50, 2), torch.ones(1, 2), torch.full((1, 2), 2.0)]).double()
    found = f._around(rows, torch.tensor([3, 3]))
    assert rows[found].unflatten(0, (2, 3))[0, :, 0].tolist() == [0.0, 1.0, 2.0]


# ---- fits ---------------------------------------------------------------------------------------------------------

CENTERS = torch.tensor([[-6, -3], [-6, 3], [6, -3], [6, 3]], dtype=torch.float64)


def gmm_hmm(n: int = 6, t: int = 200) -> tuple[Tensor, Tensor]:
    """Two states of two clusters each."""
    truth = torchem.HMM(Categorical(2), Categorical(2, 2), Mixture(Categorical(2, 2), Gaussian(4, 2))).double()
    truth.transition_matrix = [[0.95, 0.05], [0.05, 0.95]]
    truth.emission.component.means = CENTERS  # pyright: ignore
    x, z = truth.sample(n, t, latents=True, generator=rng(3))
    return x, z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["full", "diag", "tied"])
def test_a_chain_whose_states_are_mixtures(kind: str, dtype: torch.dtype) -> None:
    x, z = gmm_hmm()
    emission = Mixture(Categorical(2, 2), Gaussian(4, 2, kind))  # pyright: ignore
    model = torchem.HMM(Categorical(2), Categorical(2, 2), emission).to(dtype)
    result = torchem.fit(model, x.to(dtype), seed=0, restarts=3, max_iter=200, tol=1e-6, progress=False)
    path = model.most_likely(x.to(dtype))
    right = (path == z).double().mean()
    assert max(float(right), 1 - float(right)) > 0.98
    slack = 1e-9 if dtype == torch.float64 else 1e-5
    for history in result.histories:
        steps = torch.tensor(history, dtype=torch.float64)
        assert (steps.diff() >= -slack * steps[:-1].abs()).all()


def test_it_is_a_mixture_of_all_parts() -> None:
    """A mixture of mixtures has the likelihood of the flat one with the products of the weights."""
    f, x = nested(), randn(30, 2)
    model = torchem.Mixture(Categorical(2).double(), f)
    model.weights = [0.3, 0.7]
    flat = torchem.Mixture(Categorical(6).double(), copy.deepcopy(f.component))
    flat.weights = (model.weights.unsqueeze(-1) * f.mixing.probs).flatten().detach()  # pyright: ignore
    close(model.log_prob(x), flat.log_prob(x))
    for _ in range(5):
        one, other = model.e_step(Batch(x)), flat.e_step(Batch(x))
        close(model.bound(one), flat.bound(other))
        model.m_step(one)
        flat.m_step(other)
    close(model.log_prob(x), flat.log_prob(x))


@pytest.mark.parametrize("dead", ["respawn", "prune"])
def test_states_that_die_are_healed(dead: str) -> None:
    x = torch.cat([clusters(100, CENTERS), torch.full((20, 2), 30.0, dtype=torch.float64)])
    emission = Mixture(Categorical(3, 2), Gaussian(6, 2, "diag"))
    model = torchem.Mixture(Categorical(3), emission).double()
    torchem.fit(model, x, seed=0, restarts=2, max_iter=60, tol=1e-4, dead=dead, progress=False)  # pyright: ignore
    assert model.log_prob(x).isfinite().all()
    if dead == "prune":
        assert model.n_components < 3
        assert model.component.component.n_components == 2 * model.n_components  # pyright: ignore


def test_a_state_is_degenerate_if_a_part_is() -> None:
    f = nested(2, 2, 1)
    assert f.degenerate().tolist() == [False, False]  # pyright: ignore
    f.component.covariances = [[[1.0]], [[1.0]], [[1e-7]], [[1.0]]]  # pyright: ignore
    assert f.degenerate().tolist() == [False, True]  # pyright: ignore


def test_products_and_mixtures_nest_in_each_other(tmp_path) -> None:
    k, x = 2, torch.cat([clusters(60, CENTERS), (5 * rand(60, 1)).floor(), (3 * rand(60, 1)).floor()], -1)
    x[::7, 3] = torch.nan
    x[::5, 2] = torch.nan
    inside = Mixture(Categorical(k, 2), Product([Gaussian(2 * k, 2), Poisson(2 * k, 1), Categorical(2 * k, 3)]))
    outside = Product([Mixture(Categorical(k, 2), Gaussian(2 * k, 2)), Poisson(k, 1), Categorical(k, 3)])
    for emission in (inside, outside):
        model = torchem.Mixture(Categorical(k), emission).double()
        result = torchem.fit(model, x, seed=0, restarts=2, max_iter=40, tol=1e-5, progress=False)
        steps = torch.tensor(result.history, dtype=torch.float64)
        assert (steps.diff() >= -1e-9 * steps[:-1].abs()).all()
        torchem.save(model, tmp_path / "m")
        again = torchem.load(tmp_path / "m")
        assert type(again.component) is type(emission)
        assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_priors_of_parts_join_the_m_step() -> None:
    f, x = nested(), Batch(randn(30, 2))
    f.mixing.prior = Dirichlet(3.0)
    stats = f.stats(x, soft(30, 2))
    more = f.penalized(stats)
    close(more["mixing"]["counts"], stats["mixing"]["counts"] + 2)
    close_stats(more["component"], stats["component"])
    prior = f.log_prior()
    assert prior is not None
    close(prior, f.mixing.prior.log_prob(f.mixing))


def test_origins_move_inside() -> None:
    """Clusters far from a common origin: numerics adapt through both levels, and statistics are carried along."""
    f = Mixture(Categorical(2, 2), Gaussian(4, 1)).double()
    f.component.means = [[0.0], [1.0], [1e6], [1e6 + 1]]  # pyright: ignore
    x = Batch(torch.tensor([[0.1], [0.9], [1e6], [1e6 + 1.2]] * 20000, dtype=torch.float64))
    before = f.stats(x, even(x, 2))
    q = f.expected_log_prob(before)
    change = f.tune(len(x))
    assert change is not None
    assert change.move is not None
    moved = change.move(before)
    close(f.expected_log_prob(moved), q, rtol=1e-6)
    close_stats(f.stats(x, even(x, 2)), moved, rtol=1e-6)


# ---- files, bad input ---------------------------------------------------------------------------------------------


def test_factor_and_model_of_one_name_are_told_apart_in_files(tmp_path) -> None:
    model = torchem.Mixture(Categorical(2).double(), nested())
    x = randn(9, 2)
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert type(again) is torchem.Mixture
    assert type(again.component) is Mixture
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    torchem.save(model.component, tmp_path / "f")
    assert type(torchem.load(tmp_path / "f")) is Mixture


@pytest.mark.parametrize(
    ("mixing", "component", "words"),
    [
        (Categorical(3), Poisson(6, 1), r"Categorical\(K, M\)"),
        (Categorical(2, 3), Poisson(5, 1), r"K · M components for mixing \(2, 3\), got 5"),
        (Categorical(2, 3), Poisson(4, 1), r"got 4"),
        (Categorical(2, 3), Categorical(6), "got None"),
    ],
)
def test_what_does_not_fit_together_is_refused(mixing: Categorical, component: Poisson, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        Mixture(mixing, component)


def test_bad_data_are_refused_by_the_parts() -> None:
    model = torchem.Mixture(Categorical(2), Mixture(Categorical(2, 2), Poisson(4, 1)))
    with pytest.raises(InvalidArgument, match="whole numbers"):
        model.log_prob([[0.5]])
