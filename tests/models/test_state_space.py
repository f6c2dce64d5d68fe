"""Linear Gaussian state spaces: held to the joint normal law of states and observations, and to the laws of models."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import test_model as laws
from tests.laws.cases import ModelCase, close, close_dict, close_stats, randn, rng
from tests.regressions.common import as_users_run_it
from torchem import factors, priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidType
from torchem.models import LinearGaussianStateSpace
from torchem.ops import kalman

LENGTHS = torch.tensor([5, 3, 1, 5, 4])


def covariance(k: int, seed: int) -> Tensor:
    root = randn(k, k, seed=seed)
    return root @ root.mT / k + 0.3 * torch.eye(k)


def model_of(k: int = 2, d: int = 3, m: int = 0, kind: str = "full", noise: str = "full", **options: Any) -> Any:
    model = LinearGaussianStateSpace(
        k, d, m, covariance_type=kind, dynamics_covariance_type=noise, **options  # pyright: ignore
    ).double()  # fmt: skip
    model.dynamics, model.loadings, model.initial_mean = (
        0.5 * randn(k, k, seed=1),
        randn(d, k, seed=2),
        randn(k, seed=3),
    )
    model.initial_covariance = covariance(k, 4)
    for name, size, structure, seed in (("dynamics", k, noise, 5), ("observation", d, kind, 6)):
        value = covariance(size, seed)
        value = {"full": value, "diag": value.diagonal(), "spherical": value[0, 0]}[structure]
        setattr(model, f"{name}_covariance", value)
    if m and model.inputs != "observation":
        model.dynamics_inputs = randn(k, m, seed=7)
    if m and model.inputs != "dynamics":
        model.observation_inputs = randn(d, m, seed=8)
    return model


def data_of(model: Any, n: int = 5, t: int = 5, gaps: bool = False, **more: Any) -> Batch:
    x = 2 * randn(n, t, model.n_features, seed=9)
    if gaps:
        x[0, 2] = x[1, 0, 0] = torch.nan
        x[3:4, :, -1] = x[3:4, 1] = x[4:5, 3, 0] = torch.nan
    u = randn(n, t, model.n_inputs, seed=10) if model.n_inputs else None
    return Batch(x, u=u, **more)


def dense(value: Tensor, size: int) -> Tensor:
    return value if value.dim() == 2 else torch.diag(value.expand(size))


def joint(model: Any, x: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(x) of one sequence ``[T, D]`` with missing entries, and the law of its states and observations given them.

    By writing out the joint normal law of all of them.
    """
    t, k, d = len(x), model.n_latents, model.n_features
    a, c = model.dynamics, model.loadings
    q, r = dense(model.dynamics_covariance, k), dense(model.observation_covariance, d)
    moved = torch.zeros(t, k).double() if u is None or model.inputs == "observation" else u @ model.dynamics_inputs.mT
    shift = torch.zeros(t, d).double() if u is None or model.inputs == "dynamics" else u @ model.observation_inputs.mT
    means, own = [model.initial_mean], [model.initial_covariance]
    for i in range(1, t):
        means.append(a @ means[-1] + moved[i])
        own.append(a @ own[-1] @ a.mT + q)
    power = torch.linalg.matrix_power
    blocks = [
        [power(a, max(i - j, 0)) @ own[min(i, j)] @ power(a, max(j - i, 0)).mT for j in range(t)] for i in range(t)
    ]
    states = torch.cat([torch.cat(row, 1) for row in blocks])
    see = torch.kron(torch.eye(t).double(), c)
    both = torch.cat([states, see @ states])
    whole = torch.cat([both, both @ see.mT], 1)
    noise = torch.kron(torch.eye(t).double(), r)
    whole = whole + torch.block_diag(torch.zeros_like(states), noise)
    mean = torch.stack(means)
    center = torch.cat([mean.flatten(), (mean @ c.mT + shift).flatten()])
    seen = torch.cat([torch.zeros(t * k, dtype=torch.bool), ~x.flatten().isnan()])
    if not bool(seen.any()):
        value = torch.zeros(()).double()
    else:
        law = torch.distributions.MultivariateNormal(center[seen], whole[seen][:, seen])
        value = law.log_prob(x.flatten()[seen[t * k :]])
    gain = torch.linalg.solve(whole[seen][:, seen], whole[seen]).mT
    found = center + gain @ (torch.cat([torch.zeros(t * k).double(), x.flatten()]) - center)[seen]
    left = whole - gain @ whole[seen]
    return value, found, left, see


SHAPES = [
    (2, 3, 0, "full", "full", {}),
    (3, 2, 2, "full", "diag", {}),
    (2, 2, 1, "diag", "spherical", {"inputs": "dynamics"}),
    (1, 2, 1, "spherical", "full", {"inputs": "observation"}),
]


@pytest.mark.parametrize("square_root", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_equals_the_joint_law(shape: Any, square_root: bool) -> None:
    """Likelihood, smoothed and imputed moments, and filtered ones as those of the sequence cut there."""
    k, d, m, kind, noise, options = shape
    model = model_of(k, d, m, kind, noise, square_root=square_root, **options)
    batch = data_of(model, gaps=True, lengths=LENGTHS)
    with torch.no_grad():
        values, posterior, filtered = model.log_prob(batch), model.posterior(batch), model.filter(batch)
        level = model.smooth(batch)
        filled, spread = model.impute(batch, variance=True)
        for n, t in enumerate(LENGTHS.tolist()):
            x, u = batch.x[n, :t], None if batch.u is None else batch.u[n, :t]
            value, mean, left, see = joint(model, x, u)
            close(values[n], value)
            states, observed = mean[: t * k].view(t, k), mean[t * k :].view(t, d)
            close(posterior.mean[n, :t], states)
            own = torch.stack([left[i * k : (i + 1) * k, i * k : (i + 1) * k] for i in range(t)])
            close(posterior.covariance_matrix[n, :t], own)
            free = see @ left[: t * k, : t * k] @ see.mT
            close(level.variance[n, :t], free.diagonal().view(t, d))
            gone = x.isnan()
            close(filled[n, :t][gone], observed[gone])
            close(spread[n, :t][gone], left.diagonal()[t * k :].view(t, d)[gone])
            assert torch.equal(filled[n, :t][~gone], x[~gone])
            for i in range(t):
                own, cut = slice(i * k, (i + 1) * k), (x[: i + 1], None if u is None else u[: i + 1])
                _, mean, left, _ = joint(model, *cut)
                close(filtered.mean[n, i], mean[own])
                close(filtered.covariance_matrix[n, i], left[own, own])
            # Padding repeats the law of the last frame.
            for law in (posterior, filtered):
                close(law.mean[n, t:], law.mean[n, t - 1].expand(5 - t, k))
                close(law.covariance_matrix[n, t:], law.covariance_matrix[n, t - 1].expand(5 - t, k, k))


def test_statistics_are_expectations_under_the_joint_law() -> None:
    """Each factor's statistics, with entries missing from correlated columns, weights and padding."""
    model = model_of(2, 3, 1)
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]).double()
    batch = data_of(model, gaps=True, lengths=LENGTHS, weight=weight)
    k, d = 2, 3
    with torch.no_grad():
        stats = model.e_step(batch)
        total = {name: torch.zeros(()).double() for name in ("first", "steps", "cross", "xx", "zx", "seen")}
        for n, t in enumerate(LENGTHS.tolist()):
            assert batch.u is not None
            _, mean, left, _ = joint(model, batch.x[n, :t], batch.u[n, :t])
            second = left + torch.outer(mean, mean)

            def z(i: int) -> slice:
                return slice(i * k, (i + 1) * k)

            def x(i: int, t: int = t) -> slice:
                return slice(t * k + i * d, t * k + (i + 1) * d)

            total["first"] = total["first"] + weight[n] * second[z(0), z(0)]
            for i in range(t):
                if i:
                    total["steps"] = total["steps"] + weight[n] * second[z(i), z(i)]
                    total["cross"] = total["cross"] + weight[n] * second[z(i - 1), z(i)]
                if not bool(batch.x[n, i].isnan().all()):
                    total["xx"] = total["xx"] + weight[n] * second[x(i), x(i)]
                    total["zx"] = total["zx"] + weight[n] * second[z(i), x(i)]
                    total["seen"] = total["seen"] + weight[n]
    initial = stats["initial"]
    origin = model.initial.origin[0]
    outer = torch.outer(initial["first"][0], origin)
    about = initial["second"][0] + outer + outer.mT + initial["count"][0] * torch.outer(origin, origin)
    close(about, total["first"])
    close(stats["transition"]["xx"][0], total["steps"])
    close(stats["transition"]["ux"][0, :k], total["cross"])
    close(stats["observation"]["xx"][0], total["xx"])
    close(stats["observation"]["ux"][0, :k], total["zx"])
    close(stats["observation"]["count"][0], total["seen"])


# ---- the laws of models -------------------------------------------------------------------------------------------


def plain() -> ModelCase:
    model = model_of()
    return ModelCase(model, data_of(model))


def torn() -> ModelCase:
    model = model_of(2, 2, 1, "full", "diag")
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]).double()
    return ModelCase(model, data_of(model, gaps=True, lengths=LENGTHS, weight=weight))


def held() -> ModelCase:
    """Frozen in part, tied down by priors, more states than columns."""
    model = model_of(3, 2, 1, "diag", inputs="observation")
    model.freeze("dynamics", mask=[[True, False, True], [False] * 3, [True] * 3]).freeze("loadings")
    model.transition.prior = priors.MatrixNormalInverseWishart(scale=1.0)
    model.initial.prior = priors.NormalInverseWishart(mean=[0.0] * 3, scale=1.0)
    return ModelCase(model, data_of(model, lengths=LENGTHS))


CASES: dict[str, Callable[[], ModelCase]] = {"plain": plain, "torn": torn, "held": held}
SMOOTH = ["plain", "held"]
LAWS = [
    laws.test_bound_is_the_log_likelihood_where_it_was_computed,
    laws.test_bound_lies_below_the_log_likelihood_elsewhere,
    laws.test_fisher_identity,
    laws.test_invariance_to_chunks_and_order,
    laws.test_statistics_of_parts_add_to_those_of_the_whole,
    laws.test_weights_are_repetitions,
    laws.test_data_may_live_on_the_host,
    laws.test_nothing_is_mutated,
    laws.test_state_dict_round_trip,
    laws.test_float32_near_float64,
    laws.test_em_map_is_an_em_iteration,
    laws.test_em_map_under_vmap,
    laws.test_em_map_of_many_problems_at_once,
    laws.test_differentiating_the_e_step_gives_the_score,
]


@pytest.fixture
def _as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Posteriors as the numbers that they are made of, for laws that compare tensors."""
    posterior = LinearGaussianStateSpace.posterior

    def numbers(self: Any, data: Any) -> Tensor:
        law = posterior(self, data)
        return torch.cat([law.mean.unsqueeze(-1), law.covariance_matrix], -1)

    monkeypatch.setattr(LinearGaussianStateSpace, "posterior", numbers)
    # Equal to the bit is asked of states that are counted.
    monkeypatch.setattr(
        LinearGaussianStateSpace, "most_likely", lambda self, data: torch.zeros(()).expand(self.replicas)
    )


@pytest.mark.usefixtures("_as_numbers", "_routes_by_rounding")
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("case", CASES)
def test_laws_of_models(case: str, law: Any, device: torch.device) -> None:
    law(CASES[case], device)


@pytest.mark.parametrize("case", CASES)
def test_bound_never_falls(case: str, device: torch.device) -> None:
    laws.never_falls(CASES[case]().to(device), laws.MANY)


@pytest.mark.usefixtures("_as_numbers")
@pytest.mark.parametrize("case", CASES)
def test_replicas_equal_each_alone(case: str, device: torch.device) -> None:
    laws.test_replicas_equal_each_alone(CASES[case], laws.MANY, device)


@pytest.mark.parametrize("case", SMOOTH)
def test_derivatives(case: str, device: torch.device) -> None:
    """Of the likelihood twice, and of the EM map, in parameters and data."""

    def small() -> ModelCase:
        whole = CASES[case]()
        return ModelCase(whole.model, whole.batch[:2].with_frames(3))

    laws.test_log_prob_gradcheck_twice(small)
    laws.test_em_map_is_differentiable_in_parameters_and_data(small, device)


# ---- the kernels --------------------------------------------------------------------------------------------------


def chain_of(n: int = 3, t: int = 6, k: int = 2, length: int = 3, **more: Any) -> kalman.GaussMarkov:
    """A chain of three groups, two lengths and matrices that differ from frame to frame."""
    root = randn(n, t, k, k, seed=11)
    valid = torch.arange(t) < torch.tensor([t, length, t]).unsqueeze(-1)
    linear, information = randn(n, t, k, seed=12), root @ root.mT
    noise = randn(n, t, k, k, seed=13)
    return kalman.GaussMarkov(
        randn(k, seed=14), covariance(k, 15), 0.6 * randn(n, t, k, k, seed=16), noise @ noise.mT + 0.1 * torch.eye(k),
        torch.where(valid[..., None, None], information, 0.0), torch.where(valid[..., None], linear, 0.0),
        drift=randn(n, t, k, seed=17), valid=valid, **more,
    )  # fmt: skip


@pytest.mark.parametrize("square_root", [False, True])
def test_moments_are_the_gradient_of_the_log_normalizer(square_root: bool) -> None:
    chain = chain_of()

    def value(linear: Tensor, information: Tensor) -> Tensor:
        return kalman.log_normalizer(replace(chain, linear=linear, information=information)).sum()

    first, second = torch.func.grad(value, (0, 1))(chain.linear, chain.information)
    found = kalman.smoothed(chain, square_root)
    mean, cov = found.mean.transpose(-3, -2), found.covariance.transpose(-4, -3)
    assert chain.valid is not None
    close(mean[chain.valid], first[chain.valid])
    close((cov + mean.unsqueeze(-1) * mean.unsqueeze(-2))[chain.valid], -(second + second.mT)[chain.valid])


@pytest.mark.parametrize("square_root", [False, True])
@pytest.mark.parametrize("blocks", [2, 4, 5])
def test_blocks_of_time_equal_the_sequential_recursion(square_root: bool, blocks: int) -> None:
    """Side by side: three groups of different lengths with matrices of their own, and one whose matrices are common."""
    several = chain_of(t=11, length=4)
    root = randn(1, 1, 2, 2, seed=18)
    one = kalman.GaussMarkov(
        several.mean, several.covariance, 0.6 * randn(1, 1, 2, 2, seed=19), covariance(2, 15).view(1, 1, 2, 2),
        root @ root.mT, several.linear,
    )  # fmt: skip
    for chain in (several, one):
        plain, cut = kalman.smoothed(chain, square_root, 1), kalman.smoothed(chain, square_root, blocks)
        for name in ("mean", "covariance", "cross"):
            close(getattr(cut, name), getattr(plain, name))
        close(cut.filtered.log_weight, plain.filtered.log_weight)
        close(kalman.filtered(chain, square_root, blocks).predicted_mean, plain.filtered.predicted_mean)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_compiled_loops_equal_the_steps_in_torch(lead: tuple[int, ...]) -> None:
    """Where derivatives are followed torch takes the steps; elsewhere, on CPU, loops that are compiled."""
    pytest.importorskip("numba")
    several = chain_of(t=7)
    shared = kalman.GaussMarkov(
        several.mean.expand(*lead, 2), several.covariance.expand(*lead, 2, 2), 0.6 * randn(*lead, 1, 1, 2, 2, seed=19),
        covariance(2, 15).expand(*lead, 1, 1, 2, 2), several.information[:2], several.linear.expand(*lead, 3, 7, 2),
        which=torch.tensor([1, 0, 1]),
    )  # fmt: skip
    for chain in (several, shared):
        with torch.no_grad():
            loops = kalman.smoothed(chain)
        followed = replace(
            chain, linear=chain.linear.clone().requires_grad_(), mean=chain.mean.clone().requires_grad_()
        )
        followed = replace(followed, covariance=chain.covariance.clone().requires_grad_())
        steps = kalman.smoothed(followed, blocks=1)
        for name in ("mean", "covariance", "cross"):
            close(getattr(loops, name), getattr(steps, name).detach(), rtol=1e-11, atol=1e-12)
        close(loops.filtered.log_weight, steps.filtered.log_weight.detach(), rtol=1e-10)
        # Bit for bit the same each time.
        with torch.no_grad():
            assert torch.equal(kalman.smoothed(chain).mean, loops.mean)


def test_long_series_are_cut_by_their_shape_alone() -> None:
    """What the filter chooses for a long series is what it gives in one piece."""
    model = model_of(2, 3)
    chain = model._plan(Batch(randn(1, 2000, 3, seed=22))).chain()
    assert kalman._blocks(chain) > 1
    close(kalman.filtered(chain).mean, kalman.filtered(chain, blocks=1).mean)


def test_groups_share_what_sequences_have_in_common() -> None:
    """Sequences of one pattern: one recursion, the same numbers."""
    model = model_of()
    batch = data_of(model, n=6, gaps=True)
    batch = batch.with_x(torch.cat([batch.x, batch.x]))
    plan = model._plan(batch)
    chain = plan.chain()
    assert chain.information.shape[-4] == 5
    whole = kalman.smoothed(chain)
    assert whole.covariance.shape[-3] == 5
    alone = model.posterior(batch[3:4])
    close(whole.mean[:, 3], alone.mean[0])
    close(whole.mean[:, 9], alone.mean[0])


def test_square_roots_keep_float32_where_noises_differ_in_size() -> None:
    """A state that is seen a million times better than it is known: covariances would lose all their digits."""
    model = model_of(3, 3)
    model.initial_covariance, model.dynamics_covariance = 1e6 * torch.eye(3), 1e-4 * torch.eye(3)
    model.observation_covariance = 1e-4 * torch.eye(3)
    x = model.sample(2, 30, generator=rng(0))
    exact = model.posterior(x)
    small = copy.deepcopy(model).float()
    assert small._roots()
    found = small.posterior(x.float())
    close(found.mean.double(), exact.mean, rtol=1e-3, atol=1e-2)
    close(found.covariance_matrix.double(), exact.covariance_matrix, rtol=2e-2, atol=1e-6)
    close(small.log_prob(x.float()).double(), model.log_prob(x), rtol=1e-3, atol=0.1)


# ---- fits ---------------------------------------------------------------------------------------------------------


def truth() -> Any:
    model = LinearGaussianStateSpace(2, 3).double()
    model.dynamics, model.loadings = [[0.9, 0.3], [-0.3, 0.9]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    model.observation_covariance, model.dynamics_covariance = 0.3 * torch.eye(3), 0.1 * torch.eye(2)
    return model


def test_truth_is_recovered_up_to_the_basis() -> None:
    real = truth()
    x = real.sample(20, 100, generator=rng(0))
    model = LinearGaussianStateSpace(2, 3).double()
    result = torchem.fit(model, x, max_iter=150, tol=1e-7, seed=0, accelerate="squarem", progress=False)
    assert result.converged
    assert result.bound > float(real.log_prob(x).sum().detach())
    found, known = (torch.linalg.eigvals(m.dynamics.detach()) for m in (model, real))
    close(found.abs().sort().values, known.abs().sort().values, rtol=0.02)
    close(found.imag.abs().amax(), known.imag.abs().amax(), rtol=0.1)
    close(model.observation_covariance, real.observation_covariance, rtol=0.15, atol=0.03)
    assert model.n_parameters() == 2 + 3 + 4 + 3 + 6 + 6 - 4


def test_variational_parameters_shrink_what_is_not_needed() -> None:
    """A bound on the evidence that never falls, below the likelihood at posterior means, and best for the true size."""
    x = truth().sample(8, 40, generator=rng(0))
    bounds = {}
    for k in (1, 2, 4):
        model = torchem.variational(LinearGaussianStateSpace(k, 3).double())
        result = torchem.fit(model, x, max_iter=60, tol=1e-4, seed=0, progress=False, accelerate="squarem")
        assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
        assert result.bound < float(model.log_prob(x).sum().detach())
        bounds[k] = result.bound
    assert max(bounds, key=bounds.__getitem__) == 2


def laws_of(kind: str, variational: bool) -> list[Any]:
    """Laws of one child of two columns, given three covariates and without any."""
    found: list[Any] = [factors.LinearGaussian(1, 3, 2, kind).double(), factors.Gaussian(1, 2, kind).double()]  # pyright: ignore
    for seed, factor in enumerate(found):
        batch = Batch(randn(20, 2, seed=seed), u=randn(20, 3, seed=9))
        values = factor.maximize(factor.stats(batch, torch.ones(20, 1).double()))
        for name, value in values.items():
            factor.get_parameter(name).data = value
    if not variational:
        return found
    wrapped = [torchem.Variational(factor) for factor in found]
    for seed, factor in enumerate(wrapped):
        batch = Batch(randn(20, 2, seed=seed), u=randn(20, 3, seed=9))
        values = factor.maximize(factor.stats(batch, torch.ones(20, 1).double()))
        for name, value in values.items():
            factor.get_parameter(name).data = value
    return wrapped


@pytest.mark.parametrize("variational", [False, True])
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_quadratics_and_moments_are_the_two_halves_of_one_expectation(kind: str, variational: bool) -> None:
    """What inference is fed, expected under any moments, is Q of the statistics made of these moments."""
    for factor in laws_of(kind, variational):
        m = 3 if hasattr(factor, "weight") else 1
        both = randn(9, 2 + m, seed=21)
        if m == 1:
            both[:, 2] = 1.0
        mean = torch.tensor(9.0).double()
        second = both.mT @ both
        xx, ux, uu = second[:2, :2], second[2:, :2], second[2:, 2:]
        stats = factor.moment_stats(mean.view(1), xx.unsqueeze(0), ux.unsqueeze(0), uu.unsqueeze(0))
        law = factor.quadratic()
        weight, root = law.weight[0], torch.linalg.inv(law.factor[0])
        scatter = xx - weight @ ux - (weight @ ux).mT + weight @ uu @ weight.mT
        constant = law.offset[0] + root.diagonal().log().sum() - math.log(2 * math.pi)
        value = 9 * constant - 0.5 * (root.mT @ root * scatter).sum()
        if law.penalty is not None:
            value = value - 0.5 * (law.penalty[0] * uu).sum()
        close(value, factor.expected_log_prob(stats))


NILE = torch.tensor([
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
    831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845, 864, 862, 698, 845, 744, 796, 1040, 759,
    781, 865, 845, 944, 984, 897, 822, 1010, 771, 676, 649, 846, 812, 742, 801, 1040, 860, 874, 848, 890,
    744, 749, 838, 1050, 918, 986, 797, 923, 975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
]).double()  # fmt: skip


def level(**options: Any) -> Any:
    """The local level of J. Durbin, S. J. Koopman (2012), chapter 2: a walk seen through noise, from anywhere."""
    model = LinearGaussianStateSpace(1, 1, **options).double()
    model.initial_mean, model.initial_covariance = [0.0], [[1e7]]
    model.freeze("initial_mean", "initial_covariance", "dynamics", "loadings")
    return model


def test_the_level_of_the_nile() -> None:
    """Durbin and Koopman (2012), section 2.10: 15099 and 1469.1.

    R 4.2.2: ``f <- StructTS(Nile, type = "level"); f$coef; tsSmooth(f)[c(28, 29, 100)]`` gives 15098.577 and 1469.147
    (its optimiser stops at 1e-4 or so), and levels 999.586, 950.929 and 798.368.
    """
    model = level()
    result = torchem.fit(model, NILE, max_iter=400, tol=1e-12, seed=0, accelerate="squarem", progress=False)
    assert result.converged
    with torch.no_grad():
        assert float(model.observation_covariance) == pytest.approx(15099, rel=1e-3)
        assert float(model.dynamics_covariance) == pytest.approx(1469.1, rel=1e-3)
        smooth = model.smooth(NILE).mean[0, [27, 28, 99], 0]
    close(smooth, torch.tensor([999.585710, 950.929089, 798.368157]), rtol=2e-4)


def test_the_break_of_the_nile() -> None:
    """A step in 1899, when the dam at Aswan was begun, takes all that moved the level.

    What is left is a regression on the step: means 1097.75 before it and 849.97 after.
    """
    model = level(n_inputs=1, inputs="observation")
    step = (torch.arange(1871, 1971) >= 1899).double()
    result = torchem.fit(model, NILE, inputs=step, max_iter=12, tol=1e-4, seed=0, direct=True, progress=False)
    with torch.no_grad():
        assert float(model.observation_inputs) == pytest.approx(-247.78, rel=2e-3)
        assert float(model.dynamics_covariance) < 30
    assert result.bound > -641.58 + 9


# ---- use ----------------------------------------------------------------------------------------------------------


def test_forecasts_are_what_frames_that_are_missing_tell() -> None:
    model = model_of(2, 2, 1)
    batch = data_of(model, lengths=LENGTHS)
    assert batch.u is not None
    ahead = randn(5, 3, 1, seed=20)
    with torch.no_grad():
        found = model.forecast(batch, 3, inputs=ahead, n=3000, generator=rng(0))
        for n, t in enumerate(LENGTHS.tolist()):
            x = torch.cat([batch.x[n, :t], torch.full((3, 2), torch.nan).double()])
            longer = Batch(x.unsqueeze(0), u=torch.cat([batch.u[n, :t], ahead[n]]).unsqueeze(0))
            mean, spread = model.impute(longer, variance=True)
            assert isinstance(mean, Tensor)
            close(found.mean[n], mean[0, t:])
            close(found.variance[n], spread[0, t:])
            close(found.states.mean[n], model.posterior(longer).mean[0, t:])
        assert found.draws is not None
        assert found.draws.shape == (3000, 5, 3, 2)
        error = (found.draws.mean(0) - found.mean) / found.variance.sqrt()
        assert float(error.abs().max()) < 5 / math.sqrt(3000)


def test_forecasts_say_whose_covariates_are_missing() -> None:
    model = LinearGaussianStateSpace(1, 1, 1)
    past, future = torch.ones(5, 1), torch.ones(3, 1)
    with pytest.raises(InvalidArgument, match=r"^u: .*frames of data.* inputs= .*frames to come"):
        model.forecast(torch.zeros(5, 1), 3, inputs=future)
    assert model.forecast(torch.zeros(5, 1), 3, inputs=future, u=past).mean.shape == (1, 3, 1)


def test_draws_have_the_moments_of_the_posterior() -> None:
    model = model_of(2, 2)
    batch = data_of(model, n=2, gaps=True)
    paths = model.sample_posterior(batch, 2000, generator=rng(0))
    with torch.no_grad():
        law = model.posterior(batch)
        gap = (paths.mean(0) - law.mean) / law.variance.sqrt()
        assert float(gap.abs().max()) < 5 / math.sqrt(2000)
        close(paths.var(0), law.variance, rtol=0.2)
        filled = model.impute(batch, draws=2000, generator=rng(0))
        mean, spread = model.impute(batch, variance=True)
        gone = batch.x.isnan()
        gap = (filled.mean(0) - mean)[gone] / spread[gone].sqrt()
        assert float(gap.abs().max()) < 5 / math.sqrt(2000)
        close(filled.var(0)[gone], spread[gone], rtol=0.2)
        assert torch.equal(filled[0][~gone], batch.x[~gone])


def test_samples_follow_the_model() -> None:
    model = model_of(2, 2, 1)
    x, z = model.sample(4000, 3, latents=True, inputs=torch.ones(3, 1), generator=rng(0))
    with torch.no_grad():
        gap = z[:, 1:] - z[:, :-1] @ model.dynamics.mT - model.dynamics_inputs[:, 0]
        close(gap.flatten(0, 1).T.cov(), model.dynamics_covariance, rtol=0.1, atol=0.05)
        gap = x - z @ model.loadings.mT - model.observation_inputs[:, 0]
        close(gap.flatten(0, 1).T.cov(), model.observation_covariance, rtol=0.1, atol=0.05)
        close(z[:, 0].mean(0), model.initial_mean, atol=0.1)


def test_saved_and_loaded(tmp_path: Any) -> None:
    case = held()
    torchem.save(case.model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    close(again.log_prob(case.batch), case.model.log_prob(case.batch), rtol=1e-12)
    close_stats(again.e_step(case.batch), case.model.e_step(case.batch), rtol=1e-12)
    close_dict(again.maximize(again.e_step(case.batch)), case.model.maximize(case.model.e_step(case.batch)))


def test_frozen_coefficients_stay_and_the_rest_is_the_best_given_them() -> None:
    """Entries of the dynamics alone, under noise that couples the rows: no step away from the M-step's gains."""
    model = model_of(2, 3)
    mask = torch.tensor([[True, False], [False, False]])
    kept = float(model.dynamics[0, 0].detach())
    model.freeze("dynamics", mask=mask)
    batch = data_of(model)
    with torch.no_grad():
        stats = model.e_step(batch)
        for _ in range(8):  # coefficients and the covariance that weights them
            model.assign(model.maximize(stats))
    assert float(model.dynamics[0, 0].detach()) == kept
    value = model.transition.expected_log_prob(stats["transition"])
    slopes = torch.autograd.grad(value, [model.transition.coefficient, model.transition.scale])
    close(torch.where(mask, 0.0, slopes[0][0]), torch.zeros(2, 2), atol=1e-7)
    close(slopes[1].tril(), torch.zeros(1, 2, 2), atol=1e-7)


def test_single_frames_and_no_sequences_at_all() -> None:
    """What has no step has no moment of steps; what is empty adds nothing; of both ways to take steps."""
    model = model_of(2, 3)
    batch = data_of(model, n=4, t=1)
    law = torch.distributions.MultivariateNormal(
        model.loadings @ model.initial_mean,
        model.loadings @ model.initial_covariance @ model.loadings.mT + model.observation_covariance,
    )
    for followed in (True, False):
        with torch.set_grad_enabled(followed):
            close(model.log_prob(batch), law.log_prob(batch.x[:, 0]))
            stats = model.e_step(batch)
            assert float(stats["transition"]["count"].detach()) == 0
            close_stats(model.e_step(batch[:0]) + stats, stats)
            close_stats(model.e_step(data_of(model, gaps=True)[:0]) + stats, stats)
    result = torchem.fit(LinearGaussianStateSpace(2, 3).double(), batch, max_iter=500, tol=1e-3, seed=0, progress=False)
    assert math.isfinite(result.bound)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_series_far_from_zero_are_fitted_as_those_at_zero(offset: float) -> None:
    walk = randn(1, 60, 2, seed=2).cumsum(1)

    def bound(x: Tensor) -> float:
        model = LinearGaussianStateSpace(2, 2).double()
        result = torchem.fit(model, x, max_iter=40, tol=0, seed=0, progress=False)
        assert not {"dynamics_covariance", "observation_covariance"} & set(result.floored)
        return result.bound

    far = bound(walk + offset)
    assert abs(far - bound(walk)) < 1.0
    # Units change nothing but the measure, at any offset.
    assert bound(1e-5 * (walk + offset)) + walk.numel() * math.log(1e-5) == pytest.approx(far, abs=1e-3)


def test_noise_about_a_level_is_no_walk() -> None:
    x = randn(1, 80, 1, seed=1)
    normal = float(torch.distributions.Normal(x.mean(), x.std(correction=0)).log_prob(x).sum())
    model = LinearGaussianStateSpace(1, 1).double()
    result = torchem.fit(model, x + 1000, max_iter=300, tol=0, seed=0, progress=False)
    assert result.bound > normal - 2.0
    assert 0.9 < float(model.observation_covariance.detach()) / float(x.var()) < 1.1


@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
@pytest.mark.parametrize("accelerate", ["squarem", "anderson"])
def test_jumps_end_in_the_feasible_set_and_floors_are_named(accelerate: Any) -> None:
    # One sequence has one first state: nothing tells how such states vary.
    y = np.cumsum(np.random.default_rng(13).normal(size=(1, 20, 2)), 1)
    model = LinearGaussianStateSpace(1, 2).double()
    result = torchem.fit(model, y, max_iter=300, tol=1e-12, seed=0, accelerate=accelerate, progress=False)
    assert result.status == "max_iter"
    assert float(torch.tensor(result.history).diff().min()) >= 0
    assert result.floored == ["initial_covariance", "observation_covariance"]
    assert float(model.initial_covariance.detach()) == pytest.approx(1e-6, rel=1e-3)


def test_frames_at_the_end_of_which_nothing_was_seen_change_no_density() -> None:
    model = LinearGaussianStateSpace(1, 1)
    model.dynamics, model.loadings = [[1.02]], [[1.0]]
    x = torch.zeros(3, 3000, 1)
    x[0, 100:] = x[1, 50:] = x[2] = torch.nan
    x[1, 7] = torch.nan
    alone = [float(model.log_prob(row[:n].unsqueeze(0)).detach()) for row, n in zip(x, (100, 50, 1), strict=True)]
    assert model.log_prob(x).tolist() == pytest.approx(alone, abs=1e-3)
    assert alone[2] == 0.0


def test_states_whose_variance_overflows_are_named() -> None:
    model = LinearGaussianStateSpace(2, 1)
    model.dynamics, model.loadings = [[1.0, 0.0], [0.0, 1.5]], [[1.0, 0.0]]
    short, long = torch.zeros(1, 80, 1), torch.zeros(1, 300, 1)
    assert bool(model.log_prob(short).isfinite().all())
    uses: list[Callable[[], Any]] = [
        lambda: model.log_prob(long),
        lambda: model.posterior(long),
        lambda: model.filter(long),
        lambda: model.smooth(long),
        lambda: model.impute(torch.cat([long, long.new_full((1, 1, 1), torch.nan)], 1)),
        lambda: model.forecast(short, 300),
        lambda: model.sample(2, 300),
    ]
    with torch.no_grad():
        for use in uses:
            with pytest.raises(InvalidArgument, match=r"dynamics: .* overflow at frame \d+, .* radius of 1\.5"):
                use()


def test_unstable_dynamics_are_finite() -> None:
    """What explodes is legal as long as it is short; padding, where it would go on, is never computed."""
    model = model_of(2, 2)
    model.dynamics = [[3.0, 1.0], [0.0, 2.5]]
    x = model.sample(2, 8, generator=rng(0))
    lengths = torch.tensor([8, 400])
    long = torch.cat([x, torch.zeros(2, 392, 2).double()], 1)
    long[1] = 0.0
    with torch.no_grad():
        stats = model.e_step(model.batch(long, lengths=lengths))
        assert all(bool(leaf.isfinite().all()) for leaf in stats.leaves())
        close(model.log_prob(long, lengths=lengths)[0], model.log_prob(x[:1])[0], rtol=1e-9)
        # A state that nothing is seen of is as the dynamics leave it.
        model.loadings = torch.zeros(2, 2)
        assert bool(model.posterior(x).covariance_matrix.isfinite().all())


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: LinearGaussianStateSpace(0, 1), r"^n_latents: expected a whole number of at least 1, got 0"),
    (lambda: LinearGaussianStateSpace(1, 1, -1), r"^n_inputs: "),
    (lambda: LinearGaussianStateSpace(1, 1, inputs="x"), r"^inputs: expected one of"),  # pyright: ignore
    (lambda: LinearGaussianStateSpace(1, 1, covariance_type="tied"), r"^covariance_type: "),  # pyright: ignore
    (lambda: LinearGaussianStateSpace(1, 1).freeze("means"), r"^freeze: "),
    (lambda: LinearGaussianStateSpace(1, 1).freeze(), r"^freeze: expected a name"),
    (lambda: LinearGaussianStateSpace(2, 1).freeze("dynamics", mask=[True]), r"^mask: expected shape \[2, 2\]"),
    (lambda: LinearGaussianStateSpace(2, 1).freeze("initial_mean", mask=[True]), r"^mask: "),
    (lambda: setattr(model_of(), "dynamics", torch.eye(3)), r"^dynamics: expected shape \[2, 2\], got \[3, 3\]"),
    (lambda: setattr(model_of(), "loadings", torch.full((3, 2), torch.nan)), r"^loadings: expected finite"),
    (lambda: setattr(model_of(), "initial_mean", [0.0]), r"^initial_mean: expected shape \[2\]"),
    (
        lambda: setattr(model_of(), "dynamics_covariance", [[1.0, 2.0], [2.0, 1.0]]),
        r"^dynamics_covariance: expected positive definite",
    ),
    (
        lambda: setattr(model_of(), "observation_covariance", torch.eye(2)),
        r"^observation_covariance: expected shape \[3, 3\]",
    ),
    (
        lambda: setattr(model_of(), "initial_covariance", [[1.0, 0.5], [0.0, 1.0]]),
        r"^initial_covariance: expected symmetric",
    ),
    (lambda: model_of().log_prob(torch.zeros(4, 2)), r"^data: expected 3 features"),
    (lambda: model_of().batch(torch.zeros(4, 3), inputs=torch.zeros(4, 1)), r"^inputs: expected 0 columns"),
    (lambda: model_of(2, 3, 1).log_prob(torch.zeros(4, 3)), r"^inputs: expected 1 columns of covariates, got none"),
    (lambda: model_of().e_step(Batch(torch.zeros(1, 4, 3)), "hard"), r"^e_step: expected 'soft'"),
    (lambda: model_of().forecast(torch.zeros(4, 3), 0), r"^steps: "),
    (lambda: model_of(2, 3, 1).sample(2, 4), r"^inputs: expected shape \[2, 4, 1\], got none"),
    (lambda: model_of().sample(2), r"^length: "),
    (lambda: torchem.fit(model_of(3, 1), torch.zeros(2, 1), progress=False), r"^data: expected at least as many"),
    (
        lambda: torchem.variational(model_of().freeze("dynamics", mask=[[True, False], [False, False]])),
        r"^mask: expected whole components of a posterior",
    ),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(BAD)))
def test_bad_input(place: int) -> None:
    call, message = BAD[place]
    with as_users_run_it(), pytest.raises((InvalidArgument, InvalidType), match=message):
        call()
