"""A NaN is a missing entry: what was observed keeps its marginal density. ±inf always raises."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.laws.families import Counts
from tests.regressions.common import COVARIANCE_TYPES, DTYPES, blobs, dense, fit, healthy, same, started
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


def unaware(device: torch.device) -> torchem.Mixture:
    """A model whose factor does not support missing entries."""
    return torchem.Mixture(torchem.factors.Categorical(3), Counts.example()[0]).double().to(device)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_the_infinite_entry_is_named(use: str, value: float, device: torch.device) -> None:
    clean = blobs(40, 2, 2)
    model, before = (started(clean, 2, device=device) for _ in range(2))
    with pytest.raises(InvalidArgument) as error:
        USES[use](model, spoilt(value).to(device))
    message = str(error.value)
    assert message.startswith("data: expected ")
    assert "row 2, column 1" in message if use == "fit loader" else "row 17, column 1" in message
    assert f"{value}" in message
    assert "NaN if it stands for a missing entry" in message
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_every_type(dtype: torch.dtype, device: torch.device) -> None:
    model = started(blobs(40, 2, 2), 2, device=device)
    with pytest.raises(InvalidArgument, match="row 17, column 1"):
        fit(model, spoilt(math.inf, dtype).to(device))
    assert math.isfinite(fit(model, spoilt(math.nan, dtype).to(device), max_iter=2).bound)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("use", USES)
def test_missing_entries_just_work(use: str, covariance_type: str, device: torch.device) -> None:
    model, x = started(blobs(40, 2, 2), 2, covariance_type, device=device), spoilt(math.nan).to(device)
    before = x.clone()
    USES[use](model, x)
    healthy(model)
    assert model.log_prob(x).isfinite().all()
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


def test_the_missing_entry_is_named_where_no_factor_supports_it(device: torch.device) -> None:
    with pytest.raises(InvalidArgument, match=r"NaN at row 17, column 1.*missing data needs a factor that supports it"):
        fit(unaware(device), spoilt(math.nan).to(device))


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_the_likelihood_is_that_of_the_observed_columns(covariance_type: str, device: torch.device) -> None:
    x = blobs(40, 3, 2)
    model = started(x, 2, covariance_type, device=device)
    fit(model, x, max_iter=2, init=None)
    mean, covariance = model.means.detach().double().cpu(), dense(model)
    for seen in ([0], [2], [0, 1], [1, 2], [0, 1, 2]):
        part = torch.full_like(x, math.nan)
        part[:, seen] = x[:, seen]
        marginal = MultivariateNormal(mean[:, seen], covariance[:, seen][:, :, seen])
        joint = model.weights.detach().double().cpu().log() + marginal.log_prob(x[:, None, seen])
        found = model.log_prob(part.to(device)).detach().double().cpu()
        torch.testing.assert_close(found, joint.logsumexp(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_a_row_missing_throughout_adds_nothing(covariance_type: str, device: torch.device) -> None:
    x = blobs(40, 2, 2)
    more = torch.cat([x, torch.full((7, 2), math.nan, dtype=torch.float64)]).to(device)
    model = started(x, 2, covariance_type, device=device)
    assert float(model.log_prob(more)[40:].detach().abs().max()) < 1e-15
    few, many = model.e_step(model.batch(x.to(device))), model.e_step(model.batch(more))
    torch.testing.assert_close(many["log_likelihood"], few["log_likelihood"], rtol=1e-12, atol=0)
    for name, leaf in few["component"].items():
        torch.testing.assert_close(many["component"][name], leaf, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_nothing_is_missing_nothing_changes(
    covariance_type: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A mask without a gap, and a batch beside one with gaps, leave every bit as it was."""
    x = blobs(60, 2, 2).to(device, dtype)
    plain, masked = (started(x.cpu(), 2, covariance_type, dtype, device) for _ in range(2))
    fit(plain, x, init=None)
    fit(masked, torchem.Batch(x, observed=torch.ones_like(x, dtype=torch.bool)), init=None)
    assert same(plain, masked)
    together = plain.log_prob(torch.cat([x, spoilt(math.nan).to(device, dtype)]))[:60]
    torch.testing.assert_close(together, plain.log_prob(x), rtol=1e-5, atol=1e-5)


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


# ---- frames of sequences ------------------------------------------------------------------------------------------


def chain(covariance_type: str, dtype: torch.dtype, device: torch.device) -> torchem.GaussianHMM:
    model = torchem.GaussianHMM(2, 2, covariance_type).to(device, dtype)  # pyright: ignore
    model.means = [[0.0, 0.0], [6.0, -6.0]]
    model.transition_matrix, model.initial_probs = [[0.8, 0.2], [0.4, 0.6]], [0.3, 0.7]
    return model


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_missing_frame_is_summed_out(covariance_type: str, dtype: torch.dtype, device: torch.device) -> None:
    """Gaps are steps of the chain that nobody saw: powers of the transition matrix."""
    model = chain(covariance_type, dtype, device)
    x = blobs(7, 2, 2).to(device, dtype)
    gone = x.clone()
    gone[[0, 3, 4, 6]] = math.nan
    log_b = model.emission.log_prob(torchem.Batch(x)).detach()
    first, step = model.initial_probs.detach(), model.transition_matrix.detach()
    # Frames 1, 2 and 5 are seen.
    message = (first @ step) * log_b[1].exp()
    message = (message @ step) * log_b[2].exp()
    message = (message @ step @ step @ step) * log_b[5].exp()
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    torch.testing.assert_close(model.log_prob(gone)[0].detach(), message.sum().log(), **close)
    posterior = model.posterior(gone)[0].detach()
    torch.testing.assert_close(posterior.sum(-1), torch.ones_like(posterior[:, 0]))
    last = message @ step / message.sum()
    torch.testing.assert_close(posterior[6], last, **close)
    # What is missing at the end changes nothing before.
    cut = model.posterior(gone[:6])[0].detach()
    torch.testing.assert_close(posterior[:6], cut, **close)
    assert bool((model.most_likely(gone) >= 0).all())


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_a_sequence_missing_throughout_adds_only_its_frames(covariance_type: str, device: torch.device) -> None:
    model = chain(covariance_type, torch.float64, device)
    x = blobs(24, 2, 2).view(4, 6, 2).to(device)
    more = torch.cat([x, torch.full_like(x[:2], math.nan)])
    assert float(model.log_prob(more)[4:].detach().abs().max()) < 1e-12
    few, many = model.e_step(model.batch(x)), model.e_step(model.batch(more))
    torch.testing.assert_close(many["log_likelihood"], few["log_likelihood"], rtol=1e-12, atol=0)
    for name, leaf in few["emission"].items():
        torch.testing.assert_close(many["emission"][name], leaf, rtol=1e-9, atol=1e-9)
    # Without data the chain is expected to run as it does.
    steps = many["transition"]["counts"] - few["transition"]["counts"]
    ratio = steps / steps.sum(-1, keepdim=True)
    torch.testing.assert_close(ratio, model.transition_matrix.detach())
    result = fit(model, more, init=None, max_iter=15, tol=0.0)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


def test_nothing_but_missing_data(device: torch.device) -> None:
    model, before = (chain("diag", torch.float64, device) for _ in range(2))
    with pytest.raises(InvalidArgument, match="at least one observation"):
        fit(model, torch.full((3, 5, 2), math.nan, dtype=torch.float64, device=device), init=None)
    assert same(model, before)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_the_infinite_frame_is_named(value: float, device: torch.device) -> None:
    model = chain("diag", torch.float64, device)
    x = blobs(24, 2, 2).view(4, 6, 2).to(device)
    x[2, 3, 1] = value
    for data in (x, list(x), torchem.Batch(x)):
        with pytest.raises(InvalidArgument, match="sequence 2, frame 3, column 1"):
            fit(model, data, init=None)
    with pytest.raises(InvalidArgument, match="sequence 2, frame 3, column 1"):
        fit(model, x.flatten(0, 1), lengths=[6] * 4, init=None)
