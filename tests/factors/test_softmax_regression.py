"""Gates and transitions that read covariates. No law covers latent children of this kind, so they are here."""

import copy

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import close, close_dict, close_stats
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import LinearGaussian, SoftmaxRegression
from torchem.stats import Stats

N, K, M = 60, 3, 2


class Case:
    """A gate or transition, covariates with an intercept, expectations that carry weights."""

    def __init__(self, parents: int | None = None, restricted: bool = False, seed: int = 0):
        self.factor = SoftmaxRegression(K, M, parents).double()
        shape = self.factor.shape
        self.factor.weight = 1.5 * cases.randn(*shape, M, seed=seed)
        if restricted:
            allowed = torch.ones(shape, dtype=torch.bool)
            allowed[..., 0] = parents is not None
            if parents is not None:
                allowed[0, 0], allowed[1, 2], allowed[2] = False, False, torch.tensor([False, True, False])
            self.factor.support = allowed
        u = cases.randn(N, M, seed=seed + 1)
        u[:, 0] = 1.0
        self.batch = Batch(torch.zeros(N, 1, dtype=torch.float64), u=u)
        self.expected = torch.where(self.factor.support, cases.rand(N, *shape, seed=seed + 2), 0.0)

    def q(self, factor: SoftmaxRegression | None = None) -> Tensor:
        value = (factor or self.factor).log_table(self.batch)
        return torch.where(self.expected > 0, self.expected * value, 0.0).sum()

    def stats(self) -> Stats:
        return self.factor.table_stats(self.batch, self.expected).map(torch.Tensor.detach)


def vanishes(gradient: Tensor, tolerance: float) -> None:
    assert float(gradient.abs().max()) <= tolerance


every_case = pytest.mark.parametrize(
    "case",
    [(None, False), (None, True), (4, False), (4, True), (1, False)],
    ids=["gate", "gate-support", "transition", "transition-support", "one-parent"],
)


@every_case
def test_table_is_the_softmax_and_zeros_are_exact(case: tuple) -> None:
    c = Case(*case)
    table = c.factor.log_table(c.batch)
    assert table.shape == (N, *c.factor.shape)
    assert c.batch.u is not None
    weight = c.factor.weight
    assert bool((weight[..., 0, :] == 0).all())
    logits = torch.einsum("nm,...jm->n...j", c.batch.u, weight)
    close(table.exp(), torch.where(c.factor.support, logits.exp(), 0.0) / torch.where(
        c.factor.support, logits.exp(), 0.0).sum(-1, keepdim=True))  # fmt: skip
    assert torch.equal(table.exp() == 0, (~c.factor.support).expand_as(table))
    folded = c.batch.map(lambda value: value.unflatten(0, (4, N // 4)))
    close(c.factor.log_table(folded).flatten(0, 1), table)
    close_stats(c.factor.table_stats(folded, c.expected.unflatten(0, (4, N // 4))), c.stats())


@every_case
def test_minorizer_touches_q_and_stays_below(case: tuple) -> None:
    c = Case(*case)
    stats = c.stats()
    close(c.factor.expected_log_prob(stats), c.q())
    ours = torch.autograd.grad(c.factor.expected_log_prob(stats), c.factor.coefficient)[0]
    theirs = torch.autograd.grad(c.q(), c.factor.coefficient)[0]
    close(ours, theirs)
    for trial in range(40):
        other = copy.deepcopy(c.factor)
        other.coefficient.data += 10.0 ** (trial % 4 - 2) * cases.randn(*other.coefficient.shape, seed=trial)
        assert float((c.q(other) - other.expected_log_prob(stats)).detach()) >= -1e-9


@every_case
def test_maximize_is_the_maximum_of_the_minorizer_and_pure(case: tuple) -> None:
    c = Case(*case)
    stats, before = c.stats(), cases.state(c.factor)
    new = c.factor.maximize(stats)
    cases.unchanged(c.factor, before)
    best = copy.deepcopy(c.factor)
    cases.assign(best, new)
    vanishes(torch.autograd.grad(best.expected_log_prob(stats), best.coefficient)[0], 1e-9)
    assert float((c.q(best) - c.q()).detach()) > 0


@every_case
def test_climbs_to_the_optimum_without_ever_falling(case: tuple) -> None:
    c = Case(*case)
    last = float(c.q().detach())
    for _ in range(300):
        cases.assign(c.factor, c.factor.maximize(c.stats()))
        value = float(c.q().detach())
        assert value >= last - 1e-10 * abs(last)
        last = value
    vanishes(torch.autograd.grad(c.q(), c.factor.coefficient)[0], 1e-7)


@pytest.mark.parametrize("parents", [None, 4])
def test_minorizers_of_different_parameters_add(parents: int | None) -> None:
    """What incremental EM sums: batches whose statistics were taken at different parameters."""
    c = Case(parents)
    parts, halves = [], (slice(0, N // 2), slice(N // 2, None))
    for i, half in enumerate(halves):
        moved = copy.deepcopy(c.factor)
        moved.coefficient.data += i * cases.randn(*moved.coefficient.shape, seed=9)
        parts.append(moved.table_stats(c.batch[half], c.expected[half]).map(torch.Tensor.detach))
    total = parts[0] + parts[1]
    for trial in range(20):
        other = copy.deepcopy(c.factor)
        other.coefficient.data += cases.randn(*other.coefficient.shape, seed=trial)
        assert float((c.q(other) - other.expected_log_prob(total)).detach()) >= -1e-9
    whole = c.factor.table_stats(c.batch, 2 * c.expected)
    close_stats(whole, c.stats() * 2)
    close_stats(
        c.factor.table_stats(c.batch[halves[0]], c.expected[halves[0]])
        + c.factor.table_stats(c.batch[halves[1]], c.expected[halves[1]]),
        c.stats(),
    )


@every_case
def test_replicas_equal_each_alone(case: tuple) -> None:
    c = Case(*case)
    many = copy.deepcopy(c.factor)
    many.replicate(3)
    many.coefficient.data = many.coefficient.data + 0.5 * cases.randn(*many.coefficient.shape, seed=5)
    expected = torch.stack([c.expected * w for w in (1.0, 0.5, 2.0)])
    table, stats = many.log_table(c.batch), many.table_stats(c.batch, expected)
    new, q = many.maximize(stats), many.expected_log_prob(stats)
    for r in range(3):
        single = copy.deepcopy(many)
        single.take_replicas(r)
        close(table[r], single.log_table(c.batch))
        own = single.table_stats(c.batch, expected[r])
        close_stats(stats.map(lambda leaf, r=r: leaf[r]), own)
        close(q[r], single.expected_log_prob(own))
        close_dict({name: value[r] for name, value in new.items()}, single.maximize(own), rtol=1e-8)


@every_case
def test_under_vmap_and_grad(case: tuple) -> None:
    c = Case(*case)
    stats = c.stats()
    both = stats.map(lambda leaf: torch.stack([leaf, 3 * leaf]))
    batched = torch.func.vmap(c.factor.maximize)(both)["coefficient"]
    close(batched[0], c.factor.maximize(stats)["coefficient"])
    # The expectations' scale changes nothing but the weight.
    names = list(dict(c.factor.named_parameters()))

    def step(expected: Tensor, u: Tensor, *values: Tensor) -> Tensor:
        params = {f"inner.{n}": v for n, v in zip(names, values, strict=True)}
        return torch.func.functional_call(Shell(c.factor), params, (Batch(c.batch.x, u=u), expected))

    assert c.batch.u is not None
    inputs = (c.expected.requires_grad_(), c.batch.u.clone().requires_grad_(), c.factor.coefficient.detach().clone())
    inputs[2].requires_grad_()
    assert torch.autograd.gradcheck(step, inputs, fast_mode=True, atol=1e-5)


class Shell(torch.nn.Module):
    """An M-step as a forward pass."""

    def __init__(self, inner: SoftmaxRegression):
        super().__init__()
        self.inner = inner

    def forward(self, batch: Batch, expected: Tensor) -> Tensor:
        return self.inner.maximize(self.inner.table_stats(batch, expected))["coefficient"]


def test_collinear_covariates_and_parents_never_visited() -> None:
    c = Case(4)
    assert c.batch.u is not None
    u = torch.cat([c.batch.u, 3 * c.batch.u[:, 1:] - 1, torch.zeros(N, 1)], -1)
    factor = SoftmaxRegression(K, 4, 4).double()
    factor.weight = start = torch.nn.functional.pad(cases.randn(4, K - 1, 4), (0, 0, 1, 0))
    c.expected[:, 2] = 0.0
    batch = Batch(c.batch.x, u=u)
    for _ in range(400):
        cases.assign(factor, factor.maximize(factor.table_stats(batch, c.expected)))
    close(factor.weight[2], start[2], rtol=0, atol=0)
    close(factor.weight[..., 3], start[..., 3], rtol=0, atol=0)
    slope = torch.autograd.grad((c.expected * factor.log_table(batch)).sum(), factor.coefficient)[0]
    vanishes(slope, 1e-6)
    none = factor.table_stats(batch[:0], c.expected[:0])
    close_dict(factor.maximize(none), dict(factor.named_parameters()), rtol=0)


def test_statistics_are_float64_of_the_declared_shapes() -> None:
    factor = SoftmaxRegression(K, M, 4)
    stats = factor.table_stats(Batch(torch.zeros(5, 1), u=torch.ones(5, M)), torch.rand(5, 4, K))
    assert all(leaf.dtype == torch.float64 for leaf in stats.leaves())
    shapes = {name: tuple(leaf.shape) for name, leaf in stats.items()}
    assert shapes == {"constant": (4,), "linear": (4, K - 1, M), "curvature": (4, M, M), "mass": (4, K)}
    assert factor.maximize(stats)["coefficient"].dtype == torch.float32


def test_freezing_and_counting() -> None:
    c = Case(4, True)
    assert c.factor.n_parameters() == M * ((2 - 1) + (2 - 1) + (1 - 1) + (3 - 1))
    c.factor.freeze("weight", mask=torch.tensor([False, False, False, True]))
    assert c.factor.n_parameters() == M * 2
    new = c.factor.maximize(c.stats())["coefficient"]
    assert torch.equal(new[3], c.factor.coefficient[3])
    assert not torch.equal(new[0], c.factor.coefficient[0])
    gate = Case().factor
    assert gate.n_parameters() == (K - 1) * M
    with pytest.raises(InvalidArgument, match="mask"):
        gate.freeze("weight", mask=torch.tensor([True, False, False]))
    assert gate.freeze("weight").n_parameters() == 0


def test_select_keeps_the_odds() -> None:
    c = Case()
    keep = torch.tensor([False, True, True])
    small = c.factor.select(keep)
    table = c.factor.log_table(c.batch)[:, keep]
    close(small.log_table(c.batch), table.log_softmax(-1))
    square = Case(K)
    small = square.factor.select(keep)
    assert small.shape == (2, 2)
    table = square.factor.log_table(square.batch)[:, keep][:, :, keep]
    close(small.log_table(square.batch), table.log_softmax(-1))
    again = SoftmaxRegression(**square.factor.config())
    assert again.shape == square.factor.shape


def test_forbidden_classes_stay_forbidden() -> None:
    c = Case(K)
    c.factor.forbid(torch.tensor([[False, True, False]]))
    assert not bool(c.factor.support[:, 1].any())
    c.expected[..., 1] = 0.0
    for _ in range(3):
        cases.assign(c.factor, c.factor.maximize(c.stats()))
        assert bool((c.factor.log_table(c.batch)[..., 1] == -torch.inf).all())
    other = SoftmaxRegression(K, M, K).double()
    other.load_state_dict(c.factor.state_dict())
    assert torch.equal(other.log_table(c.batch), c.factor.log_table(c.batch))


def test_messages() -> None:
    gate = SoftmaxRegression(K, M)
    for u in (None, torch.zeros(5, M + 1)):
        for call in (gate.log_table, gate.check):
            with pytest.raises(InvalidArgument, match=r"inputs: expected covariates \[N, 2\]"):
                call(Batch(torch.zeros(5, 1), u=u))
    with pytest.raises(InvalidArgument, match="support"):
        gate.support = torch.zeros(K, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match="support"):
        gate.support = torch.ones(2, K, dtype=torch.bool)
    with pytest.raises(InvalidArgument, match="weight"):
        gate.weight = torch.zeros(K - 1, M)
    with pytest.raises(InvalidArgument, match="n_parents"):
        SoftmaxRegression(K, M, 0)


# ---- in models ----------------------------------------------------------------------------------------------------


def test_mixture_of_experts_never_falls_and_finds_the_border() -> None:
    n = 400
    v = 2 * cases.randn(n, seed=1)
    u = torch.stack([torch.ones(n), v], -1).double()
    left = torch.rand(n, generator=cases.rng(2)) < torch.sigmoid(-4 * v)
    x = torch.where(left, 1 + 0.5 * v, -1 - v).unsqueeze(-1) + 0.2 * cases.randn(n, 1, seed=3)
    model = torchem.Mixture(SoftmaxRegression(2, 2), LinearGaussian(2, 2, 1)).double()
    model.component.weight = [[[0.5, 0.0]], [[-0.5, 0.0]]]  # pyright: ignore
    batch, last = Batch(x, u=u), -torch.inf
    for _ in range(400):
        stats = model.e_step(batch).map(torch.Tensor.detach)
        value = float(stats["log_likelihood"])
        close(model.bound(stats), stats["log_likelihood"])
        assert value >= last - 1e-9 * abs(value)
        last = value
        model.m_step(stats)
        assert float(model.bound(stats).detach()) >= value - 1e-9 * abs(value)
    gate = model.mixing.weight.detach()[1]  # pyright: ignore
    assert abs(float(gate[0] / gate[1])) < 0.3
    assert 2.5 < float(gate[1]) < 7
    close(model.component.weight[0, 0], torch.tensor([1.0, 0.5]), atol=0.1, rtol=0)  # pyright: ignore


def test_transition_that_reads_inputs_in_a_hidden_markov_model() -> None:
    """Every bound touches the likelihood, and no step lowers it; the input's effect is found."""
    n, length = 8, 150
    u = torch.stack([torch.ones(n, length), torch.sign(cases.randn(n, length, seed=1))], -1).double()
    truth = torchem.HMM(
        torchem.factors.Categorical(2).double(), SoftmaxRegression(2, 2, 2).double(),
        torchem.factors.Gaussian(2, 1).double(),
    )  # fmt: skip
    truth.emission.means = [[-2.0], [2.0]]  # pyright: ignore
    truth.transition.weight = [[[0.0, 0.0], [-1.0, 2.0]], [[0.0, 0.0], [1.0, 2.0]]]  # pyright: ignore
    x = truth.sample(n, length, inputs=u, generator=cases.rng(4))
    model = copy.deepcopy(truth)
    model.transition.weight = torch.zeros(2, 2, 2)  # pyright: ignore
    batch, last = Batch(x, u=u), -torch.inf
    for _ in range(60):
        stats = model.e_step(batch).map(torch.Tensor.detach)
        value = float(stats["log_likelihood"])
        close(model.bound(stats), stats["log_likelihood"])
        assert value >= last - 1e-9 * abs(value)
        last = value
        model.m_step(stats)
    assert last > float(truth.log_prob(batch).sum().detach())
    close(model.transition.weight[:, 1], truth.transition.weight[:, 1], atol=0.6, rtol=0)  # pyright: ignore
