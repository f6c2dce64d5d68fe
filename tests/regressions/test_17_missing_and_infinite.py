"""NaN says that missing data need a factor that supports them; ±inf always raises. Nothing spreads in silence."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, same, started
from torchem.errors import InvalidArgument


def spoilt(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = blobs(40, 2, 2).to(dtype)
    x[17, 1] = value
    return x


USES: dict[str, Callable[[torchem.GaussianMixture, torch.Tensor], Any]] = {
    "fit": fit,
    "log_prob": lambda model, x: model.log_prob(x),
    "posterior": lambda model, x: model.posterior(x),
    "most_likely": lambda model, x: model.most_likely(x),
    "criteria": torchem.criteria,
    "forward": lambda model, x: model(x),
    "fit array": lambda model, x: fit(model, x.cpu().numpy()),
    "fit lists": lambda model, x: fit(model, x.tolist()),
    "fit batch": lambda model, x: fit(model, torchem.Batch(x)),
    "fit data set": lambda model, x: fit(model, TensorDataset(x)),
    "fit loader": lambda model, x: fit(model, DataLoader(TensorDataset(x), batch_size=15)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_entry_is_named(use: str, value: float, device: torch.device) -> None:
    clean = blobs(40, 2, 2)
    model, before = (started(clean, 2, device=device) for _ in range(2))
    with pytest.raises(InvalidArgument) as error:
        USES[use](model, spoilt(value).to(device))
    message = str(error.value)
    assert message.startswith("data: expected ")
    assert "row 2, column 1" in message if use == "fit loader" else "row 17, column 1" in message
    if math.isnan(value):
        assert "missing data needs a factor that supports it" in message
    else:
        assert f"{value}" in message
        assert "NaN if it stands for a missing entry" in message
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_in_every_type(value: float, dtype: torch.dtype, device: torch.device) -> None:
    with pytest.raises(InvalidArgument, match="row 17, column 1"):
        fit(started(blobs(40, 2, 2), 2, device=device), spoilt(value, dtype).to(device))


def test_both_infinities_do_not_hide_each_other(device: torch.device) -> None:
    x = spoilt(math.inf)
    x[3, 0] = -math.inf
    with pytest.raises(InvalidArgument, match="row 3, column 0"):
        fit(started(blobs(40, 2, 2), 2, device=device), x.to(device))


def test_a_sum_that_overflows_is_not_an_infinite_entry(device: torch.device) -> None:
    # The quick check sums; finite entries whose sum is not must still be read as finite.
    x = torch.full((4, 1), 1e308, dtype=torch.float64, device=device)
    assert len(torchem.GaussianMixture(1, 1).double().to(device).batch(x)) == 4


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_infinity_raises_even_where_the_weight_is_zero(covariance_type: str, device: torch.device) -> None:
    weight = torch.ones(40)
    weight[17] = 0
    with pytest.raises(InvalidArgument, match="row 17, column 1"):
        fit(started(blobs(40, 2, 2), 2, covariance_type, device=device), spoilt(math.inf).to(device), weights=weight)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_covariates_may_not_be_missing(value: float, device: torch.device) -> None:
    u = torch.zeros(40, 1)
    u[5] = value
    with pytest.raises(InvalidArgument, match="inputs: expected finite covariates"):
        fit(started(blobs(40, 2, 2), 2, device=device), blobs(40, 2, 2).to(device), inputs=u)
