"""Variational Bayes beside scikit-learn's BayesianGaussianMixture: equal posteriors and bound for full covariances."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import betaln, gammaln
from sklearn.mixture import BayesianGaussianMixture

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem import priors

K, D, NU, KAPPA, ALPHA = 5, 3, 5.0, 0.7, 0.3


def data() -> np.ndarray:
    return (cases.blobs(400, D, 3, seed=3) @ cases.randn(D, D, seed=4)).numpy()


def peer(x: np.ndarray, start: np.ndarray, kind: str, iterations: int) -> BayesianGaussianMixture:
    model = BayesianGaussianMixture(
        n_components=K, weight_concentration_prior_type=kind, weight_concentration_prior=ALPHA,
        mean_precision_prior=KAPPA, degrees_of_freedom_prior=NU, covariance_prior=np.cov(x.T), reg_covar=0.0,
        max_iter=iterations, tol=0.0,
    )  # fmt: skip
    model._initialize_parameters = lambda x, *_args, **_kwargs: model._initialize(x, start)
    return model.fit(x)


def dropped(x: np.ndarray, kind: str) -> float:
    """What scikit-learn leaves out of its bound: nothing that an iteration moves."""
    scatter = np.linalg.slogdet(np.cov(x.T))[1]
    wishart = NU * D / 2 * math.log(2) + sum(gammaln((NU - i) / 2) for i in range(D)) - NU / 2 * scatter
    prior = K * (wishart - D / 2 * math.log(KAPPA))
    weights = K * gammaln(ALPHA) - gammaln(K * ALPHA) if kind.endswith("distribution") else K * betaln(1, ALPHA)
    return -len(x) * D / 2 * math.log(2 * math.pi) - prior - weights


def test_diagonal_posteriors_of_the_same_responsibilities() -> None:
    x = data()
    start = cases.soft(len(x), K, seed=6)
    start = start / start.sum(-1, keepdim=True)
    theirs = BayesianGaussianMixture(
        n_components=K, covariance_type="diag", mean_precision_prior=KAPPA, degrees_of_freedom_prior=NU,
        covariance_prior=x.var(0), reg_covar=0.0,
    )  # fmt: skip
    theirs._check_parameters(x)
    theirs._initialize(x, start.numpy())
    prior = priors.NormalInverseGamma(x.mean(0), KAPPA, NU, x.var(0))
    ours: Any = torchem.variational(torchem.GaussianMixture(K, D, "diag").double(), component=prior)
    ours.initialize(ours.batch(x), start)
    close(ours.means, torch.as_tensor(theirs.means_), rtol=1e-8, atol=1e-8)
    close(ours.covariances, torch.as_tensor(theirs.covariances_), rtol=1e-8)
    freedom = ours.component.posterior()["dof"] + 1
    close(freedom, torch.as_tensor(theirs.degrees_of_freedom_).unsqueeze(-1).expand(K, D), rtol=1e-8)


@pytest.mark.filterwarnings("ignore:Best performing initialization:sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("kind", ["dirichlet_distribution", "dirichlet_process"])
@pytest.mark.parametrize("iterations", [1, 5, 30])
def test_the_same_posteriors_and_bound(kind: str, iterations: int) -> None:
    x = data()
    start = cases.soft(len(x), K, seed=6)
    start = start / start.sum(-1, keepdim=True)
    theirs = peer(x, start.numpy(), kind, iterations)
    weights = priors.Dirichlet(ALPHA) if kind.endswith("distribution") else priors.StickBreaking(ALPHA)
    ours: Any = torchem.variational(
        torchem.GaussianMixture(K, D).double(),
        mixing=weights,
        component=priors.NormalInverseWishart(x.mean(0), KAPPA, NU, np.cov(x.T)),
    )
    batch = ours.batch(x)
    ours.initialize(batch, start)
    for _ in range(iterations):
        stats = ours.e_step(batch)
        ours.m_step(stats)
    found = ours.component.posterior()
    close(ours.means, torch.as_tensor(theirs.means_), rtol=1e-8, atol=1e-8)
    close(ours.covariances, torch.as_tensor(theirs.covariances_), rtol=1e-8, atol=1e-8)
    close(found["dof"] + D, torch.as_tensor(theirs.degrees_of_freedom_), rtol=1e-8)
    close(found["count"], torch.as_tensor(theirs.mean_precision_), rtol=1e-8)
    close(ours.weights, torch.as_tensor(theirs.weights_), rtol=1e-8, atol=1e-10)
    posterior = ours.mixing.posterior()
    if isinstance(weights, priors.Dirichlet):
        close(posterior["counts"], torch.as_tensor(theirs.weight_concentration_), rtol=1e-8, atol=1e-8)
    else:
        for a, b in zip(weights.sticks(posterior), theirs.weight_concentration_, strict=True):
            close(a, torch.as_tensor(b), rtol=1e-8, atol=1e-8)
    bound = ours.bound(stats)
    close(bound, torch.tensor(theirs.lower_bound_ + dropped(x, kind), dtype=torch.float64), rtol=1e-8)
    close(ours.posterior(batch), torch.as_tensor(theirs.predict_proba(x)), rtol=1e-7, atol=1e-9)
