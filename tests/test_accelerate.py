"""Acceleration: the same optimum in fewer passes, and never below the plain step."""

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.regressions.common import as_users_run_it, blobs, mixture
from torchem.accelerate import Anderson, Squarem
from torchem.errors import ConvergenceWarning, InvalidArgument, SymmetryWarning
from torchem.factors import Categorical, Poisson

METHODS = ["squarem", "anderson"]
#: Days with 0, 1, … deaths of women over 80 in The Times of 1910–1912; V. Hasselblad (1969).
DEATHS = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1]).double()
OPTIMUM = -1989.945859


def fit(model: Any, data: Any, **options: Any) -> torchem.Result:
    with warnings.catch_warnings():
        for category in (ConvergenceWarning, SymmetryWarning):
            warnings.simplefilter("ignore", category)
        return torchem.fit(model, data, progress=False, **{"seed": 0, **options})


def poissons() -> torchem.Mixture:
    model = torchem.Mixture(Categorical(2), Poisson(2, 1)).double()
    model.weights, model.component.rates = [0.3, 0.7], [[1.0], [2.5]]
    return model


def overlapping(gap: float, kind: str) -> tuple[torchem.GaussianMixture, Tensor]:
    x, model = blobs(600, 2, 3, gap=gap), mixture(3, 2, kind)
    model.means = x[[0, 250, 500]]
    return model, x


def passes(model: Any, data: Tensor, near: float, accelerate: str | None, monkeypatch: Any, **options: Any) -> int:
    """E-steps over the data until the objective comes to within a distance of the optimum."""
    count = itertools.count()
    plain = torchem.DiscreteModel.e_step

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        next(count)
        return plain(self, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(torchem.DiscreteModel, "e_step", counted)
        result = fit(
            copy.deepcopy(model), data, init=None, tol=0, max_iter=4000, accelerate=accelerate,
            callbacks=[lambda now: now.objective[0] > near], **options,
        )  # fmt: skip
    assert result.status == "interrupted", "the optimum was not reached"
    return next(count)


def test_a_poisson_mixture_in_a_tenth_of_the_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, near = torch.arange(10.0).double().unsqueeze(-1), OPTIMUM - 1e-6
    plain, *fast = (passes(poissons(), x, near, how, monkeypatch, weights=DEATHS) for how in (None, *METHODS))
    assert all(plain >= 10 * count for count in fast)


@pytest.mark.parametrize(("gap", "kind"), [pytest.param(0.8, "full", marks=pytest.mark.slow), (1.2, "spherical")])
def test_overlapping_gaussians_in_a_third_of_the_maps(gap: float, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = overlapping(gap, kind)
    best = fit(copy.deepcopy(model), x, init=None, tol=0, max_iter=600, accelerate="squarem").bound
    plain, fast = (passes(model, x, best - 1e-4, how, monkeypatch) for how in (None, "squarem"))
    assert plain >= 3 * fast


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["GaussianMixture-full-K3-D2-N60", "HMM-labels", "HMM-stationary", "HMM-inputs"])
def test_never_falls_and_ends_no_lower(name: str, method: str, device: torch.device) -> None:
    case = cases.MODEL_CASES[name]().to(device)
    case.model.project()
    plain = fit(copy.deepcopy(case.model), case.batch, init=None, tol=1e-5, max_iter=300)
    fast = fit(copy.deepcopy(case.model), case.batch, init=None, tol=1e-5, max_iter=300, accelerate=method)
    assert fast.status in ("converged", "max_iter")
    for before, after in itertools.pairwise(fast.history):
        assert after >= before - 1e-9 * (1 + abs(before))
    assert fast.bound >= plain.bound - 1e-3 * (1 + abs(plain.bound))
    stats = fast.model.e_step(case.batch)
    assert fast.bound == pytest.approx(float((stats["log_likelihood"] + fast.model.log_prior()).detach()), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_restarts_side_by_side(method: str) -> None:
    # Apart enough that a jump leads none of them to another optimum.
    x = blobs(300, 2, 3, gap=1.8)
    plain = fit(mixture(3, 2), x, restarts=4, tol=1e-6, max_iter=300)
    fast = fit(mixture(3, 2), x, restarts=4, tol=1e-6, max_iter=300, accelerate=method)
    for quick, slow in zip(fast.restarts, plain.restarts, strict=True):
        assert quick >= slow - 1.0
    assert fast.bound >= plain.bound - 1e-2
    for history in fast.histories:
        assert all(after >= before - 1e-9 * abs(before) for before, after in itertools.pairwise(history))


@pytest.mark.parametrize("method", METHODS)
def test_other_modes_beside_it(method: str) -> None:
    model, x = overlapping(1.2, "spherical")
    model.mixing.prior = torchem.priors.Dirichlet(2.0)
    plain = fit(copy.deepcopy(model), x, init=None, tol=1e-6, max_iter=1000)
    for options in ({}, {"anneal": [0.7]}, {"batch_size": 170}):
        fast = fit(copy.deepcopy(model), x, init=None, tol=1e-6, max_iter=1000, accelerate=method, **options)
        assert fast.bound >= plain.bound - 0.5
    hard = fit(copy.deepcopy(model), x, init=None, e_step="hard", accelerate=method)
    assert all(after >= before - 1e-9 * abs(before) for before, after in itertools.pairwise(hard.history))


def test_structural_zeros_and_frozen_cells_stay(device: torch.device) -> None:
    model = torchem.GaussianHMM(3, 1).double()
    model.restrict(torchem.masks.left_right(3))
    model.means = [[-2.0], [0.0], [2.0]]
    x = model.sample(10, 20, generator=torch.Generator().manual_seed(0))
    model.emission.freeze("covariances")
    before = model.covariances.clone()
    fit(model.to(device), x, init=None, accelerate="squarem", max_iter=50)
    assert bool((model.transition_matrix.tril(-1) == 0).all())
    assert torch.equal(model.covariances.cpu(), before)


@pytest.mark.parametrize(
    "options",
    [{"accumulate": torchem.Stochastic()}, {"accumulate": torchem.Incremental()}, {"e_step": "sample"}],
)
def test_steps_that_are_not_the_em_map_are_refused(options: dict) -> None:
    with pytest.raises(InvalidArgument, match="accelerate"):
        fit(mixture(2, 2), blobs(20, 2, 2), accelerate="squarem", **options)
    with as_users_run_it(), pytest.raises(InvalidArgument, match="squarem"):
        fit(mixture(2, 2), blobs(20, 2, 2), accelerate="nesterov")


@pytest.mark.parametrize("method", [Squarem, Anderson])
def test_linear_maps(method: Any) -> None:
    """Each replica has a rate of its own; what rests stays."""
    rates = torch.tensor([[0.99, 0.5, 0.9], [0.0, 0.0, 0.0]]).double()
    accelerator, point = method(), torch.ones(2, 3).double()
    for step in range(60):
        point = accelerator.propose(point, rates * point)
        if step == 30:
            accelerator.refuse(torch.tensor([True, False]))
        if step == 40:
            accelerator.keep(torch.tensor([0]))
            rates, point = rates[:1], point[:1]
    assert float(point.norm()) < 1e-2
    assert 0.99**60 > 0.5
    still = torch.ones(1, 3).double()
    fresh = method()
    for _ in range(8):
        assert torch.equal(fresh.propose(still, still), still)
