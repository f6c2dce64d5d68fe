"""Temperatures and draws: E-steps on sharpened, flattened and sampled posteriors."""

import itertools
import warnings
from typing import Any

import pytest
import torch

import torchem
from tests.laws import cases
from tests.laws.cases import close, close_dict
from tests.regressions.common import blobs, mixture
from torchem.anneal import Annealing
from torchem.batch import Batch
from torchem.errors import ConvergenceWarning, InvalidArgument, SymmetryWarning
from torchem.model import DiscreteModel
from torchem.ops import reduce

NAMES = ["GaussianMixture-full-K3-D2-N60", "HMM-labels", "HMM-memory", "HMM-inputs", "Mixture-Categorical"]


def fit(model: Any, data: Any, **options: Any) -> torchem.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", SymmetryWarning)
        return torchem.fit(model, data, progress=False, **{"seed": 0, **options})


@pytest.fixture(params=[name for name in NAMES if name in cases.MODEL_CASES])
def case(request: pytest.FixtureRequest, device: torch.device) -> cases.ModelCase:
    return cases.MODEL_CASES[request.param]().to(device)


# ---- temperatures ---------------------------------------------------------------------------------------------------


def test_every_name_is_a_case() -> None:
    assert set(NAMES) <= set(cases.MODEL_CASES)


def test_tempered_responsibilities() -> None:
    x, model = blobs(50, 2, 3), mixture(3, 2)
    model.means = x[:3]
    for beta in (0.1, 0.5, 2.0):
        stats = model.e_step(Batch(x), beta=beta)
        joint = beta * (model.weights.log() + model.component.log_prob(Batch(x)))
        share = joint.softmax(-1)
        close(stats["mixing"]["counts"].flatten(), share.sum(0))
        close(stats["log_likelihood"], joint.logsumexp(-1).sum() / beta)


def test_the_free_energy_never_falls_at_any_temperature(case: cases.ModelCase) -> None:
    model = case.model
    assert isinstance(model, DiscreteModel)
    model.project()
    with torch.no_grad():
        for beta in (0.2, 0.7, 1.0):
            values = []
            for _ in range(8):
                stats = model.e_step(case.batch, beta=beta)
                values.append(float(stats["log_likelihood"] + model.log_prior()))
                # The bound is tight where the statistics were taken.
                assert float(model.bound(stats)) == pytest.approx(values[-1], rel=1e-9)
                model.m_step(stats)
            for before, after in itertools.pairwise(values):
                assert after >= before - 1e-8 * (1 + abs(before))


def test_low_temperatures_name_the_most_likely_configuration(case: cases.ModelCase) -> None:
    model = case.model
    assert isinstance(model, DiscreteModel)
    cold, hard = model.e_step(case.batch, beta=2000.0), model.e_step(case.batch, "hard")
    close(cold["log_likelihood"], hard["log_likelihood"], rtol=1e-2)


def test_a_schedule_that_is_one_is_em() -> None:
    x = blobs(100, 2, 3)
    plain, cool = (fit(mixture(3, 2), x, max_iter=30, **o) for o in ({}, {"anneal": [1.0]}))
    close_dict(dict(cool.model.named_parameters()), dict(plain.model.named_parameters()))
    assert cool.history == plain.history


def test_annealing_ends_at_temperature_one() -> None:
    x = blobs(200, 2, 3, gap=4.0)
    for anneal in ([0.1, 0.3, 0.6], lambda t: min(1.0, 0.1 * 1.3**t)):
        result = fit(mixture(3, 2), x, anneal=anneal, max_iter=300)
        assert result.status == "converged"
        assert result.bound == pytest.approx(float(result.model.log_prob(x).detach().sum()), rel=1e-6)


def test_annealing_finds_what_single_starts_miss() -> None:
    """Five clusters in a row, started from random responsibilities: the best known optimum, over many seeds."""
    x = torch.cat([blobs(60, 2, 1) * 0.6 + torch.tensor([4.0 * i, 0.0]).double() for i in range(5)])
    best = fit(mixture(5, 2, "spherical"), x, restarts=30, max_iter=500, tol=1e-7).bound

    def found(**options: Any) -> int:
        runs = [
            fit(mixture(5, 2, "spherical"), x, init="random_from_data", seed=s, max_iter=600, tol=1e-6, **options)
            for s in range(8)
        ]
        return sum(run.bound > best - 1.0 for run in runs)

    plain, cooled = found(), found(anneal=[0.02 * 1.5**i for i in range(10)])
    assert cooled > plain
    assert cooled >= 6


def test_restarts_and_rules_under_annealing() -> None:
    x = blobs(300, 2, 3, gap=4.0)
    x = x[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    best = fit(mixture(3, 2, "spherical"), x, restarts=5).bound
    for options in ({"restarts": 3}, {"accumulate": torchem.Incremental(), "batch_size": 50},
                    {"accumulate": torchem.Stochastic(average=True), "batch_size": 50}):  # fmt: skip
        result = fit(mixture(3, 2, "spherical"), x, anneal=[0.5, 0.8, 1.4], max_iter=200, **options)
        assert result.bound == pytest.approx(best, abs=2.0)


def test_components_that_merged_part_above_one() -> None:
    """Equal Gaussians with full covariances rest on a saddle that is flat at β = 1."""
    x = blobs(300, 2, 3, gap=4.0)
    best = fit(mixture(3, 2), x, restarts=5).bound
    merged, parted = (fit(mixture(3, 2), x, anneal=a, max_iter=300) for a in ([0.3, 0.6], [0.3, 0.6, 1.3]))
    assert merged.bound < best - 10
    assert parted.bound == pytest.approx(best, abs=0.5)
    assert parted.bound == pytest.approx(float(parted.model.log_prob(x).detach().sum()), rel=1e-6)


@pytest.mark.parametrize("anneal", [[0.5, 0.5], [0.5, 0.2], [0.0], [2.5], [], lambda t: -1.0])
def test_bad_schedules_are_named(anneal: Any) -> None:
    with pytest.raises(InvalidArgument, match="anneal"):
        fit(mixture(2, 2), blobs(20, 2, 2), anneal=anneal)


def test_a_hard_assignment_has_no_temperature() -> None:
    with pytest.raises(InvalidArgument, match="all temperatures"):
        fit(mixture(2, 2), blobs(20, 2, 2), anneal=[0.5], e_step="hard")


def test_schedules() -> None:
    held = Annealing([0.5, 1.2])
    betas = []
    for _ in range(25):
        betas.append(held.beta)
        held.advance()
    assert betas == [0.5] * 10 + [1.2] * 10 + [1.0] * 5
    assert held.done
    free = Annealing(lambda t: min(1.0, 0.5 + 0.25 * t))
    assert [free.beta, free.advance(), free.beta, free.done, free.advance(), free.beta] == [
        0.5,
        True,
        0.75,
        False,
        True,
        1,
    ]
    assert not free.advance()
    assert free.done


# ---- draws ----------------------------------------------------------------------------------------------------------


def test_draws() -> None:
    weight = torch.tensor([[0.2, 0.0, 0.8, 0.0]]).double()
    grid = (torch.arange(1000).double() + 0.5) / 1000
    counts = torch.bincount(reduce.draw(weight.expand(1000, 4), grid), minlength=4)
    assert counts.tolist() == [200, 0, 800, 0]
    assert reduce.draw(weight, torch.tensor([1.0]).double()).item() == 2, "rounding never draws what has no weight"


def test_sampled_statistics_are_right_on_average(case: cases.ModelCase) -> None:
    """Means of many draws approach the expectations, whatever way a model draws."""
    model, generator = case.model, torch.Generator().manual_seed(1)
    assert isinstance(model, DiscreteModel)
    batch = case.batch[:4]

    def uniforms(shape: torch.Size) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        soft = model.e_step(batch)
        for way in (model.infer_sample, lambda p, b, u: DiscreteModel.infer_sample(model, p, b, u)):
            kernels = model._kernels()
            potentials = {slot: kernel.log_potential(batch) for slot, kernel in kernels.items()}
            log_z, exact = model.infer(potentials, batch)
            total = {slot: torch.zeros_like(value) for slot, value in exact.items()}
            draws = 400
            for _ in range(draws):
                value, one = way(potentials, batch, uniforms)
                close(value, log_z)
                total = {slot: total[slot] + one[slot] for slot in total}
            for slot in total:
                gap = (total[slot] / draws - exact[slot]).abs().max()
                scale = 1.0 if batch.weight is None else float(batch.weight.max())
                # A sum over frames varies by its square root.
                frames = float(exact[slot].sum()) if exact[slot].dim() else 1.0
                assert float(gap) < 6 * scale * (0.25 * max(1.0, frames) / draws) ** 0.5
    sampled = model.e_step(batch, "sample", uniforms=uniforms)
    close(sampled["log_likelihood"], soft["log_likelihood"])


def test_stochastic_em_of_draws_comes_near_the_optimum() -> None:
    x = blobs(1500, 2, 3, gap=2.5)
    best = fit(mixture(3, 2), x, restarts=4, tol=1e-8, max_iter=500).bound
    result = fit(mixture(3, 2), x, e_step="sample", max_iter=60, tol=0)
    assert result.bound == pytest.approx(best, abs=3.0)
    assert len(result.history) == 61
    # Single draws are worse than the mean of their statistics.
    assert result.bound > sum(result.history[30:60]) / 30
    stirred = x[torch.randperm(1500, generator=torch.Generator().manual_seed(2))]
    saem = fit(
        mixture(3, 2), stirred, e_step="sample", accumulate=torchem.Stochastic(average=True), batch_size=150,
        max_iter=30, tol=0,
    )  # fmt: skip
    assert saem.bound == pytest.approx(best, abs=4.0)


@pytest.mark.parametrize("anneal", [[k / 30 for k in range(1, 30)], lambda passes: 0.5, lambda passes: passes / 30])
def test_schedules_must_come_to_one(anneal: Any) -> None:
    x = blobs(30, 2, 3)
    with pytest.raises(
        InvalidArgument, match=r"^anneal: expected a schedule that comes to 1 within max_iter=19 passes"
    ):
        fit(mixture(3, 2), x, anneal=anneal, max_iter=19)


def test_a_short_fit_holds_temperatures_for_its_share_of_the_passes() -> None:
    x = blobs(60, 2, 3)
    result = fit(mixture(3, 2), x, anneal=[0.3, 0.6, 1.0], max_iter=8, tol=0)
    assert result.n_iter == 8
    assert result.bound == pytest.approx(float(result.model.log_prob(x).sum().detach()))
    assert [Annealing([0.3, 0.6], 8).at(t) for t in range(6)] == [0.3, 0.3, 0.6, 0.6, 1.0, 1.0]
    assert [Annealing([0.3, 0.6], 100).at(t) for t in (9, 10, 19, 20)] == [0.3, 0.6, 0.6, 1.0]


def test_draws_come_from_the_fits_own_generator() -> None:
    x = blobs(60, 2, 3, gap=0.5)
    before = torch.get_rng_state()
    a, b, c = (fit(mixture(3, 2), x, e_step="sample", max_iter=5, seed=s, restarts=2) for s in (1, 1, 2))
    assert a.histories == b.histories != c.histories
    assert torch.equal(before, torch.get_rng_state())


def test_sampled_paths_train_a_chain() -> None:
    truth = torchem.GaussianHMM(2, 1).double()
    truth.means, truth.transition_matrix = [[-1.5], [1.5]], [[0.9, 0.1], [0.2, 0.8]]
    x = truth.sample(20, 50, generator=torch.Generator().manual_seed(0))
    best = fit(torchem.GaussianHMM(2, 1).double(), x, tol=1e-8, max_iter=300).bound
    result = fit(torchem.GaussianHMM(2, 1).double(), x, e_step="sample", max_iter=40, tol=1e-4, restarts=2)
    assert result.bound == pytest.approx(best, abs=3.0)
