"""Trees of gates, gates that are networks, and gates that read columns of their own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import BinomialRegression, Categorical, LinearGaussian, NeuralGate, SoftmaxRegression, TreeGate


def gate(k: int, seed: int, columns: Any = None) -> SoftmaxRegression:
    found = SoftmaxRegression(k, 2, columns=columns).double()
    found.weight = 1.5 * cases.randn(k, 2, seed=seed)
    return found


def deep() -> TreeGate:
    """Five leaves, at depths of one, two and three."""
    return TreeGate(gate(3, 1), [None, TreeGate(gate(2, 2), [gate(2, 3), None]), Categorical(1).double()])


def design(n: int, m: int = 2) -> Tensor:
    u = cases.randn(n, m)
    u[:, 0] = 1.0
    return u


def test_a_leaf_has_the_product_of_its_forks() -> None:
    tree, u = deep(), design(12)
    batch = Batch(torch.zeros(12, 1), u=u)
    top, middle, low = (one.log_table(batch).exp() for one in (tree.gate, tree.below[0].gate, tree.below[0].below[0]))  # pyright: ignore
    leaves = [
        top[:, 0], top[:, 1] * middle[:, 0] * low[:, 0], top[:, 1] * middle[:, 0] * low[:, 1],
        top[:, 1] * middle[:, 1], top[:, 2],
    ]  # fmt: skip
    close(tree.log_table(batch).exp(), torch.stack(leaves, -1))
    close(tree.log_table(batch).exp().sum(-1), torch.ones(12))
    plain = TreeGate(Categorical(2), [Categorical(2), None])
    assert plain.log_table(batch).shape == (1, 3)


def test_statistics_of_a_tree_touch_q_and_its_m_step_raises_it() -> None:
    tree, batch = deep(), Batch(torch.zeros(30, 1), u=design(30))
    expected, last = cases.soft(30, 5), -torch.inf
    for _ in range(5):
        stats = tree.table_stats(batch, expected)
        q = (expected * tree.log_table(batch)).sum()
        close(tree.expected_log_prob(stats), q)
        parameters = [p for p in tree.parameters() if p.numel()]
        for a, b in zip(
            torch.autograd.grad(tree.expected_log_prob(stats), parameters), torch.autograd.grad(q, parameters),
            strict=True,
        ):  # fmt: skip
            close(a, b)
        assert float(q.detach()) > last
        last = float(q.detach())
        cases.assign(tree, tree.maximize(stats))


def test_trees_lose_leaves_and_are_saved(tmp_path) -> None:
    tree, batch = deep(), Batch(torch.zeros(8, 1), u=design(8))
    keep = torch.tensor([True, False, True, False, True])
    small = tree.select(keep)
    assert small.shape == (3,)
    odds = tree.log_table(batch)[:, [0, 4]]
    close(small.log_table(batch)[:, [0, 2]].diff(), odds.diff())
    forbidden = copy.deepcopy(tree)
    forbidden.forbid(~keep)
    assert torch.equal(forbidden.log_table(batch) == -torch.inf, (~keep).expand(8, 5))
    model = torchem.Mixture(tree, LinearGaussian(5, 2, 1)).double()
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    x = cases.randn(8, 1)
    close(again.log_prob(Batch(x, u=batch.u)), model.log_prob(Batch(x, u=batch.u)), rtol=0)
    assert tree.n_parameters() == 4 + 2 + 2 + 0


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: TreeGate(gate(2, 1), [None]), "2, one for each class"),
        (lambda: TreeGate(SoftmaxRegression(2, 2, 2), [None, None]), "without parents"),
        (lambda: TreeGate(shared := gate(2, 1), [shared, None]), "each gate once"),
        (lambda: NeuralGate(torch.nn.ReLU(), 2), "with parameters"),
        (lambda: NeuralGate(torch.nn.Linear(2, 3), 2).log_table(Batch(torch.zeros(4, 1), u=design(4))), "scores of"),
        (lambda: NeuralGate(torch.nn.Linear(2, 3), 3).log_table(Batch(torch.zeros(4, 1))), "inputs"),
    ],
)
def test_messages(build: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        build()


def regimes() -> dict[str, Any]:
    """Lines in one covariate that switch along another."""
    u = torch.cat([design(150), cases.randn(150, 1, seed=4)], -1)
    up = u[:, 2] + 0.2 * cases.randn(150, seed=5) > 0
    x = torch.where(up, 1 + u[:, 1], -1 - u[:, 1]) + 0.2 * cases.randn(150, seed=6)
    return {"data": x.unsqueeze(-1), "inputs": u}


@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
def test_a_gate_reads_columns_of_its_own() -> None:
    gates = {
        "softmax": SoftmaxRegression(2, 2, columns=(0, 2)),
        "network": torchem.Gradient(NeuralGate(torch.nn.Linear(1, 2), 2, columns=(2,)), steps=3),
    }
    for mixing in gates.values():
        model: Any = torchem.Mixture(mixing, LinearGaussian(2, 2, 1, columns=(0, 1))).double()
        result = torchem.fit(model, **regimes(), seed=0, tol=1e-4, max_iter=50, progress=False)
        assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
        slopes = model.component.weight[:, 0, 1].detach()
        close(slopes.abs(), torch.ones(2), rtol=0, atol=0.1)
    # A network of one layer is the softmax regression on that column.
    layer: Any = gates["network"].module
    same = SoftmaxRegression(2, 2, columns=(0, 2)).double()
    same.weight = torch.stack([layer.bias, layer.weight[:, 0]], -1).detach()
    batch = Batch(regimes()["data"], u=regimes()["inputs"])
    close(gates["network"].log_table(batch), same.log_table(batch))


def test_a_network_as_the_transition_of_a_chain() -> None:
    net = NeuralGate(torch.nn.Linear(2, 4), 2, n_parents=2)
    model = torchem.HMM(
        Categorical(2), torchem.Gradient(net, torch.optim.Adam, steps=2, lr=0.05), LinearGaussian(2, 2, 1)
    )
    u = design(60).view(3, 20, 2)
    result = torchem.fit(model.double(), cases.randn(3, 20, 1), inputs=u, max_iter=4, tol=0.0, seed=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
    assert result.history[-1] > result.history[0]


@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
def test_a_tree_of_experts_finds_its_forks() -> None:
    """One regression of four pieces, told apart at two levels."""
    u = torch.stack([torch.ones(200).double(), torch.linspace(-2, 2, 200, dtype=torch.float64)], -1)
    odds = torch.tensor([-2.0, 2.0, -2.0, 2.0]).double()[((u[:, 1] + 2) * 0.999).long()]
    x = (torch.rand(200, 1, generator=cases.rng(1), dtype=torch.float64) < odds.sigmoid().unsqueeze(-1)).double()
    tree = TreeGate(SoftmaxRegression(2, 2), [SoftmaxRegression(2, 2), SoftmaxRegression(2, 2)])
    model: Any = torchem.Mixture(tree, BinomialRegression(4, 2)).double()
    result = torchem.fit(model, x, inputs=u, seed=0, tol=2e-4, max_iter=100, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
    found = model.predict(u).mean[:, 0].detach()
    assert float((found - odds.sigmoid()).abs().mean()) < 0.15


GATES: dict[str, Callable[[], Any]] = {
    "softmax": lambda: SoftmaxRegression(3, 2),
    "tree": lambda: TreeGate(SoftmaxRegression(2, 2), [None, SoftmaxRegression(2, 2)]),
    "tree of tables": lambda: TreeGate(Categorical(2), [Categorical(2), None]),
    "network": lambda: torchem.Gradient(NeuralGate(torch.nn.Linear(2, 3), 3), torch.optim.Adam, steps=2, lr=0.05),
}


@pytest.mark.parametrize("build", GATES.values(), ids=GATES)
def test_experts_that_nobody_calls_are_named_and_taken_out(build: Callable[[], Any]) -> None:
    u = torch.stack([torch.ones(60), torch.linspace(-2, 2, 60)], -1).double()
    x = u[:, 1:].abs() + 0.1 * cases.randn(60, 1)
    labels = torch.where(u[:, 1] < 0, 0, 2)
    given: Any = {"inputs": u, "labels": labels, "max_iter": 8, "tol": 0.0, "seed": 0, "progress": False}

    def model() -> Any:
        return torchem.Mixture(build(), LinearGaussian(3, 2, 1)).double()

    for restarts in (1, 2):
        assert torchem.fit(model(), x, restarts=restarts, **given).dead == [1]
    fitted = model()
    assert torchem.fit(fitted, x, dead="prune", **given).pruned == [1]
    assert fitted.posterior(x, inputs=u).shape == (60, 2)
    with pytest.raises(torchem.errors.DegenerateComponent, match="component 1"):
        torchem.fit(model(), x, dead="raise", **given)


def test_gates_tell_what_is_expected_of_each_class() -> None:
    expected = cases.soft(20, 5, seed=7).unsqueeze(-2)
    batch = Batch(torch.zeros(20, 1), u=design(20))
    tree = deep()
    close(tree.occupancy(tree.table_stats(batch, expected)), expected.sum((0, 1)))  # pyright: ignore


TRANSITIONS: dict[str, Callable[[], Any]] = {
    "softmax": lambda: SoftmaxRegression(3, 2, 3),
    "network": lambda: torchem.Gradient(NeuralGate(torch.nn.Linear(2, 9), 3, 3), torch.optim.Adam, steps=2, lr=0.05),
}


@pytest.mark.parametrize("build", TRANSITIONS.values(), ids=TRANSITIONS)
def test_states_that_no_frame_is_in_under_transitions_that_read_covariates(build: Callable[[], Any]) -> None:
    u = torch.stack([torch.ones(60), torch.linspace(-2, 2, 60)], -1).double()
    labels = torch.arange(60) // 7 % 2 * 2
    x = labels.unsqueeze(-1) + 0.1 * cases.randn(60, 1)
    given: Any = {"inputs": u, "labels": labels, "max_iter": 6, "tol": 0.0, "seed": 0, "progress": False}

    def model() -> Any:
        return torchem.HMM(Categorical(3), build(), torchem.factors.Gaussian(3, 1, "diag")).double()

    assert torchem.fit(model(), x, **given).dead == [1]
    fitted = model()
    assert torchem.fit(fitted, x, dead="prune", **given).pruned == [1]
    assert fitted.posterior(x, inputs=u).shape[-1] == 2
    assert fitted.transition.log_table(Batch(x[None], u=u[None])).exp().sum(-1).allclose(torch.ones(1).double())
    with pytest.raises(torchem.errors.DegenerateComponent, match="component 1"):
        torchem.fit(model(), x, dead="raise", **given)


def test_networks_keep_the_classes_that_are_left() -> None:
    batch = Batch(torch.zeros(20, 1), u=design(20))
    gate = NeuralGate(torch.nn.Linear(2, 9), 3, 3).double()
    small: Any = gate.select(torch.tensor([2, 0]))
    whole = gate.log_table(batch)[:, [2, 0]][..., [2, 0]]
    close(small.log_table(batch), whole.log_softmax(-1))
    close(small.select(torch.tensor([False, True])).log_table(batch), torch.zeros(20, 1, 1))
    again = NeuralGate(**small.config())
    assert again.shape == (2, 2)
    gate.forbid(torch.tensor([[True, False, False]]))
    assert not gate.log_table(batch).exp()[..., 0].any()
    with pytest.raises(torchem.errors.InvalidArgument, match="states: expected classes from 0 to 2"):
        NeuralGate(torch.nn.Linear(2, 3), 3, states=[3])
