"""Weights, provably honoured: none = ones, integer = repetition, 0 = absent; and the stopping rule counts them."""

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
