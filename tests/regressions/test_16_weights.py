"""Weights, provably honoured: none = ones, integer = repetition, 0 = absent; and the stopping rule counts them."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

import torchem
from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, gap, rng, same, started
from torchem.errors import InvalidArgument

FIXED: dict[str, Any] = {"init": None, "tol": 0.0, "max_iter": 12}


def fitted(x: torch.Tensor, covariance_type: str, device: torch.device, **options: Any) -> torchem.Result:
    # The start is made from data that all cases share.
    model = started(blobs(60, 2, 3, gap=3.0), 3, covariance_type, device=device)
    return fit(model, x.to(device), **{**FIXED, **options})


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_none_equals_ones(covariance_type: str, device: torch.device) -> None:
    x = blobs(60, 2, 3, gap=3.0)
    plain = fitted(x, covariance_type, device)
    ones = fitted(x, covariance_type, device, weights=torch.ones(60))
    assert gap(plain.model, ones.model) < 1e-13
    assert plain.history == pytest.approx(ones.history, rel=1e-13)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_integers_equal_repetition(covariance_type: str, device: torch.device) -> None:
    x = blobs(60, 2, 3, gap=3.0)
    times = torch.randint(0, 4, (60,), generator=rng(1))
    weighted = fitted(x, covariance_type, device, weights=times)
    repeated = fitted(x.repeat_interleave(times, 0), covariance_type, device)
    assert gap(weighted.model, repeated.model) < 1e-10
    assert weighted.history == pytest.approx(repeated.history, rel=1e-11)
    assert weighted.bound == pytest.approx(repeated.bound, rel=1e-11)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_zero_equals_absent(covariance_type: str, device: torch.device) -> None:
    x = blobs(60, 2, 3, gap=3.0)
    weight = torch.ones(60)
    weight[::4] = 0
    # Absent rows may lie anywhere, also where a density underflows to zero.
    polluted = x.clone()
    polluted[::4] = 1e8
    masked = fitted(polluted, covariance_type, device, weights=weight)
    absent = fitted(x[weight > 0], covariance_type, device)
    assert gap(masked.model, absent.model) < 1e-9
    assert masked.history == pytest.approx(absent.history, rel=1e-9)


@pytest.mark.parametrize("init", ["kmeans++", "kmeans", "random", "random_from_data", "hierarchical"])
def test_absent_rows_do_not_reach_a_start(init: str, device: torch.device) -> None:
    x = blobs(90, 2, 3, gap=20.0)
    weight = torch.ones(93)
    weight[90:] = 0
    polluted = torch.cat([x, torch.full((3, 2), 1e8, dtype=torch.float64)])
    clean = fit(torchem.GaussianMixture(3, 2).double().to(device), x.to(device), init=init, restarts=5)
    model = torchem.GaussianMixture(3, 2).double().to(device)
    dirty = fit(model, polluted.to(device), init=init, restarts=5, weights=weight)
    assert dirty.bound == pytest.approx(clean.bound, rel=1e-3)
    assert bool((model.means.detach().abs() < 100).all())


def test_scaling_all_weights_scales_the_objective(device: torch.device) -> None:
    x = blobs(60, 2, 3, gap=3.0)
    plain = fitted(x, "full", device)
    scaled = fitted(x, "full", device, weights=torch.full((60,), 2.5))
    assert gap(plain.model, scaled.model) < 1e-11
    assert [2.5 * v for v in plain.history] == pytest.approx(scaled.history, rel=1e-11)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_the_stopping_rule_uses_them(factor: float, device: torch.device) -> None:
    """tol is per unit of weight: scaling all weights leaves the number of iterations as it is."""
    x = blobs(60, 2, 3, gap=2.0)
    options = {"max_iter": 300, "tol": 1e-4}
    plain = fitted(x, "full", device, **options)
    scaled = fitted(x, "full", device, weights=torch.full((60,), factor), **options)
    assert plain.converged
    assert plain.n_iter > 10
    assert (scaled.status, scaled.n_iter) == (plain.status, plain.n_iter)


def test_rows_without_weight_do_not_slow_the_stop(device: torch.device) -> None:
    x = blobs(60, 2, 3, gap=2.0)
    options = {"max_iter": 300, "tol": 1e-4}
    plain = fitted(x, "full", device, **options)
    padded = torch.cat([x, torch.zeros(6000, 2, dtype=torch.float64)])
    weight = torch.cat([torch.ones(60), torch.zeros(6000)])
    assert fitted(padded, "full", device, weights=weight, **options).n_iter == plain.n_iter


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (torch.ones(59), r"\[60\]"),
        (torch.ones(60, 1), r"\[60\]"),
        (torch.tensor(1.0), r"\[60\]"),
        (torch.ones(60).index_fill(0, torch.tensor([7]), -1.0), "row 7"),
        (torch.ones(60).index_fill(0, torch.tensor([7]), math.nan), "row 7"),
        (torch.ones(60).index_fill(0, torch.tensor([7]), math.inf), "row 7"),
        (torch.zeros(60), "all zero"),
        ([1.0] * 59, r"\[60\]"),
        (np.ones((2, 30)), r"\[60\]"),
    ],
    ids=["short", "column", "scalar", "negative", "nan", "infinite", "all zero", "short list", "matrix"],
)
def test_bad_weights_raise(weights: Any, said: str, device: torch.device) -> None:
    model = started(blobs(60, 2, 3), 3, device=device)
    before = started(blobs(60, 2, 3), 3, device=device)
    with pytest.raises(InvalidArgument, match=said) as error:
        fit(model, blobs(60, 2, 3).to(device), weights=weights)
    assert str(error.value).startswith("weights: expected ")
    assert same(model, before)


@pytest.mark.parametrize("kind", [list, np.asarray, torch.as_tensor, lambda w: torch.as_tensor(w).to(torch.int32)])
def test_weights_of_any_kind(kind: Any, device: torch.device) -> None:
    x = blobs(60, 2, 3, gap=3.0)
    weights = [1 + i % 3 for i in range(60)]
    first = fitted(x, "full", device, weights=torch.tensor(weights, dtype=torch.float64))
    assert gap(first.model, fitted(x, "full", device, weights=kind(weights)).model) == 0


def test_log_prob_is_never_weighted(device: torch.device) -> None:
    x = blobs(60, 2, 3)
    model = started(x, 3, device=device)
    batch = model.batch(x.to(device), weight=torch.arange(60))
    torch.testing.assert_close(model.log_prob(batch), model.log_prob(x.to(device)))


# ---- sequences ----------------------------------------------------------------------------------------------------

SEQUENCES = 20


def sequences() -> list[torch.Tensor]:
    lengths = [1 + 5 * i % 9 for i in range(SEQUENCES)]
    return [
        3.0 * ((torch.arange(n) // 3 + i) % 2).unsqueeze(-1) + blobs(n, 2, 1, seed=i) for i, n in enumerate(lengths)
    ]


def chain(device: torch.device, x: list[torch.Tensor], **options: Any) -> torchem.Result:
    model = torchem.GaussianHMM(2, 2, "full").double().to(device)
    model.means = [[0.0, 1.0], [2.0, 2.0]]
    return fit(model, x, **{**FIXED, **options})


def test_of_sequences(device: torch.device) -> None:
    x = sequences()
    plain = chain(device, x)
    ones = chain(device, x, weights=torch.ones(SEQUENCES))
    assert gap(plain.model, ones.model) < 1e-12
    assert plain.history == pytest.approx(ones.history, rel=1e-12)
    times = torch.randint(0, 4, (SEQUENCES,), generator=rng(1))
    weighted = chain(device, x, weights=times)
    repeated = chain(device, [one for one, n in zip(x, times.tolist(), strict=True) for _ in range(n)])
    assert gap(weighted.model, repeated.model) < 1e-10
    assert weighted.history == pytest.approx(repeated.history, rel=1e-11)


def test_a_sequence_without_weight_is_absent(device: torch.device) -> None:
    x = sequences()
    weight = torch.ones(SEQUENCES)
    weight[::4] = 0
    polluted = [one if w else torch.full_like(one, 1e8) for one, w in zip(x, weight.tolist(), strict=True)]
    masked = chain(device, polluted, weights=weight)
    absent = chain(device, [one for one, w in zip(x, weight.tolist(), strict=True) if w])
    assert gap(masked.model, absent.model) < 1e-9
    assert masked.history == pytest.approx(absent.history, rel=1e-9)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_stopping_rule_counts_weighted_frames(factor: float, device: torch.device) -> None:
    options = {"max_iter": 300, "tol": 1e-4}
    plain = chain(device, sequences(), **options)
    assert plain.converged
    scaled = chain(device, sequences(), weights=torch.full((SEQUENCES,), factor), **options)
    assert (scaled.status, scaled.n_iter) == (plain.status, plain.n_iter)
    # tol is per frame: the last rise was below it, the one before was not.
    frames = sum(map(len, sequences()))
    rises = [b - a for a, b in itertools.pairwise(plain.history)]
    assert rises[-1] < 1e-4 * frames <= max(rises[:-1])


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (torch.ones(19), r"\[20\]"),
        (torch.ones(20).index_fill(0, torch.tensor([7]), -1.0), "sequence 7"),
        (torch.ones(20).index_fill(0, torch.tensor([7]), math.nan), "sequence 7"),
        (torch.zeros(20), "all zero"),
    ],
    ids=["short", "negative", "nan", "all zero"],
)
def test_bad_weights_of_sequences_raise(weights: torch.Tensor, said: str, device: torch.device) -> None:
    with pytest.raises(InvalidArgument, match=said) as error:
        chain(device, sequences(), weights=weights)
    assert str(error.value).startswith("weights: expected ")
