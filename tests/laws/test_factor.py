"""The laws of a factor, for every factor that exists."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import FactorCase, close, close_dict, close_stats, every_factor
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factor import Conjugate, Factor
from torchem.factors import (
    Categorical,
    Categoricals,
    Censored,
    Exponential,
    Gamma,
    Gaussian,
    Multinomial,
    NegativeBinomial,
    Stacked,
    StudentT,
    Uniform,
    VonMises,
    VonMisesFisher,
    ZeroInflated,
)
from torchem.factors._bounded import Bounded
from torchem.stats import Stats


def parameters(factor: Factor) -> dict[str, Tensor]:
    return dict(factor.named_parameters())


def learns(name: str) -> bool:
    return not name.startswith("Uniform")  # has no parameters


def objective(factor: Factor, values: dict[str, Tensor], stats: Stats) -> Tensor:
    """Q at other parameter values; the pure form that derivatives need."""

    class Shell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = factor

        def forward(self) -> Tensor:
            return self.inner.expected_log_prob(stats)

    return torch.func.functional_call(Shell(), {f"inner.{k}": v for k, v in values.items()}, ())


def expected_sum(log_prob: Tensor, expected: Tensor) -> Tensor:
    return torch.where(expected > 0, log_prob, 0.0).mul(expected).sum()


def floored(factor: Factor) -> bool:
    degenerate = factor.degenerate()
    return degenerate is not None and bool(degenerate.any())


def maximized(factor: Factor, stats: Stats) -> Factor:
    best = copy.deepcopy(factor)
    cases.assign(best, factor.maximize(stats))
    return best


def mixed_replicas(factor: Factor, count: int = 3) -> Factor:
    """Replicas of different parameters, valid ones: those of M-steps under different expectations."""
    case = copy.deepcopy(factor)
    for module in case.modules():
        if isinstance(module, Factor):
            module.replicate(count)
    for parameter in case.parameters():
        shift = 0.1 * cases.randn(*parameter.shape, seed=21).to(parameter)
        parameter.data = parameter.data + shift * parameter.data.abs().clamp(min=1e-3)
    return case


# ---- shapes and statistics ----------------------------------------------------------------------------------------


def float64_and_component_first(stats: Stats, k: int) -> None:
    for name, leaf in stats.items():
        if isinstance(leaf, Stats):
            float64_and_component_first(leaf, k)
            continue
        assert leaf.dtype == torch.float64, name
        assert name in stats.shared or leaf.shape[0] == k, name


@every_factor()
def test_shapes(build, device: torch.device) -> None:
    case = build().to(device)
    factor, batch, expected = case.factor, case.batch, case.expected
    n, k = expected.shape
    assert factor.n_components is not None
    assert factor.n_components ** (factor.memory + 1) == k
    value = factor.log_prob(batch)
    assert value.shape == (n, k)
    assert value.dtype == factor.dtype
    assert not value.isnan().any()
    stats = factor.stats(batch, expected)
    float64_and_component_first(stats, k)
    new = factor.maximize(stats)
    assert new.keys() == parameters(factor).keys()
    for name, value in new.items():
        old = factor.get_parameter(name)
        assert value.shape == old.shape
        assert value.dtype == old.dtype
        assert value.device == old.device
        assert value.isfinite().all(), name
    assert factor.expected_log_prob(stats).shape == ()


@every_factor(only=lambda name: "N1" not in name and "one-row" not in name)
def test_more_observation_axes(build, device: torch.device) -> None:
    case = build().to(device)
    n = len(case.batch) // 2 * 2
    batch, expected = case.batch[:n], case.expected[:n]
    folded = batch.map(lambda value: value.unflatten(0, (2, n // 2)))
    grid = expected.unflatten(0, (2, n // 2))
    close(case.factor.log_prob(folded).flatten(0, 1), case.factor.log_prob(batch))
    close_stats(case.factor.stats(folded, grid), case.factor.stats(batch, expected))
    kernel = case.factor.kernel()
    close(kernel.log_potential(folded).flatten(0, 1), case.factor.log_prob(batch))
    kernel.collect(folded, grid)
    close_stats(kernel.stats(), case.factor.stats(batch, expected))


@every_factor()
def test_statistics_are_additive_in_observations_and_linear_in_weights(build, device: torch.device) -> None:
    case = build().to(device)
    factor, batch, expected = case.factor, case.batch, case.expected
    cut = len(batch) // 3
    whole = factor.stats(batch, expected)
    close_stats(factor.stats(batch[:cut], expected[:cut]) + factor.stats(batch[cut:], expected[cut:]), whole)
    other = cases.soft(*expected.shape, seed=9).to(device)
    both = factor.stats(batch, 0.25 * expected + 3.0 * other)
    close_stats(whole * 0.25 + factor.stats(batch, other) * 3.0, both)


@every_factor()
def test_weight_zero_is_absent_and_weight_two_is_twice(build, device: torch.device) -> None:
    case = build().to(device)
    factor, batch, expected = case.factor, case.batch, case.expected
    keep = torch.arange(len(batch), device=device) % 3 != 1
    weight = keep.to(expected).unsqueeze(-1)
    close_stats(factor.stats(batch, expected * weight), factor.stats(batch[keep], expected[keep]))
    twice = batch.map(lambda value: torch.cat([value, value[keep]]))
    close_stats(
        factor.stats(batch, expected * (1 + weight)), factor.stats(twice, torch.cat([expected, expected[keep]]))
    )


@every_factor()
def test_no_rows_are_no_statistics(build, device: torch.device) -> None:
    case = build().to(device)
    none = case.factor.stats(case.batch[:0], case.expected[:0])
    whole = case.factor.stats(case.batch, case.expected)
    close_stats(none + whole, whole)
    for name, value in case.factor.maximize(none).items():
        # Nothing was seen: nothing may move.
        close(value, case.factor.get_parameter(name), rtol=1e-12, atol=0)


# ---- the density --------------------------------------------------------------------------------------------------


def support(factor: Factor, batch: Batch) -> tuple[Batch, Tensor] | None:
    """Points and the logarithms of their volumes that cover the space, where that is feasible."""
    d = batch.x.shape[-1]
    if isinstance(factor, Categorical):
        return Batch(torch.arange(factor.shape[-1]).unsqueeze(-1)), torch.zeros(factor.shape[-1])
    if isinstance(factor, Multinomial):
        # All rows of six.
        rows = torch.cartesian_prod(*[torch.arange(7.0, dtype=torch.float64)] * d)
        return Batch(rows[rows.sum(-1) == 6]), torch.zeros(math.comb(6 + d - 1, d - 1))
    if isinstance(factor, Categoricals):
        points = torch.cartesian_prod(*map(torch.arange, factor.sizes))
        return Batch(points.double()), torch.zeros(len(points))
    if isinstance(factor, VonMisesFisher):
        return _sphere()
    if d > 2 or batch.u is not None:
        return None
    if isinstance(factor, (Bounded, ZeroInflated)) and not factor.factor.unwrapped.discrete:
        return _pieces([_measure(factor, column) for column in range(d)])
    if isinstance(factor, NegativeBinomial):
        axis = torch.arange(300.0, dtype=torch.float64)
        return _pieces([(axis, torch.zeros(300))] * d)
    if isinstance(factor, Gaussian):
        return _normal_grid(factor, d)
    if isinstance(factor, VonMises):
        # An even grid over whole periods is exact to rounding.
        t = torch.arange(200, dtype=torch.float64) * (2 * math.pi / 200)
        return Batch(torch.cartesian_prod(t, t)), torch.full(
            (40_000,), 2 * math.log(2 * math.pi / 200), dtype=torch.float64
        )
    if isinstance(factor, (Stacked, Uniform)):
        # Cells about whose edges the sides of the boxes lie.
        t = (torch.arange(-300, 300, dtype=torch.float64) + 0.5) / 25
        return Batch(torch.cartesian_prod(t, t)), torch.full((360_000,), -2 * math.log(25), dtype=torch.float64)
    if isinstance(factor, StudentT):
        # Heavy tails: x = sinh t, whose volume element is cosh t.
        t = torch.linspace(-14, 14, 600, dtype=torch.float64)
        points = torch.cartesian_prod(*[t.sinh()] * d).reshape(-1, d)
        return Batch(points), points.square().add(1).log().sum(-1) / 2 + d * (t[1] - t[0]).log()
    if isinstance(factor, (Exponential, Gamma)):
        # Midpoints in t = log x, whose volume element is x.
        t = torch.linspace(-40, 6, 1000, dtype=torch.float64)
        points = torch.cartesian_prod(*[t.exp()] * d).reshape(-1, d)
        return Batch(points), points.log().sum(-1) + d * (t[1] - t[0]).log()
    axis = torch.arange(80.0, dtype=torch.float64)
    return Batch(torch.cartesian_prod(*[axis] * d).reshape(-1, d)), torch.zeros(80**d)


def _pieces(axes: list[tuple[Tensor, Tensor]]) -> tuple[Batch, Tensor]:
    """The product of axes of points and the logarithms of their volumes."""
    points = torch.cartesian_prod(*[points for points, _ in axes]).reshape(-1, len(axes))
    return Batch(points), torch.cartesian_prod(*[volumes for _, volumes in axes]).reshape(-1, len(axes)).sum(-1)


def _measure(factor: Factor, column: int) -> tuple[Tensor, Tensor]:
    """Points of a column's range (Gauss–Legendre between limits) and those that have a mass of their own."""
    if isinstance(factor, ZeroInflated):
        t = torch.linspace(-30, 6, 700, dtype=torch.float64)
        return torch.cat([t.new_zeros(1), t.exp()]), torch.cat([t.new_zeros(1), t + (t[1] - t[0]).log()])
    assert isinstance(factor, Bounded)
    low, high = (max(-12.0, min(12.0, value)) for value in factor.limits()[:, column].tolist())
    nodes, weights = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(200))
    inner = low + (high - low) * (nodes + 1) / 2
    ends = [value for value in factor.limits()[:, column] if value.isfinite() and isinstance(factor, Censored)]
    points = torch.cat([inner, torch.stack(ends)]) if ends else inner
    return points, torch.cat([(weights * (high - low) / 2).log(), torch.zeros(len(ends))])


def _sphere() -> tuple[Batch, Tensor]:
    """Gauss's points of the height, an even grid of the angle about the axis: the sphere in space."""
    height, weight = (torch.from_numpy(value) for value in np.polynomial.legendre.leggauss(60))
    angle = torch.arange(120, dtype=torch.float64) * (2 * math.pi / 120)
    z, t = torch.cartesian_prod(height, angle).unbind(-1)
    wide = (1 - z.square()).sqrt()
    volume = weight.repeat_interleave(120) * (2 * math.pi / 120)
    return Batch(torch.stack([wide * t.cos(), wide * t.sin(), z], -1)), volume.log()


def _normal_grid(factor: Gaussian, d: int) -> tuple[Batch, Tensor]:
    mean, variances = factor.means.detach(), factor.structure.variances(factor.scale, *factor.means.shape).detach()
    reach = 9 * variances.sqrt().amax()
    axes = [torch.linspace(float(m.min() - reach), float(m.max() + reach), 500, dtype=torch.float64) for m in mean.mT]
    volume = sum(float((axis[1] - axis[0]).log()) for axis in axes)
    points = torch.cartesian_prod(*axes).reshape(-1, d)
    return Batch(points), torch.full((len(points),), volume, dtype=torch.float64)


@every_factor(only=lambda name: "example" not in name or name.rstrip("0123456789").endswith("example"))
def test_density_sums_to_one(build) -> None:
    case = build()
    found = support(case.factor, case.batch)
    if found is None:
        pytest.skip("quadrature ends at two dimensions; tests/peers compares densities beyond")
    points, volume = found
    total = (case.factor.log_prob(points) + volume.unsqueeze(-1)).logsumexp(0).exp()
    close(total, torch.ones_like(total), rtol=1e-7)


#: Marks of what each row cuts off do not say how it came about: it cannot be drawn.
DRAWN = every_factor(only=lambda name: name.rstrip("123").endswith("example") and name != "Censored-example1")


@DRAWN
def test_truth_is_recovered_from_samples(build) -> None:
    case = build()
    factor, k = case.factor, case.expected.shape[-1]
    z = torch.arange(20_000 * k) % k
    given = case.batch[torch.arange(len(z)) // k % len(case.batch)]
    x = factor.sample(z, given, generator=cases.rng(8))
    batch = given.with_x(factor.cast(x))
    expected = torch.nn.functional.one_hot(z, k).double()
    found = maximized(factor, factor.stats(batch, expected))
    loss = expected_sum(factor.log_prob(batch) - found.log_prob(batch), expected) / len(z)
    assert -0.01 < loss <= 0
    for view in factor.views:
        close(getattr(found, view), getattr(factor, view), rtol=0.04, atol=0.04)


# ---- the M-step ---------------------------------------------------------------------------------------------------


@every_factor(only=learns)
def test_gradient_of_the_expected_density_is_that_of_q(build, device: torch.device) -> None:
    case = build().to(device)
    factor, batch, expected = case.factor, case.batch, case.expected
    # A factor with latent variables of its own takes statistics under their posterior at θ: held here, as in an M-step.
    stats = factor.stats(batch, expected).map(Tensor.detach)
    values = parameters(factor)
    direct = expected_sum(factor.log_prob(batch), expected)
    q = factor.expected_log_prob(stats)
    ours = dict(zip(values, torch.autograd.grad(q, list(values.values())), strict=True))
    theirs = dict(zip(values, torch.autograd.grad(direct, list(values.values())), strict=True))
    for name in values:
        assert ours[name].isfinite().all()
        size = float(theirs[name].abs().max()) + 1e-12
        # Terms of size reach² cancel in both.
        close(ours[name] / size, theirs[name] / size, rtol=1e-6, atol=1e-7)
    if isinstance(factor, (Gaussian, Categorical)):
        close(q, direct, rtol=1e-8)


def own_scale(factor: Factor, name: str) -> Tensor:
    """How far a parameter must move to change the distribution: Gaussian means count in standard deviations."""
    if isinstance(factor, Gaussian) and name == "mean":
        return factor.structure.variances(factor.scale, *factor.mean.shape[-2:]).sqrt().detach()
    return torch.ones_like(factor.get_parameter(name))


def beats_perturbations(case: FactorCase, stats: Stats, best: Factor, movable: dict[str, Tensor]) -> None:
    top = float(best.expected_log_prob(stats).detach())
    slack = 1e-9 * (1 + abs(top))
    for trial in range(12):
        other = copy.deepcopy(best)
        size = 10.0 ** -(trial % 4)
        for name, mask in movable.items():
            parameter = other.get_parameter(name)
            step = size * cases.randn(*parameter.shape, seed=100 + trial).to(parameter) * own_scale(best, name)
            parameter.data = torch.where(mask, parameter.data + step, parameter.data)
        other.project()  # what lies below the floor competes from the floor
        assert float(other.expected_log_prob(stats).detach()) <= top + slack, f"perturbation {trial} of size {size}"


@every_factor(only=learns)
def test_maximize_is_stationary_and_beats_perturbations(build, device: torch.device) -> None:
    case = build().to(device)
    stats = case.factor.stats(case.batch, case.expected)
    best = maximized(case.factor, stats)
    everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in parameters(best).items()}
    beats_perturbations(case, stats, best, everything)
    if floored(best):
        return
    grads = torch.autograd.grad(best.expected_log_prob(stats), list(best.parameters()))
    for name, grad in zip(parameters(best), grads, strict=True):
        assert float((grad * own_scale(best, name)).abs().max()) <= 1e-6 * float(case.expected.sum() + 1), name


@every_factor(only=lambda name: "example" in name or "support" in name or "scale1-" in name)
def test_frozen_views_stay_and_the_rest_is_still_best(build, device: torch.device) -> None:
    for frozen in build().factor.views:
        case = build().to(device)
        stats = case.factor.stats(case.batch, case.expected)
        free = case.factor.maximize(stats)
        assert case.factor.freeze(frozen) is case.factor
        best = maximized(case.factor, stats)
        kept = case.factor.views[frozen]
        close(getattr(best, frozen), getattr(case.factor, frozen), rtol=1e-12, atol=0)
        movable = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters(best).items() if n != kept}
        beats_perturbations(case, stats, best, movable)
        assert case.factor.n_parameters() < copy.deepcopy(case.factor).unfreeze(frozen).n_parameters()
        case.factor.unfreeze(frozen)
        close_dict(case.factor.maximize(stats), free, rtol=0)


@every_factor(only=lambda name: name.rstrip("123").endswith("example") or "N40" in name or "scale1-" in name)
def test_frozen_components_stay_and_the_others_move_as_before(build, device: torch.device) -> None:
    for frozen in build().factor.views:
        case = build().to(device)
        factor = case.factor
        if factor.views[frozen] in factor.shared_parameters or isinstance(factor, (Categorical, Categoricals)):
            continue  # of tables single cells are kept
        stats = factor.stats(case.batch, case.expected)
        mask = torch.arange(factor.n_components, device=device) == 1
        factor.freeze(frozen, mask=mask)
        best = maximized(factor, stats)
        name = factor.views[frozen]
        assert torch.equal(best.get_parameter(name)[mask], factor.get_parameter(name)[mask])
        rule = mask.reshape(-1, *[1] * (factor.get_parameter(name).dim() - 1))
        movable = {n: torch.ones_like(p, dtype=torch.bool) for n, p in parameters(best).items()}
        movable[name] = (~rule).expand_as(movable[name])
        beats_perturbations(case, stats, best, movable)


@every_factor()
def test_maximize_is_pure(build, device: torch.device) -> None:
    case = build().to(device)
    stats = case.factor.stats(case.batch, case.expected)
    before, kept = cases.state(case.factor), stats.map(torch.clone)
    again = case.factor.maximize(stats)
    cases.unchanged(case.factor, before)
    for a, b in zip(stats.leaves(), kept.leaves(), strict=True):
        assert torch.equal(a, b)
    close_dict(case.factor.maximize(stats), again, rtol=0)


@every_factor(only=lambda name: "one-row" not in name and "N1" not in name and learns(name))
def test_maximize_under_vmap_and_grad(build, device: torch.device) -> None:
    case = build().to(device)
    one = case.factor.stats(case.batch, case.expected)
    two = case.factor.stats(case.batch, cases.soft(*case.expected.shape, seed=31).to(device))
    both = one.map(lambda a, b: torch.stack([a, b]), two)
    batched = torch.func.vmap(case.factor.maximize)(both)
    for i, single in enumerate((one, two)):
        close_dict({k: v[i] for k, v in batched.items()}, case.factor.maximize(single), rtol=1e-8)

    def total(stats: Stats) -> Tensor:
        return sum(value.double().square().sum() for value in case.factor.maximize(stats).values())  # pyright: ignore

    slope = torch.func.grad(total)(one)
    assert all(leaf.isfinite().all() for leaf in slope.leaves())


@every_factor()
def test_empty_components_keep_their_parameters(build, device: torch.device) -> None:
    case = build().to(device)
    if case.factor.memory:
        pytest.skip("an expanded state is no component")
    case.expected[:, 0] = 0.0
    best = maximized(case.factor, case.factor.stats(case.batch, case.expected))
    for name, parameter in parameters(best).items():
        if name not in case.factor.shared_parameters:
            close(parameter[0], case.factor.get_parameter(name)[0], rtol=1e-12, atol=0)
        assert parameter.isfinite().all()


# ---- kernels, replicas, precision ---------------------------------------------------------------------------------


@every_factor()
def test_kernel_equals_log_prob_and_stats(build, device: torch.device) -> None:
    case = build().to(device)
    factor, batch, expected = case.factor, case.batch, case.expected
    routes = (True, False) if isinstance(factor, Gaussian) else (None,)
    value, stats = factor.log_prob(batch), factor.stats(batch, expected)
    for direct in routes:
        if direct is not None:
            factor.direct = direct
        kernel = factor.kernel()
        cut = len(batch) // 2
        found = []
        for rows in (slice(0, cut), slice(cut, None)):
            found.append(kernel.log_potential(batch[rows]))
            kernel.collect(batch[rows], expected[rows])
        # The route over features cancels terms of the size that `rounding` bounds; shifts of 50 σ cost digits.
        close(torch.cat(found), value, rtol=1e-8, atol=1e-8)
        close_stats(kernel.stats(), stats, rtol=1e-9)
        # What the pass remembers of Q is Q: up to terms free of θ for families that leave these out.
        inner = kernel.inner()
        close(inner, factor.expected_log_prob(stats), rtol=1e-8, atol=1e-8)
        if isinstance(factor, (Gaussian, Categorical)):
            close(inner, expected_sum(value, expected), rtol=1e-8, atol=1e-8)


@every_factor()
def test_replicas_equal_each_alone(build, device: torch.device) -> None:
    case = build().to(device)
    batch = case.batch
    many = mixed_replicas(case.factor)
    assert many.replicas == (3,)
    expected = torch.stack([cases.soft(*case.expected.shape, seed=40 + r) for r in range(3)]).to(device)
    alone = []
    for r in range(3):
        single = copy.deepcopy(many)
        for module in single.modules():
            if isinstance(module, Factor):
                module.take_replicas(r)
        assert single.replicas == ()
        alone.append(single)
    value, stats = many.log_prob(batch), many.stats(batch, expected)
    assert value.shape == expected.shape
    routes = (True, False) if isinstance(many, Gaussian) else (None,)
    for direct in routes:
        if direct is not None:
            many.direct = direct
        kernel = many.kernel()
        close(kernel.log_potential(batch), value, rtol=1e-8, atol=1e-8)
        kernel.collect(batch, expected)
        close_stats(kernel.stats(), stats)
    new, q = many.maximize(stats), many.expected_log_prob(stats)
    assert q.shape == (3,)
    for r, single in enumerate(alone):
        close(value[r], single.log_prob(batch))
        own = single.stats(batch, expected[r])
        close_stats(stats.map(lambda leaf, r=r: leaf[r]), own)
        close(q[r], single.expected_log_prob(own))
        close_dict({k: v[r] for k, v in new.items()}, single.maximize(own), rtol=1e-8)


@every_factor(only=lambda name: "scale1e" not in name and "shift50" not in name)
def test_float32_near_float64(build, device: torch.device) -> None:
    case = build().to(device)
    small, batch = (
        copy.deepcopy(case.factor).float(),
        case.batch.with_x(case.batch.x.float() if case.batch.x.is_floating_point() else case.batch.x),
    )
    value = small.log_prob(batch)
    assert value.dtype == torch.float32
    finite = case.factor.log_prob(case.batch).isfinite()
    close(value[finite], case.factor.log_prob(case.batch).float()[finite], rtol=1e-4, atol=1e-3)
    if floored(maximized(case.factor, case.factor.stats(case.batch, case.expected))):
        return
    stats = small.stats(batch, case.expected.float())
    assert all(leaf.dtype == torch.float64 for leaf in stats.leaves())
    close_stats(stats, case.factor.stats(case.batch, case.expected), rtol=1e-5)
    fitted, exact = maximized(small, stats), maximized(case.factor, case.factor.stats(case.batch, case.expected))
    for view in small.views:
        close(getattr(fitted, view), getattr(exact, view).float(), rtol=2e-4, atol=2e-4)


@every_factor()
def test_copies_through_state_dict(build, device: torch.device) -> None:
    case = build().to(device)
    other = copy.deepcopy(case.factor)
    for parameter in other.parameters():
        parameter.data = torch.zeros_like(parameter)
    other.load_state_dict(case.factor.state_dict())
    assert torch.equal(other.log_prob(case.batch), case.factor.log_prob(case.batch))


def test_every_family_has_a_q_of_statistics_or_says_that_it_has_none() -> None:
    wrappers = (torchem.Variational, torchem.Gradient, torchem.models.stationary.Stationary)
    for kind in (*cases.every_family(), *wrappers):
        if kind.sufficient:
            assert kind.expected_log_prob is not Factor.expected_log_prob, kind
            continue
        factor, batch = kind.example()
        expected = cases.soft(len(batch), factor.n_components or 1)
        # What stands for statistics carries the value of Q where they were taken, and no M-step.
        take, log_prob = factor.stats, factor.log_prob
        if factor.n_components is None:  # a latent child
            expected = cases.soft(len(batch), factor.shape[-1])  # pyright: ignore[reportAttributeAccessIssue]
            take, log_prob = factor.table_stats, factor.log_table
        stats = take(batch, expected)
        close(factor.expected_log_prob(stats), expected_sum(log_prob(batch), expected))
        with pytest.raises(InvalidArgument, match="no function of statistics"):
            factor.maximize(stats)


# ---- what only some families have ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.COVARIANCE_TYPES)
@pytest.mark.parametrize(("a", "b"), [(1e-6, 0.0), (1e6, -3e6), (2.5, 10.0)])
def test_gaussian_is_equivariant_to_units(kind: str, a: float, b: float, device: torch.device) -> None:
    case = cases.FACTOR_CASES[f"Gaussian-{kind}-K3-D2-N40"]().to(device)
    factor, batch = case.factor, case.batch
    other = cases._scaled(copy.deepcopy(factor), a, b)
    moved = batch.with_x(batch.x * a + b)
    log_a = torch.tensor(a, dtype=torch.float64).log().to(device)
    close(other.log_prob(moved), factor.log_prob(batch) - 2 * log_a, rtol=1e-8, atol=1e-7)
    best = maximized(factor, factor.stats(batch, case.expected))
    best_moved = maximized(other, other.stats(moved, case.expected))
    close(best_moved.means, best.means * a + b, rtol=1e-9, atol=1e-9 * a)
    close(best_moved.covariances, best.covariances * a * a, rtol=1e-7, atol=1e-9 * a * a)


@pytest.mark.parametrize("kind", cases.COVARIANCE_TYPES)
def test_gaussian_floor_is_equivariant_to_units_of_each_column(kind: str) -> None:
    """A collapsed component is floored in proportion to the data, whatever each column is measured in."""
    if kind == "spherical":
        return  # one variance for all columns cannot follow their units
    x = cases.randn(20, 2)
    unit = torch.tensor([1e3, 1e-3], dtype=torch.float64)
    expected = torch.zeros(20, 2, dtype=torch.float64)
    expected[0, 0] = 1.0
    expected[1, 1] = 1.0

    def fitted(scale: Tensor) -> Tensor:
        g = Gaussian(2, 2, kind).double()  # pyright: ignore
        g.unit = (x * scale).var(0, unbiased=False)
        data = Batch(x * scale)
        return maximized(g, g.stats(data, expected)).covariances.detach()

    plain, scaled = fitted(torch.ones(2, dtype=torch.float64)), fitted(unit)
    by = unit.square() if kind == "diag" else unit.unsqueeze(-1) * unit
    close(scaled / by, plain, rtol=1e-6, atol=1e-9)
    close(torch.as_tensor(maximum_floor(plain, x.var(0, unbiased=False))), torch.tensor(1e-6), rtol=1e-5, atol=0)


def maximum_floor(covariances: Tensor, unit: Tensor) -> float:
    dense = (
        torch.diag_embed(covariances) if covariances.shape == (2, 2) and bool((covariances > 0).all()) else covariances
    )
    return float(torch.linalg.eigvalsh(dense / (unit.sqrt().unsqueeze(-1) * unit.sqrt())).min())


def zeros_table() -> Categorical:
    table = Categorical(3, 4).double()
    table.probs = [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4]]
    return table


def test_forbidden_stays_forbidden() -> None:
    table = zeros_table()
    forbidden = table.probs == 0
    counts = Stats(counts=cases.rand(3, 4))
    for _ in range(3):
        cases.assign(table, table.maximize(counts))
        assert torch.equal(table.probs == 0, forbidden)
        close(table.probs.sum(-1), torch.ones(3))
    cases.assign(table, table.maximize(Stats(counts=torch.zeros(3, 4, dtype=torch.float64))))
    assert torch.equal(table.probs == 0, forbidden)
    q = table.expected_log_prob(counts)
    (grad,) = torch.autograd.grad(q, [table.logits])
    assert q.isfinite()
    assert grad.isfinite().all()
    assert (grad[forbidden] == 0).all()


def test_forbidden_gives_minus_infinity_and_gradients_without_nan() -> None:
    table = zeros_table()
    batch = Batch(torch.arange(4).unsqueeze(-1))
    value = table.log_prob(batch)
    assert torch.equal(value.mT == -torch.inf, table.probs == 0)
    (grad,) = torch.autograd.grad(torchem.ops.reduce.logsumexp(value, -1).sum(), [table.logits])
    assert grad.isfinite().all()


def test_zeros_that_em_reaches_are_not_structural() -> None:
    table = Categorical(3).double()
    cases.assign(table, table.maximize(Stats(counts=torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))))
    assert table.logits.isfinite().all()
    assert table.support.all()
    assert 0 < float(table.probs[1].detach()) < 1e-100
    cases.assign(table, table.maximize(Stats(counts=torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))))
    close(table.probs, torch.tensor([0.25, 0.25, 0.5]))


def test_frozen_cells_of_a_table_stay_and_the_row_is_still_best() -> None:
    table = Categorical(2, 4).double()
    table.probs = [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.5, 0.0]]
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    table.freeze("probs", mask=mask)
    counts = Stats(counts=torch.tensor([[3.0, 1.0, 2.0, 4.0], [1.0, 5.0, 2.0, 7.0]], dtype=torch.float64))
    best = maximized(table, counts).probs.detach()
    close(best[mask], table.probs[mask], rtol=1e-12)
    close(best.sum(-1), torch.ones(2), rtol=1e-12)
    # What is free is shared in proportion to the counts.
    close(best[0, 1:3], 0.5 * torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    close(best[1, [0, 2]], 0.75 * torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    assert best[1, 3] == 0
    assert table.n_parameters() == 2 - 1 + 2 - 1


# ---- conjugate priors ---------------------------------------------------------------------------------------------


def posterior_of(case: FactorCase) -> Stats:
    """Statistics of real data, with enough of two counts that the posterior is proper; the counts differ."""
    stats = case.factor.stats(case.batch, case.expected + 0.2)
    if isinstance(case.factor, Gaussian):
        return stats.like({**stats, "dof": stats["dof"] + 3.5, "count": stats["count"] + 0.5})
    return stats + stats.map(torch.ones_like)


CONJUGATE = every_factor(
    only=lambda name: (
        name.split("-")[0] in {c.__name__ for c in cases.concrete_factors() if issubclass(c, Conjugate)}
        and not any(word in name for word in ("scale1e", "rank-1", "constant", "N1", "one-row", "N3"))
    )
)


@CONJUGATE
def test_expected_natural_is_the_gradient_of_the_log_normalizer(build, device: torch.device) -> None:
    case = build().to(device)
    posterior = posterior_of(case)
    slope = torch.func.grad(lambda leaves: case.factor.log_normalizer(posterior.like(leaves)).sum())(dict(posterior))
    expected = case.factor.expected_natural(posterior)
    close_stats(expected, posterior.like(slope), rtol=1e-8)


@CONJUGATE
def test_log_normalizer_is_convex(build, device: torch.device) -> None:
    """A log-normaliser is convex in its natural coordinates; so its gradient is monotone along any segment."""
    case = build().to(device)
    one = posterior_of(case)
    two = posterior_of(FactorCase(case.factor, case.batch, cases.soft(*case.expected.shape, seed=77).to(device)))
    values = [float(case.factor.log_normalizer(one.lerp(two, t)).sum().detach()) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    second = [values[i - 1] - 2 * values[i] + values[i + 1] for i in (1, 2, 3)]
    assert min(second) >= -1e-7 * max(map(abs, values))


@pytest.mark.parametrize("k", [1, 3])
def test_full_expected_density_is_the_textbook_formula(k: int) -> None:
    """C. M. Bishop (2006), equations 10.60–10.64 with 10.65."""
    g, d = cases.gaussian(k, 3, "full"), 3
    posterior = posterior_of(FactorCase(g, Batch(cases.randn(30, d)), cases.soft(30, k)))
    x = 2 * cases.randn(6, d, seed=12)
    natural = g.expected_natural(posterior)
    z = x - g.origin
    found = (
        natural["count"]
        + natural["dof"]
        + z @ natural["first"].mT
        + torch.einsum("ni,kij,nj->nk", z, natural["second"], z)
        - d / 2 * torch.tensor(2 * torch.pi, dtype=torch.float64).log()
    )
    beta, nu = posterior["count"], posterior["dof"] + d
    m = posterior["first"] / beta.unsqueeze(-1)
    w = torch.linalg.inv(posterior["second"] - beta[:, None, None] * m.unsqueeze(-1) * m.unsqueeze(-2))
    index = torch.arange(1, d + 1, dtype=torch.float64)
    log_det = ((nu.unsqueeze(-1) + 1 - index) / 2).digamma().sum(-1) + d * torch.tensor(2.0).double().log() + w.logdet()
    gap = z.unsqueeze(1) - m
    distance = d / beta + nu * torch.einsum("nki,kij,nkj->nk", gap, w, gap)
    textbook = 0.5 * (log_det - d * torch.tensor(2 * torch.pi, dtype=torch.float64).log() - distance)
    close(found, textbook, rtol=1e-9)


def wishart(nu: Tensor, scatter: Tensor) -> tuple[Tensor, Tensor]:
    """E Λ and E log |Λ| (C. M. Bishop 2006, equations B.80 and B.81)."""
    d = scatter.shape[-1]
    index = torch.arange(1, d + 1, dtype=torch.float64)
    spread = ((nu.unsqueeze(-1) + 1 - index) / 2).digamma().sum(-1)
    return nu[..., None, None] * torch.linalg.inv(scatter), spread + d * math.log(2) - scatter.logdet()


@pytest.mark.parametrize("kind", cases.COVARIANCE_TYPES)
@pytest.mark.parametrize("d", [1, 2, 4])
@pytest.mark.parametrize("k", [1, 3])
def test_expected_natural_parameters_in_closed_form(kind: str, d: int, k: int) -> None:
    """Moments of normal–Wishart and normal–gamma posteriors, written for each structure from the textbook."""
    g = cases.gaussian(k, d, kind)
    posterior = posterior_of(FactorCase(g, Batch(cases.randn(30, d)), cases.soft(30, k)))
    count, dof = posterior["count"], posterior["dof"]
    natural = g.expected_natural(posterior)
    if kind in ("diag", "spherical"):
        # Entries are independent given the precision: each has counts of its own.
        mean = posterior["first"] / count
        if kind == "diag":
            rate = (posterior["second"] - count * mean.square()) / 2
            shape = (dof + 1) / 2
        else:
            rate = ((posterior["second"] - (count * mean.square()).sum(-1)) / 2).unsqueeze(-1)
            shape = (dof.sum(-1, keepdim=True) - d) / 2 + 1
        precision, log_precision = shape / rate, shape.digamma() - rate.log()
        close(natural["dof"], (log_precision / 2).expand(k, d))
        close(natural["second"], (precision if kind == "diag" else precision.squeeze(-1)) / -2)
        close(natural["first"], precision * mean)
        close(natural["count"], -(1 / count + precision * mean.square()) / 2)
        return
    mean = posterior["first"] / count.unsqueeze(-1)
    outer = count[:, None, None] * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    if kind == "full":
        precision, log_det = wishart(dof + d, posterior["second"] - outer)
        slope = -precision / 2
    else:
        precision, log_det = wishart(dof.sum() - k + d + 1, posterior["second"] - outer.sum(0))
        slope, precision, log_det = -precision / 2, precision.expand(k, d, d), log_det.expand(k)
    linear = torch.einsum("kij,kj->ki", precision, mean)
    close(natural["dof"], log_det / 2)
    close(natural["second"], slope)
    close(natural["first"], linear)
    close(natural["count"], -(d / count + (linear * mean).sum(-1)) / 2)


@pytest.mark.parametrize("kind", cases.COVARIANCE_TYPES)
def test_marginal_likelihood_by_normalizers_is_the_integral(kind: str) -> None:
    """exp(A(prior + S) − A(prior)) integrates the likelihood of one number over mean and precision (quadrature)."""
    g = Gaussian(1, 1, kind).double()  # pyright: ignore
    x = Batch(torch.tensor([[0.7]], dtype=torch.float64))
    data = Batch(torch.tensor([[-0.5], [0.3], [1.9]], dtype=torch.float64))
    prior = g.stats(data, torch.ones(3, 1, dtype=torch.float64))
    seen = g.stats(x, torch.ones(1, 1, dtype=torch.float64))
    ratio = (g.log_normalizer(prior + seen) - g.log_normalizer(prior)).exp() / math.sqrt(2 * math.pi)
    mean = torch.linspace(-40, 40, 4001, dtype=torch.float64).unsqueeze(-1)
    log_precision = torch.linspace(-25, 8, 2001, dtype=torch.float64)
    lam = log_precision.exp()

    def log_density(count: Tensor, dof: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return dof / 2 * log_precision - lam / 2 * (second - 2 * first * mean + count * mean.square()) + log_precision

    def integral(s: Stats) -> Tensor:
        flat = {name: leaf.reshape(()) for name, leaf in s.items()}
        return log_density(**flat).flatten().logsumexp(0)

    evidence = integral(prior + seen) - integral(prior) - 0.5 * math.log(2 * math.pi)
    close(ratio.log().squeeze(), evidence, rtol=1e-3, atol=1e-3)
