"""Poisson and binomial regressions against statsmodels' and R's numbers, brute force, and each other."""

import copy
import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import close
from tests.regressions.common import as_users_run_it
from torchem import priors
from torchem.batch import Batch
from torchem.data import Moments
from torchem.errors import InvalidArgument
from torchem.factors import BinomialRegression, Categorical, LinearGaussian, PoissonRegression, SoftmaxRegression
from torchem.factors._glm import GeneralizedLinear

KINDS: list[type[GeneralizedLinear]] = [PoissonRegression, BinomialRegression]
both = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def design(n: int, m: int = 2, seed: int = 0) -> Tensor:
    u = cases.randn(n, m, seed=seed)
    u[:, 0] = 1.0
    return u


def with_ones(v: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(v), v], -1)


def maximized(factor: Any, stats: torchem.Stats) -> Any:
    best = copy.deepcopy(factor)
    cases.assign(best, factor.maximize(stats))
    return best


def truth(batch: Batch, expected: Tensor, factor: Any) -> Tensor:
    """Q itself."""
    return torch.where(expected > 0, expected * factor.log_prob(batch), 0.0).sum()


# ---- the density --------------------------------------------------------------------------------------------------


def test_densities_are_those_of_torch() -> None:
    for kind in KINDS:
        factor, batch = kind.example()
        u, offset = batch.u, batch.offset
        assert u is not None
        eta = torch.einsum("nm,kdm->nkd", u, factor.weight)  # pyright: ignore
        eta = eta if offset is None else eta + offset[:, None, None]
        law: Any = torch.distributions.Poisson(eta.exp())
        if kind is BinomialRegression:
            assert batch.trials is not None
            law = torch.distributions.Binomial(batch.trials[:, None, None].expand_as(eta), logits=eta)
        x = batch.x.unsqueeze(-2)
        each = torch.where(x.isnan(), 0.0, law.log_prob(x.nan_to_num(nan=0.0)))
        close(factor.log_prob(batch), each.sum(-1))
        mean, variance = factor.moments(batch)
        close(mean, law.mean)
        close(variance, law.variance)


@both
def test_probabilities_add_to_the_distribution_function(kind: type[GeneralizedLinear]) -> None:
    factor, batch = kind.example()
    trials = None if batch.trials is None else torch.full_like(batch.trials, 5.0)
    batch, total = replace(batch, trials=trials), torch.zeros(30, 3, 2, dtype=torch.float64)
    for outcome in range(6):
        x = torch.full_like(batch.x, torch.nan)
        parts = []
        for d in range(2):  # of a column by itself
            alone = x.clone()
            alone[:, d] = outcome
            parts.append(factor.log_prob(batch.with_x(alone)).exp())
        total = total + torch.stack(parts, -1)
        found = factor.cdf(batch.with_x(torch.full_like(x, outcome + 0.5)))
        close(found, total, rtol=1e-8)
    close(factor.cdf(batch.with_x(torch.full_like(batch.x, -0.5))), torch.zeros_like(total))
    if kind is BinomialRegression:
        close(total, torch.ones_like(total))


# ---- the M-step ---------------------------------------------------------------------------------------------------


def test_binomial_quadratics_lie_below_everywhere() -> None:
    factor, batch = BinomialRegression.example()
    expected = cases.soft(len(batch), 3)
    stats = factor.stats(batch, expected)
    base = truth(batch, expected, factor) - factor.expected_log_prob(stats)
    for trial in range(60):
        other = copy.deepcopy(factor)
        other.coefficient.data += 10.0 ** (trial % 5 - 2) * cases.randn(3, 2, 2, seed=trial)  # pyright: ignore
        gap = truth(batch, expected, other) - other.expected_log_prob(stats) - base
        assert float(gap.detach()) >= -1e-9 * (1 + abs(float(base.detach())))


def test_no_quadratic_that_touches_is_sharper() -> None:
    """With a curvature less by a thousandth it crosses log(1 + exp η): at −η, where the sharpest touches again."""
    factor = BinomialRegression(1, 1)
    for value in (0.5, 3.0, -8.0):
        eta = torch.tensor([[[value]]], dtype=torch.float64)
        at = factor.expand(eta, torch.zeros(1, 1), torch.ones(1))
        there = factor.expand(-eta, torch.zeros(1, 1), torch.ones(1)).value
        step = -2 * eta
        close(at.value + at.slope * step - at.bend * step.square() / 2, there)
        assert bool(at.value + at.slope * step - 0.999 * at.bend * step.square() / 2 > there)


def test_poisson_quadratics_lie_below_up_to_a_reach() -> None:
    """Each for every fall of the log rate, and for rises of one or up to the count."""
    factor = PoissonRegression(1, 1)
    for eta in torch.linspace(-6, 4, 21).double():
        for y in (0.0, 1.0, 3.0, 40.0):
            count = torch.tensor([[y]], dtype=torch.float64)
            at = factor.expand(eta.reshape(1, 1, 1), count, torch.ones(1))
            reach = max(1.0, float(count.log() - eta)) if y else 1.0
            step = torch.linspace(-8, reach, 200, dtype=torch.float64)
            there = y * (eta + step) - (eta + step).exp()
            below = at.value + at.slope * step - at.bend * step.square() / 2
            assert bool((there - below >= -1e-9).all())


@both
def test_steps_come_to_the_top_of_q(kind: type[GeneralizedLinear]) -> None:
    factor, batch = kind.example()
    expected, last = cases.soft(len(batch), 3), -torch.inf
    for _ in range(150):
        value = float(truth(batch, expected, factor).detach())
        assert value >= last - 1e-10 * abs(value)
        last = value
        cases.assign(factor, factor.maximize(factor.stats(batch, expected)))
    slope = torch.autograd.grad(truth(batch, expected, factor), factor.coefficient)[0]  # pyright: ignore
    assert float(slope.abs().max()) < 1e-7


def far_out() -> dict[str, Tensor]:
    """A row far out, of a rate next to nothing, which a whole step would make astronomical."""
    v = torch.cat([torch.linspace(0, 1, 30, dtype=torch.float64), torch.tensor([60.0], dtype=torch.float64)])
    return {"data": torch.cat([torch.arange(30.0), torch.zeros(1)]).double().unsqueeze(-1), "inputs": with_ones(v)}


def test_steps_whose_reach_is_known_raise_q_for_certain() -> None:
    """Poisson, from coefficients anywhere, with rows far out: by the reach of its inputs, without the data."""
    for seed in range(40):
        shared = bool(seed % 2)
        factor = PoissonRegression(2, 3, 2, shared=[1] if shared else ()).double()
        u = design(40, 3, seed=seed) * torch.where(cases.rand(40, 1, seed=seed) < 0.1, 12.0, 1.0)
        x = torch.poisson((2 * cases.randn(40, 2, seed=seed + 50)).exp(), generator=cases.rng(seed))
        batch = Batch(x, u=u)
        weight = (1 + seed % 4) * cases.randn(2, 2, 3, seed=seed + 100)
        weight[1, :, 1] = weight[0, :, 1] if shared else weight[1, :, 1]
        factor.weight = weight
        factor.center = u.mean(0)
        factor.extent = (u - factor.center).abs().amax(0)
        expected = cases.soft(40, 2, seed)
        before = float(truth(batch, expected, factor).detach())
        stats = factor.stats(batch, expected)
        cases.assign(factor, factor.maximize(stats))
        assert float(truth(batch, expected, factor).detach()) > before
        one = factor.select(torch.tensor([True, False]))
        assert torch.equal(one.center, factor.center)
        assert torch.equal(one.extent, factor.extent)


def test_an_input_without_spread_reaches_as_far_as_its_mean() -> None:
    """A thousand zeros and one count of forty, from a rate next to nothing, with an intercept alone."""
    count = torch.zeros(1001, 1, dtype=torch.float64)
    count[0] = 40.0
    model: Any = torchem.Mixture(Categorical(1), PoissonRegression(1, 1)).double()
    model.component.weight = [[[-8.0]]]
    batch = model.batch(count, inputs=torch.ones_like(count))
    before = float(model.log_prob(batch).sum().detach())
    moments = Moments()
    moments.add(batch)
    model.prepare(moments)
    model.m_step(model.e_step(batch))
    assert float(model.log_prob(batch).sum().detach()) > before


@pytest.mark.parametrize("rule", [torchem.Incremental, torchem.Stochastic])
def test_passes_in_batches_are_as_safe(rule: Any) -> None:
    data = far_out()
    model: Any = torchem.Mixture(Categorical(1), PoissonRegression(1, 2)).double()
    model.component.weight = [[[0.5, -0.2]]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # online EM may stop before the pass that measures it
        result = fit(model, data, init=None, accumulate=rule(), batch_size=8, max_iter=100)
    if rule is torchem.Incremental:
        assert result.converged
        assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    assert float(model.log_prob(model.batch(data["data"], inputs=data["inputs"])).sum().detach()) > -160


def test_a_fit_halves_steps_that_lead_down() -> None:
    data = far_out()
    model: Any = torchem.Mixture(Categorical(1), PoissonRegression(1, 2)).double()
    model.component.weight = [[[0.5, -0.2]]]
    batch, once = model.batch(data["data"], inputs=data["inputs"]), copy.deepcopy(model)
    once.m_step(once.e_step(batch))
    assert float(once.log_prob(batch).sum().detach()) < -1e6
    result = fit(model, data, init=None)
    assert result.converged
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    slope = torch.autograd.grad(model.log_prob(batch).sum(), model.component.coefficient)[0]
    assert float(slope.abs().max()) < 1e-2


@both
def test_coefficients_in_common_are_the_best_that_all_share(kind: type[GeneralizedLinear]) -> None:
    factor, batch = kind(3, 3, 2, shared=[1]).double(), kind.example()[1]
    batch = replace(batch, u=design(30, 3, seed=7))
    expected = cases.soft(30, 3)
    stats = factor.stats(batch, expected)
    best = maximized(factor, stats)
    slopes = torch.autograd.grad(best.expected_log_prob(stats), list(best.parameters()))
    assert all(float(slope.abs().max()) < 1e-9 for slope in slopes)
    weight = best.weight
    close(weight[:, :, 1], weight[:1, :, 1].expand(3, -1), rtol=0, atol=0)
    assert best.n_parameters() == 3 * 2 * 2 + 2
    close(best.select(torch.tensor([True, False, True])).weight, weight[[0, 2]], rtol=0)
    kept = copy.deepcopy(best).freeze("weight", mask=torch.tensor([True, False, False]))
    again = kept.maximize(kept.stats(batch, cases.soft(30, 3, seed=9)))
    assert torch.equal(again["coefficient"][0], kept.coefficient[0])
    assert torch.equal(again["common"], kept.common)
    whole = kind(2, 2, 1, shared="all").double()
    one, pair = kind(1, 2, 1).double(), batch.with_x(batch.x[:, :1])
    pair = replace(pair, u=design(30, 2, seed=8))
    close(
        maximized(whole, whole.stats(pair, cases.soft(30, 2))).weight[1],
        maximized(one, one.stats(pair, cases.soft(30, 2).sum(-1, keepdim=True))).weight[0],
    )


@both
def test_columns_are_read_by_number(kind: type[GeneralizedLinear]) -> None:
    factor, batch = kind.example()
    assert batch.u is not None
    wide = torch.cat([cases.randn(30, 1), batch.u.flip(-1)], -1)
    picked = kind(3, 2, 2, columns=(2, 1)).double()
    picked.weight = factor.weight.detach()  # pyright: ignore
    moved = replace(batch, u=wide)
    close(picked.log_prob(moved), factor.log_prob(batch), rtol=0)
    again = kind(**picked.config())
    assert again.columns == (2, 1)
    for columns in ((1,), (1, 1), (-1, 0), (True, 0)):
        with pytest.raises(InvalidArgument, match="columns"):
            kind(3, 2, 2, columns=columns)
    with pytest.raises(InvalidArgument, match="inputs: expected covariates"):
        picked.check(batch)


# ---- data that determine nothing, or too much ---------------------------------------------------------------------


def separated() -> dict[str, Tensor]:
    u = design(40)
    return {"data": (u[:, 1:] > 0).double(), "inputs": u}


def fit(model: Any, data: dict[str, Any], **options: Any) -> torchem.Result:
    return torchem.fit(model, **data, **{"seed": 0, "progress": False, "tol": 1e-10, "max_iter": 500} | options)


@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
def test_classes_that_a_plane_separates() -> None:
    """Coefficients grow, the objective rises to zero and is told so; a prior keeps them."""
    model = torchem.Mixture(Categorical(1), BinomialRegression(1, 2)).double()
    result = fit(model, separated(), max_iter=40, tol=0.0)
    assert all(b > a for a, b in itertools.pairwise(result.history))
    assert -3.0 < result.bound < 0
    assert not result.floored
    model.component.weight = [[[0.0, 20.0]]]
    assert fit(model, separated(), init=None, max_iter=1).floored == [0]
    model = torchem.Mixture(Categorical(1), BinomialRegression(1, 2)).double()
    model.component.prior = priors.Normal([0.0, 1.0])
    result = fit(model, separated())
    assert result.converged
    assert not result.floored
    batch = model.batch(separated()["data"], inputs=separated()["inputs"])
    slope = torch.autograd.grad(model.log_prob(batch).sum() + model.log_prior(), list(model.component.parameters()))
    assert float(slope[0].abs().max()) < 1e-4


def test_the_prior_of_a_gate_does_not_know_which_class_is_pinned() -> None:
    gate = SoftmaxRegression(3, 2).double()
    gate.prior = priors.Normal([0.5, 2.0])
    gate.weight = weight = cases.randn(3, 2)
    first = gate.log_prior()
    assert first is not None
    gate.weight = weight.roll(1, 0)
    close(gate.log_prior(), first)  # pyright: ignore[reportArgumentType]
    # The density of the two free differences integrates to one: for one input by quadrature.
    one = SoftmaxRegression(3, 1).double()
    one.prior = priors.Normal(2.0)
    grid = torch.linspace(-8, 8, 81, dtype=torch.float64)
    points = torch.cartesian_prod(grid, grid)
    one.replicate(len(points))
    one.coefficient.data = points.unsqueeze(-1)
    assert float(one.log_prior().exp().sum().detach()) * 0.04 == pytest.approx(1.0, abs=1e-6)  # pyright: ignore


@both
def test_the_prior_is_that_of_torch(kind: type[GeneralizedLinear]) -> None:
    factor = kind(2, 2, 2, shared=[1]).double()
    factor.weight = torch.cat([cases.randn(2, 2, 1), cases.randn(1, 2, 1, seed=1).expand(2, -1, -1)], -1)
    factor.prior = priors.Normal([0.5, 3.0])
    law = torch.distributions.Normal(0.0, torch.tensor([0.5, 3.0]).double().rsqrt())
    each = law.log_prob(factor.weight)
    close(factor.log_prior(), each[..., 0].sum() + each[0, :, 1].sum())  # pyright: ignore
    with pytest.raises(InvalidArgument, match="precision"):
        factor.prior = priors.Normal([1.0])
    with pytest.raises(InvalidArgument, match="prior"):
        Categorical(2).prior = priors.Normal()


@both
def test_inputs_that_depend_on_others_and_experts_without_mass(kind: type[GeneralizedLinear]) -> None:
    batch = kind.example()[1]
    assert batch.u is not None
    wide = kind(3, 4, 2).double()
    wide.weight = start = 0.3 * cases.randn(3, 2, 4)
    batch = replace(batch, u=torch.cat([batch.u, 2 * batch.u[:, 1:] - 1, torch.zeros(30, 1)], -1))
    expected = cases.soft(30, 3)
    expected[:, 2] = 0.0
    stats = wide.stats(batch, expected)
    best = maximized(wide, stats)
    assert best.weight.isfinite().all()
    close(best.weight[2], start[2], rtol=0, atol=0)
    close(best.weight[..., 2:], start[..., 2:], rtol=0, atol=1e-12)
    slope = torch.autograd.grad(best.expected_log_prob(stats), best.coefficient)[0]
    assert float(slope.abs().max()) < 1e-8


def test_bad_data() -> None:
    u = design(4)

    def refused(model: Any, x: Any, match: str, **fields: Any) -> None:
        with pytest.raises(InvalidArgument, match=match), as_users_run_it():
            torchem.fit(model, x, **{"inputs": u, "progress": False} | fields)

    counts = torchem.Mixture(Categorical(1), PoissonRegression(1, 2))
    odds = torchem.Mixture(Categorical(1), BinomialRegression(1, 2))
    for model in (counts, odds):
        refused(model, [[0.0], [-1.0], [1.0], [1.0]], "whole numbers of at least zero")
        refused(model, [[0.0], [0.5], [1.0], [1.0]], "whole numbers of at least zero")
        refused(model, [[0.0], [1.0], [1.0], [1.0]], "inputs: expected covariates", inputs=None)
        refused(model, [[0.0], [1.0], [1.0], [1.0]], "inputs: expected finite", inputs=u * torch.nan)
        refused(model, [[0.0], [1.0], [1.0], [1.0]], r"offset: expected \[4\]", offset=[1.0])
        refused(model, [[0.0], [1.0], [1.0], [1.0]], "offset: expected finite", offset=[1.0, torch.inf, 0.0, 0.0])
    refused(odds, [[0.0], [2.0], [1.0], [1.0]], r"successes as trials \(1\), got 2 at row 1, column 0")
    refused(
        odds, [[0.0], [2.0], [1.0], [1.0]], r"successes as trials \(1\), got 2 at row 1, column 0", trials=[3, 1, 1, 1]
    )
    refused(odds, [[0.0], [1.0], [1.0], [1.0]], "trials: expected whole", trials=[3, 1.5, 1, 1])


# ---- references ---------------------------------------------------------------------------------------------------


@both
def test_one_component_is_a_generalized_linear_model(kind: type[GeneralizedLinear]) -> None:
    """Coefficients and log-likelihoods of statsmodels 0.15."""
    x = torch.tensor([2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 10.0, 12.0, 15.0, 1.0]).double()
    v = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0, 1.2, 1.3, 1.7, 2.1, -0.4], dtype=torch.float64)
    u, offset = torch.stack([torch.ones(10).double(), v], -1), v.cos()
    trials = None if kind is PoissonRegression else torch.full((10,), 16.0)
    model: Any = torchem.Mixture(Categorical(1), kind(1, 2)).double()
    result = fit(model, {"data": x.unsqueeze(-1), "inputs": u, "offset": offset, "trials": trials}, tol=1e-14)
    weight, loglik = STATSMODELS[kind.__name__]
    close(model.component.weight[0, 0], torch.tensor(weight), rtol=0, atol=2e-7)
    assert result.bound == pytest.approx(loglik, abs=1e-7)


#: statsmodels 0.15.0, ``params`` and ``llf`` of:
#: import numpy as np, statsmodels.api as sm
#: y = np.array([2, 3, 6, 7, 8, 9, 10, 12, 15, 1.]); v = np.array([.1, .3, .5, .9, 1, 1.2, 1.3, 1.7, 2.1, -.4])
#: X = sm.add_constant(v)
#: sm.GLM(y, X, family=sm.families.Poisson(), offset=np.cos(v)).fit(tol=1e-14, maxiter=100)
#: sm.GLM(np.column_stack([y, 16 - y]), X, family=sm.families.Binomial(), offset=np.cos(v)).fit(tol=1e-14, maxiter=100)
STATSMODELS: dict[str, tuple[list[float], float]] = {
    "PoissonRegression": ([-0.13502934, 1.62046195], -18.472860406851712),
    "BinomialRegression": ([-3.07415345, 2.61041558], -15.053621263726537),
}


#: R 4.2.2, flexmix 2.3.18 and mixtools 2.0.0; ``parameters``, ``prior`` and ``logLik`` of m, b, h and r:
#: n <- 60; i <- 0:(n-1); v <- ((i * 37) %% 60) / 30 - 1; z <- i %% 2; e <- 0.2 * cos(i); t <- 12
#: mu <- ifelse(z == 0, exp(0.5 + 1.2 * v), exp(2.5 - 0.8 * v))
#: y <- pmax(0, floor(mu + sqrt(mu) * sin(1.7 * i) + 0.5))
#: p <- plogis(ifelse(z == 0, -1.5 + 2 * v, 1.5 + 1 * v))
#: s <- pmin(t, pmax(0, floor(t * p + sqrt(t * p * (1 - p)) * sin(2.3 * i) + 0.5)))
#: x <- ifelse(z == 0, 1 + 2 * v, 3 - 1.5 * v) + 0.3 * sin(2.9 * i)
#: ctrl <- list(tolerance = 1e-12, iter.max = 5000)
#: m <- flexmix(y ~ v, k = 2, cluster = z + 1, model = FLXMRglm(family = "poisson", offset = e), control = ctrl)
#: b <- flexmix(cbind(s, t - s) ~ v, k = 2, cluster = z + 1, model = FLXMRglm(family = "binomial"), control = ctrl)
#: h <- flexmix(y ~ v, k = 2, cluster = z + 1, model = FLXMRglm(family = "poisson"),
#:              concomitant = FLXPmultinom(~ v), control = ctrl)
#: r <- regmixEM(x, v, lambda = c(.5, .5), beta = matrix(c(1, 2, 3, -1.5), 2), sigma = c(.3, .3), epsilon = 1e-13,
#:               maxit = 10000)
def data_of_r() -> dict[str, Tensor]:
    i = torch.arange(60, dtype=torch.float64)
    v, z = (i * 37) % 60 / 30 - 1, i % 2 == 0
    mu = torch.where(z, (0.5 + 1.2 * v).exp(), (2.5 - 0.8 * v).exp())
    p = torch.where(z, -1.5 + 2 * v, 1.5 + v).sigmoid()
    return {
        "u": torch.stack([torch.ones(60).double(), v], -1),
        "offset": 0.2 * i.cos(),
        "y": (mu + mu.sqrt() * (1.7 * i).sin() + 0.5).floor().clamp(min=0.0).unsqueeze(-1),
        "s": (12 * p + (12 * p * (1 - p)).sqrt() * (2.3 * i).sin() + 0.5).floor().clamp(0.0, 12.0).unsqueeze(-1),
        "x": (torch.where(z, 1 + 2 * v, 3 - 1.5 * v) + 0.3 * (2.9 * i).sin()).unsqueeze(-1),
    }


def compared(
    component: Any, start: list[Any], weight: list[Any], loglik: float, mixing: Any = None, **data: Any
) -> Any:
    model: Any = torchem.Mixture(Categorical(2) if mixing is None else mixing, component).double()
    model.component.weight = start
    result = fit(model, data, init=None, tol=1e-13, accelerate="squarem")
    found: Any = model.component
    close(found.weight[:, 0], torch.tensor(weight), rtol=0, atol=2e-5)
    assert result.bound == pytest.approx(loglik, abs=2e-8)
    return model


def test_mixtures_are_those_of_flexmix_and_mixtools() -> None:
    d = data_of_r()
    start = [[[0.5, 1.2]], [[2.5, -0.8]]]
    found = compared(
        PoissonRegression(2, 2), start, [[0.42462395221, 1.33342396680], [2.513930840148, -0.763446592528]],
        -154.94389571524, data=d["y"], inputs=d["u"], offset=d["offset"],
    )  # fmt: skip
    close(found.weights, torch.tensor([0.505975784841, 0.494024215159]), rtol=0, atol=2e-6)
    compared(
        BinomialRegression(2, 2), [[[-1.5, 2.0]], [[1.5, 1.0]]],
        [[-1.57239939293, 2.24195679239], [1.48216722553, 1.08955940050]], -125.92097016007,
        data=d["s"], inputs=d["u"], trials=torch.full((60,), 12),
    )  # fmt: skip
    found = compared(
        PoissonRegression(2, 2), start, [[0.440120333597, 1.278491822816], [2.516594670267, -0.856594225151]],
        -149.23939416586, SoftmaxRegression(2, 2), data=d["y"], inputs=d["u"],
    )  # fmt: skip
    close(found.mixing.weight[1], torch.tensor([-0.005638332724, 0.070739339857]), rtol=0, atol=2e-5)
    lines = LinearGaussian(2, 2, 1)
    lines.covariances = [[[0.09]], [[0.09]]]
    compared(
        lines, [[[1.0, 2.0]], [[3.0, -1.5]]], [[0.975098102404, 1.945580538719], [3.03529776505, -1.55136574627]],
        -27.123424254596, data=d["x"], inputs=d["u"],
    )  # fmt: skip
    close(lines.covariances.flatten().sqrt(), torch.tensor([0.206394958479, 0.211226818612]), rtol=0, atol=2e-6)
