"""Components that start identical stay so under EM: starts break the symmetry, and a user's own is warned about."""

import warnings

import pytest
import torch

import torchem
from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, mixture, started
from torchem.errors import SymmetryWarning

INITS = ["auto", "kmeans++", "kmeans", "random", "random_from_data", "hierarchical"]


def closest(model: torchem.GaussianMixture) -> float:
    """Smallest distance between two components, over means and covariances."""
    flat = model.covariances.detach()
    parts = [model.means.detach()]
    if model.covariance_type != "tied":
        parts.append(flat.reshape(model.n_components, -1))
    return float(torch.pdist(torch.cat(parts, -1)).min())


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_identical_components_are_warned_about(covariance_type: str, device: torch.device) -> None:
    x = blobs(60, 2, 3)
    model = started(x, 3, covariance_type, device=device)
    means = model.means.detach().clone()
    means[2] = means[0]
    model.means = means
    with pytest.warns(SymmetryWarning, match="components 0 and 2"):
        fit(model, x.to(device), init=None, max_iter=1)


def test_the_warning_says_what_to_do(device: torch.device) -> None:
    with pytest.warns(SymmetryWarning, match="change the parameters of one, or let init choose"):
        fit(torchem.GaussianMixture(2, 2).double().to(device), blobs(60, 2, 2).to(device), init=None, max_iter=1)


def test_uniform_tables_are_warned_about(device: torch.device) -> None:
    model = torchem.Mixture(torchem.factors.Categorical(3), torchem.factors.Categorical(3, 4)).double().to(device)
    x = (torch.arange(40) % 4).unsqueeze(-1).to(device)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", SymmetryWarning)
        fit(model, x, init=None, max_iter=1)
    said = [str(warning.message) for warning in record if str(warning.message).startswith("init: ")]
    assert [text.split(" start")[0] for text in said] == [
        "init: components 0 and 1",
        "init: components 0 and 2",
        "init: components 1 and 2",
    ]


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_different_components_are_not(covariance_type: str, device: torch.device) -> None:
    x = blobs(60, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SymmetryWarning)
        fit(started(x, 3, covariance_type, device=device), x.to(device), init=None, max_iter=1)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("restarts", [1, 3])
def test_components_differ_or_it_is_said(init: str, covariance_type: str, restarts: int, device: torch.device) -> None:
    # Four components for two distinct rows: clusters coincide, components must not, or it must be said.
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64).repeat(20, 1).to(device)
    model = mixture(4, 2, covariance_type, device=device)
    assert warned(model, x, init=init, restarts=restarts) or closest(model) > 0


@pytest.mark.parametrize("init", INITS)
def test_repeated_rows(init: str, device: torch.device) -> None:
    # Each row ten times: a start that draws rows may draw one of them twice.
    x = torch.arange(6.0, dtype=torch.float64).unsqueeze(-1).repeat(10, 1).to(device)
    for seed in range(5):
        model = mixture(4, 1, device=device)
        assert warned(model, x, init=init, seed=seed) or closest(model) > 0


def warned(model: torchem.LatentModel, x: torch.Tensor, **options: object) -> bool:
    """Whether a fit said anything about symmetry."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", SymmetryWarning)
        fit(model, x, max_iter=300, **options)
    return any(issubclass(warning.category, SymmetryWarning) for warning in record)


@pytest.mark.parametrize("init", INITS)
def test_uniform_tables_are_learned_from_a_start(init: str, device: torch.device) -> None:
    """A latent class model: its tables start uniform, and a fit tells the classes apart."""
    if init not in ("auto", "random", "random_from_data"):
        pytest.skip("clusters of categories are no start")
    model = torchem.Mixture(torchem.factors.Categorical(2), torchem.factors.Categorical(2, 4)).double().to(device)
    x = (torch.arange(60) % 4).unsqueeze(-1).to(device)
    fit(model, x, init=init, max_iter=5, tol=0.0)
    probs = model.component.probs.detach()  # pyright: ignore
    assert float((probs[0] - probs[1]).abs().max()) > 1e-3


def test_uniform_networks_are_warned_about_or_learned(device: torch.device) -> None:
    """Tables that start uniform stay so under EM (in pgmpy and pomegranate too): a start tells the states apart."""
    edges = [("H", "A"), ("H", "B"), ("G", "B"), ("G", "C")]
    net = torchem.BayesianNetwork(dict.fromkeys("HGABC", 2), edges, ("H", "G")).double().to(device)
    x = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]], device=device).repeat(20, 1)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", SymmetryWarning)
        fit(net, x, init=None, max_iter=3)
    said = [str(warning.message).split(" start")[0] for warning in record if str(warning.message).startswith("init: ")]
    assert said == ["init: components 0 and 1", "init: components 2 and 3"]
    assert torch.equal(net.tables["A"][0], net.tables["A"][1])
    fit(net, x, max_iter=20, tol=0.0)
    for name, axis in (("A", 0), ("B", 0), ("B", 1), ("C", 0)):
        one, other = net.tables[name].detach().unbind(axis)
        assert float((one - other).abs().max()) > 0.05
