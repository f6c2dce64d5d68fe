"""Bayesian networks against the list of all their configurations, other models that they are, and graph by graph."""

import itertools
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchem
from tests.laws.cases import close, close_stats
from tests.regressions.common import as_users_run_it
from torchem import BayesianNetwork, priors
from torchem.batch import Batch
from torchem.errors import ConvergenceWarning, InvalidArgument, InvalidFile, InvalidType, SymmetryWarning
from torchem.factors import Categorical, Categoricals, Gaussian, LinearGaussian, Poisson, SoftmaxRegression
from torchem.model import DiscreteModel
from torchem.models import elimination, patterns, pools
from torchem.ops import eliminate

NAMES = "ABCDEF"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(*shape: int, seed: int = 0, zeros: float = 0.0) -> Tensor:
    """Random rows of probabilities, some of them zero."""
    value = torch.randn(shape, generator=rng(seed), dtype=torch.float64).exp()
    gone = torch.rand(shape, generator=rng(seed + 1), dtype=torch.float64) < zeros
    gone[..., 0] = False
    value = value.masked_fill(gone, 0.0)
    return value / value.sum(-1, keepdim=True)


def random_net(
    sizes: Sequence[int], edges: Sequence[tuple[int, int]], seed: int = 0, zeros: float = 0.0, **options: Any
):
    names = dict(zip(NAMES, sizes, strict=False))
    net = BayesianNetwork(names, [(NAMES[a], NAMES[b]) for a, b in edges], **options).double()
    for i, name in enumerate(net.tables):
        net.tables[name] = table(*net.tables[name].shape, seed=seed + 10 * i, zeros=zeros)
    return net


def fit(model: Any, data: Any, **options: Any) -> torchem.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torchem.fit(model, data, **{"progress": False, "seed": 0, "tol": 0.0} | options)


# ---- the list of all configurations ---------------------------------------------------------------------------------


def joint(net: BayesianNetwork) -> Tensor:
    """p of every configuration, an axis for each node."""
    names = list(net.cardinalities)
    total = torch.ones([net.cardinalities[name] for name in names], dtype=torch.float64)
    for name in names:
        scope = [names.index(v) for v in (*net.parents[name], name)]
        order = sorted(range(len(scope)), key=scope.__getitem__)
        shape = [net.cardinalities[names[v]] if v in scope else 1 for v in range(len(names))]
        total = total * net.tables[name].detach().permute(order).reshape(shape)
    return total


def consistent(net: BayesianNetwork, row: Sequence[float], whole: Tensor) -> Tensor:
    """The joint with what contradicts a row taken out."""
    names, columns = list(net.cardinalities), net.columns
    for name, value in zip(columns, row, strict=True):
        if not math.isnan(value):
            axis = names.index(name)
            keep = torch.zeros(whole.shape[axis], dtype=torch.float64)
            keep[int(value)] = 1.0
            whole = whole * keep.reshape([-1 if v == axis else 1 for v in range(len(names))])
    return whole


def check_against_enumeration(net: BayesianNetwork, x: Tensor, weight: Tensor) -> None:
    """log p, posteriors, expected counts and the most likely configuration."""
    names, whole = list(net.cardinalities), joint(net)
    rows = [consistent(net, row, whole) for row in x.tolist()]
    mass = torch.stack([row.sum() for row in rows])
    with torch.no_grad():
        batch = net.batch(x, weight=weight)
        found = net.log_prob(batch)
        close(found, mass.log())
        query = (names[-1], names[0]) if len(names) > 1 else (names[0],)
        axes = [names.index(v) for v in query]
        close(net.posterior(query, batch), torch.stack([marginal(row, axes) for row in rows]))
        best = net.most_likely(batch, nodes=names)
        for n, row in enumerate(rows):
            if mass[n] > 0:
                close(row[tuple(best[n].tolist())], row.max(), rtol=1e-12)
        potentials = {slot: kernel.log_potential(batch) for slot, kernel in net._kernels().items()}
        expected, hard = net.infer(potentials, batch)[1], net.infer_hard(potentials, batch)[1]
        for v, name in enumerate(names):
            scope = [names.index(p) for p in (*net.parents[name], name)]
            # A node of which nothing that was seen is a descendant is no latent variable of its row.
            below = [reaches(net, v, names.index(column)) for column in net.columns]
            seen = (torch.tensor(below, dtype=torch.bool) & ~x.isnan()).any(-1)
            own = torch.where(seen & (mass > 0), weight, 0.0)
            counts = torch.stack([w * marginal(row, scope) for w, row in zip(own.tolist(), rows, strict=True)]).sum(0)
            slot = net.conditionals.slot(name)
            close(expected[slot].squeeze(0), counts)
            close(hard[slot].sum(), own.sum())


def marginal(row: Tensor, axes: Sequence[int]) -> Tensor:
    """The posterior of some nodes, from the joint with the evidence."""
    letters = "abcdefghijklmnop"[: row.dim()]
    total = torch.einsum(f"{letters}->{''.join(letters[v] for v in axes)}", row)
    return total / total.sum().clamp(min=1e-300)


def reaches(net: BayesianNetwork, above: int, below: int) -> bool:
    """Whether a node is another's descendant, or itself."""
    names = list(net.cardinalities)
    return above == below or any(reaches(net, above, names.index(p)) for p in net.parents[names[below]])


def holes(net: BayesianNetwork, n: int, seed: int, share: float) -> Tensor:
    x = torch.stack(
        [torch.randint(net.cardinalities[name], (n,), generator=rng(seed + i)) for i, name in enumerate(net.columns)],
        -1,
    ).double()
    return x.masked_fill(torch.rand(x.shape, generator=rng(seed + 99)) < share, torch.nan)


def shapes(n: int) -> list[list[tuple[int, int]]]:
    """Every directed acyclic graph of n nodes, one of each isomorphism class."""
    pairs = list(itertools.combinations(range(n), 2))
    codes = np.arange(1 << len(pairs), dtype=np.int64)
    bits = [(codes >> k) & 1 for k in range(len(pairs))]
    least = np.full(len(codes), np.iinfo(np.int64).max)
    for order in itertools.permutations(range(n)):
        renamed = np.zeros(len(codes), dtype=np.int64)
        for bit, (i, j) in zip(bits, pairs, strict=True):
            renamed |= bit << (order[i] * n + order[j])
        least = np.minimum(least, renamed)
    _, first = np.unique(least, return_index=True)
    return [[pair for k, pair in enumerate(pairs) if code >> k & 1] for code in first.tolist()]


def check_shape(edges: Sequence[tuple[int, int]], n: int, seed: int) -> None:
    generator = rng(seed)
    sizes = (1 + torch.randint(1, 3, (n,), generator=generator)).tolist()
    count = int(torch.randint(0, n, (), generator=generator))
    hidden = [NAMES[i] for i in torch.randperm(n, generator=generator)[:count].tolist()]
    # Columns may be in another order than the graph's.
    order = torch.randperm(n, generator=generator).tolist()
    turned = [(order[a], order[b]) for a, b in edges]
    net = random_net(sizes, turned, seed, zeros=0.25 * (seed % 2), hidden=hidden)
    weight = 2 * torch.rand(9, generator=generator, dtype=torch.float64)
    weight[1] = 0.0
    check_against_enumeration(net, holes(net, 9, seed, 0.4), weight)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_small_graph_equals_enumeration(n: int) -> None:
    graphs = shapes(n)
    assert len(graphs) == {1: 1, 2: 2, 3: 6}[n]
    for seed, edges in enumerate(graphs):
        check_shape(edges, n, 2 * seed)
        check_shape(edges, n, 2 * seed + 1)


@pytest.mark.parametrize(("n", "step", "start"), [(4, 2, 1), (5, 40, 3)])
def test_some_larger_graphs_equal_enumeration(n: int, step: int, start: int) -> None:
    for seed, edges in list(enumerate(shapes(n)))[start::step]:
        check_shape(edges, n, seed)


def taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have components taken each by itself, in pools, those of few rows in pools, or all of them in one elimination."""
    few = {"apart": 0, "pooled": 1 << 20, "mixed": 40, "whole": 3}[way]
    monkeypatch.setattr(pools, "_FEW", {"cpu": few, "cuda": few})
    if way == "whole":
        monkeypatch.setattr(patterns, "_ELIMINATED", 0)
        monkeypatch.setattr(patterns, "_LEAST", 0)


@pytest.mark.parametrize("way", ["apart", "mixed", "whole"])
def test_components_may_be_taken_in_any_way(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken(way, monkeypatch)
    for seed, edges in list(enumerate(shapes(4)))[len(way) % 3 :: 8]:
        check_shape(edges, 4, seed)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 20), way=st.sampled_from(["apart", "pooled", "mixed", "whole"]))
def test_any_network_equals_enumeration(seed: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of up to four states, zeros, rows without a weight, any part of them missing, pieces of any size."""
    chance = random.Random(seed)
    n = chance.randint(1, 6)
    sizes, order = [chance.choice([1, 2, 2, 3, 4]) for _ in range(n)], chance.sample(range(n), n)
    edges = [(order[a], order[b]) for a, b in itertools.combinations(range(n), 2) if chance.random() < 0.5]
    hidden = [NAMES[i] for i in range(1, n) if chance.random() < 0.3]
    with monkeypatch.context() as patch:
        taken(way, patch)
        patch.setattr(elimination, "_LISTED", chance.choice([0, 64]))
        net = random_net(sizes, edges, seed, zeros=chance.choice([0.0, 0.4]), hidden=hidden)
        net.memory_budget = chance.choice([None, 1])
        x, weight = holes(net, 10, seed, chance.choice([0.2, 0.5, 0.9])), torch.ones(10, dtype=torch.float64)
        weight[::4] = 0.0
        check_against_enumeration(net, x, weight)
        possible = net.log_prob(x) > -torch.inf
        draws = net.impute(x[possible], draws=2, generator=rng(seed)).flatten(0, 1)
        assert bool(net.log_prob(draws).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 5, 6])
def test_every_graph_equals_enumeration(n: int) -> None:
    graphs = shapes(n)
    # The number of acyclic digraphs (OEIS A003087).
    assert len(graphs) == {4: 31, 5: 302, 6: 5984}[n]
    for seed, edges in enumerate(graphs):
        check_shape(edges, n, seed)


def test_large_components_are_eliminated() -> None:
    """A chain of twelve hidden nodes, which are never listed together, with observed ones beside it."""
    n = 6
    names = {f"h{i}": 3 for i in range(n)} | {f"x{i}": 2 for i in range(n)}
    edges = [(f"h{i}", f"h{i + 1}") for i in range(n - 1)] + [(f"h{i}", f"x{i}") for i in range(n)]
    net = BayesianNetwork(names, edges, [f"h{i}" for i in range(n)]).double()
    for i, name in enumerate(net.tables):
        net.tables[name] = table(*net.tables[name].shape, seed=i)
    check_against_enumeration(net, holes(net, 8, 1, 0.3), torch.rand(8, generator=rng(5), dtype=torch.float64))


def plain(net: BayesianNetwork, batch: Batch) -> Tensor:
    """log p by elimination of all nodes, with what is observed as a table: nothing is looked at or shared."""
    step = torch.func.vmap(lambda x: net.log_prob(Batch(x.unsqueeze(0))))
    return step(batch.x).squeeze(-1)


def test_shared_cases_equal_row_by_row() -> None:
    net = random_net([2, 3, 2, 2, 3], [(0, 1), (1, 2), (0, 3), (2, 4), (3, 4)], hidden=("B",))
    batch = net.batch(holes(net, 60, 3, 0.2))
    close(net.log_prob(batch), plain(net, batch))


# ---- other models ---------------------------------------------------------------------------------------------------


def test_naive_bayes_is_a_latent_class_model() -> None:
    net = random_net([3, 2, 4, 2], [(0, 1), (0, 2), (0, 3)], hidden=("A",))
    twin = torchem.Mixture(Categorical(3), Categoricals(3, [2, 4, 2])).double()
    twin.weights = net.tables["A"].detach()
    twin.component.tables = [net.tables[name].detach() for name in "BCD"]  # pyright: ignore
    x = holes(net, 50, 1, 0.1)
    close(net.log_prob(x), twin.log_prob(x))
    close(net.posterior("A", x), twin.posterior(x))
    assert torch.equal(net.most_likely(x), twin.most_likely(x))
    one, two = (fit(m, x, init=None, max_iter=20) for m in (net, twin))
    assert one.history == pytest.approx(two.history, rel=1e-10)


def test_a_chain_of_tied_tables_is_a_hidden_markov_model() -> None:
    frames = 5
    step, emission = Categorical(2, 2).double(), Categorical(2, 3).double()
    names = {f"z{t}": 2 for t in range(frames)} | {f"x{t}": 3 for t in range(frames)}
    edges = [(f"z{t}", f"z{t + 1}") for t in range(frames - 1)] + [(f"z{t}", f"x{t}") for t in range(frames)]
    shared: dict[str, Any] = {f"z{t}": step for t in range(1, frames)} | {f"x{t}": emission for t in range(frames)}
    net = BayesianNetwork(names, edges, [f"z{t}" for t in range(frames)], conditionals=shared).double()
    net.tables["z0"], net.tables["z3"], net.tables["x1"] = [0.6, 0.4], table(2, 2, seed=1), table(2, 3, seed=2)
    assert len(net.factors()) == 3
    hmm = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)).double()
    hmm.initial_probs, hmm.transition_matrix = [0.6, 0.4], step.probs.detach()
    hmm.emission.probs = emission.probs.detach()  # pyright: ignore
    x = torch.randint(0, 3, (40, frames), generator=rng(3))
    close(net.log_prob(x), hmm.log_prob(x.unsqueeze(-1)))
    assert torch.equal(net.most_likely(x), hmm.most_likely(x.unsqueeze(-1)))
    one, two = fit(net, x, init=None, max_iter=15), fit(hmm, x.unsqueeze(-1), init=None, max_iter=15)
    assert one.history == pytest.approx(two.history, rel=1e-10)
    close(net.tables["z4"], hmm.transition_matrix)


def test_one_continuous_leaf_is_a_gaussian_mixture() -> None:
    leaf = Gaussian(3, 2)
    net = BayesianNetwork({"H": 3}, [], ("H",), {"X": (("H",), leaf)}).double()
    x = torch.randn(60, 2, generator=rng(4), dtype=torch.float64) + 4 * (torch.arange(60) % 3 - 1).unsqueeze(-1)
    x[::7, 0] = torch.nan
    twin = torchem.GaussianMixture(3, 2).double()
    fit(net, x, max_iter=1)
    twin.weights, twin.means, twin.covariances = (v.detach() for v in (net.tables["H"], leaf.means, leaf.covariances))
    one, two = (fit(model, x, init=None, max_iter=10) for model in (net, twin))
    assert one.history == pytest.approx(two.history, rel=1e-9)
    close(net.impute(x), twin.impute(x), rtol=1e-7)
    close(net.impute(x, variance=True)[1], twin.impute(x, variance=True)[1], rtol=1e-6)


def test_ten_iterations_are_those_of_pgmpy() -> None:
    """The tables after ten iterations of pgmpy 1.1.2 from the same start on the same rows.

    ExpectationMaximization(DiscreteBayesianNetwork(edges, latents={"H"}), data).get_parameters(
        latent_card={"H": 2}, max_iter=10, atol=0.0, init_cpds=start); columns of its tables are rows of ours.
    """
    edges = [("A", "H"), ("H", "B"), ("H", "C"), ("A", "C"), ("C", "D")]
    net = BayesianNetwork({"A": 2, "H": 2, "B": 2, "C": 3, "D": 2}, edges, ("H",)).double()
    net.tables["A"], net.tables["H"], net.tables["B"] = [0.4, 0.6], [[0.7, 0.3], [0.2, 0.8]], [[0.9, 0.1], [0.3, 0.7]]
    net.tables["C"] = [[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], [[0.6, 0.2, 0.2], [0.2, 0.5, 0.3]]]
    net.tables["D"] = [[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]]
    i = torch.arange(60)
    x = torch.stack([(i * 7) % 11 % 2, (i * 5) % 13 % 2, (i * i) % 7 % 3, (i * 3) % 5 % 2], -1)
    fit(net, x, init=None, max_iter=10)
    found = {
        "H": [0.468828087739, 0.531171912261, 0.331339501837, 0.668660498163],
        "B": [0.732912947608, 0.267087052392, 0.424481138862, 0.575518861138],
        "C": [0.053301326395, 0.718385547481, 0.228313126124, 0.093385743127, 0.553222566029, 0.353391690844,
              0.23820158722, 0.392820512819, 0.368977899961, 0.175284412439, 0.612101513824, 0.212614073737],
    }  # fmt: skip
    for name, values in found.items():
        close(net.tables[name].detach().flatten(), torch.tensor(values, dtype=torch.float64))


# ---- leaves ---------------------------------------------------------------------------------------------------------


def with_leaves() -> BayesianNetwork:
    """Two hidden parents of a measurement and an observed one of counts, which a hidden one has too."""
    measure, counts = Gaussian(4, 1), Poisson(4, 1)
    net = BayesianNetwork(
        {"A": 2, "B": 2, "C": 2}, [("A", "B"), ("B", "C")], ("A", "B"),
        {"X": (("A", "B"), measure), "Y": (("B", "C"), counts)},
    ).double()  # fmt: skip
    for i, name in enumerate("ABC"):
        net.tables[name] = table(*net.tables[name].shape, seed=i)
    measure.means, measure.covariances = [[-1.0], [0.0], [1.0], [3.0]], [[[0.5]], [[1.0]], [[2.0]], [[0.7]]]
    counts.rates = [[0.5], [2.0], [4.0], [9.0]]
    return net


def rows_with_leaves(net: BayesianNetwork, n: int = 25) -> Tensor:
    x = net.sample(n, generator=rng(6))
    x[::4, 0] = x[1::4, 1] = x[2::5, 2] = torch.nan
    return x


def listed(net: BayesianNetwork, row: Tensor) -> Tensor:
    """Joint densities ``[A, B, C]`` of a row of `with_leaves`."""
    total = joint(net)
    c, value, count = row.tolist()
    if not math.isnan(c):
        total = total * torch.eye(2, dtype=torch.float64)[int(c)]
    if not math.isnan(value):
        normal = torch.distributions.Normal(
            net.conditionals["X"].means.reshape(2, 2).detach(),
            net.conditionals["X"].covariances.reshape(2, 2).sqrt().detach(),
        )
        total = total * normal.log_prob(row[1]).exp().unsqueeze(-1)
    if not math.isnan(count):
        rate = torch.distributions.Poisson(net.conditionals["Y"].rates.reshape(2, 2).detach())
        total = total * rate.log_prob(row[2]).exp()
    return total


def test_leaves_equal_enumeration() -> None:
    net = with_leaves()
    x = rows_with_leaves(net)
    whole = torch.stack([listed(net, row) for row in x])
    mass = whole.sum((1, 2, 3))
    close(net.log_prob(x), mass.log())
    share = whole / mass.view(-1, 1, 1, 1)
    close(net.posterior(("A", "B"), x), share.sum(3))
    close(net.posterior(("C", "A"), x), share.sum(2).mT)
    # A missing leaf is its mean under each state of its parents, weighted.
    full, spread = net.impute(x, variance=True)
    gone = x[:, 1].isnan()
    means, variances = (net.conditionals["X"].means.reshape(2, 2), net.conditionals["X"].covariances.reshape(2, 2))
    center = (share.sum(3) * means).sum((1, 2))
    close(full[gone, 1], center[gone])
    between = (share.sum(3) * (variances + (means - center.view(-1, 1, 1)).square())).sum((1, 2))
    close(spread[gone, 1], between[gone])
    assert torch.equal(full[~x.isnan()], x[~x.isnan()])
    lost = x[:, 0].isnan()
    assert torch.equal(full[lost, 0], share.sum((1, 2))[lost].argmax(-1).double())


def test_regression_leaf_and_gate_read_inputs() -> None:
    """Given covariates: a mixture of experts, as a network."""
    u = torch.cat([torch.ones(80, 1), torch.randn(80, 1, generator=rng(1))], -1).double()
    gate, expert = SoftmaxRegression(2, 2), LinearGaussian(2, 2, 1)
    gate.weight, expert.weight = [[0.2, 1.0], [0.0, 0.0]], [[[0.0, 1.0]], [[1.0, -1.0]]]
    net = BayesianNetwork({"H": 2}, [], ("H",), {"X": ("H", expert)}, {"H": gate}).double()
    twin = torchem.Mixture(gate, expert).double()
    x = torch.randn(80, 1, generator=rng(2), dtype=torch.float64)
    close(net.log_prob(x, inputs=u), twin.log_prob(twin.batch(x, inputs=u)))
    one = fit(net, x, inputs=u, max_iter=15)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(one.history))
    assert one.history[-1] > one.history[0]


# ---- queries --------------------------------------------------------------------------------------------------------


def asia() -> BayesianNetwork:
    edges = [("smoke", "cancer"), ("smoke", "cough"), ("cancer", "xray"), ("cancer", "tired"), ("cough", "tired")]
    net = BayesianNetwork(
        {"smoke": 2, "cancer": 2, "cough": 2, "xray": 2, "tired": 3}, edges, ("cancer",),
        states={"smoke": ["no", "yes"], "tired": ["never", "often", "always"]},
    ).double()  # fmt: skip
    for i, name in enumerate(net.tables):
        net.tables[name] = table(*net.tables[name].shape, seed=i)
    return net


def test_evidence_by_name_is_a_row() -> None:
    net = asia()
    row = [[1.0, torch.nan, torch.nan, 2.0]]
    for known in (
        {"smoke": 1, "tired": 2},
        {"smoke": "yes", "tired": "always"},
        {"smoke": [1], "tired": torch.tensor(2)},
    ):
        close(net.posterior(("cough", "cancer"), known), net.posterior(("cough", "cancer"), row))
        close(net.log_prob(known), net.log_prob(row))
        assert torch.equal(net.most_likely(known), net.most_likely(row))
    close(
        net.posterior("cancer", {"smoke": ["yes", "no"]}),
        net.posterior("cancer", [[1.0, *[torch.nan] * 3], [0.0, *[torch.nan] * 3]]),
    )
    close(net.posterior("cough", {"smoke": 1, "tired": None}), net.posterior("cough", {"smoke": 1}))
    assert net.most_likely({"smoke": 1}, nodes="cough").shape == (1, 1)
    # A hidden node may be known too.
    both = net.posterior(("cancer", "cough"), {"smoke": 1})
    close(net.posterior("cough", {"smoke": 1, "cancer": 0}), both[:, 0] / both[:, 0].sum(-1, keepdim=True))
    close(net.posterior("xray"), joint(net).sum((0, 1, 2, 4)).unsqueeze(0))
    assert net.columns == ["smoke", "cough", "xray", "tired"]


def test_samples_have_the_frequencies_of_the_joint() -> None:
    net = asia()
    x, z = net.sample(40_000, latents=True, generator=rng(1))
    found = torch.zeros(2, 2, 2, 2, 3, dtype=torch.float64)
    index = [x[:, 0].long(), z[:, 0], x[:, 1].long(), x[:, 2].long(), x[:, 3].long()]
    found.index_put_(tuple(index), torch.ones(40_000, dtype=torch.float64), accumulate=True)
    truth = joint(net)
    # Pearson's statistic: 47 degrees of freedom.
    assert float((40_000 * (found / 40_000 - truth).square() / truth).sum()) < 100
    given = net.sample(20_000, latents=True, evidence={"smoke": "yes", "tired": 0}, generator=rng(2))
    assert bool((given[0][:, [0, 3]] == torch.tensor([1, 0])).all())
    share = torch.zeros(2, 2, dtype=torch.float64)
    share.index_put_((given[0][:, 1].long(), given[1][:, 0]), torch.ones(20_000).double(), accumulate=True)
    close(
        share / 20_000, net.posterior(("cough", "cancer"), {"smoke": 1, "tired": 0})[0].detach(), atol=0.015, rtol=0.0
    )


def test_imputed_draws_follow_the_posterior() -> None:
    net = asia()
    row = torch.tensor([[1.0, torch.nan, torch.nan, 2.0]], dtype=torch.float64)
    draws = net.impute(row, draws=8000, generator=rng(3))
    assert draws.shape == (8000, 1, 4)
    truth = net.posterior(("cough", "xray"), row)[0]
    found = torch.zeros(2, 2, dtype=torch.float64)
    found.index_put_((draws[:, 0, 1].long(), draws[:, 0, 2].long()), torch.ones(8000).double(), accumulate=True)
    close(found / 8000, truth.detach(), atol=0.025, rtol=0.0)
    leaves = with_leaves()
    x = rows_with_leaves(leaves)
    many = leaves.impute(x, draws=3000, generator=rng(4))
    center, spread = leaves.impute(x, variance=True)
    gone = x[:, 1].isnan()
    close(many[:, gone, 1].mean(0), center[gone, 1].detach(), atol=0.12, rtol=0.0)
    close(many[:, gone, 1].var(0), spread[gone, 1].detach(), atol=0.0, rtol=0.15)


def parity(n: int) -> BayesianNetwork:
    """Each node the exclusive or of the two before, the last one with some noise; one in the middle hidden."""
    edges = [(f"v{i}", f"v{j}") for j in range(2, n) for i in (j - 2, j - 1)]
    net = BayesianNetwork({f"v{i}": 2 for i in range(n)}, edges, ("v3",)).double()
    exact = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    for j in range(2, n):
        net.tables[f"v{j}"] = exact if j < n - 1 else 0.8 * exact + 0.1
    net.tables["v0"], net.tables["v1"] = [0.3, 0.7], [0.6, 0.4]
    return net


@pytest.mark.parametrize(("way", "listed"), [("apart", 0), ("apart", 64), ("pooled", 64), ("whole", 0), ("whole", 64)])
def test_draws_and_modes_are_joint(way: str, listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that determine each other are never drawn one by one, nor maximised."""
    taken(way, monkeypatch)
    monkeypatch.setattr(elimination, "_LISTED", listed)
    net = parity(7)
    names, whole = list(net.cardinalities), joint(net)
    x = net.sample(60, generator=rng(0))
    x = x.masked_fill(torch.rand(x.shape, generator=rng(1)) < 0.5, torch.nan)
    filled = net.impute(x, draws=3, generator=rng(2))
    assert bool(net.log_prob(filled.flatten(0, 1)).isfinite().all())
    for row, best in zip(x.tolist(), net.most_likely(x, nodes=names).tolist(), strict=True):
        known = consistent(net, row, whole)
        close(known[tuple(best)], known.max(), rtol=1e-12)
    generator = rng(3)
    stats = net.e_step(net.batch(x), "sample", uniforms=lambda s: torch.rand(s, generator=generator).double())
    for name in names:
        assert float(stats[net.conditionals.slot(name)]["counts"][net.tables[name] == 0].sum()) == 0
    row = torch.tensor([[torch.nan, 1.0, torch.nan, torch.nan, torch.nan, 0.0]])
    draws = net.impute(row, draws=4000, generator=rng(4))[:, 0].long()
    found = torch.zeros(2, 2, 2, dtype=torch.float64)
    found.index_put_((draws[:, 0], draws[:, 3], draws[:, 5]), torch.ones(4000).double(), accumulate=True)
    truth = marginal(consistent(net, row[0].tolist(), whole), [0, 4, 6])[..., 0]
    share = found[..., 0] / 4000
    close(share, truth, atol=0.03, rtol=0.0)


# ---- learning -------------------------------------------------------------------------------------------------------


def test_learns_what_was_sampled() -> None:
    """The hidden cause of five answers, from 20 000 rows of which a tenth of the entries is missing."""
    truth = random_net([2, 2, 3, 2, 2, 2], [(0, i) for i in range(1, 6)] + [(1, 3)], hidden=("A",), seed=7)
    truth.tables["B"], truth.tables["C"] = [[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]
    truth.tables["E"], truth.tables["F"] = [[0.8, 0.2], [0.1, 0.9]], [[0.15, 0.85], [0.75, 0.25]]
    x = truth.sample(20_000, generator=rng(2))
    x = x.masked_fill(torch.rand(x.shape, generator=rng(3)) < 0.1, torch.nan)
    net = BayesianNetwork(truth.cardinalities, truth.edges, truth.hidden).double()
    result = fit(net, x, max_iter=200, tol=1e-7, restarts=2)
    assert result.bound >= float(truth.log_prob(x).detach().sum())
    same = abs(float(net.tables["B"].detach()[0, 0]) - 0.9) < 0.2
    for name in "BCEF":
        found = net.tables[name] if same else net.tables[name].flip(0)
        close(found.detach(), truth.tables[name].detach(), atol=0.04, rtol=0.0)


def test_zeros_priors_and_frozen_tables_hold() -> None:
    net = asia()
    net.tables["xray"] = [[1.0, 0.0], [0.3, 0.7]]
    net.conditionals["cough"].freeze()
    net.conditionals["tired"].prior = priors.Dirichlet(3.0)
    x = net.sample(200, generator=rng(5))
    kept = net.tables["cough"].clone()
    result = fit(net, x, init=None, max_iter=20)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    assert net.tables["xray"][0, 1] == 0
    assert torch.equal(net.tables["cough"], kept)
    # With no hidden member the posterior mode is (n + α − 1) / (N + Σ(α − 1)).
    full = BayesianNetwork({"A": 2, "B": 2}, [("A", "B")]).double()
    full.conditionals["B"].prior = priors.Dirichlet(3.0)
    data = torch.tensor([[0, 0], [0, 1], [0, 1], [1, 0]])
    fit(full, data, max_iter=2)
    close(full.tables["A"].detach(), torch.tensor([0.75, 0.25]).double())
    close(full.tables["B"].detach(), torch.tensor([[3 / 7, 4 / 7], [3 / 5, 2 / 5]], dtype=torch.float64))


def test_a_variational_fit_of_complete_data_has_the_posterior_in_closed_form() -> None:
    net = BayesianNetwork({"A": 2, "B": 3}, [("A", "B")]).double()
    torchem.variational(net, **{"conditionals.B": priors.Dirichlet(0.5)})
    x = torch.tensor([[0, 0], [0, 2], [1, 1], [0, 2]])
    fit(net, x, max_iter=2)
    close(
        net.tables["B"].detach(),
        torch.tensor([[1.5, 0.5, 2.5], [0.5, 1.5, 0.5]]).double() / torch.tensor([[4.5], [2.5]]),
    )


def test_impossible_rows(device: torch.device) -> None:
    net = random_net([2, 2, 2], [(0, 1), (1, 2)], hidden=("B",)).to(device)
    net.tables["B"], net.tables["C"] = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]]
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [torch.nan, 1.0]], dtype=torch.float64, device=device)
    value = net.log_prob(x)
    assert (value == -torch.inf).tolist() == [False, True, False, False]
    share = net.posterior("B", x)
    assert share[1].tolist() == [0.0, 0.0]
    assert bool(share.isfinite().all())
    stats = net.e_step(net.batch(x, weight=torch.tensor([1.0, 0.0, 2.0, 1.0])))
    assert all(bool(leaf.isfinite().all()) for leaf in stats.leaves())
    with pytest.raises(InvalidArgument, match="row 1"):
        fit(net, x, init=None)
    with pytest.raises(InvalidArgument, match="probability zero at row 0"):
        net.sample(1, evidence={"A": 0, "C": 1})
    broken = random_net([2, 2, 2], [(0, 1), (0, 2)])
    broken.tables["A"], broken.tables["B"] = [1.0, 0.0], [[1.0, 0.0], [0.5, 0.5]]
    with pytest.raises(InvalidArgument, match="probability zero at row 1"):
        broken.impute([[0.0, 0.0, 1.0], [torch.nan, 1.0, torch.nan]])


def test_incomplete_rows_and_hidden_columns_are_the_same() -> None:
    """A hidden node that has a column without entries is a hidden node."""
    hidden = random_net([2, 3, 2], [(0, 1), (1, 2)], hidden=("B",))
    shown = random_net([2, 3, 2], [(0, 1), (1, 2)])
    x = torch.randint(0, 2, (30, 2), generator=rng(1)).double()
    wide = torch.stack([x[:, 0], torch.full((30,), torch.nan), x[:, 1]], -1)
    close(hidden.log_prob(x), shown.log_prob(wide))
    close_stats(hidden.e_step(hidden.batch(x)), shown.e_step(shown.batch(wide)))
    # Labels are what a column of the node would say.
    wide[::2, 1] = torch.arange(15.0) % 3
    labels = wide[:, 1].nan_to_num(nan=-1.0).long()
    close_stats(hidden.e_step(hidden.batch(x, labels=labels)), shown.e_step(shown.batch(wide)))


def test_a_column_without_entries_is_a_hidden_node() -> None:
    truth = asia()
    x = truth.sample(400, generator=rng(1))
    wide = torch.cat([x[:, :1], torch.full((400, 1), torch.nan), x[:, 1:]], -1)
    net = BayesianNetwork(truth.cardinalities, truth.edges).double()
    result = fit(net, wide, max_iter=20, restarts=2)
    assert len(set(result.restarts)) == 2
    assert float((net.tables["xray"][0] - net.tables["xray"][1]).detach().abs().max()) > 0.01
    even = BayesianNetwork(truth.cardinalities, truth.edges).double()
    with pytest.warns(SymmetryWarning, match="start identical"):
        alike = fit(even, wide, init=None, max_iter=20)
    assert result.bound > alike.bound + 0.1
    with pytest.raises(InvalidArgument, match="none in column 2"):
        fit(with_leaves(), torch.tensor([[0.0, 1.0, torch.nan], [1.0, 0.5, torch.nan]]), max_iter=1)


def test_uniform_tables_are_a_saddle_that_a_start_leaves() -> None:
    truth = asia()
    x = truth.sample(400, generator=rng(1))
    net = BayesianNetwork(truth.cardinalities, truth.edges, truth.hidden).double()
    with pytest.warns(SymmetryWarning, match="components 0 and 1"):
        fit(net, x, init=None, max_iter=3)
    close(net.tables["xray"][0].detach(), net.tables["xray"][1].detach())
    fit(net, x, max_iter=3)
    assert float((net.tables["xray"][0] - net.tables["xray"][1]).detach().abs().max()) > 0.1


# ---- mean field -----------------------------------------------------------------------------------------------------


def test_mean_field_is_a_bound() -> None:
    edges = [(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)]
    exact = random_net([2, 3, 2, 2, 2], edges, hidden=("A", "B"))
    field = random_net([2, 3, 2, 2, 2], edges, hidden=("A", "B"), inference="mean_field")
    x = holes(exact, 40, 2, 0.2)
    value, bound = exact.log_prob(x).detach(), field.elbo(x).detach()
    close(field.log_prob(x), value)
    assert bool((bound <= value + 1e-12).all())
    assert float((value - bound).max()) > 1e-4
    q = field.posterior(("A", "B"), x).detach()
    close(q, q.sum(-1, keepdim=True) * q.sum(-2, keepdim=True))
    # One open node at a time: nothing is left out.
    single = holes(exact, 40, 3, 0.0)
    known = {"labels": torch.stack([torch.arange(40) % 2, torch.full((40,), -1)], -1)}
    close(field.elbo(single, **known), exact.log_prob(single, **known), rtol=1e-8)
    close(field.posterior("B", single, **known), exact.posterior("B", single, **known), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"restarts": 4, "race": 5},
        {"e_step": "hard"},
        {"accelerate": "squarem"},
        {"batch_size": 50},
        {"accumulate": torchem.Incremental(), "batch_size": 50},
    ],
    ids=["plain", "race", "hard", "squarem", "chunks", "incremental"],
)
def test_mean_field_climbs(options: dict[str, Any]) -> None:
    truth = asia()
    x = truth.sample(150, generator=rng(4)).masked_fill(torch.rand(150, 4, generator=rng(5)) < 0.2, torch.nan)
    net = BayesianNetwork(truth.cardinalities, truth.edges, truth.hidden, inference="mean_field").double()
    result = fit(net, x, max_iter=25, **options)
    assert all(b >= a - 1e-7 * (1 + abs(a)) for a, b in itertools.pairwise(result.history))
    assert result.bound > result.history[0]
    if options != {"e_step": "hard"}:
        assert result.bound <= float(net.log_prob(x).detach().sum()) + 1e-9


def test_a_mean_field_decides_between_states_that_zeros_tie() -> None:
    """Two hidden nodes that are the same: q is one of both states, never a mixture of them."""
    nets = [random_net([2, 2, 2, 2], [(0, 1), (0, 2), (1, 3)], hidden=("A", "B"), inference=way)
            for way in ("exact", "mean_field")]  # fmt: skip
    x = torch.tensor([[0, 0], [0, 1], [1, 1]])
    for net in nets:
        net.tables["B"] = torch.eye(2)
    gap = nets[0].log_prob(x) - nets[1].elbo(x)
    assert bool(((gap > 0) & gap.isfinite()).all())
    best = nets[1].posterior(("A", "B"), x).flatten(1)
    assert bool((best.amax(-1) == 1).all())


def test_a_bound_is_not_climbed_directly() -> None:
    net = random_net([2, 2], [(0, 1)], hidden=("A",), inference="mean_field")
    with pytest.raises(InvalidArgument, match="a bound on it"):
        fit(net, [[0], [1]], direct=True)


def entangled(n: int, **options: Any) -> BayesianNetwork:
    """Hidden nodes of eight states, an observed child for each pair of them: a clique of all."""
    names = {f"h{i}": 8 for i in range(n)}
    pairs = list(itertools.combinations(names, 2))
    shown = {f"x{k}": 2 for k in range(len(pairs))}
    edges = [(parent, child) for child, pair in zip(shown, pairs, strict=True) for parent in pair]
    net = BayesianNetwork(names | shown, edges, list(names), **options).double()
    for i, name in enumerate(net.tables):
        net.tables[name] = table(*net.tables[name].shape, seed=i)
    return net


def test_intractable_networks_are_refused_and_mean_field_serves() -> None:
    with pytest.raises(
        InvalidArgument, match=r"1048576 joint states.*one of 16777216, of 8 nodes.*width 7.*mean_field"
    ):
        entangled(8)
    net = entangled(8, inference="mean_field")
    x = torch.randint(0, 2, (5, 28), generator=rng(0)).double()
    with pytest.raises(InvalidArgument, match="tree-width"):
        net.log_prob(x)
    assert bool(net.log_score(net.batch(x)).isfinite().all())
    result = fit(net, x, init=None, max_iter=4)
    assert all(b >= a - 1e-7 * abs(a) for a, b in itertools.pairwise(result.history))
    # As much of it as exact inference can take: the bound lies below.
    small, twin = entangled(3), entangled(3, inference="mean_field")
    assert bool((twin.elbo(x[:, :3]) <= small.log_prob(x[:, :3])).all())


# ---- files ----------------------------------------------------------------------------------------------------------

DOG = """// A comment, and a /* within
network "Dog problem" { property "author = F. Cozman; 1995"; }
variable "light on" { type discrete[2] { "true", false }; property "x; y"; }
/* over
   lines */
variable bark { type discrete [ 3 ] { loud, "quite loud", none }; }
variable out.side { type discrete [2] {yes, no}; }
probability (out.side) { table 0.15 0.85; }
probability ( "light on" | out.side ) { table 0.6, 0.05, 0.4, 0.95; }
probability ( bark | out.side, "light on" ) {
  (yes, "true") 0.5, 0.3, 0.2;
  default 0.1, 0.2, 0.7; // all others
  property note;
  (no, false) 0, 0, 1;
}
"""


def test_reads_bif(tmp_path: Any) -> None:
    path = tmp_path / "dog.bif"
    path.write_text(DOG)
    net = BayesianNetwork.from_bif(path, hidden=("out.side",))
    assert net.cardinalities == {"light on": 2, "bark": 3, "out.side": 2}
    assert net.parents["bark"] == ("out.side", "light on")
    assert net.states["bark"] == ("loud", "quite loud", "none")
    # Of a table the node's own states run slowest.
    close(net.tables["light on"], torch.tensor([[0.6, 0.4], [0.05, 0.95]], dtype=torch.float64), rtol=1e-12)
    rest = [0.1, 0.2, 0.7]
    bark = torch.tensor([[[0.5, 0.3, 0.2], rest], [rest, [0.0, 0.0, 1.0]]], dtype=torch.float64)
    close(net.tables["bark"], bark, rtol=1e-12)
    assert net.tables["bark"][1, 1, 0] == 0
    twin_path = tmp_path / "twin.bif"
    net.to_bif(twin_path)
    twin = BayesianNetwork.from_bif(twin_path, hidden=("out.side",))
    assert (twin.edges, twin.states, twin.cardinalities) == (net.edges, net.states, net.cardinalities)
    for name in net.tables:
        close(twin.tables[name], net.tables[name], rtol=1e-15, atol=0.0)
    assert twin.conditionals["bark"].restricted
    x = net.sample(50, generator=rng(0))
    close(twin.log_prob(x), net.log_prob(x), rtol=1e-12)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("table 0.15 0.85", "table 0.15 x", "line 8: expected a number, got 'x'"),
        ("table 0.15 0.85", "table 0.15", "line 8: expected 2 numbers, got 1"),
        ("table 0.15 0.85", "table 0.15 0.65", "line 8: .*sum of 0.8"),
        ("table 0.15 0.85", "table -0.15 1.15", "line 8: .*at least zero"),
        ("{ loud,", "{ loud, loud,", "line 6: expected 3 different states"),
        ("(yes, \"true\")", "(yes, maybe)", "line 11: expected one of .*got 'maybe'"),
        ("(yes, \"true\")", "(yes)", "line 11: expected a state of each"),
        ("  default 0.1, 0.2, 0.7;", "", "none for"),
        ("/* over\n   lines */", "/* over", "line 4: .*a comment without an end"),
        ("discrete [ 3 ]", "discrete [ 0 ]", "line 6: .*at least one state"),
        ("| out.side, \"light on\" )", "| out.side, out.side )", "line 10: expected 'bark' given different variables"),
        (DOG, "network empty { }", "line 1: expected variables, got none"),
        ("probability (out.side) {", "probability (out.side | bark) {", "line 8: expected 6 numbers, got 2"),
        ("probability (out.side) { table", "probability (out.side | bark) { default", "without cycles"),
        ("| out.side )", "| outside )", "line 9: .*'outside'"),
        ("probability (out.side) { table 0.15 0.85; }", "", "none of 'out.side'"),
        ("variable bark", "node bark", "line 6: expected 'network' or 'variable' or 'probability', got 'node'"),
        ("(no, false) 0, 0, 1;\n}", "(no, false) 0, 0, 1;\n", "the end of the file"),
    ],
)  # fmt: skip
def test_bif_errors_name_the_line(tmp_path: Any, old: str, new: str, said: str) -> None:
    assert old in DOG
    path = tmp_path / "dog.bif"
    path.write_text(DOG.replace(old, new, 1))
    with pytest.raises(InvalidFile, match=said):
        BayesianNetwork.from_bif(path)
    with pytest.raises(InvalidFile, match="no-such"):
        BayesianNetwork.from_bif(tmp_path / "no-such.bif")


def test_odd_files_and_names_are_read_back(tmp_path: Any) -> None:
    path = tmp_path / "dog.bif"
    path.write_bytes(b"\xef\xbb\xbf" + DOG.replace("\n", "\r\n").encode())
    net = BayesianNetwork.from_bif(path, states={"bark": ["1", "2", "3"]})
    assert (net.states["bark"], net.states["out.side"]) == (("1", "2", "3"), ("yes", "no"))
    odd = {"a b": 2, "x;y": 3, "p/q": 2, "{": 2, "é": 1, "//c": 2, "network": 2}
    names = {"x;y": ["<0.5", "(", "a\tb"], "é": [""], "//c": ["/*", "*/"]}
    net = BayesianNetwork(odd, [("p/q", "x;y"), ("a b", "x;y"), ("{", "é"), ("//c", "network")], states=names).double()
    for i, name in enumerate(net.tables):
        net.tables[name] = table(*net.tables[name].shape, seed=i)
    net.to_bif(path, "a name")
    twin = BayesianNetwork.from_bif(path)
    assert (twin.cardinalities, twin.parents) == (net.cardinalities, net.parents)
    assert {name: twin.states[name] for name in names} == net.states
    for name in net.tables:
        close(twin.tables[name], net.tables[name], rtol=1e-15, atol=0.0)
    for bad in ('"', "\n", "\r"):
        with pytest.raises(InvalidArgument, match="without quotes and line ends"):
            BayesianNetwork({f"a{bad}": 2}).to_bif(path)


def test_saved_networks_come_back(tmp_path: Any) -> None:
    net = with_leaves()
    shared = Categorical(2, 2)
    tied = BayesianNetwork(
        {"A": 2, "B": 2, "C": 2}, [("A", "B"), ("B", "C")], ("A",), conditionals={"B": shared, "C": shared}
    )
    wrapped = torchem.variational(asia())
    for i, (model, x) in enumerate(
        (
            (net, rows_with_leaves(net)),
            (tied.double(), torch.randint(0, 2, (9, 2)).double()),
            (wrapped, asia().sample(9)),
        )
    ):
        path = tmp_path / f"{i}.safetensors"
        torchem.save(model, path)
        again = torchem.load(path)
        close(again.log_prob(x), model.log_prob(x), rtol=1e-12)
        assert (again.edges, again.hidden, again.states) == (model.edges, model.hidden, model.states)
        assert len(again.factors()) == len(model.factors())


# ---- bad input ------------------------------------------------------------------------------------------------------

AB = {"A": 2, "B": 3}


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: BayesianNetwork({"A": 2, "B": 2, "C": 2}, [("A", "B"), ("B", "C"), ("C", "A")]), "→ A"),
        (lambda: BayesianNetwork(AB, [("A", "A")]), "A → A"),
        (lambda: BayesianNetwork(AB, [("A", "X")]), "'X'"),
        (lambda: BayesianNetwork(AB, [("A", "B"), ("A", "B")]), "twice"),
        (lambda: BayesianNetwork(AB, ["AB", "B"]), "pairs"),
        (lambda: BayesianNetwork(AB, None), "edges: expected pairs"),  # pyright: ignore[reportArgumentType]
        (lambda: BayesianNetwork(AB, [1]), "edges: expected pairs"),  # pyright: ignore[reportArgumentType]
        (lambda: BayesianNetwork(AB, [], 3), "hidden: expected names"),  # pyright: ignore[reportArgumentType]
        (lambda: BayesianNetwork(AB, states={"A": 2}), "names of states"),  # pyright: ignore[reportArgumentType]
        (lambda: BayesianNetwork(AB, [], ("X",)), "hidden: .*'X'"),
        (lambda: BayesianNetwork(AB, [], ("A", "A")), "each node once"),
        (lambda: BayesianNetwork(AB, [], ("A", "B")), "at least one node that is observed"),
        (lambda: BayesianNetwork({"A": 0}), "positive"),
        (lambda: BayesianNetwork({}), "cardinalities"),
        (lambda: BayesianNetwork(AB, states={"A": ["x"]}), "2 different names"),
        (lambda: BayesianNetwork(AB, inference="loopy"), "mean_field"),  # pyright: ignore[reportArgumentType]
        (lambda: BayesianNetwork(AB, leaves={"X": (("A",), Gaussian(3, 1))}), "2 components"),
        (lambda: BayesianNetwork(AB, leaves={"A": (("A",), Gaussian(2, 1))}), "names of their own"),
        (lambda: BayesianNetwork(AB, leaves={"X": (("Z",), Gaussian(2, 1))}), "'Z'"),
        (lambda: BayesianNetwork(AB, conditionals={"B": Categorical(2)}), r"shape \[3\]"),
        (lambda: BayesianNetwork(AB, conditionals={"X": Categorical(2)}), "'X'"),
    ],
)  # fmt: skip
def test_bad_networks_are_refused(build: Any, said: str) -> None:
    with as_users_run_it(), pytest.raises((InvalidArgument, InvalidType), match=said):
        build()


def test_bad_tables_data_and_queries_are_refused() -> None:
    net = random_net([2, 3], [(0, 1)])
    for value, said in (([0.5, 0.5], r"tables\['B'\]: .*\[2, 3\]"), ([[0.5, 0.2, 0.2], [1, 0, 0]], "row 0")):
        with pytest.raises(InvalidArgument, match=said):
            net.tables["B"] = value
    with pytest.raises(InvalidArgument, match="'X'"):
        net.tables["X"] = [1.0]
    for data, said in (
        ([[0, 3]], r"states of B from 0 to 2.*got 3 at row 0, column 1"),
        ([[0.0, 1.0], [0.5, 1.0]], r"states of A.*0.5 at row 1, column 0"),
        ([[-1, 0]], "-1 at row 0"),
        ([[0, 1, 1]], r"2 columns, \['A', 'B'\]"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            net.log_prob(data)
    for query, evidence, said in (
        ("X", {}, "'X'"), (("A", "A"), {}, "different"), ("A", {"A": 1}, "leaves open"), ("A", {"X": 1}, "'X'"),
        ("A", {"B": "red"}, "numbers of states"), ([[0, 1]], None, "no node is hidden"), ("A", {"B": 7}, "from 0 to 2"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=said):
            net.posterior(query, evidence)
    named = asia()
    with pytest.raises(InvalidArgument, match="never"):
        named.posterior("cancer", {"tired": "sometimes"})
    with pytest.raises(InvalidArgument, match="from 0 to 1"):
        named.posterior("cough", {"cancer": 2})
    leaf = with_leaves()
    with pytest.raises(InvalidArgument, match="impute"):
        leaf.posterior("X", {})
    with pytest.raises(InvalidArgument, match="to_bif"):
        leaf.to_bif("x.bif")


def test_names_may_be_anything() -> None:
    net = BayesianNetwork(
        {"type": 2, "a.b": 2, "training": 2, "a_b": 2}, [("type", "a.b"), ("a.b", "training")]
    ).double()
    net.tables["a.b"] = [[0.9, 0.1], [0.2, 0.8]]
    stats = net.e_step(net.batch(torch.zeros(3, 4)))
    assert len(net.slots()) == 4
    net.m_step(stats)
    assert float(net.tables["training"][0, 0].detach()) == pytest.approx(1.0)


# ---- numerics -------------------------------------------------------------------------------------------------------


def test_the_fast_way_runs_where_cases_are_shared() -> None:
    """2 000 rows of which 32 differ are 32 cases; many patterns of what is missing share theirs too."""
    net = random_net([2, 2, 2, 2, 2, 2], [(0, i) for i in range(1, 6)], hidden=("A",))
    x = torch.randint(0, 2, (2000, 5), generator=rng(1)).double()
    batch = net.batch(x)
    potentials = {slot: kernel.log_potential(batch) for slot, kernel in net._kernels().items()}
    parts = net._parts(batch, *net._given(potentials, batch), frozenset(), True, True)
    assert [part.size for part in parts] == [32]
    batch = net.batch(x.masked_fill(torch.rand(x.shape, generator=rng(2)) < 0.3, torch.nan))
    parts = net._parts(batch, *net._given(potentials, batch), frozenset(), True, True)
    # A child that was not seen is one state more: rows of all 32 patterns are together, but for those without any.
    assert next(part.size for part in parts) == 3**5 - 1
    found, reference = net.infer(potentials, batch), DiscreteModel.infer(net, potentials, batch)
    for slot, value in found[1].items():
        close(value, reference[1][slot])


def test_rare_components_are_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of sets of open nodes make a few pools: one for each number of configurations."""
    edges = [(a, b) for b in range(1, 12) for a in {b // 2, max(0, b - 2)} if a < b]
    net = BayesianNetwork({f"v{i}": 2 + (i == 4) for i in range(12)}, [(f"v{a}", f"v{b}") for a, b in edges]).double()
    for i, name in enumerate(net.tables):
        net.tables[name] = table(*net.tables[name].shape, seed=i)
    x = net.sample(600, generator=rng(0))
    x = x.masked_fill(torch.rand(x.shape, generator=rng(1)) < 0.3, torch.nan)
    batch = net.batch(x, weight=torch.rand(600, generator=rng(2), dtype=torch.float64))
    potentials = {slot: kernel.log_potential(batch) for slot, kernel in net._kernels().items()}
    parts = net._parts(batch, *net._given(potentials, batch), frozenset(), True, True)
    found = [part for part in parts if isinstance(part, pools.Pool)]
    sets = {tuple(row) for row in (x.isnan()).tolist()}
    assert len(sets) > 200
    assert len({pool.configurations for pool in found}) == len(found) < 20
    close(net.log_prob(batch), plain(net, batch))
    for mine, reference in ((net.infer, DiscreteModel.infer), (net.infer_hard, DiscreteModel.infer_hard)):
        (value, counts), (wanted, expected) = mine(potentials, batch), reference(net, potentials, batch)
        close(value, wanted)
        for slot in counts:
            close(counts[slot], expected[slot])
    # In one elimination the same.
    taken("whole", monkeypatch)
    again = net.batch(x, weight=batch.weight)
    whole = net._parts(again, *net._given(potentials, again), frozenset(), True, True)
    assert sum(isinstance(part, patterns.Part) and len(part.closed) > 0 for part in whole) == 1
    close(net.infer(potentials, again)[0], net.infer(potentials, batch)[0])
    for slot, value in net.infer(potentials, again)[1].items():
        close(value, net.infer(potentials, batch)[1][slot])


def test_order_of_elimination_finds_the_width_of_known_graphs() -> None:
    chain = [(i, i + 1) for i in range(9)]
    assert eliminate.order(chain, [2] * 10, range(10)).width == 1
    ring = [*chain, (9, 0)]
    assert eliminate.order(ring, [2] * 10, range(10)).width == 2
    clique = [tuple(range(6))]
    assert eliminate.order(clique, [2] * 6, range(6)) == eliminate.Order((0, 1, 2, 3, 4, 5), 5, 64, 126)
    # What is known cuts the ring.
    assert eliminate.order(ring, [2] * 10, range(9)).width == 1


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_pieces_do_not_matter(kind: Any) -> None:
    net = with_leaves()
    x = rows_with_leaves(net, 400)
    batch = net.batch(x)
    whole = net.e_step(batch, kind)
    net.memory_budget = 1
    close_stats(net.e_step(replace(batch), kind), whole)


def cause_seen_apart() -> Tensor:
    """A cause and three effects, the cause seen in rows alone that do not show these."""
    truth = BayesianNetwork({"A": 2, "B": 2, "C": 2, "D": 2}, [("A", "B"), ("A", "C"), ("A", "D")]).double()
    truth.tables["A"] = [0.4, 0.6]
    for name in "BCD":
        truth.tables[name] = [[0.9, 0.1], [0.2, 0.8]]
    x = truth.sample(400, generator=torch.Generator().manual_seed(0)).double()
    x[:40, 1:], x[40:, 0] = torch.nan, torch.nan
    assert float(truth.log_prob(x).detach().sum()) > -664
    return x


def test_a_node_that_is_never_seen_beside_others_leaves_its_saddle() -> None:
    """Its observed frequencies alone make all of its states alike: every restart stayed at −774.5."""
    net = BayesianNetwork({"A": 2, "B": 2, "C": 2, "D": 2}, [("A", "B"), ("A", "C"), ("A", "D")]).double()
    result = torchem.fit(net, cause_seen_apart(), seed=0, restarts=3, max_iter=300, tol=1e-6, progress=False)
    assert result.bound > -664
    assert len({round(bound, 6) for bound in result.restarts}) == 3


def test_a_column_without_entries_whose_states_are_alike_is_named() -> None:
    net = BayesianNetwork({"A": 2, "B": 2}, [("A", "B")]).double()
    x = torch.tensor([[torch.nan, 0.0], [torch.nan, 1.0]]).double()
    with pytest.warns(SymmetryWarning, match="start identical"):
        torchem.fit(net, x, init=None, max_iter=1, tol=0, progress=False)


def test_fewer_rows_than_hidden_states_are_enough() -> None:
    net = BayesianNetwork({"H": 3, "B": 2, "C": 2}, [("H", "B"), ("H", "C")], ("H",)).double()
    result = torchem.fit(net, [[0.0, 1.0], [1.0, 0.0]], weights=[50.0, 50.0], seed=0, tol=1e-9, progress=False)
    assert result.bound == pytest.approx(-100 * math.log(2), abs=1e-4)


def test_tables_too_large_to_hold_are_refused() -> None:
    parents = [f"P{i}" for i in range(40)]
    with pytest.raises(InvalidArgument, match=r"^edges: expected tables of at most .* for X"):
        BayesianNetwork(dict.fromkeys([*parents, "X"], 2), [(name, "X") for name in parents])
