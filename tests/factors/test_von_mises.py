"""Directions and angles: densities, draws, bounds, missing rows, recovery."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.laws.cases import assign, close, rand, randn, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Exponential, Product, VonMises, VonMisesFisher


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def directions(k: int, d: int, seed: int = 0) -> VonMisesFisher:
    v = VonMisesFisher(k, d).double()
    v.directions, v.concentrations = randn(k, d, seed=seed), 1 + 20 * rand(k, seed=seed)
    return v


@pytest.mark.parametrize("d", [2, 3, 5, 30])
def test_density_is_that_of_scipy(d: int) -> None:
    v, x = directions(3, d), unit(randn(20, d, seed=1))
    found = v.log_prob(Batch(x))
    for k in range(3):
        law = scipy_stats.vonmises_fisher(v.directions[k].detach().numpy(), float(v.concentrations[k].detach()))
        close(found[:, k], torch.from_numpy(law.logpdf(x.numpy())), rtol=1e-10)


def test_angles_have_the_density_of_scipy_and_are_directions_in_the_plane() -> None:
    v, x = VonMises(3, 2).double(), 2 * math.pi * rand(20, 2, seed=1) - math.pi
    v.means, v.concentrations = 2 * randn(3, 2), 0.1 + 300 * rand(3, 2)
    found = v.log_prob(Batch(x))
    for k in range(3):
        mean, kappa = v.means[k].detach().numpy(), v.concentrations[k].detach().numpy()
        close(found[:, k], torch.from_numpy(scipy_stats.vonmises.logpdf(x.numpy(), kappa, loc=mean).sum(-1)))
    plane = VonMisesFisher(3, 2).double()
    angle = v.means[:, 0].detach()
    plane.directions, plane.concentrations = torch.stack([angle.cos(), angle.sin()], -1), v.concentrations[:, 0]
    one = VonMises(3, 1).double()
    one.means, one.concentrations = v.means[:, :1].detach(), v.concentrations[:, :1].detach()
    points = Batch(torch.stack([x[:, 0].cos(), x[:, 0].sin()], -1))
    close(plane.log_prob(points), one.log_prob(Batch(x[:, :1])))
    expected = soft(20, 3)
    new = copy.deepcopy(one), copy.deepcopy(plane)
    assign(new[0], one.maximize(one.stats(Batch(x[:, :1]), expected)))
    assign(new[1], plane.maximize(plane.stats(points, expected)))
    close(new[0].concentrations[:, 0], new[1].concentrations)
    close(new[0].means.cos()[:, 0], new[1].directions[:, 0])


@pytest.mark.parametrize("kappa", [0.01, 2.0, 50.0, 1e5])
def test_draws_follow_the_density(kappa: float) -> None:
    """Kolmogorov's test of angles on the circle; in higher dimensions the moments, as the density has them."""
    v = VonMises(1, 1).double()
    v.means, v.concentrations = [[3.0]], [[kappa]]
    x = v.sample(torch.zeros(4000, dtype=torch.long), generator=rng(0))
    assert float(x.abs().max()) <= math.pi
    centred = torch.remainder(x[:, 0] - 3.0 + math.pi, 2 * math.pi) - math.pi
    assert scipy_stats.kstest(centred.numpy(), scipy_stats.vonmises(kappa).cdf).pvalue > 0.01
    for d in (2, 3, 6):
        family = VonMisesFisher(1, d).double()
        family.directions, family.concentrations = torch.arange(1.0, d + 1).unsqueeze(0), [kappa]
        x = family.sample(torch.zeros(20_000, dtype=torch.long), generator=rng(1))
        close(x.norm(dim=-1), torch.ones(20_000), rtol=1e-12)
        mean, variance = (value[0, 0] for value in family.moments(Batch(x)))
        gap = (x.mean(0) - mean.detach()) / (variance.detach() / 20_000).sqrt()
        assert float(gap.abs().max()) < 4
        close(x.var(0), variance, rtol=0.07)


def test_what_is_missing_says_nothing() -> None:
    v, x, expected = directions(3, 3), unit(randn(12, 3, seed=2)), soft(12, 3)
    holes = x.clone()
    holes[::3] = torch.nan
    seen = torch.arange(12) % 3 != 0
    close(v.log_prob(Batch(holes)), torch.where(seen.unsqueeze(-1), v.log_prob(Batch(x)), 0.0))
    close(v.stats(Batch(holes), expected)["features"], v.stats(Batch(x[seen]), expected[seen])["features"])
    model = torchem.Mixture(Categorical(3), directions(3, 3)).double()
    result = torchem.fit(model, holes, seed=0, progress=False, max_iter=5, tol=0)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(result.history))


def test_a_single_direction_stays_at_the_cap_and_is_named() -> None:
    x = torch.cat([unit(torch.tensor([[1.0, 2.0, 2.0]])).repeat(30, 1), unit(randn(70, 3, seed=3))]).double()
    v = VonMisesFisher(2, 3, concentration_cap=1e4)
    result = torchem.fit(torchem.Mixture(Categorical(2), v).double(), x, seed=0, max_iter=200, progress=False)
    assert result.floored == [int(v.concentrations.argmax())]
    close(v.concentrations.max(), torch.tensor(1e4), rtol=1e-6)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    angles = VonMises(2, 1, concentration_cap=1e4)
    x = torch.cat([torch.full((30, 1), 2.0), 6 * rand(70, 1) - 3]).double()
    result = torchem.fit(torchem.Mixture(Categorical(2), angles).double(), x, seed=0, restarts=3, progress=False)
    assert result.floored == [int(angles.concentrations[:, 0].argmax())]


def test_directions_that_cancel_are_spread_evenly() -> None:
    x = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    v = directions(1, 3)
    old = v.directions.detach()
    assign(v, v.maximize(v.stats(Batch(x), torch.ones(6, 1, dtype=torch.float64))))
    close(v.concentrations, torch.tensor([1e-6]))
    close(v.directions, old)
    close(v.log_prob(Batch(x)), torch.full((6, 1), -math.log(4 * math.pi)), rtol=1e-6)


def test_a_direction_that_is_kept_takes_the_mean_along_it() -> None:
    x = unit(randn(40, 3, seed=4) + torch.tensor([2.0, 0.0, 0.0]))
    v = VonMisesFisher(1, 3).double()
    v.directions = [[1.0, 1.0, 0.0]]
    v.freeze("directions")
    assign(v, v.maximize(v.stats(Batch(x), torch.ones(40, 1, dtype=torch.float64))))
    along = (x @ torch.tensor([1.0, 1.0, 0.0]).double()).mean() / 2**0.5
    kappa = v.concentrations.detach()[0]
    close(1 / kappa.tanh() - 1 / kappa, along)  # A₃ in closed form
    assert v.n_parameters() == 1


def test_a_cluster_where_the_ends_meet_is_one() -> None:
    truth = VonMises(2, 1).double()
    truth.means, truth.concentrations = [[3.1], [0.5]], [[8.0], [4.0]]
    x = truth.sample(torch.arange(4000) % 2, generator=rng(5))
    angles = VonMises(2, 1)
    model = torchem.Mixture(Categorical(2), angles).double()
    result = torchem.fit(model, x, seed=0, restarts=3, tol=1e-7, max_iter=500, progress=False)
    order = angles.means[:, 0].cos().argsort()
    close(angles.means[order].cos(), truth.means.cos(), atol=0.05)
    close(angles.concentrations[order], truth.concentrations, rtol=0.15)
    assert result.floored == []
    turned = torch.remainder(x + 2.0 + math.pi, 2 * math.pi) - math.pi
    again = torchem.fit(model, turned, seed=0, restarts=3, tol=1e-7, max_iter=500, progress=False)
    assert again.bound == pytest.approx(result.bound, abs=0.01)  # no angle is special


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_on_the_sphere_is_recovered(dtype: torch.dtype) -> None:
    truth = VonMisesFisher(3, 4).to(dtype)
    truth.directions, truth.concentrations = torch.eye(4)[:3], [5.0, 20.0, 60.0]
    z = torch.arange(6000) % 3
    x = truth.sample(z, generator=rng(6))
    found = VonMisesFisher(3, 4)
    model = torchem.Mixture(Categorical(3), found).to(dtype)
    torchem.fit(model, x, seed=0, restarts=2, tol=1e-6, max_iter=300, progress=False)
    order = found.concentrations.argsort()
    close(found.directions[order], truth.directions, atol=0.05)
    close(found.concentrations[order], truth.concentrations, rtol=0.08)


def test_a_walk_has_turns_and_steps() -> None:
    """Animal movement: long straight steps, and short ones about (J. M. Morales et al. 2004)."""
    turns, steps = VonMises(2, 1), Exponential(2, 1)
    turns.means, turns.concentrations, steps.rates = [[0.0], [3.1]], [[6.0], [1.5]], [[0.2], [3.0]]
    truth = torchem.HMM(Categorical(2), Categorical(2, 2), Product([turns, steps])).double()
    truth.transition_matrix = [[0.9, 0.1], [0.2, 0.8]]
    x, z = truth.sample(10, 150, latents=True, generator=rng(7))
    model = torchem.HMM(Categorical(2), Categorical(2, 2), Product([VonMises(2, 1), Exponential(2, 1)])).double()
    result = torchem.fit(model, x, seed=0, restarts=3, max_iter=200, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    agreement = float((model.most_likely(x) == z).double().mean())
    assert max(agreement, 1 - agreement) > 0.93


def test_files_and_pruning(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    for family, x in ((directions(3, 3), unit(randn(5, 3))), (VonMises.example()[0], randn(5, 2))):
        family.freeze("concentrations", mask=torch.tensor([True, False, False]))
        torchem.save(family, path)
        again = torchem.load(path)
        assert torch.equal(again.log_prob(Batch(x)), family.log_prob(Batch(x)))
        assert again.n_parameters() == family.n_parameters()
        small = family.select(torch.tensor([0, 2]))
        close(small.log_prob(Batch(x)), family.log_prob(Batch(x))[:, [0, 2]])
        assert small.frozen("log_concentration").tolist() == [True, False]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: VonMisesFisher(2, 1), "n_features: expected a whole number of at least 2"),
        (lambda: VonMises(0, 1), "n_components: "),
        (lambda: VonMises(1, 1, concentration_cap=0.5), "concentration_cap: "),
        (lambda: setattr(VonMisesFisher(1, 2), "directions", [[0.0, 0.0]]), "directions: .* not zero"),
        (lambda: setattr(VonMisesFisher(1, 2), "concentrations", [1e9]), "concentrations: .* raise concentration_cap"),
        (lambda: VonMisesFisher(1, 2).check(Batch(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))), "length 1.41421 at row 1"),
        (lambda: VonMisesFisher(1, 2).check(Batch(torch.tensor([[1.1, torch.nan]]))), "at most of .*1.1 at row 0"),
        (lambda: VonMises(1, 1).check(Batch(torch.tensor([[0.1], [90.0]]))), "radians.*got 90.*deg2rad"),
    ],
)
def test_bad_input(act, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        act()


# ---- missing entries of directions --------------------------------------------------------------------------------


def sphere(d: int, n: int) -> tuple[Tensor, Tensor]:
    """Points of the unit sphere in m ≤ 3 dimensions and their weights, exact to rounding for smooth functions.

    Gauss–Legendre in the third coordinate (Archimedes: its law is even), even angles about it.
    """
    if d == 1:
        return torch.tensor([[-1.0], [1.0]]).double(), torch.ones(2).double()
    angle = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    if d == 2:
        return circle, torch.full((n,), 2 * math.pi / n, dtype=torch.float64)
    height, weight = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(n))
    across = (1 - height.square()).sqrt()
    points = torch.cat([across[:, None, None] * circle, height[:, None, None].expand(n, n, 1)], -1)
    return points.flatten(0, 1), (weight[:, None] * 2 * math.pi / n).expand(n, n).flatten()


@pytest.mark.parametrize(("d", "m"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3), (7, 3)])
def test_a_direction_with_holes_has_the_integral_of_its_density(d: int, m: int) -> None:
    """Density, mean and covariance by quadrature over what is missing; of no share of the mean as well."""
    v = directions(4, d, seed=d)
    with torch.no_grad():
        v.direction[3, :m] = 0.0
        v.log_concentration[2] = 4.0
        x = unit(randn(6, d, seed=m))
        x[5] = torch.eye(d)[d - 1]
        x[:5] = unit(x[:5])
        part, weight = sphere(m, 200)
        left = (1 - x[:, m:].square().sum(-1)).clamp(min=0.0).sqrt()
        holed = x.clone()
        holed[:, :m] = torch.nan
        batch = Batch(holed)
        points = torch.cat([left[:, None, None] * part, x[:, None, m:].expand(-1, len(part), -1)], -1)
        # dS = ρ^{m−2} dx_o dσ, from ρ dρ = −|x_o| d|x_o|.
        density = v.log_prob(Batch(points[:5].flatten(0, 1))).unflatten(0, (5, -1)).exp() * weight[:, None]
        mass = density.sum(1)
        close(v.log_prob(batch)[:5], mass.log() + (m - 2) * left[:5].log().unsqueeze(-1), rtol=1e-9)
        law = density / mass.unsqueeze(1)
        mean = (law.unsqueeze(-1) * points[:5].unsqueeze(2)).sum(1)
        gap = points[:5].unsqueeze(2) - mean.unsqueeze(1)
        spread = (law[..., None, None] * gap.unsqueeze(-1) * gap.unsqueeze(-2)).sum(1)
        found, variance = v.conditional(batch)
        close(found[:5], mean, rtol=1e-9, atol=1e-10)
        covariance = v.conditional_covariance(batch)
        close(covariance[:5], spread, rtol=1e-8, atol=1e-9)
        close(variance, covariance.diagonal(dim1=-2, dim2=-1))
        # The E-step's features are those expectations.
        expected = soft(6, 4)
        stats = v.stats(batch, expected)["features"]
        close(stats[:, :-1], torch.einsum("nk,nkd->kd", expected, found), rtol=1e-10)
        close(stats[:, -1], expected.sum(0))
        # Nothing is left to what is missing.
        assert bool(v.log_prob(batch).isfinite().all())
        close(found[5], x[5].expand(4, d), rtol=0, atol=1e-7)


def test_one_missing_entry_is_a_sign() -> None:
    """m = 1: p(x_o) = C e^{κ μ_o x_o} 2 cosh(s) / ρ, and E x_m = ρ tanh(s) sgn(μ_m)."""
    v = directions(2, 3, seed=4)
    x = unit(randn(5, 3, seed=3))
    holed = x.clone()
    holed[:, 1] = torch.nan
    kappa, mean, rho = v.concentrations.detach(), v.directions.detach(), x[:, 1].abs()
    s = kappa * rho[:, None] * mean[:, 1].abs()
    constant = kappa.log() - math.log(4 * math.pi) - kappa.sinh().log()  # D = 3
    truth = constant + kappa * (x[:, [0, 2]] @ mean[:, [0, 2]].mT) + (2 * s.cosh()).log() - rho.log()[:, None]
    close(v.log_prob(Batch(holed)), truth, rtol=1e-10)
    close(v.conditional(Batch(holed))[0][..., 1], rho[:, None] * s.tanh() * mean[:, 1].sign(), rtol=1e-10)


@pytest.mark.parametrize("kappa", [1e-6, 3.0, 1e5])
def test_derivatives_are_finite_at_the_edges(kappa: float) -> None:
    """A mean without a share in what is missing, entries that leave nothing, concentrations at both ends."""
    v = VonMisesFisher(2, 3).double()
    v.concentrations = [kappa, 1.0]
    nan = torch.nan
    x = torch.tensor([[1.0, nan, nan], [nan, 1.0, 0.0], [0.6, 0.8, nan], [0.6, nan, 0.1], [nan, nan, nan]]).double()
    x.requires_grad_()
    value = v.log_prob(Batch(x))
    assert bool(value.isfinite().all())
    for part in torch.autograd.grad(value.sum(), [x, *v.parameters()]):
        assert bool(part[~part.isnan()].isfinite().all())
        assert bool((part.isnan() <= x.isnan()).all() if part.shape == x.shape else part.isfinite().all())
    small = copy.deepcopy(v).float()
    close(small.log_prob(Batch(x.detach().float()))[2:], value[2:], rtol=1e-3, atol=1e-3 * max(1.0, kappa**0.5))
    close(torch.func.vmap(lambda row: v.log_prob(Batch(row.unsqueeze(0)))[0])(x.detach()), value, rtol=1e-10)


def test_a_mixture_of_directions_learns_from_what_is_left() -> None:
    """The objective never falls, the truth comes back, and what is filled in are unit vectors."""
    truth = VonMisesFisher(2, 3).double()
    truth.directions, truth.concentrations = [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], [30.0, 8.0]
    x = truth.sample(torch.arange(2000) % 2, generator=rng(0)).double()
    holed = torch.where(torch.rand(x.shape, generator=rng(1)) < 0.25, torch.nan, x)
    model = torchem.Mixture(Categorical(2), VonMisesFisher(2, 3)).double()
    result = torchem.fit(model, holed, restarts=2, seed=0, tol=1e-6, max_iter=100, progress=False)
    assert all(b >= a - 1e-8 for h in result.histories for a, b in itertools.pairwise(h))
    order = model.component.concentrations.argsort(descending=True)
    close((model.component.directions[order] * truth.directions).sum(-1), torch.ones(2), rtol=0, atol=2e-3)
    close(model.component.concentrations[order], truth.concentrations, rtol=0.12)
    value, spread = model.impute(holed, variance=True)
    close(value.norm(dim=-1), torch.ones(2000), rtol=1e-6)
    assert torch.equal(value[~holed.isnan()], x[~holed.isnan()])
    few = holed[:30]
    drawn = model.impute(few, draws=3000, generator=rng(2))
    close(drawn.norm(dim=-1), torch.ones(3000, 30), rtol=1e-6)
    mean = model.impute(few, "mean")
    gap = (drawn.mean(0) - mean) / (spread[:30] / 3000).sqrt().clamp(min=1e-12)
    assert float(gap[few.isnan()].abs().max()) < 5
    law = model.condition(few[:, 2:], columns=[2])
    assert bool(law.mean.isfinite().all())
    assert law.covariance_matrix.shape == (30, 2, 2)


def test_entries_that_are_too_long_are_named() -> None:
    model = torchem.Mixture(Categorical(2), directions(2, 3))
    x = unit(randn(6, 3))
    x[4] = torch.tensor([0.9, 0.9, torch.nan])
    with pytest.raises(InvalidArgument, match=r"data: .*at most of length one.*got length 1.27279 at row 4; normalise"):
        model.log_prob(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_that_are_all_equal_end_at_the_cap(dtype: torch.dtype) -> None:
    """At κ = 1e6 the rounding of a cosine in float32 weighs a tenth of a nat."""
    model = torchem.Mixture(Categorical(1), VonMises(1, 1)).to(torch.device("cpu"), dtype)
    result = torchem.fit(model, torch.ones(60, 1, dtype=dtype), progress=False, seed=0)
    assert result.status == "converged"
    assert result.bound == pytest.approx(359.33, abs=0.02)
