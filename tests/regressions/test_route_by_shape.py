"""The kernel that a shape chooses in a fit, and that the choice changes nothing but the time."""

import pytest
import torch

import torchem
from tests.regressions.common import blobs, fit, mixture
from torchem.ops.gaussian import STRUCTURES


@pytest.mark.parametrize(("k", "d", "direct"), [(4, 2, True), (5, 2, False), (12, 64, True), (13, 64, False)])
def test_few_wide_components_take_differences(k: int, d: int, direct: bool) -> None:
    model = mixture(k, d)
    model.means = torch.randn(k, d, dtype=torch.float64)
    model.tune(1 << 40)
    assert model.component.direct is direct


def test_replicas_share_features() -> None:
    model = mixture(4, 2).replicate(2)
    model.tune(1 << 40)
    assert model.component.direct is False


@pytest.mark.parametrize("kind", ["tied", "diag", "spherical"])
def test_other_structures_have_cheap_features(kind: str) -> None:
    model = mixture(1, 64, kind)
    model.tune(1 << 40)
    assert model.component.direct is False


def test_the_choice_changes_nothing_else(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x = blobs(9000, 3, 4, gap=3.0).to(device)
    fits: list[torchem.Result] = []
    for shape in (True, False):
        with monkeypatch.context() as patch:
            if not shape:
                patch.setattr(type(STRUCTURES["full"]), "prefers_differences", lambda self, k, d: False)
            fits.append(fit(mixture(4, 3, device=device), x, tol=0.0, max_iter=15))
    assert [result.model.component.direct for result in fits] == [True, False]
    assert fits[0].history == pytest.approx(fits[1].history, rel=1e-10)
