"""Agreement with scikit-learn from the same start, and with the densities of torch and SciPy."""

import warnings

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

import torchem
from tests.laws.cases import COVARIANCE_TYPES, blobs, close, mixture, randn

sklearn_mixture = pytest.importorskip("sklearn.mixture")
every_kind = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
SIZES = [(300, 4, 3), (200, 1, 2), (150, 2, 1)]


def precisions(model: torchem.GaussianMixture) -> np.ndarray:
    covariances = model.covariances.detach()
    if model.covariance_type in ("full", "tied"):
        return torch.linalg.inv(covariances).numpy()
    return (1 / covariances).numpy()


def start(kind: str, x: Tensor, k: int) -> torchem.GaussianMixture:
    """Means at data points, the data's own spread, uneven weights; no floor, as scikit-learn without reg_covar."""
    m = torchem.GaussianMixture(k, x.shape[1], kind, covariance_floor=0.0).double()  # pyright: ignore
    m.means = x[torch.arange(k) * 7]
    cov = torch.cov(x.mT).reshape(x.shape[1], x.shape[1])
    variances = cov.diagonal()
    m.covariances = {
        "full": cov.expand(k, -1, -1),
        "tied": cov,
        "diag": variances.expand(k, -1),
        "spherical": variances.mean().expand(k),
    }[kind]
    weights = torch.arange(1.0, k + 1, dtype=torch.float64)
    m.weights = weights / weights.sum()
    return m


def peer(model: torchem.GaussianMixture, x: Tensor, iterations: int):
    """scikit-learn after so many iterations from the model's parameters."""
    fitted = sklearn_mixture.GaussianMixture(
        model.n_components,
        covariance_type=model.covariance_type,
        reg_covar=0.0,
        tol=0.0,
        max_iter=iterations,
        weights_init=model.weights.detach().numpy(),
        means_init=model.means.detach().numpy(),
        precisions_init=precisions(model),
        init_params="random",
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was told to stop early
        return fitted.fit(x.numpy())


@every_kind
@pytest.mark.parametrize("iterations", [1, 5, 50])
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("n", "d", "k"), SIZES)
def test_the_same_after_so_many_iterations(kind: str, iterations: int, direct: bool, n: int, d: int, k: int) -> None:
    x = blobs(n, d, max(k, 2), spread=2.0)
    model = start(kind, x, k)
    theirs = peer(model, x, iterations)
    batch = model.batch(x)
    model.component.direct = direct
    with torch.no_grad():
        for _ in range(iterations):
            model.m_step(model.e_step(batch))
    assert model.component.direct is direct
    close(model.weights, torch.from_numpy(theirs.weights_), rtol=1e-8, atol=1e-8)
    close(model.means, torch.from_numpy(theirs.means_), rtol=1e-8, atol=1e-8)
    close(model.covariances, torch.from_numpy(theirs.covariances_), rtol=1e-8, atol=1e-8)
    close(model.log_prob(x), torch.from_numpy(theirs.score_samples(x.numpy())), rtol=1e-8, atol=1e-8)
    close(model.posterior(x), torch.from_numpy(theirs.predict_proba(x.numpy())), rtol=1e-8, atol=1e-8)
    assert torch.equal(model.most_likely(x), torch.from_numpy(theirs.predict(x.numpy())))
    criteria = torchem.criteria(model, x)
    assert criteria.n_parameters == theirs._n_parameters()
    assert criteria.bic == pytest.approx(theirs.bic(x.numpy()), rel=1e-9)
    assert criteria.aic == pytest.approx(theirs.aic(x.numpy()), rel=1e-9)


@every_kind
def test_the_optimum_of_fit_is_that_of_scikit_learn(kind: str) -> None:
    """Both run to convergence from one start, with the trainer in place of the bare loop."""
    x = blobs(250, 2, 3, spread=4.0)
    model = start(kind, x, 3)
    theirs = peer(model, x, 400)
    result = torchem.fit(model, x, init=None, tol=1e-12, max_iter=1000, progress=False)
    assert result.converged
    close(model.log_prob(x).mean(), torch.tensor(theirs.score(x.numpy()), dtype=torch.float64), rtol=1e-8)
    close(model.means, torch.from_numpy(theirs.means_), rtol=1e-4, atol=1e-4)
    assert result.bound == pytest.approx(theirs.score(x.numpy()) * len(x), rel=1e-8)


@every_kind
@pytest.mark.parametrize("d", [1, 3, 12])
def test_densities_are_those_of_torch_and_scipy(kind: str, d: int) -> None:
    model = mixture(3, d, kind)
    x = 2 * randn(20, d, seed=7)
    factor = model.component.structure.dense(model.component.scale, 3, d).detach()
    normal = MultivariateNormal(model.means.detach(), scale_tril=factor)
    close(model.log_prob(x), MixtureSameFamily(Categorical(model.weights.detach()), normal).log_prob(x), rtol=1e-10)
    if kind in ("diag", "spherical"):
        deviations = factor.diagonal(dim1=-2, dim2=-1)
        independent = Independent(Normal(model.means.detach(), deviations), 1)
        close(model.component.log_prob(model.batch(x)), independent.log_prob(x.unsqueeze(1)), rtol=1e-10)
    for k in range(3):
        reference = scipy.stats.multivariate_normal(model.means[k].detach().numpy(), (factor[k] @ factor[k].mT).numpy())
        found = model.component.log_prob(model.batch(x))[:, k].detach()
        close(found, torch.from_numpy(np.atleast_1d(reference.logpdf(x.numpy()))), rtol=1e-9)


def test_table_is_that_of_torch() -> None:
    table = torchem.factors.Categorical(3, 4).double()
    probs = randn(3, 4).softmax(-1)
    table.probs = probs
    x = torch.arange(4).unsqueeze(-1)
    reference = torch.distributions.Categorical(probs).log_prob(x)
    close(table.log_prob(torchem.Batch(x)), reference, rtol=1e-12)


@every_kind
def test_conjugate_normaliser_is_that_of_the_wishart(kind: str) -> None:
    """In one dimension all four priors are the normal–gamma."""
    g = torchem.factors.Gaussian(1, 1, kind).double()  # pyright: ignore
    kappa, dof, mean, scatter = 2.5, 6.0, 0.4, 3.0
    posterior = torchem.Stats(
        count=torch.tensor([kappa]).double(),
        dof=torch.tensor([dof]).double(),
        first=torch.tensor([[kappa * mean]]).double(),
        second=torch.full(g.structure.shape(1, 1), scatter + kappa * mean**2, dtype=torch.float64),
    )
    # ∫ λ^{(dof − 1)/2} exp(−λ scatter / 2) dλ · √(2π/κ) is an unnormalised gamma of shape (dof + 1)/2.
    shape = (dof + 1) / 2
    truth = scipy.special.gammaln(shape) - shape * np.log(scatter / 2) + 0.5 * np.log(2 * np.pi / kappa)
    close(g.log_normalizer(posterior).reshape(()), torch.tensor(truth, dtype=torch.float64), rtol=1e-12)
