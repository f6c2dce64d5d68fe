"""Only a plateau is convergence: a fall, NaN and infinities are not."""

import math

import pytest
import torch

import torchem
from tests.regressions.common import blobs, fit, same
from torchem.errors import ConvergenceWarning
from torchem.stopping import verdict


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([-10.0, -500.0], "diverged"),
        ([-10.0, math.nan], "nonfinite"),
        ([-10.0, math.inf], "nonfinite"),
        ([-10.0, -math.inf], "nonfinite"),
        ([math.nan], "nonfinite"),
        ([-10.0, -10.0], "converged"),
        ([-11.0, -10.0, -9.9999], "converged"),
        ([-12.0, -10.0, -9.0], None),
        # The first rise, and one that is greater than the last, are no plateau however small.
        ([-10.0, -9.9999], None),
        ([-10.0, -9.9999, -9.9995], None),
        ([-10.0], None),
        ([], None),
    ],
)
def test_verdict(history: list[float], expected: str | None) -> None:
    assert verdict(history, 1e-3, 1e-9) == expected


class Scripted(torchem.GaussianMixture):
    """A mixture whose reported log-likelihood follows a script, one entry for each pass."""

    script: tuple[float, ...] = ()

    def e_step(self, batch: torchem.Batch) -> torchem.Stats:
        stats = super().e_step(batch)
        place = min(int(self.passes), len(self.script) - 1)
        self.passes += 1
        stats["log_likelihood"] = torch.full_like(stats["log_likelihood"], self.script[place])
        return stats


def scripted(*script: float, device: torch.device) -> Scripted:
    model = Scripted(2, 1).double().to(device)
    model.script = script
    model.register_buffer("passes", torch.zeros((), dtype=torch.long))
    model.means = [[0.0], [6.0]]
    return model


@pytest.mark.parametrize(("bad", "status"), [(-500.0, "diverged"), (math.nan, "nonfinite"), (math.inf, "nonfinite")])
def test_a_bad_step_is_named_and_undone(bad: float, status: str, device: torch.device) -> None:
    x = blobs(20, 1, 2).to(device)
    model = scripted(-30.0, -20.0, -10.0, bad, device=device)
    with pytest.warns(ConvergenceWarning, match="kept"):
        result = torchem.fit(model, x, init=None, max_iter=50, progress=False)
    # θ_2 is the last whose objective was sound.
    assert (result.status, result.converged) == (status, False)
    assert (result.n_iter, result.bound) == (2, -10.0)
    reference = torchem.GaussianMixture(2, 1).double().to(device)
    reference.means = [[0.0], [6.0]]
    fit(reference, x, init=None, max_iter=2, tol=0.0)
    torch.testing.assert_close(model.means, reference.means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.covariances, reference.covariances, rtol=1e-12, atol=1e-12)


def test_minus_infinity_names_the_impossible_row(device: torch.device) -> None:
    # Categories that the support forbids are the truth about the data, not the end of a fit.
    model = torchem.Mixture(torchem.factors.Categorical(1), torchem.factors.Categorical(1, 3)).double().to(device)
    model.component.probs = [[0.5, 0.5, 0.0]]  # pyright: ignore
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(torchem.errors.InvalidArgument, match="row 4") as error:
        fit(model, torch.tensor([[0], [1], [0], [1], [2], [2]], device=device), init=None)
    assert "probability zero" in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_plateau_is_convergence_without_a_warning(device: torch.device) -> None:
    x = blobs(200, 2, 2).to(device)
    model = torchem.GaussianMixture(2, 2).double().to(device)
    result = torchem.fit(model, x, seed=0, progress=False)
    assert (result.status, result.converged) == ("converged", True)
    assert result.history[-1] - result.history[-2] < 1e-3 * len(x)


def test_sabotage_is_detected(device: torch.device) -> None:
    """An M-step that really walks away is reported, and the walk undone."""

    class Sabotaged(torchem.GaussianMixture):
        def m_step(self, stats: torchem.Stats) -> None:
            super().m_step(stats)
            self.component.mean.data = self.component.mean.data + 50.0

    x = blobs(40, 1, 2).to(device)
    model = Sabotaged(2, 1).double().to(device)
    model.means = [[0.0], [6.0]]
    model.covariances = [[[1.0]], [[1.0]]]
    start = torchem.GaussianMixture(2, 1).double().to(device)
    start.load_state_dict(model.state_dict())
    result = fit(model, x, init=None)
    assert result.status == "diverged"
    assert (result.n_iter, result.bound) == (0, result.history[0])
    assert len(result.history) == 2
    assert torch.equal(model.means, start.means)
    assert not same(model, Sabotaged(2, 1).double().to(device))
