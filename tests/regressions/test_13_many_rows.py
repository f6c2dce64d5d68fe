"""Sums over millions of float32 rows are taken in float64: log-likelihood and counts within 1e-6."""

import pytest
import torch

import torchem
from tests.regressions.common import mixture, rng


def spread(dtype: torch.dtype, device: torch.device) -> torchem.GaussianMixture:
    model = mixture(3, 1, "full", dtype, device)
    model.weights, model.means = [0.7, 0.2, 0.1], [[-2.0], [0.0], [3.0]]
    model.covariances = [[[1.0]], [[0.5]], [[2.0]]]
    return model


@pytest.mark.parametrize("rows", [2_000_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
# By differences, and by features about one origin.
@pytest.mark.parametrize("direct", [True, False])
@torch.no_grad()
def test_accumulated_statistics(rows: int, direct: bool, device: torch.device) -> None:
    x = 2 * torch.randn(rows, 1, generator=rng(1)) + 0.5
    single, double = spread(torch.float32, device), spread(torch.float64, device)
    single.component.direct = direct
    stats = single.e_step(torchem.Batch(x.to(device)))
    # The reference in pieces: the whole in float64 is not needed to judge sums.
    exact = [double.e_step(torchem.Batch(piece.double().to(device))) for piece in x.split(1 << 20)]
    exact = sum(exact[1:], exact[0])

    assert {leaf.dtype for leaf in stats.leaves()} == {torch.float64}
    assert float(stats["count"]) == rows
    assert float(stats["log_likelihood"]) == pytest.approx(float(exact["log_likelihood"]), rel=1e-7)
    torch.testing.assert_close(stats["mixing"]["counts"], exact["mixing"]["counts"], rtol=1e-6, atol=0)
    torch.testing.assert_close(stats["component"]["count"], exact["component"]["count"], rtol=1e-6, atol=0)
    assert float(stats["mixing"]["counts"].sum()) == pytest.approx(rows, rel=1e-6)
    new, wanted = single.maximize(stats), double.maximize(exact)
    torch.testing.assert_close(new["component.mean"].double(), wanted["component.mean"], rtol=1e-5, atol=1e-5)


def test_weights_are_summed_in_float64(device: torch.device) -> None:
    # 2²⁵ ones cannot be counted in float32; weights of 32 make the same of fewer rows.
    rows = 1 << 20
    x = torch.randn(rows, 1, generator=rng(2)).to(device)
    model = mixture(1, 1, "full", torch.float32, device)
    batch = model.batch(x, weight=torch.full((rows,), 32.0, device=device))
    with torch.no_grad():
        stats = model.e_step(batch)
    assert float(stats["count"]) == 32 * rows
    assert float(stats["component"]["count"]) == pytest.approx(32 * rows, rel=1e-9)


@pytest.mark.parametrize("compiled", [True, False])
@torch.no_grad()
def test_frames_and_steps_are_summed_in_float64(
    compiled: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One long sequence and many short ones in float32: expected steps add up to the steps that there are."""
    if not compiled:
        monkeypatch.setattr(torchem.ops.chain, "chain_kernel", lambda emission: torchem.ops.scan)
    for sequences, frames in ((1, 1_000_000), (20_000, 50)):
        model = torchem.GaussianHMM(2, 1).to(device)
        model.means, model.transition_matrix = [[-1.0], [1.0]], [[0.9, 0.1], [0.2, 0.8]]
        x = torch.randn(sequences, frames, 1, generator=rng(3)).to(device)
        stats = model.e_step(torchem.Batch(x))
        total = sequences * (frames - 1)
        assert float(stats["transition"]["counts"].sum()) == pytest.approx(total, rel=1e-6)
        assert float(stats["initial"]["counts"].sum()) == pytest.approx(sequences, rel=1e-6)
        assert float(stats["emission"]["count"].sum()) == pytest.approx(sequences * frames, rel=1e-6)
        assert float(stats["count"]) == sequences * frames
