"""Information criteria: against their definitions and scikit-learn, with weights, constraints, pieces and any data."""

import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

import torchem
from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, mixture, rand, started
from torchem.errors import InvalidArgument


def fitted(
    covariance_type: str = "full", k: int = 3, device: torch.device | str = "cpu"
) -> tuple[torchem.GaussianMixture, Tensor]:
    x = blobs(90, 2, 3, gap=3.0).to(device)
    model = mixture(k, 2, covariance_type, device=device)
    fit(model, x)
    return model, x


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_definitions(covariance_type: str, device: torch.device) -> None:
    model, x = fitted(covariance_type, device=device)
    found = torchem.criteria(model, x)
    posterior = model.posterior(x).detach()
    entropy = -float((posterior * posterior.clamp(min=1e-300).log()).sum())
    p = model.n_parameters()
    assert found.loglik == pytest.approx(float(model.log_prob(x).detach().sum()), rel=1e-12)
    assert (found.n, found.n_parameters) == (90, p)
    assert found.aic == pytest.approx(-2 * found.loglik + 2 * p, rel=1e-12)
    assert found.bic == pytest.approx(-2 * found.loglik + p * math.log(90), rel=1e-12)
    assert found.icl == pytest.approx(found.bic + 2 * entropy, rel=1e-12)
    assert found.icl > found.bic


def test_bound_of_a_fit_is_its_log_likelihood(device: torch.device) -> None:
    x = blobs(90, 2, 3).to(device)
    weights = rand(90)
    model = mixture(3, 2, device=device)
    result = fit(model, x, weights=weights)
    assert torchem.criteria(model, x, weights).loglik == pytest.approx(result.bound, rel=1e-12)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_scikit_learn_fitted_on_its_own(covariance_type: str) -> None:
    """One component has one optimum: both libraries must come to the same criteria by their own ways."""
    x = blobs(200, 3, 1)
    model = mixture(1, 3, covariance_type, covariance_floor=0.0)
    fit(model, x)
    peer = GaussianMixture(1, covariance_type=covariance_type, reg_covar=0.0).fit(x.numpy())
    found = torchem.criteria(model, x)
    assert found.bic == pytest.approx(peer.bic(x.numpy()), rel=1e-9)
    assert found.aic == pytest.approx(peer.aic(x.numpy()), rel=1e-9)


def test_one_component_has_no_entropy(device: torch.device) -> None:
    model, x = fitted(k=1, device=device)
    found = torchem.criteria(model, x)
    assert found.icl == found.bic


def test_integer_weights_are_repetition(device: torch.device) -> None:
    model, x = fitted(device=device)
    times = torch.arange(90) % 4
    weighted, repeated = (
        torchem.criteria(model, x, times),
        torchem.criteria(model, x.repeat_interleave(times.to(device), 0)),
    )
    for name in ("loglik", "n", "aic", "bic", "icl"):
        assert getattr(weighted, name) == pytest.approx(getattr(repeated, name), rel=1e-12), name


def test_a_row_of_weight_zero_may_be_impossible(device: torch.device) -> None:
    model = torchem.Mixture(torchem.factors.Categorical(1), torchem.factors.Categorical(1, 3)).double().to(device)
    model.component.probs = [[0.5, 0.5, 0.0]]  # pyright: ignore
    x = torch.tensor([[0], [1], [2]], device=device)
    assert torchem.criteria(model, x, [1.0, 1.0, 0.0]).loglik == pytest.approx(-2 * math.log(2))
    assert torchem.criteria(model, x).loglik == -math.inf


def test_pieces_do_not_show(device: torch.device) -> None:
    model, _ = fitted(device=device)
    x = blobs(1000, 2, 3, seed=9).to(device)
    whole = torchem.criteria(model, x)
    model.memory_budget = 1
    pieces = torchem.criteria(model, x)
    assert pieces.loglik == pytest.approx(whole.loglik, rel=1e-12)
    assert pieces.icl == pytest.approx(whole.icl, rel=1e-12)


def test_weights_of_a_batch_count(device: torch.device) -> None:
    model, x = fitted(device=device)
    weights = rand(90)
    batch = model.batch(x, weight=weights)
    assert torchem.criteria(model, batch) == torchem.criteria(model, x, weights)


@pytest.mark.parametrize("make", [lambda x: x.cpu().numpy(), lambda x: x.tolist(), lambda x: x.float().double()])
def test_any_data(make: object, device: torch.device) -> None:
    model, x = fitted(device=device)
    found = torchem.criteria(model, make(x))  # pyright: ignore[reportCallIssue]
    assert found.loglik == pytest.approx(torchem.criteria(model, x).loglik, rel=1e-5)


@pytest.mark.parametrize("name", ["bic", "icl"])
def test_the_true_number_of_components_is_chosen(name: str) -> None:
    x = blobs(300, 2, 3, gap=5.0)
    scores = [getattr(torchem.criteria(fit(mixture(k, 2), x, restarts=3).model, x), name) for k in range(1, 6)]
    assert int(np.argmin(scores)) + 1 == 3


def test_nothing_is_recorded_or_changed(device: torch.device) -> None:
    model, x = fitted(device=device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x.requires_grad_()
    found = torchem.criteria(model, x)
    assert isinstance(found.loglik, float)
    assert x.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "weights", "said"),
    [
        (torch.zeros(0, 2), None, "at least one observation"),
        (torch.zeros(3, 3), None, "2 features"),
        (torch.full((3, 2), math.inf), None, "row 0, column 0"),
        (torch.zeros(3, 2), [1.0, -1.0, 1.0], "row 1"),
        (torch.zeros(3, 2), [0.0, 0.0, 0.0], "all zero"),
    ],
)
def test_bad_data(data: Tensor, weights: list[float] | None, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        torchem.criteria(started(blobs(9, 2, 2), 2), data, weights)


def test_batches_are_checked_too() -> None:
    # A Batch built by hand has passed no check yet.
    model = started(blobs(9, 2, 2), 2)
    with pytest.raises(InvalidArgument, match="2 features"):
        torchem.criteria(model, torchem.Batch(torch.zeros(3, 3)))


def test_sequences_of_any_form_and_length(device: torch.device) -> None:
    """One long sequence and many short ones are never padded together, and count frame by frame."""
    generator = torch.Generator().manual_seed(1)
    model = torchem.GaussianHMM(2, 1).double().to(device)
    model.means = [[-1.0], [1.0]]
    sequences = [torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (3000, *[2] * 40)]
    weights = torch.rand(41, generator=generator, dtype=torch.float64) + 0.5
    found = torchem.criteria(model, sequences, weights)
    parts = [torchem.criteria(model, x) for x in sequences]
    lengths = [len(x) for x in sequences]
    assert found.loglik == pytest.approx(sum(float(w) * p.loglik for w, p in zip(weights, parts, strict=True)))
    assert found.n == pytest.approx(float(weights @ torch.tensor(lengths, dtype=torch.float64)))
    entropy = sum(float(w) * (p.icl - p.bic) for w, p in zip(weights, parts, strict=True))
    assert found.icl - found.bic == pytest.approx(entropy)
    assert torchem.criteria(model, torch.cat(sequences), weights, lengths=lengths) == found
    labels = [torch.full((n,), -1) for n in lengths]
    assert torchem.criteria(model, sequences, weights, labels=labels).loglik == pytest.approx(found.loglik)


def test_where_likelihoods_are_too_dear_the_bound_stands_for_them() -> None:
    x = torch.randn(3, 20, 1, generator=torch.Generator().manual_seed(0))
    model = torchem.SwitchingLinearDynamics(2, 1, 1)
    long, short = torchem.criteria(model, x), torchem.criteria(model, x[:, :4])
    assert (long.bound, short.bound) == (True, False)
    assert long.loglik == pytest.approx(float(model.elbo(x).detach().sum()), rel=1e-5)
    assert short.loglik == pytest.approx(float(model.log_prob(x[:, :4]).detach().sum()), rel=1e-5)
    assert long.bic == pytest.approx(-2 * long.loglik + long.n_parameters * math.log(60))
    rows = torch.tensor([[0, 1], [1, 1], [1, 0]])
    sizes, edges = {"A": 2, "B": 2, "C": 2}, [("A", "B"), ("A", "C")]
    exact = torchem.BayesianNetwork(sizes, edges, hidden=("A",))
    field = torchem.BayesianNetwork(sizes, edges, hidden=("A",), inference="mean_field")
    assert not torchem.criteria(exact, rows).bound
    found = torchem.criteria(field, rows)
    assert found.bound
    assert found.loglik == pytest.approx(float(field.elbo(rows).detach().sum()), rel=1e-5)
