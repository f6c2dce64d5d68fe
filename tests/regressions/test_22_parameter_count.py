"""The number of free parameters, which AIC and BIC rest on, for every covariance type and constraint."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.mixture import GaussianMixture

import torchem
from tests.laws import cases
from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, mixture
from torchem import factors


def reference(x: torch.Tensor, model: torchem.GaussianMixture) -> GaussianMixture:
    """scikit-learn's mixture with the parameters of a model."""
    peer = GaussianMixture(model.n_components, covariance_type=model.covariance_type)
    peer.weights_, peer.means_ = model.weights.detach().cpu().numpy(), model.means.detach().cpu().numpy()
    peer.covariances_ = model.covariances.detach().cpu().numpy()
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    peer.precisions_cholesky_ = _compute_precision_cholesky(peer.covariances_, model.covariance_type)
    return peer


@pytest.mark.parametrize(("k", "d"), [(1, 1), (1, 4), (3, 1), (3, 4), (7, 10)])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_formula(covariance_type: str, k: int, d: int) -> None:
    covariance = {"full": k * d * (d + 1) // 2, "tied": d * (d + 1) // 2, "diag": k * d, "spherical": k}
    assert mixture(k, d, covariance_type).n_parameters() == k - 1 + k * d + covariance[covariance_type]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_criteria_agree_with_scikit_learn(covariance_type: str, k: int, device: torch.device) -> None:
    x = blobs(120, 2, 3, gap=4.0)
    model = mixture(k, 2, covariance_type, device=device)
    fit(model, x.to(device))
    peer, found = reference(x, model), torchem.criteria(model, x.to(device))
    data = x.numpy()
    assert found.n_parameters == peer._n_parameters()
    assert found.loglik == pytest.approx(peer.score(data) * 120, rel=1e-10)
    assert found.aic == pytest.approx(peer.aic(data), rel=1e-10)
    assert found.bic == pytest.approx(peer.bic(data), rel=1e-10)
    posterior = peer.predict_proba(data)
    entropy = -(posterior * torch.as_tensor(posterior).clamp(min=1e-300).log().numpy()).sum()
    assert found.icl == pytest.approx(peer.bic(data) + 2 * entropy, rel=1e-10)
    assert found.n == 120


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_what_is_frozen_is_not_free(covariance_type: str) -> None:
    model = mixture(3, 2, covariance_type)
    all_free = model.n_parameters()
    covariance = all_free - 2 - 6

    model.component.freeze("means")
    assert model.n_parameters() == all_free - 6
    model.component.freeze("covariances")
    assert model.n_parameters() == 2
    model.mixing.freeze("probs")
    assert model.n_parameters() == 0
    model.component.unfreeze("covariances")
    assert model.n_parameters() == covariance
    model.component.unfreeze()
    model.mixing.unfreeze()
    assert model.n_parameters() == all_free


def test_some_components_frozen() -> None:
    model = mixture(3, 2, "full")
    model.component.freeze("means", mask=torch.tensor([True, False, True]))
    assert model.n_parameters() == 2 + 2 + 9
    model.component.freeze("covariances", mask=torch.tensor([True, False, False]))
    assert model.n_parameters() == 2 + 2 + 6


def test_structural_zeros_are_not_free() -> None:
    model = mixture(4, 2, "diag")
    before = model.n_parameters()
    model.weights = [0.5, 0.0, 0.25, 0.25]
    assert model.n_parameters() == before - 1


def test_tables() -> None:
    table = torchem.factors.Categorical(3, 4)
    assert table.n_parameters() == 9
    table.probs = [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]]
    assert table.n_parameters() == 1 + 0 + 3
    table.probs = torch.full((3, 4), 0.25)
    table.freeze("probs", mask=torch.tensor([[True, True, False, False], [True] * 4, [False] * 4]))
    # Two free cells that must share what is left have one degree of freedom.
    assert table.n_parameters() == 1 + 0 + 3


def test_criteria_with_weights(device: torch.device) -> None:
    x = blobs(60, 2, 2).to(device)
    model = mixture(2, 2, device=device)
    fit(model, x)
    times = torch.arange(60) % 3
    weighted = torchem.criteria(model, x, weights=times)
    repeated = torchem.criteria(model, x.repeat_interleave(times.to(device), 0))
    assert weighted.n == repeated.n
    assert weighted.bic == pytest.approx(repeated.bic, rel=1e-12)
    assert weighted.icl == pytest.approx(repeated.icl, rel=1e-12)
    assert weighted.bic == pytest.approx(-2 * weighted.loglik + 11 * math.log(weighted.n))


def _examples() -> Iterator[Any]:
    for kind in cases.every_family():
        for i, (factor, _) in enumerate(cases._offered(kind)):
            # Autoregressions count as the regressions that they are.
            if factor.n_components is not None and factor.sufficient and kind is not factors.Autoregressive:
                yield pytest.param(kind, i, id=f"{kind.__name__}{i or ''}")


@pytest.mark.parametrize(("kind", "i"), [*_examples()])
def test_every_family_counts_what_its_density_depends_on(kind: Any, i: int) -> None:
    """The directions in which the density of each state changes with the parameters: the rank of its derivatives."""
    factor, batch = cases._offered(kind)[i]
    factor = factor.double()
    n = 160
    rows = batch[torch.arange(n) % len(batch)].map(lambda v: v.double() if v.is_floating_point() else v)
    if rows.u is not None:
        rows = replace(rows, u=rows.u + 0.3 * torch.randn(rows.u.shape, generator=torch.Generator().manual_seed(1)))
    z = torch.arange(n) % int(factor.n_components or 1)
    x = factor.sample(z, rows, torch.Generator().manual_seed(0))
    rows = rows.with_x(factor.cast(x))
    named = {name: value.detach() for name, value in factor.named_parameters()}
    if not named:
        assert factor.n_parameters() == 0
        return

    def density(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(Scores(factor), {f"factor.{k}": v for k, v in params.items()}, (rows,))

    slopes = torch.func.jacrev(density)(named)
    matrix = torch.cat([value.flatten(1) for value in slopes.values()], -1)
    size = matrix.norm(dim=0, keepdim=True)
    matrix = (matrix / torch.where(size > 1e-9 * size.amax(), size, 1.0))[:, (size > 1e-9 * size.amax())[0]]
    assert int(torch.linalg.matrix_rank(matrix, rtol=1e-7)) == factor.n_parameters()


class Scores(torch.nn.Module):
    """Log-densities of all rows and states that are possible."""

    def __init__(self, factor: Any):
        super().__init__()
        self.factor = factor

    def forward(self, batch: Any) -> torch.Tensor:
        value = self.factor.log_prob(batch).flatten()
        return torch.where(value > -torch.inf, value, 0.0)
