"""hmmlearn, an independent implementation: the same numbers from the same starts, its priors switched off."""

from typing import Any

import numpy as np
import pytest
import torch

import torchem
from tests.laws import cases
from torchem.factors import Categorical, Poisson

hmm = pytest.importorskip("hmmlearn.hmm")

LENGTHS = [60, 1, 25, 40]
STATES = 3


def start() -> tuple[torch.Tensor, torch.Tensor]:
    return cases.randn(STATES, seed=1).softmax(-1), (cases.randn(STATES, STATES, seed=2) + torch.eye(STATES)).softmax(
        -1
    )


def observations(kind: str) -> torch.Tensor:
    """Switching regimes, so that there is something to find."""
    z = (torch.arange(sum(LENGTHS)) // 7) % STATES
    if kind == "gaussian":
        centers = 2 * cases.randn(STATES, 2, seed=3)
        return centers[z] + cases.randn(len(z), 2, seed=4)
    draws = cases.rand(len(z), 2, seed=5)
    if kind == "poisson":
        return torch.poisson((1.0 + 4 * z).double().unsqueeze(-1) * (0.5 + draws), generator=cases.rng(6))
    return ((draws[:, :1] * 2).long() + z.unsqueeze(-1)) % 4


def gaussian(kind: str, iterations: int) -> tuple[torchem.HMM, Any]:
    ours = torchem.GaussianHMM(STATES, 2, kind, covariance_floor=0).double()  # pyright: ignore
    theirs = hmm.GaussianHMM(
        STATES, kind, init_params="", tol=-np.inf, n_iter=iterations, startprob_prior=1.0, transmat_prior=1.0,
        means_weight=0.0, covars_prior=0.0, covars_weight=0.0, min_covar=0.0,
    )  # fmt: skip
    ours.means = cases.randn(STATES, 2, seed=7)
    ours.covariances = 1.5 * {
        "full": torch.eye(2).expand(STATES, 2, 2), "tied": torch.eye(2), "diag": torch.ones(STATES, 2),
        "spherical": torch.ones(STATES),
    }[kind]  # fmt: skip
    theirs.means_, theirs.covars_ = ours.means.detach().numpy(), ours.covariances.detach().numpy()
    return ours, theirs


def categorical(kind: str, iterations: int) -> tuple[torchem.HMM, Any]:
    ours = torchem.HMM(Categorical(STATES), Categorical(STATES, STATES), Categorical(STATES, 4)).double()
    theirs = hmm.CategoricalHMM(STATES, init_params="", tol=-np.inf, n_iter=iterations, emissionprob_prior=1.0)
    ours.emission.probs = cases.randn(STATES, 4, seed=8).softmax(-1)  # pyright: ignore
    theirs.n_features, theirs.emissionprob_ = 4, ours.emission.probs.detach().numpy()  # pyright: ignore
    return ours, theirs


def poisson(kind: str, iterations: int) -> tuple[torchem.HMM, Any]:
    ours = torchem.HMM(Categorical(STATES), Categorical(STATES, STATES), Poisson(STATES, 2)).double()
    theirs = hmm.PoissonHMM(
        STATES, init_params="", tol=-np.inf, n_iter=iterations, lambdas_prior=0.0, lambdas_weight=0.0
    )
    ours.emission.rates = 1 + 5 * cases.rand(STATES, 2, seed=9)  # pyright: ignore
    theirs.lambdas_ = ours.emission.rates.detach().numpy()  # pyright: ignore
    return ours, theirs


FAMILIES = {
    **{f"gaussian-{kind}": (gaussian, kind) for kind in cases.COVARIANCE_TYPES},
    "categorical": (categorical, ""),
    "poisson": (poisson, ""),
}


def close(ours: Any, theirs: Any) -> None:
    mine = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-8)


def shaped(covariances: np.ndarray, kind: str) -> np.ndarray:
    """hmmlearn gives every kind as a matrix per state."""
    if kind == "diag":
        return np.diagonal(covariances, axis1=-2, axis2=-1)
    return {"full": covariances, "tied": covariances[0], "spherical": covariances.reshape(STATES, -1)[:, 0]}[kind]


@pytest.mark.parametrize("iterations", [1, 5, 50])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*:torchem.errors.ConvergenceWarning")
def test_the_same_numbers_after_the_same_iterations(family: str, iterations: int) -> None:
    build, kind = FAMILIES[family]
    ours, theirs = build(kind, iterations)
    first, table = start()
    ours.initial_probs, ours.transition_matrix = first, table
    theirs.startprob_, theirs.transmat_ = first.numpy(), table.numpy()
    x = observations(family.split("-", maxsplit=1)[0])
    torchem.fit(ours, x, lengths=LENGTHS, init=None, max_iter=iterations, tol=0, progress=False)
    theirs.fit(x.numpy(), LENGTHS)
    close(ours.initial_probs, theirs.startprob_)
    close(ours.transition_matrix, theirs.transmat_)
    if build is gaussian:
        close(ours.means, theirs.means_)  # pyright: ignore
        close(ours.covariances, shaped(theirs.covars_, kind))  # pyright: ignore
    elif build is categorical:
        close(ours.emission.probs, theirs.emissionprob_)  # pyright: ignore
    else:
        close(ours.emission.rates, theirs.lambdas_)  # pyright: ignore
    batch = ours.batch(x, lengths=LENGTHS)
    valid = batch.frames_mask()
    close(ours.log_prob(batch).sum().item(), theirs.score(x.numpy(), LENGTHS))
    close(ours.posterior(batch)[valid], theirs.predict_proba(x.numpy(), LENGTHS))
    score, path = theirs.decode(x.numpy(), LENGTHS)
    np.testing.assert_array_equal(ours.most_likely(batch)[valid].numpy(), path)
    close(ours.best_paths(batch, 1)[0].sum().item(), score)
