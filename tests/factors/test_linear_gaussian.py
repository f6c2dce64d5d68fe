"""Linear regressions with normal noise, beyond the laws."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases, test_factor
from tests.laws.cases import FactorCase, close, close_dict
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, LinearGaussian
from torchem.factors.linear_gaussian import _example
from torchem.stats import Stats

KINDS = ("full", "tied", "diag", "spherical")
every_kind = pytest.mark.parametrize("kind", KINDS)


def dense(factor: LinearGaussian) -> Tensor:
    """Covariance matrices ``[K, D, D]``."""
    root = factor.structure.dense(factor.scale.detach(), factor.n_components, factor.n_outputs)
    return root @ root.mT


def regression(n: int, k: int, m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Covariates with an intercept, observations of K regressions, and their states."""
    u, weight = cases.randn(n, m, seed=seed), cases.randn(k, d, m, seed=seed + 1)
    u[:, 0] = 1.0
    z = torch.arange(n) % k
    return u, (weight[z] @ u.unsqueeze(-1)).squeeze(-1) + 0.3 * cases.randn(n, d, seed=seed + 2), z


# ---- offsets ------------------------------------------------------------------------------------------------------


@every_kind
def test_an_offset_is_taken_off(kind: str) -> None:
    factor, batch = _example(kind)  # pyright: ignore
    offset = 3 * cases.randn(30, seed=7)
    holes = torch.rand(30, 3, generator=torch.Generator().manual_seed(1)) < 0.3
    for x in (batch.x, batch.x.masked_fill(holes, torch.nan)):
        plain = batch.with_x(x)
        moved = replace(plain.with_x(x + offset[:, None]), offset=offset)
        close(factor.log_prob(moved), factor.log_prob(plain))
        expected = cases.soft(30, 3)
        close_dict(factor.stats(moved, expected), factor.stats(plain, expected))
        for a, b in zip(factor.conditional(moved), factor.conditional(plain), strict=True):
            close(a - offset[:, None, None] * (a != b), b)
        seen = moved.x.nan_to_num()
        assert torch.equal(torch.where(moved.x.isnan(), 0.0, factor.conditional(moved)[0][:, 0]), seen)
    z = torch.arange(30) % 3
    draws = [factor.sample(z, b, torch.Generator().manual_seed(3)) for b in (moved, plain)]
    close(draws[0], draws[1] + offset[:, None])
    done = [factor.complete(b, z, torch.Generator().manual_seed(3)) for b in (moved, plain)]
    close(done[0], done[1] + offset[:, None])
    close(factor.cdf(moved).nan_to_num(), factor.cdf(plain).nan_to_num())
    close(factor.moments(moved)[0], factor.moments(plain)[0] + offset[:, None, None])


def test_offsets_in_a_mixture_of_experts() -> None:
    u, x, _ = regression(120, 2, 2, 1)
    offset = 5 * cases.randn(120, seed=9)
    found = []
    for data, known in ((x, None), (x + offset[:, None], offset)):
        gate = torchem.factors.SoftmaxRegression(2, 2)
        model = torchem.Mixture(gate, LinearGaussian(2, 2, 1)).double()
        model.component.weight = [[[1.0, 0.0]], [[-1.0, 0.5]]]
        result = torchem.fit(model, data, inputs=u, offset=known, init=None, max_iter=8, tol=0, progress=False)
        mean = model.predict(u, offset=known).mean
        draw = model.sample(120, inputs=u, offset=known, generator=torch.Generator().manual_seed(0))
        known = torch.zeros(120) if known is None else known
        found.append((torch.tensor(result.history), mean - known[:, None], draw - known[:, None]))
    for plain, moved in zip(*found, strict=True):
        close(moved, plain, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["inputs", "offset", "trials"])
def test_what_no_factor_reads_is_refused(name: str) -> None:
    given: dict[str, Any] = {name: torch.ones(9)}
    model, x = torchem.GaussianMixture(2, 1), torch.randn(9, 1)
    for act in (
        lambda: torchem.fit(model, x, **given, progress=False), lambda: model.log_prob(x, **given),
        lambda: model.sample(9, **given),
        lambda: torchem.fit(torchem.GaussianHMM(2, 1), x, **given, progress=False),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=rf"^{name}: expected none: no factor of this Gaussian"):
            act()


class Reader(torchem.factors.Gaussian):
    """What a user's own family reads is not known."""


def test_what_a_users_family_may_read_is_taken() -> None:
    model = torchem.Mixture(Categorical(2), Reader(2, 1))
    assert model.log_prob(torch.zeros(9, 1), inputs=torch.ones(9)).shape == (9,)


# ---- the density --------------------------------------------------------------------------------------------------


@every_kind
def test_density_is_the_normal_around_the_regression(kind: str) -> None:
    factor, batch = _example(kind)  # pyright: ignore
    assert batch.u is not None
    mean = torch.einsum("kdm,nm->nkd", factor.weight, batch.u)
    normal = torch.distributions.MultivariateNormal(mean, dense(factor))
    close(factor.log_prob(batch), normal.log_prob(batch.x.unsqueeze(1)))
    center, variance = factor.moments(batch)
    close(center, mean)
    close(variance, dense(factor).diagonal(dim1=-2, dim2=-1).unsqueeze(0))


# ---- missing outputs ----------------------------------------------------------------------------------------------


def gappy(kind: str) -> tuple[LinearGaussian, Batch, Tensor]:
    factor, batch = _example(kind)  # pyright: ignore
    holes = cases.rand(30, 3, seed=3) < 0.35
    holes[0], holes[1] = True, False
    return factor, batch, holes


@every_kind
def test_what_was_observed_of_outputs_and_completed_moments(kind: str) -> None:
    """Row by row: marginal normals, and the textbook's regression of what is missing."""
    factor, batch, holes = gappy(kind)
    assert batch.u is not None
    masked = batch.with_x(batch.x.masked_fill(holes, torch.nan))
    value, expected = factor.log_prob(masked).detach(), cases.soft(30, 3)
    mean, cov = torch.einsum("kdm,nm->nkd", factor.weight.detach(), batch.u), dense(factor)
    count, xx, ux = torch.zeros(3).double(), torch.zeros(3, 3, 3).double(), torch.zeros(3, 2, 3).double()
    for n, k in itertools.product(range(30), range(3)):
        o, m, x, left = ~holes[n], holes[n], batch.x[n].clone(), torch.zeros(3, 3).double()
        if not o.any():
            assert float(value[n, k]) == 0
            continue
        normal = torch.distributions.MultivariateNormal(mean[n, k, o], cov[k][o][:, o])
        close(value[n, k], normal.log_prob(x[o]))
        slope = torch.linalg.solve(cov[k][o][:, o], cov[k][o][:, m]).mT
        x[m] = mean[n, k, m] + slope @ (x[o] - mean[n, k, o])
        left[m.outer(m)] = (cov[k][m][:, m] - slope @ cov[k][o][:, m]).flatten()
        count[k] += expected[n, k]
        xx[k] += expected[n, k] * (x.outer(x) + left)
        ux[k] += expected[n, k] * batch.u[n].outer(x)
    stats = factor.stats(masked, expected)
    close(stats["count"], count)
    close(stats["ux"], ux)
    diagonal = xx.diagonal(dim1=-2, dim2=-1)
    shapes = {"full": xx, "tied": xx.sum(0), "diag": diagonal, "spherical": diagonal.sum(-1)}
    close(stats["xx"].detach(), shapes[kind])
    # Fisher's identity: the slope of Q is that of the likelihood.
    slopes = torch.autograd.grad((expected * factor.log_prob(masked)).sum(), list(factor.parameters()))
    inner = factor.expected_log_prob(stats.map(Tensor.detach))
    for a, b in zip(slopes, torch.autograd.grad(inner, list(factor.parameters())), strict=True):
        close(a, b)


@every_kind
@pytest.mark.parametrize("bayes", [False, True])
def test_em_with_missing_outputs_climbs_and_finds_the_lines(kind: str, bayes: bool) -> None:
    u, x, _ = regression(300, 2, 2, 3)
    x = x.masked_fill(cases.rand(300, 3, seed=5) < 0.25, torch.nan)
    model = torchem.Mixture(Categorical(2), LinearGaussian(2, 2, 3, kind)).double()  # pyright: ignore
    model = torchem.variational(model) if bayes else model
    result = torchem.fit(model, x, inputs=u, seed=0, restarts=2, max_iter=40, tol=1e-4, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    truth = cases.randn(2, 3, 2, seed=1)
    found = model.component.weight.detach()  # pyright: ignore
    found = found if (found[0] - truth[0]).norm() < (found[0] - truth[1]).norm() else found.flip(0)
    close(found, truth, rtol=0, atol=0.15)
    nothing = model.batch(torch.full_like(x[:2], torch.nan), inputs=u[:2])
    close(model.log_prob(nothing), torch.zeros(2).double(), atol=1e-12)


@every_kind
def test_no_missing_output_is_the_complete_path_bit_for_bit(kind: str) -> None:
    factor, batch, holes = gappy(kind)
    kernel = factor.kernel()
    kernel.log_potential(batch.with_x(batch.x.masked_fill(holes, torch.nan)))
    assert torch.equal(kernel.log_potential(batch), factor.log_prob(batch))


@pytest.mark.parametrize(("kind", "d"), list(itertools.product(KINDS, (1, 2))))
def test_density_integrates_to_one_whatever_the_covariates(kind: str, d: int) -> None:
    factor = LinearGaussian(2, 2, d, kind).double()  # pyright: ignore
    factor.weight = cases.randn(2, d, 2)
    axis = torch.linspace(-12, 12, 400, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * d).reshape(-1, d)
    for u in cases.randn(3, 2, seed=4):
        value = factor.log_prob(Batch(points, u=u.expand(len(points), 2)))
        total = value.exp().sum(0) * float(axis[1] - axis[0]) ** d
        close(total, torch.ones(2), rtol=1e-6)


def test_log_prob_is_differentiable_in_covariates() -> None:
    factor, batch = _example("full")
    batch, u = batch[:4], batch.u[:4].clone().requires_grad_()  # pyright: ignore
    assert torch.autograd.gradcheck(lambda u: factor.log_prob(Batch(batch.x, u=u)), (u,))


@every_kind
def test_samples_have_the_moments(kind: str) -> None:
    factor, _ = _example(kind)  # pyright: ignore
    u = torch.tensor([[1.0, -0.7]], dtype=torch.float64)
    z = torch.arange(60_000) % 3
    rows = Batch(torch.empty(len(z), 3), u=u.expand(len(z), 2))
    x = factor.sample(z, rows, cases.rng(3)).detach()
    mean, variance = (value.detach() for value in factor.moments(Batch(torch.zeros(1, 3), u=u)))
    for k in range(3):
        close(x[z == k].mean(0), mean[0, k], atol=0.05, rtol=0)
        close(x[z == k].var(0), variance[0, k], rtol=0.05)


# ---- the M-step ---------------------------------------------------------------------------------------------------


@every_kind
def test_m_step_is_weighted_least_squares(kind: str) -> None:
    factor = LinearGaussian(3, 3, 2, kind).double()  # pyright: ignore
    u, x, _ = regression(60, 3, 3, 2)
    expected = cases.soft(60, 3)
    best = test_factor.maximized(factor, factor.stats(Batch(x, u=u), expected))
    scatters = []
    for k in range(3):
        root = expected[:, k].sqrt().unsqueeze(-1)
        weight = torch.linalg.lstsq(root * u, root * x).solution.mT
        close(best.weight[k], weight)  # pyright: ignore
        residual = root * (x - u @ weight.mT)
        scatters.append(residual.mT @ residual)
    scatter, mass = torch.stack(scatters), expected.sum(0)
    pooled = {
        "full": scatter / mass[:, None, None],
        "tied": scatter.sum(0) / mass.sum(),
        "diag": scatter.diagonal(dim1=-2, dim2=-1) / mass[:, None],
        "spherical": scatter.diagonal(dim1=-2, dim2=-1).sum(-1) / mass / 2,
    }
    close(best.covariances, pooled[kind])  # pyright: ignore


def collinear(n: int) -> Tensor:
    """An intercept, a covariate, a copy of it in other units, and one that is never seen."""
    v = cases.randn(n, seed=5)
    return torch.stack([torch.ones_like(v), v, 1e4 * v - 2, torch.zeros_like(v)], -1)


def test_collinear_covariates_reach_the_optimum_and_keep_what_nothing_tells() -> None:
    u = collinear(40)
    x = cases.randn(40, 2) + u[:, 1:2]
    factor = LinearGaussian(2, 4, 2).double()
    factor.weight = start = cases.randn(2, 2, 4, seed=8)
    expected = cases.soft(40, 2)
    stats = factor.stats(Batch(x, u=u), expected)
    best = test_factor.maximized(factor, stats)
    assert isinstance(best, LinearGaussian)
    close(best.weight[..., 3], start[..., 3], rtol=0, atol=0)
    for k in range(2):
        root = expected[:, k].sqrt().unsqueeze(-1)
        found = root * (x - u @ best.weight[k].mT)
        least = root * x - root * u[:, :2] @ torch.linalg.lstsq(root * u[:, :2], root * x).solution
        close(found, least, rtol=1e-7, atol=1e-7)
    again = copy.deepcopy(best).maximize(stats)
    close(again["coefficient"], best.weight, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_rows_than_covariates(rows: int) -> None:
    factor, batch = LinearGaussian(2, 5, 1).double(), Batch(cases.randn(rows, 1), u=cases.randn(rows, 5, seed=1))
    best = test_factor.maximized(factor, factor.stats(batch, torch.ones(rows, 2, dtype=torch.float64)))
    assert isinstance(best, LinearGaussian)
    close(best.moments(batch)[0], batch.x.unsqueeze(1).expand(-1, 2, -1), atol=1e-9)
    close(best.covariances, torch.full((2, 1, 1), 1e-6), rtol=1e-6)
    assert bool(best.degenerate().all())  # pyright: ignore


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_far_from_the_origin(offset: float, dtype: torch.dtype) -> None:
    """Statistics of raw values in float64 find what centred data say, from float32 input too."""
    v, noise = cases.randn(500, 1, seed=2), cases.randn(500, 1, seed=3)
    v, x = (v + offset).to(dtype).double(), (0.5 * v + 0.1 * noise + offset).to(dtype).double()
    ones = torch.ones_like(v)
    exact = torch.linalg.lstsq(torch.cat([ones, v - offset], -1), x - offset).solution[:, 0]
    residual = x - offset - exact[0] - exact[1] * (v - offset)
    factor = LinearGaussian(1, 2, 1).to(dtype)
    batch = Batch(x.to(dtype), u=torch.cat([ones, v], -1).to(dtype))
    best = test_factor.maximized(factor, factor.stats(batch, torch.ones(500, 1, dtype=dtype)))
    assert isinstance(best, LinearGaussian)
    close(best.weight[0, 0, 1], exact[1], rtol=1e-5)
    close(best.covariances.flatten(), residual.square().mean(0), rtol=1e-4)


def test_floor_is_relative_to_the_data() -> None:
    factor = LinearGaussian(1, 1, 2, "full", covariance_floor=1e-3).double()
    scale = torch.tensor([1e4, 1e-4], dtype=torch.float64)
    u = cases.randn(30, 1)
    batch = Batch(u * scale, u=u)  # an exact fit

    class Moments:
        mean, variance = batch.x.mean(0), batch.x.var(0, unbiased=False)
        low, high = batch.x.amin(0), batch.x.amax(0)

    factor.prepare(Moments())
    best = test_factor.maximized(factor, factor.stats(batch, torch.ones(30, 1, dtype=torch.float64)))
    close(best.covariances[0], torch.diag(1e-3 * Moments.variance), rtol=1e-6)  # pyright: ignore
    assert bool(best.degenerate().all())  # pyright: ignore


@every_kind
def test_fit_is_equivariant_to_units(kind: str) -> None:
    a, b = 1e6, torch.tensor([1.0, 1e-5], dtype=torch.float64)
    factor, batch = _example(kind)  # pyright: ignore
    expected = cases.soft(30, 3)
    best = test_factor.maximized(factor, factor.stats(batch, expected))
    scaled = Batch(batch.x * a, u=batch.u * b)  # pyright: ignore
    factor.unit = factor.unit * a * a
    other = test_factor.maximized(factor, factor.stats(scaled, expected))
    close(other.weight * b / a, best.weight, rtol=1e-8)  # pyright: ignore
    close(other.covariances / a**2, best.covariances, rtol=1e-8)  # pyright: ignore


# ---- coefficients in common ---------------------------------------------------------------------------------------


def shared_cases() -> dict[str, tuple]:
    return {f"{kind}-{shared}": (kind, shared) for kind in KINDS for shared in ((0,), (1,), (0, 1))}


@pytest.mark.parametrize(("kind", "shared"), list(shared_cases().values()), ids=list(shared_cases()))
@pytest.mark.parametrize("hard", [False, True])
def test_common_coefficients_keep_the_laws(kind: str, shared: tuple[int, ...], hard: bool, device) -> None:
    def build() -> FactorCase:
        factor, batch = _example(kind, shared)  # pyright: ignore
        expected = cases.soft(30, 3)
        return FactorCase(factor, batch, (expected == expected.amax(-1, keepdim=True)).double() if hard else expected)

    test_factor.test_shapes(build, device)
    test_factor.test_more_observation_axes(build, device)
    test_factor.test_no_rows_are_no_statistics(build, device)
    test_factor.test_gradient_of_the_expected_density_is_that_of_q(build, device)
    test_factor.test_maximize_is_stationary_and_beats_perturbations(build, device)
    test_factor.test_maximize_is_pure(build, device)
    test_factor.test_maximize_under_vmap_and_grad(build, device)
    test_factor.test_empty_components_keep_their_parameters(build, device)
    test_factor.test_kernel_equals_log_prob_and_stats(build, device)
    test_factor.test_replicas_equal_each_alone(build, device)
    test_factor.test_float32_near_float64(build, device)
    test_factor.test_copies_through_state_dict(build, device)
    weight = build().factor.weight  # pyright: ignore
    for m in shared:
        assert bool((weight[..., m] == weight[:1, :, m]).all())


def test_common_coefficients_under_one_variance_are_a_regression_on_dummies() -> None:
    u, x, z = regression(60, 3, 3, 1)
    factor = LinearGaussian(3, 3, 1, "tied", shared=(1, 2)).double()
    hard = torch.nn.functional.one_hot(z, 3).double()
    best = test_factor.maximized(factor, factor.stats(Batch(x, u=u), hard))
    assert isinstance(best, LinearGaussian)
    solution = torch.linalg.lstsq(torch.cat([hard, u[:, 1:]], -1), x).solution[:, 0]
    close(best.weight[:, 0, 0], solution[:3])
    close(best.weight[:, 0, 1:], solution[3:].expand(3, 2))


def test_all_coefficients_in_common() -> None:
    u, x, _ = regression(50, 1, 3, 2)
    factor = LinearGaussian(2, 3, 2, "diag", shared="all").double()
    assert factor.shared == (0, 1, 2)
    assert [name for name, _ in factor.named_parameters()] == ["common", "scale"]
    best = test_factor.maximized(factor, factor.stats(Batch(x, u=u), cases.soft(50, 2)))
    grads = torch.autograd.grad(best.expected_log_prob(best.stats(Batch(x, u=u), cases.soft(50, 2))), best.common)  # pyright: ignore
    assert float(grads[0].abs().max()) < 1e-8
    assert factor.n_parameters() == 3 * 2 + 2 * 2


def test_freezing_a_component_keeps_what_it_has_in_common() -> None:
    factor, batch = _example("full", (1,))
    before = factor.weight.detach().clone()
    assert factor.n_parameters() == 3 * 3 + 3 + 3 * 6
    factor.freeze("weight", mask=torch.tensor([False, True, False]))
    assert factor.n_parameters() == 2 * 3 + 3 * 6
    best = test_factor.maximized(factor, factor.stats(batch, cases.soft(30, 3)))
    assert isinstance(best, LinearGaussian)
    close(best.weight[..., 1], before[..., 1], rtol=0, atol=0)
    close(best.weight[1], before[1], rtol=0, atol=0)
    assert float((best.weight[0, :, 0] - before[0, :, 0]).detach().abs().max()) > 1e-3
    free = factor.unfreeze("weight").maximize(factor.stats(batch, cases.soft(30, 3)))
    assert float((free["common"] - factor.common).detach().abs().max()) > 1e-3  # pyright: ignore
    factor.freeze("weight")
    close_dict(
        {n: v for n, v in factor.maximize(factor.stats(batch, cases.soft(30, 3))).items() if n != "scale"},
        {n: v for n, v in factor.named_parameters() if n != "scale"},
    )


@every_kind
@pytest.mark.parametrize("shared", [(), (1,)])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_m_step_by_forward_and_reverse_derivatives(kind: str, shared: tuple[int, ...]) -> None:
    factor, batch = _example(kind, shared)  # pyright: ignore
    stats = factor.stats(batch, cases.soft(30, 3)).map(torch.Tensor.detach)
    step = lambda leaves: factor.maximize(stats.like(leaves))  # noqa: E731
    reverse, forward = torch.func.jacrev(step)(dict(stats)), torch.func.jacfwd(step)(dict(stats))
    for name in reverse:
        for leaf in stats:
            close(forward[name][leaf], reverse[name][leaf], rtol=1e-8, atol=1e-10)


# ---- bookkeeping --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shared", [(), (1,)])
def test_select_and_configuration(kind: str, shared: tuple[int, ...]) -> None:
    factor, batch = _example(kind, shared)  # pyright: ignore
    keep = torch.tensor([True, False, True])
    if kind != "tied":
        factor.freeze("covariances", mask=torch.tensor([True, False, False]))
    small = factor.select(keep)
    close(small.log_prob(batch), factor.log_prob(batch)[:, keep])
    assert small.frozen("scale") is None or small.frozen("scale").tolist() == [True, False]  # pyright: ignore
    again = LinearGaussian(**factor.config()).double()
    again.load_state_dict({name: value for name, value in factor.state_dict().items() if "frozen" not in name})
    close(again.log_prob(batch), factor.log_prob(batch), rtol=0, atol=0)


def test_views_are_assignable() -> None:
    factor = LinearGaussian(2, 3, 2, "full", shared=(1,))
    weight = cases.randn(2, 2, 3)
    with pytest.raises(InvalidArgument, match="shared inputs"):
        factor.weight = weight
    weight[1, :, 1] = weight[0, :, 1]
    factor.weight, factor.covariances = weight.numpy(), np.tile(2 * np.eye(2), (2, 1, 1))
    close(factor.weight, weight.float())
    close(factor.covariances, 2 * torch.eye(2).expand(2, 2, 2), rtol=1e-6)
    for wrong, match in ((weight[0], "weight: expected shape"), (weight * torch.nan, "finite")):
        with pytest.raises(InvalidArgument, match=match):
            factor.weight = wrong
    for wrong in (torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]).expand(2, 2, 2)):
        with pytest.raises(InvalidArgument, match="covariances"):
            factor.covariances = wrong


@pytest.mark.parametrize("u", [None, torch.zeros(5, 3)])
def test_missing_covariates_are_named(u: Tensor | None) -> None:
    factor, batch = LinearGaussian(2, 2, 1), Batch(torch.zeros(5, 1), u=u)
    for call in (
        factor.check, factor.log_prob, factor.moments, lambda b: factor.stats(b, torch.ones(5, 2)),
        lambda b: factor.sample(torch.zeros(5).long(), b),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match=r"inputs: expected covariates \[N, 2\]"):
            call(batch)
    with pytest.raises(InvalidArgument, match="inputs"):
        factor.sample(torch.zeros(5).long())
    with pytest.raises(InvalidArgument, match="data: expected 1 features"):
        factor.check(Batch(torch.zeros(5, 2), u=torch.zeros(5, 2)))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n_inputs": 0}, "n_inputs"),
        ({"shared": (3,)}, "shared"),
        ({"shared": (1, 1)}, "shared"),
        ({"covariance_floor": -1.0}, "covariance_floor"),
    ],
)
def test_bad_options(arguments: dict, match: str) -> None:
    with pytest.raises(InvalidArgument, match=match):
        LinearGaussian(**{"n_components": 2, "n_inputs": 2, "n_outputs": 1, **arguments})


def test_tied_covariance_freezes_whole() -> None:
    with pytest.raises(InvalidArgument, match="mask"):
        LinearGaussian(2, 2, 1, "tied").freeze("covariances", mask=torch.tensor([True, False]))


# ---- in a model ---------------------------------------------------------------------------------------------------


def crossing_lines(n: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.tensor([[[1.0, 2.0]], [[0.0, -1.5]], [[-1.0, 0.3]]], dtype=torch.float64)
    u = torch.stack([torch.ones(n), 2 * cases.randn(n, seed=1)], -1).double()
    z = torch.arange(n) % 3
    return u, (weight[z] @ u.unsqueeze(-1)).squeeze(-1) + 0.2 * cases.randn(n, 1, seed=2), weight


def test_mixture_of_regressions_finds_the_lines_and_never_falls() -> None:
    u, x, weight = crossing_lines()
    model = torchem.Mixture(Categorical(3), LinearGaussian(3, 2, 1)).double()
    result = torchem.fit(model, x, inputs=u, restarts=5, seed=0, tol=1e-8, progress=False)
    assert result.converged
    history = torch.as_tensor(result.history)
    assert bool((history.diff() >= -1e-9 * history.abs().max()).all())
    found = model.component.weight.detach()  # pyright: ignore
    close(found[found[:, 0, 1].argsort()], weight[weight[:, 0, 1].argsort()], atol=0.1, rtol=0)


def test_bound_is_the_likelihood_where_it_was_taken() -> None:
    u, x, _ = crossing_lines(90)
    model = torchem.Mixture(Categorical(3), LinearGaussian(3, 2, 1, "spherical", shared=(1,))).double()
    model.component.weight = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]], [[2.0, 1.0]]])  # pyright: ignore
    batch, last = Batch(x, u=u), -torch.inf
    for _ in range(30):
        stats = model.e_step(batch)
        value = float(stats["log_likelihood"].detach())
        close(model.bound(stats), stats["log_likelihood"])
        assert value >= last - 1e-9 * abs(value)
        last = value
        model.m_step(stats)


def test_statistics_hold_no_more_than_moments() -> None:
    factor, batch = _example("tied")
    stats = factor.stats(batch, cases.soft(30, 3))
    assert isinstance(stats, Stats)
    shapes = {name: tuple(leaf.shape) for name, leaf in stats.items()}
    assert shapes == {"count": (3,), "dof": (3,), "xx": (3, 3), "ux": (3, 2, 3), "uu": (3, 2, 2)}
    assert stats.shared == {"xx"}
