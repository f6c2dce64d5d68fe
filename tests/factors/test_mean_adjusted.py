"""Hamilton's autoregression about switching means, beyond the laws."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases, test_factor
from tests.laws.cases import FactorCase, close
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, MeanAdjustedAutoregression
from torchem.factors.mean_adjusted import _example

SHAPES = [(2, 1, False), (2, 4, False), (3, 2, True), (1, 2, False), (2, 2, True)]
every_shape = pytest.mark.parametrize(("k", "order", "switching"), SHAPES)


def example(k: int, order: int, switching: bool) -> tuple[MeanAdjustedAutoregression, Batch]:
    factor, batch = _example(MeanAdjustedAutoregression(k, order, switching))
    factor.scale.data = 0.3 * cases.randn(*factor.scale.shape, seed=3)
    return factor, batch


# ---- the density --------------------------------------------------------------------------------------------------


@every_shape
def test_density_is_the_equation_for_each_path_of_states(k: int, order: int, switching: bool) -> None:
    factor, batch = example(k, order, switching)
    assert factor.memory == factor.lags == order
    value = factor.log_prob(batch)
    assert value.shape == (60, k ** (order + 1))
    assert batch.u is not None
    mean, variance = factor.moments(batch)
    for code, path in enumerate(itertools.product(range(k), repeat=order + 1)):
        mu = factor.means[list(path)]
        center = mu[0] + (batch.u - mu[1:]) @ factor.coefficients
        scale = factor.variances[path[0] if switching else 0].sqrt()
        close(value[:, code], torch.distributions.Normal(center, scale).log_prob(batch.x[:, 0]))
        close(mean[:, code, 0], center)
        close(variance[:, code, 0], (scale**2).expand(60))


def test_context_is_the_lags() -> None:
    factor = MeanAdjustedAutoregression(2, 2)
    x = torch.arange(10.0).reshape(2, 5, 1)
    seen = factor.context(Batch(x))
    assert seen.u is not None
    assert seen.u[0, 2:].tolist() == [[1.0, 0.0], [2.0, 1.0], [3.0, 2.0]]
    assert bool(seen.u.isfinite().all())
    assert torch.equal(seen.x.isnan()[..., 0], (torch.arange(5) < 2).expand(2, 5))


def test_messages() -> None:
    factor = MeanAdjustedAutoregression(2, 2)
    x = torch.zeros(1, 6, 1)
    factor.check(Batch(x))
    x[0, 3] = torch.nan
    with pytest.raises(InvalidArgument, match="sequence 0, frame 3"):
        factor.check(Batch(x))
    with pytest.raises(InvalidArgument, match="1 features"):
        factor.check(Batch(torch.zeros(1, 6, 2)))
    with pytest.raises(InvalidArgument, match="2 columns of lags"):
        factor.log_prob(Batch(torch.zeros(6, 1)))
    with pytest.raises(InvalidArgument, match="order"):
        MeanAdjustedAutoregression(2, 0)
    with pytest.raises(InvalidArgument, match="variances"):
        factor.variances = [-1.0]
    with pytest.raises(InvalidArgument, match="means"):
        factor.means = [1.0]
    with pytest.raises(InvalidArgument, match="mask"):
        factor.freeze("variances", mask=torch.tensor([True, False]))


# ---- the M-step ---------------------------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("hard", [False, True])
def test_laws(k: int, order: int, switching: bool, hard: bool, device) -> None:
    def build() -> FactorCase:
        factor, batch = example(k, order, switching)
        expected = cases.soft(60, k ** (order + 1))
        return FactorCase(factor, batch, (expected == expected.amax(-1, keepdim=True)).double() if hard else expected)

    test_factor.test_more_observation_axes(build, device)
    test_factor.test_statistics_are_additive_in_observations_and_linear_in_weights(build, device)
    test_factor.test_no_rows_are_no_statistics(build, device)
    test_factor.test_gradient_of_the_expected_density_is_that_of_q(build, device)
    test_factor.test_maximize_is_stationary_and_beats_perturbations(build, device)
    test_factor.test_frozen_views_stay_and_the_rest_is_still_best(build, device)
    test_factor.test_maximize_is_pure(build, device)
    test_factor.test_maximize_under_vmap_and_grad(build, device)
    test_factor.test_kernel_equals_log_prob_and_stats(build, device)
    test_factor.test_replicas_equal_each_alone(build, device)
    test_factor.test_float32_near_float64(build, device)
    test_factor.test_copies_through_state_dict(build, device)
    if k > 1:
        test_factor.test_frozen_components_stay_and_the_others_move_as_before(build, device)


def test_one_state_is_an_autoregression_by_least_squares() -> None:
    x = cases.randn(200, seed=1).cumsum(0) * 0.1 + 5
    factor = MeanAdjustedAutoregression(1, 2).double()
    rows = factor.context(Batch(x.reshape(1, -1, 1))).rows()[2:]
    best = test_factor.maximized(factor, factor.stats(rows, torch.ones(198, 1, dtype=torch.float64)))
    assert isinstance(best, MeanAdjustedAutoregression)
    design = torch.cat([torch.ones(198, 1), rows.u], -1)  # pyright: ignore
    solution = torch.linalg.lstsq(design, rows.x).solution
    close(best.coefficients, solution[1:, 0], rtol=1e-6)
    close(best.means[0], solution[0, 0] / (1 - solution[1:].sum()), rtol=1e-5)
    close(best.variances[0], (rows.x - design @ solution).square().mean(), rtol=1e-6)


def test_states_never_visited_keep_their_parameters() -> None:
    factor, batch = example(3, 1, True)
    expected = cases.soft(60, 9).unflatten(-1, (3, 3))
    expected[:, 1], expected[:, :, 1] = 0.0, 0.0
    best = test_factor.maximized(factor, factor.stats(batch, expected.flatten(-2)))
    assert isinstance(best, MeanAdjustedAutoregression)
    close(best.means[1], factor.means[1], rtol=0, atol=0)
    close(best.variances[1], factor.variances[1], rtol=1e-12)
    assert float((best.means[0] - factor.means[0]).abs().detach()) > 1e-3


def test_variance_floor() -> None:
    factor = MeanAdjustedAutoregression(1, 1, variance_floor=1e-3).double()
    x = 0.5 ** torch.arange(20.0, dtype=torch.float64)  # follows itself exactly
    rows = factor.context(Batch(x.reshape(1, -1, 1))).rows()[1:]

    class Moments:
        mean, variance = x.mean(0, keepdim=True), x.var(0, keepdim=True)
        low, high = x.min().unsqueeze(0), x.max().unsqueeze(0)

    factor.prepare(Moments())
    best = test_factor.maximized(factor, factor.stats(rows, torch.ones(19, 1, dtype=torch.float64)))
    close(best.variances, 1e-3 * Moments.variance, rtol=1e-9)  # pyright: ignore
    assert bool(best.degenerate().all())  # pyright: ignore


def test_samples_have_the_moments() -> None:
    factor, _ = example(2, 1, True)
    z = torch.arange(80_000) % 4
    rows = Batch(torch.zeros(len(z), 1), u=torch.full((len(z), 1), 0.7, dtype=torch.float64))
    x = factor.sample(z, rows, cases.rng(1)).detach()
    mean, variance = (value.detach() for value in factor.moments(rows[:1]))
    for code in range(4):
        close(x[z == code].mean(), mean[0, code, 0], atol=0.03, rtol=0)
        close(x[z == code].var(), variance[0, code, 0], rtol=0.05)


def test_bookkeeping() -> None:
    factor, batch = example(3, 1, True)
    assert factor.n_parameters() == 3 + 1 + 3
    assert MeanAdjustedAutoregression(2, 4).n_parameters() == 2 + 4 + 1
    factor.freeze("means", mask=torch.tensor([True, False, False]))
    assert factor.n_parameters() == 6
    small = factor.select(torch.tensor([2, 0]))
    codes = torch.tensor([8, 6, 2, 0])
    close(small.log_prob(batch), factor.log_prob(batch)[:, codes])
    assert small.frozen("mean").tolist() == [False, True]  # pyright: ignore
    again = MeanAdjustedAutoregression(**factor.config())
    assert (again.order, again.switching_variance) == (1, True)


def test_starts() -> None:
    factor, batch = example(2, 2, False)
    values = factor.initialize_at(batch, torch.tensor([4, 9]))
    close(values["mean"], batch.x[[4, 9], 0])
    close((2 * values["scale"]).exp(), batch.x.var(0, unbiased=False))


# ---- US output (J. D. Hamilton 1989) ------------------------------------------------------------------------------

#: Estimates and log-likelihood that statsmodels' documentation reports for Hamilton's model of US output.
MATRIX = [[0.754673, 0.245327], [0.095915, 0.904085]]
MEANS, VARIANCE = [-0.358811, 1.163518], 0.591366
COEFFICIENTS = [0.013487, -0.057521, -0.246983, -0.212921]
LOG_LIKELIHOOD = -181.26339


def growth() -> Tensor:
    """Quarterly growth of US real GNP, 1951:2 to 1984:4, in percent (Hamilton 1989), as statsmodels carries it."""
    path = Path(torchem.__file__).parent / "datasets" / "rgnp.csv"
    return torch.from_numpy(np.loadtxt(path, skiprows=1, delimiter=",", usecols=1))


def hamilton() -> torchem.HMM:
    model = torchem.HMM("stationary", Categorical(2, 2), MeanAdjustedAutoregression(2, 4)).double()
    model.transition_matrix = MATRIX
    emission = model.emission
    emission.means, emission.variances, emission.coefficients = MEANS, [VARIANCE], COEFFICIENTS  # pyright: ignore
    return model


def filtered(y: np.ndarray, matrix: np.ndarray, mu: np.ndarray, phi: np.ndarray, variance: float) -> float:
    """Hamilton's filter over paths of the last five states, written out."""
    order = len(phi)
    ones = np.linalg.lstsq(np.vstack([matrix.T - np.eye(2), np.ones(2)]), np.array([0, 0, 1.0]), rcond=None)[0]
    paths = list(itertools.product(range(2), repeat=order + 1))  # oldest first
    prob = {p: ones[p[0]] * math.prod(matrix[a, b] for a, b in itertools.pairwise(p)) for p in paths}
    total = 0.0
    for t in range(order, len(y)):
        joint = {}
        for p in paths:
            mean = mu[p[-1]] + sum(phi[lag] * (y[t - 1 - lag] - mu[p[-2 - lag]]) for lag in range(order))
            joint[p] = prob[p] * math.exp(-((y[t] - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        norm = sum(joint.values())
        total += math.log(norm)
        prob = dict.fromkeys(paths, 0.0)
        for p in paths:
            for b in range(2):
                prob[(*p[1:], b)] += joint[p] / norm * matrix[p[-1], b]
    return total


def test_likelihood_is_that_of_hamiltons_filter() -> None:
    y = growth()
    value = float(hamilton().log_prob(Batch(y.reshape(1, -1, 1))).detach())
    by_hand = filtered(y.numpy(), np.array(MATRIX), np.array(MEANS), np.array(COEFFICIENTS), VARIANCE)
    assert value == pytest.approx(by_hand, abs=1e-6)
    assert value == pytest.approx(LOG_LIKELIHOOD, abs=1e-4)


def test_em_reaches_hamiltons_estimates_and_never_falls() -> None:
    model, batch, last = hamilton(), Batch(growth().reshape(1, -1, 1)), -math.inf
    model.transition_matrix = [[0.7, 0.3], [0.2, 0.8]]
    emission = model.emission
    emission.means, emission.coefficients, emission.variances = [0.0, 1.5], [0.0] * 4, [1.0]  # pyright: ignore
    for _ in range(15):
        stats = model.e_step(batch).map(torch.Tensor.detach)
        value = float(stats["log_likelihood"])
        close(model.bound(stats), stats["log_likelihood"])
        assert value >= last - 1e-9 * abs(value)
        last = value
        model.m_step(stats)
    # The rest in long strides.
    result = torchem.fit(model, growth(), init=None, accelerate="squarem", tol=0, max_iter=30, progress=False)
    assert all(after >= before - 1e-9 * abs(before) for before, after in itertools.pairwise([last, *result.history]))
    assert result.bound == pytest.approx(LOG_LIKELIHOOD, abs=1e-4)
    close(model.transition_matrix, torch.tensor(MATRIX), atol=1e-3, rtol=0)
    close(emission.means, torch.tensor(MEANS), atol=1e-3, rtol=0)  # pyright: ignore
    close(emission.coefficients, torch.tensor(COEFFICIENTS), atol=1e-3, rtol=0)  # pyright: ignore
    close(emission.variances, torch.tensor([VARIANCE]), atol=1e-3, rtol=0)  # pyright: ignore


def test_fit_reaches_hamiltons_estimates_from_its_own_start() -> None:
    model = copy.deepcopy(hamilton())
    result = torchem.fit(model, growth(), restarts=5, seed=0, tol=1e-7, max_iter=500, progress=False)
    assert float(result.bound) == pytest.approx(LOG_LIKELIHOOD, abs=1e-2)


def test_model_samples_what_it_describes() -> None:
    x, z = hamilton().sample(40, 300, latents=True, generator=cases.rng(0))
    assert x.shape == (40, 300, 1)
    for state, mean in enumerate(MEANS):
        assert float(x[..., 0][z == state].mean().detach()) == pytest.approx(mean, abs=0.12)
