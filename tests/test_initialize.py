"""Starts: every method, for one run and for many at once, in any units, with weights, duplicates and too few rows."""

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

import torchem
from tests.regressions.common import (
    COVARIANCE_TYPES,
    DTYPES,
    blobs,
    dense,
    fit,
    gap,
    healthy,
    mixture,
    rand,
    randn,
    rng,
    same,
)
from torchem import initialize
from torchem.errors import InvalidArgument
from torchem.ops import kmeans

CLUSTERS = ("kmeans++", "kmeans", "hierarchical")
INITS = ("auto", *initialize.METHODS)


def start(model: torchem.GaussianMixture, x: Tensor, init: str, **options: Any) -> torchem.Result:
    """Only the start: no EM map."""
    return fit(model, x.to(model.device), init=init, max_iter=0, **options)


def purity(model: torchem.GaussianMixture, x: Tensor, k: int) -> float:
    """Share of rows that share a component with their own cluster's majority; rows are in turn."""
    labels = model.most_likely(x.to(model.device)).cpu()
    counts = torch.stack([torch.bincount(labels[c::k], minlength=k) for c in range(k)])
    return float(counts.amax(-1).sum()) / len(x)


# ---- every method -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", CLUSTERS)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_clusters_far_apart_are_found(covariance_type: str, init: str, device: torch.device) -> None:
    x = blobs(120, 2, 4, gap=40.0)
    model = mixture(4, 2, covariance_type, device=device)
    result = start(model, x, init)
    assert (result.n_iter, result.status, len(result.history)) == (0, "max_iter", 1)
    healthy(model)
    assert purity(model, x, 4) == 1.0
    centers = torch.stack([x[c::4].mean(0) for c in range(4)])
    distance = torch.cdist(centers, model.means.detach().cpu()).amin(-1)
    # One hundredth of each row is spread at random over the components.
    assert float(distance.max()) < 2.0


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_random_shares_start_near_the_whole(covariance_type: str, device: torch.device) -> None:
    x = randn(400, 2, seed=2) * 3 + 5
    model = mixture(3, 2, covariance_type, device=device)
    start(model, x, "random")
    torch.testing.assert_close(model.means.detach().cpu(), x.mean(0).expand(3, 2), rtol=0, atol=1.0)
    assert float(model.weights.detach().std()) > 0
    assert float((model.means[0] - model.means[1]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_random_from_data_takes_observations_and_the_datas_covariance(
    covariance_type: str, device: torch.device
) -> None:
    x = randn(50, 2, seed=2) * torch.tensor([1.0, 5.0]) + 3
    model = mixture(4, 2, covariance_type, device=device)
    start(model, x, "random_from_data")
    rows = torch.cdist(model.means.detach().cpu(), x).amin(-1)
    assert float(rows.max()) < 1e-12
    assert len({tuple(row) for row in model.means.tolist()}) == 4
    torch.testing.assert_close(model.weights.detach().cpu(), torch.full((4,), 0.25).double())
    covariance = x.mT.cov(correction=0)
    expected = {
        "full": covariance, "tied": covariance, "diag": covariance.diagonal().diag(),
        "spherical": covariance.diagonal().mean() * torch.eye(2).double(),
    }[covariance_type]  # fmt: skip
    # About each mean the scatter of the whole would be larger; the start takes the covariance about the data's mean.
    torch.testing.assert_close(dense(model), expected.expand(4, 2, 2), rtol=1e-9, atol=1e-9)


def test_auto_suits_the_family(device: torch.device) -> None:
    gaussian = [start(mixture(4, 2, device=device), blobs(80, 2, 4), init).history for init in ("auto", "kmeans")]
    assert gaussian[0] == gaussian[1]
    x = (torch.arange(40) % 4).unsqueeze(-1).to(device)
    tables = []
    for init in ("auto", "random"):
        model = torchem.Mixture(torchem.factors.Categorical(2), torchem.factors.Categorical(2, 4)).double().to(device)
        tables.append(fit(model, x, init=init, max_iter=0).history)
    assert tables[0] == tables[1]


def test_none_keeps_the_parameters(device: torch.device) -> None:
    x = blobs(40, 2, 2).to(device)
    model = mixture(2, 2, device=device)
    model.weights, model.means = [0.3, 0.7], [[1.0, 1.0], [4.0, -4.0]]
    result = fit(model, x, init=None, max_iter=0)
    assert model.means.tolist() == [[1.0, 1.0], [4.0, -4.0]]
    torch.testing.assert_close(model.weights.detach().cpu(), torch.tensor([0.3, 0.7]).double())
    assert result.bound == pytest.approx(float(model.log_prob(x).detach().sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Not "random": from near the saddle that such shares make, EM may well find a lesser optimum.
@pytest.mark.parametrize("init", [name for name in initialize.METHODS if name != "random"])
def test_a_start_leads_to_the_optimum_of_easy_data(init: str, dtype: torch.dtype, device: torch.device) -> None:
    x = blobs(150, 2, 3, gap=12.0)
    result = fit(mixture(3, 2, dtype=dtype, device=device), x.to(device), init=init, restarts=8, max_iter=300)
    best = fit(mixture(3, 2), x, init="kmeans").bound
    assert result.bound == pytest.approx(best, rel=1e-3)


# ---- units --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [torch.tensor([1e-6, 1e-6]), torch.tensor([1e6, 1e6]), torch.tensor([1e-3, 1e4])])
@pytest.mark.parametrize("init", INITS)
def test_units_do_not_change_a_start(init: str, scale: Tensor, device: torch.device) -> None:
    x, scale = blobs(80, 2, 4, gap=3.0), scale.double()
    plain, scaled = mixture(4, 2, device=device), mixture(4, 2, device=device)
    start(plain, x, init)
    start(scaled, x * scale + 2 * scale, init)
    torch.testing.assert_close(
        scaled.means.detach().cpu() / scale - 2, plain.means.detach().cpu(), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(dense(scaled) / scale.outer(scale), dense(plain), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scaled.weights.detach(), plain.weights.detach(), rtol=1e-6, atol=1e-9)


def test_a_constant_column_does_not_disturb_clusters(device: torch.device) -> None:
    x = torch.cat([blobs(60, 1, 2, gap=30.0), torch.full((60, 1), 1e9, dtype=torch.float64)], -1)
    model = mixture(2, 2, device=device)
    start(model, x, "kmeans")
    assert purity(model, x, 2) == 1.0
    healthy(model)


# ---- few rows, duplicates, weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
def test_fewer_rows_than_components(init: str, device: torch.device) -> None:
    with pytest.raises(InvalidArgument) as error:
        start(mixture(5, 2, device=device), randn(4, 2), init)
    message = "data: expected at least as many observations as components (5), got 4; lower n_components."
    assert str(error.value) == message


@pytest.mark.parametrize("init", INITS)
def test_as_many_rows_as_components(init: str, device: torch.device) -> None:
    model = mixture(4, 2, device=device)
    fit(model, randn(4, 2).to(device), init=init, max_iter=3)
    healthy(model)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_fewer_distinct_rows_than_components(covariance_type: str, init: str, device: torch.device) -> None:
    x = randn(2, 2, seed=1).repeat(10, 1)
    model = mixture(5, 2, covariance_type, device=device)
    start(model, x, init)
    healthy(model)


@pytest.mark.parametrize("init", INITS)
def test_rows_without_weight_are_not_drawn(init: str, device: torch.device) -> None:
    x = torch.cat([randn(30, 2), randn(30, 2) + 1000])
    weights = torch.cat([torch.ones(30), torch.zeros(30)])
    for seed in range(5):
        model = mixture(3, 2, device=device)
        start(model, x, init, weights=weights, seed=seed)
        assert float(model.means.detach().abs().max()) < 100


def test_heavy_rows_are_drawn_more_often(device: torch.device) -> None:
    x = torch.arange(10.0, dtype=torch.float64).unsqueeze(-1)
    weights = torch.ones(10)
    weights[7] = 1e6
    for seed in range(5):
        model = mixture(1, 1, device=device)
        start(model, x, "random_from_data", weights=weights, seed=seed)
        assert float(model.means.detach()) == 7.0


def test_frozen_parameters_survive_a_start(device: torch.device) -> None:
    for init in INITS:
        model = mixture(2, 2, device=device)
        model.means, model.weights = [[1.0, 2.0], [3.0, 4.0]], [0.9, 0.1]
        model.component.freeze("means")
        model.mixing.freeze()
        start(model, blobs(40, 2, 2), init)
        assert model.means.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        torch.testing.assert_close(model.weights.detach().cpu(), torch.tensor([0.9, 0.1]).double())


# ---- replicas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", initialize.METHODS)
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_replicas_start_as_single_models(covariance_type: str, init: str, device: torch.device) -> None:
    x = blobs(60, 2, 3, gap=3.0).to(device)
    batch = torchem.Batch(x, weight=(0.5 + rand(60)).to(device))
    many = mixture(3, 2, covariance_type, device=device).replicate(4)
    initialize.start(many, batch, 3, init, [rng(seed) for seed in range(4)])
    for seed in range(4):
        single = mixture(3, 2, covariance_type, device=device)
        initialize.start(single, batch, 3, init, [rng(seed)], first=seed)
        assert gap(many.take_replicas(seed), single) < 1e-9


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'kmeans'"):
        initialize.start(mixture(2, 2), torchem.Batch(blobs(10, 2, 2)), 2, "kmean", [rng()])


@pytest.mark.parametrize(("k", "replicas"), [(1, 1), (8, 1), (8, 32), (2000, 1), (64, 64)])
def test_a_sample_is_bounded(k: int, replicas: int) -> None:
    size = initialize.sample_size(k, replicas)
    assert size >= 64 * k or size == 1 << 16
    assert size <= 1 << 16


# ---- k-means and Ward ---------------------------------------------------------------------------------------------


def test_seeds_are_distinct_rows() -> None:
    x = randn(40, 3)
    seeds = kmeans.seed(x, 10, [rng(s) for s in range(6)])
    assert seeds.shape == (6, 10)
    assert all(len(set(row)) == 10 for row in seeds.tolist())


def test_seeds_follow_their_own_generators() -> None:
    x = randn(200, 2)
    many = kmeans.seed(x, 5, [rng(s) for s in range(4)])
    for s in range(4):
        assert torch.equal(many[s], kmeans.seed(x, 5, [rng(s)])[0])
    assert len({tuple(row) for row in many.tolist()}) > 1


def test_seeds_reach_every_cluster_far_apart() -> None:
    x = blobs(60, 2, 6, gap=100.0)
    for row in kmeans.seed(x, 6, [rng(s) for s in range(10)]).tolist():
        assert sorted(index % 6 for index in row) == list(range(6))


def test_seeds_are_as_good_as_scikit_learns() -> None:
    """The best of several candidates: on average closer to the data than one drawn at random."""
    from sklearn.cluster import kmeans_plusplus

    x = randn(300, 2, seed=4)
    ours = [x[row] for row in kmeans.seed(x, 12, [rng(s) for s in range(60)])]
    theirs = [torch.from_numpy(kmeans_plusplus(x.numpy(), 12, random_state=s)[0]) for s in range(60)]
    mean, peer = (
        sum(float(torch.cdist(x, centers).amin(-1).square().sum()) for centers in group) / 60
        for group in (ours, theirs)
    )
    assert mean == pytest.approx(peer, rel=0.05)


def test_seeds_where_all_rows_are_equal() -> None:
    assert kmeans.seed(torch.ones(5, 2, dtype=torch.float64), 3, [rng()]).shape == (1, 3)


def test_seeds_avoid_rows_without_weight() -> None:
    x = torch.cat([randn(10, 2), randn(10, 2) * 1e3])
    weight = torch.cat([torch.ones(10), torch.zeros(10)]).double()
    assert bool((kmeans.seed(x, 4, [rng(s) for s in range(10)], weight) < 10).all())


def inertia(x: Tensor, labels: Tensor, k: int, weight: Tensor) -> float:
    total = 0.0
    for c in range(k):
        w = weight[labels == c]
        part = x[labels == c]
        if len(part):
            center = (w.unsqueeze(-1) * part).sum(0) / w.sum().clamp(min=1e-300)
            total += float((w * (part - center).square().sum(-1)).sum())
    return total


def test_lloyd_descends() -> None:
    x, weight = randn(200, 2), 0.1 + rand(200)
    centers = x[kmeans.seed(x, 5, [rng(0), rng(1)])]
    values = [kmeans.lloyd(x, centers, i, weight) for i in (0, 1, 2, 5, 50)]
    for r in range(2):
        costs = [inertia(x, labels[r], 5, weight) for labels in values]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(costs))
        assert costs[-1] < costs[0]


def test_lloyd_reaches_a_fixed_point() -> None:
    from sklearn.cluster import KMeans

    x = blobs(90, 2, 3, gap=3.0)
    centers = x[kmeans.seed(x, 3, [rng(0)])]
    labels = kmeans.lloyd(x, centers, 300)[0]
    peer = KMeans(3, init=centers[0].numpy(), n_init=1, tol=0, max_iter=300).fit(x.numpy())
    assert labels.tolist() == peer.labels_.tolist()


def test_lloyd_far_from_the_origin() -> None:
    # ‖x‖² − 2xc + ‖c‖² cancels there; callers standardise, and a start must not be the one that does not.
    x = blobs(60, 2, 3, gap=30.0) + 1e6
    model = mixture(3, 2)
    start(model, x, "kmeans")
    assert purity(model, x, 3) == 1.0


@pytest.mark.parametrize("k", [1, 2, 5, 30])
def test_ward_agrees_with_scipy(k: int) -> None:
    x = randn(30, 3, seed=8)
    labels = kmeans.ward(x, k)
    peer = torch.from_numpy(fcluster(linkage(x.numpy(), "ward"), k, "maxclust")).long()
    together = labels.unsqueeze(0) == labels.unsqueeze(1)
    assert torch.equal(together, peer.unsqueeze(0) == peer.unsqueeze(1))
    assert sorted(set(labels.tolist())) == list(range(k))


def test_ward_on_ties_and_duplicates() -> None:
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0], [2.0], [2.0]], dtype=torch.float64)
    labels = kmeans.ward(x, 3).tolist()
    assert len({tuple(sorted(i for i, label in enumerate(labels) if label == c)) for c in set(labels)}) == 3
    assert labels[0] == labels[1] == labels[2] != labels[3] == labels[4] != labels[5] == labels[6]


def test_the_cluster_extension_covers_all_rows(device: torch.device) -> None:
    x = blobs(3000, 2, 3, gap=40.0)
    model = mixture(3, 2, device=device)
    start(model, x, "hierarchical")
    assert purity(model, x, 3) == 1.0
    assert math.isfinite(float(model.log_prob(x.to(device)).detach().sum()))


def test_large_data_are_started_from_a_sample(device: torch.device) -> None:
    x = blobs(80_000, 2, 3, gap=20.0)
    one, two = mixture(3, 2, device=device), mixture(3, 2, device=device)
    start(one, x, "kmeans")
    start(two, x, "kmeans")
    assert same(one, two)
    assert purity(one, x, 3) == 1.0
