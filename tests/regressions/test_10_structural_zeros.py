"""Zeros that the user assigns stay exactly zero through every M-step and prior, and no other cell becomes one."""

import pytest
import torch

import torchem
from tests.laws import cases
from torchem.factors import Categorical, Poisson
from torchem.priors import Dirichlet, StickyDirichlet

MASKS = {
    "left-right": torchem.masks.left_right(4),
    "left-right-1": torchem.masks.left_right(4, jump=1),
    "cyclic": torchem.masks.cyclic(4),
    "banded": torchem.masks.banded(4, 1),
    "odd": cases.rand(4, 4, seed=1) < 0.4,
}
MASKS["odd"].fill_diagonal_(True)
PRIORS = {"none": None, "dirichlet": Dirichlet(3.0), "sticky": StickyDirichlet(10.0, concentration=2.0)}


def data() -> torch.Tensor:
    return torch.poisson(3 + 10 * cases.rand(6, 40, 1, seed=2), generator=cases.rng(3))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("e_step", ["soft", "hard"])
@pytest.mark.parametrize("initial", ["free", "stationary"])
def test_zeros_stay_zero(mask: str, prior: str, e_step: str, initial: str) -> None:
    first = Categorical(4) if initial == "free" else "stationary"
    m = torchem.HMM(first, Categorical(4, 4), Poisson(4, 1)).double()  # pyright: ignore
    m.restrict(MASKS[mask])
    m.transition.prior = PRIORS[prior]
    if initial == "stationary" and mask not in ("cyclic", "banded"):
        with pytest.raises(torchem.errors.InvalidArgument, match="no way from state"):
            torchem.fit(m, data(), progress=False)
        return
    result = torchem.fit(
        m,
        data(),
        seed=0,
        restarts=2,
        max_iter=30,
        tol=0,
        e_step=e_step,
        progress=False,  # pyright: ignore
    )
    assert torch.equal(m.transition_matrix == 0, ~MASKS[mask])
    assert (m.transition_matrix.sum(-1) - 1).abs().max() < 1e-12
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))


def test_zeros_of_the_initial_law_and_of_emissions_too() -> None:
    m = torchem.HMM(Categorical(3), Categorical(3, 3), Categorical(3, 4)).double()
    m.initial_probs = [1.0, 0.0, 0.0]
    m.emission.probs = [[0.5, 0.5, 0, 0], [0.1, 0.2, 0.3, 0.4], [0, 0, 0.5, 0.5]]  # pyright: ignore
    kept = (m.initial_probs == 0, m.emission.probs == 0)  # pyright: ignore
    x = m.sample(20, 12, generator=cases.rng(4))
    torchem.fit(m, x, init=None, max_iter=20, tol=0, progress=False)
    assert torch.equal(m.initial_probs == 0, kept[0])
    assert torch.equal(m.emission.probs == 0, kept[1])  # pyright: ignore


def test_a_zero_that_em_reaches_is_no_structural_zero() -> None:
    m = torchem.GaussianHMM(2, 1).double()
    m.means = [[-5.0], [5.0]]
    x = torch.full((30, 1), -5.0).double() + 0.1 * cases.randn(30, 1)
    torchem.fit(m, x, init=None, max_iter=20, tol=0, progress=False)
    assert m.transition.support.all()
    assert m.transition.logits.isfinite().all()


def test_a_mask_without_successor_says_so() -> None:
    m = torchem.GaussianHMM(3, 1)
    mask = torch.eye(3, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(torchem.errors.InvalidArgument, match=r"state 1.*absorbing"):
        m.restrict(mask)
    with pytest.raises(torchem.errors.InvalidArgument, match="row 1"):
        m.transition_matrix = [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    with pytest.raises(torchem.errors.InvalidArgument, match=r"sum to one"):
        m.transition_matrix = [[0.5, 0.4, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
