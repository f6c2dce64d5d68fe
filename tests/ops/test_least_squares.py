"""Normal equations, singular ones too."""

import pytest
import torch

from tests.laws.cases import close, rand, randn
from torchem.ops.least_squares import NormalEquations


def test_healthy_equations_are_solved() -> None:
    u, x = randn(4, 30, 5), randn(4, 30, 2, seed=1)
    found = NormalEquations(u.mT @ u).solve(u.mT @ x)
    close(found, torch.linalg.lstsq(u, x).solution)


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1e8, 1e150])
def test_units_and_masses_do_not_matter(scale: float) -> None:
    u, x = randn(30, 3), randn(30, 1, seed=1)
    by = torch.tensor([1.0, scale**0.25, scale**-0.25], dtype=torch.float64)
    gram, right = (u * by).mT @ (u * by) * scale, (u * by).mT @ x * scale
    close(NormalEquations(gram).solve(right).squeeze(-1) * by, torch.linalg.lstsq(u, x).solution.squeeze(-1))


def test_what_depends_on_others_or_was_never_seen_stays_out() -> None:
    u = randn(30, 4)
    u[:, 2], u[:, 3] = 3 * u[:, 0] - 0.5 * u[:, 1], 0.0
    x = randn(30, 1, seed=1)
    found = NormalEquations(u.mT @ u).solve(u.mT @ x)
    assert found[2:].tolist() == [[0.0], [0.0]]
    close(found[:2], torch.linalg.lstsq(u[:, :2], x).solution)
    assert NormalEquations(torch.zeros(2, 3, 3).double()).solve(torch.zeros(2, 3, 1).double()).abs().max() == 0


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e5])
def test_steps_refine_what_is_ill_conditioned(offset: float) -> None:
    v = rand(200)
    u = torch.stack([torch.ones_like(v), v + offset], -1)
    truth = torch.tensor([[0.3], [-1.7]], dtype=torch.float64)
    gram, right = u.mT @ u, u.mT @ (u @ truth)
    normal, found = NormalEquations(gram), torch.zeros_like(truth)
    for _ in range(3):
        found = found + normal.solve(right - gram @ found)
    close(found[1], truth[1], rtol=1e-14 * offset**2 + 1e-9)


def test_under_vmap_and_every_derivative() -> None:
    u, x = randn(3, 10, 2), randn(3, 10, 1, seed=1)
    gram, right = u.mT @ u, u.mT @ x

    def solve(gram: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return NormalEquations(gram).solve(right)

    close(torch.func.vmap(solve)(gram, right), solve(gram, right))
    gram, right = gram[0].requires_grad_(), right[0].requires_grad_()
    symmetric = lambda g, r: solve((g + g.mT) / 2, r)  # noqa: E731
    assert torch.autograd.gradcheck(symmetric, (gram, right), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(symmetric, (gram, right))
