"""Float32 on long sequences: relative errors of the log-likelihood below 1e-6 up to a million frames."""

import pytest
import torch

import torchem
from tests.laws import cases
from torchem.ops import chain, scan


@pytest.mark.parametrize("frames", [10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("compiled", [True, False])
def test_float32_against_float64(frames: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(chain, "chain_kernel", lambda emission: scan)
    m = torchem.GaussianHMM(2, 1).double()
    m.means, m.transition_matrix = [[-1.0], [1.0]], [[0.95, 0.05], [0.1, 0.9]]
    x = cases.randn(1, frames, 1, seed=frames) + torch.sign(torch.sin(torch.arange(frames) / 30)).unsqueeze(-1)
    # Data and parameters that both types hold exactly: only the computation differs.
    x = x.float()
    small = torchem.GaussianHMM(2, 1)
    small.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in m.state_dict().items()})
    m.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in small.state_dict().items()})
    with torch.no_grad():
        exact, rough = m.log_prob(x.double()).double(), small.log_prob(x).double()
        assert (rough - exact).abs() < 1e-6 * exact.abs()
        stats, single = m.e_step(m.batch(x.double())), small.e_step(small.batch(x))
    assert (single["log_likelihood"] - stats["log_likelihood"]).abs() < 1e-6 * exact.abs()
    steps, few = stats["transition"]["counts"], single["transition"]["counts"]
    assert ((few - steps).abs() < 1e-4 * steps).all()
    assert (single["transition"]["counts"].sum() - (frames - 1)).abs() < 1e-3 * frames
