"""Missing entries filled in, conditional laws, and masks: against enumeration, quadrature and textbook formulas.

What a factor says of missing entries given the others is derived here from its density of complete rows alone.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import torchem
from tests.laws import cases
from tests.laws.cases import close, gaussian, hmm, rand, randn, rng
from tests.laws.families import Counts
from tests.regressions.common import as_users_run_it, fit, same
from torchem import factors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factor import Factor
from torchem.factors._around import Around

nan = math.nan


# ---- factors: against the density of complete rows ----------------------------------------------------------------


def _families() -> Iterator[tuple[str, Callable[[], tuple[Factor, Batch]]]]:
    """Every family that takes missing entries, at its own examples, and compositions of them."""
    for kind in cases.every_family():
        offered = cases._offered(kind)
        for i, (factor, _) in enumerate(offered):
            if factor.handles_missing and factor.n_components is not None and i < 4:
                yield f"{kind.__name__}{i or ''}", lambda kind=kind, i=i: cases._offered(kind)[i]


#: Families whose densities are zero below zero.
POSITIVE = (factors.Exponential, factors.Gamma)
FAMILIES = dict(_families())
every_family = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in FAMILIES.items()])
#: Those whose densities tell what other columns say of a missing one: angles have no mean, and counts of one total
#: leave it open when one of them was not seen (tests/factors/test_multinomial.py).
SILENT = ("VonMises", "Multinomial")
telling = pytest.mark.parametrize(
    "build", [pytest.param(build, id=name) for name, build in FAMILIES.items() if not name.startswith(SILENT)]
)


def complete_rows(factor: Factor, batch: Batch, count: int = 3) -> Batch:
    """Rows of the example without missing entries."""
    whole = ~batch.x.isnan().any(-1)
    rows = batch[whole.nonzero()[:count, 0]]
    return rows.with_x(rows.x.double())


def grid(factor: Factor, batch: Batch, column: int) -> tuple[Tensor, Tensor]:
    """Values that a column may have, and the weight of each in a sum or an integral over them."""
    outcomes = factor.outcomes()[column]
    if outcomes is None and factor.discrete:  # counts on covariates
        return torch.arange(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
    if outcomes is not None:
        value = torch.arange(200, dtype=torch.float64) if not factor.nominal[column] else outcomes.double()
        binary = bool((batch.x[:, column].nan_to_num() <= 1).all()) and len(outcomes) <= 2
        value = value[:2] if binary else value
        return value, torch.ones_like(value)
    # Tails as long as those of Student's t, x = sinh s; positive numbers, x = exp s.
    positive = isinstance(factor, POSITIVE)
    s = torch.linspace(-60 if positive else -16, 16, 3201, dtype=torch.float64)
    step = s[1] - s[0]
    return (s.exp(), s.exp() * step) if positive else (s.sinh(), s.cosh() * step)


@telling
def test_conditional_moments_are_those_of_the_density(build: Any) -> None:
    factor, batch = build()
    edged = isinstance(factor, (factors.Uniform, factors.Stacked, factors.FromDistribution))
    if edged or (isinstance(factor, Around) and not factor.discrete):
        return  # edges and atoms, which quadrature misses: below, in closed form, and by draws
    rows = complete_rows(factor, batch)
    for column in range(rows.x.shape[-1]):
        gap = rows.x.clone()
        gap[:, column] = nan
        value, weight = grid(factor, batch, column)
        mean, variance = (v.detach() for v in factor.conditional(rows.with_x(gap)))
        marginal = factor.log_prob(rows.with_x(factor.cast(gap))).detach()
        for n in range(len(rows)):
            many = rows[torch.full((len(value),), n)]
            x = many.x.clone()
            x[:, column] = value
            density = factor.log_prob(many.with_x(factor.cast(x))).detach().exp() * weight.unsqueeze(-1)
            mass = density.sum(0)
            close(mass.log(), marginal[n], rtol=1e-6, atol=1e-6)
            center = (density * value.unsqueeze(-1)).sum(0) / mass
            close(mean[n, :, column], center, rtol=1e-6, atol=1e-6)
            spread = (density * (value.unsqueeze(-1) - center).square()).sum(0) / mass
            # Of few degrees of freedom a part of the variance lies beyond any grid.
            close(variance[n, :, column], spread, rtol=1e-3, atol=1e-5)
        seen = ~gap.isnan().unsqueeze(-2).expand_as(mean)
        assert torch.equal(mean[seen], rows.x.unsqueeze(-2).expand_as(mean)[seen])
        assert bool((variance[seen] == 0).all())


@telling
def test_conditional_covariances_are_those_of_the_density(build: Any) -> None:
    """Of two missing columns, Cov(a, b) = E[b E[a | b]] − E a E b; beside the variances, and zeros where observed."""
    factor, batch = build()
    d = batch.x.shape[-1]
    edged = isinstance(factor, (factors.Uniform, factors.Stacked, factors.FromDistribution))
    if edged or isinstance(factor, Around) or any(factor.nominal):
        return
    rows = complete_rows(factor, batch, 1)
    x = rows.x.clone()
    x[:, -2:] = nan
    gappy = rows.with_x(x)
    found, variance = factor.conditional_covariance(gappy).detach()[0], factor.conditional(gappy)[1].detach()[0]
    assert found.shape == (*variance.shape, d)
    close(found.diagonal(dim1=-2, dim2=-1), variance, rtol=1e-9, atol=1e-12)
    assert torch.equal(found, found * (x[0].isnan().unsqueeze(-1) & x[0].isnan()))
    if d < 2:
        return
    value, weight = grid(factor, batch, d - 1)
    many = rows[torch.zeros(len(value), dtype=torch.long)]
    given = x.expand(len(value), -1).clone()
    given[:, -1] = value
    given = many.with_x(factor.cast(given))
    mass = factor.log_prob(given).detach().exp() * weight.unsqueeze(-1)
    mass = mass / mass.sum(0)
    other = factor.conditional(given)[0].detach()[..., -2]
    b = value.unsqueeze(-1)
    expected = (mass * b * other).sum(0) - (mass * b).sum(0) * (mass * other).sum(0)
    close(found[..., -2, -1], expected, rtol=1e-3, atol=1e-5)


@telling
def test_draws_have_the_conditional_moments_and_leave_the_rest(build: Any) -> None:
    factor, batch = build()
    row, k = complete_rows(factor, batch, 1), factor.n_components
    assert k is not None
    d, n = row.x.shape[-1], 4000
    for missing in {(0,), tuple(range(d))}:
        gap = row.x.clone()
        gap[:, list(missing)] = nan
        mean, variance = (v.detach()[0] for v in factor.conditional(row.with_x(gap)))
        for state in range(k):
            many = row[torch.zeros(n, dtype=torch.long)]
            with torch.no_grad():
                drawn = factor.complete(many.with_x(gap.expand(n, d)), torch.full((n,), state), rng(state))
            kept = ~gap[0].isnan()
            assert torch.equal(drawn[:, kept], row.x.expand(n, d)[:, kept])
            for column in missing:
                spread = float(variance[state, column])
                if math.isfinite(spread) and spread > 0:
                    z = (drawn[:, column].mean() - mean[state, column]) / (spread / n) ** 0.5
                    assert abs(float(z)) < 5
                if not isinstance(factor, (factors.StudentT, factors.Stacked)):  # heavy tails
                    assert float(drawn[:, column].var()) == pytest.approx(spread, rel=0.35, abs=1e-9)


def test_noise_and_clusters_in_closed_form() -> None:
    factor = factors.Stacked.example()[0]
    x = torch.tensor([[0.5, nan], [nan, nan]]).double()
    mean, variance = (v.detach() for v in factor.conditional(Batch(x)))
    close(mean[:, 2, 1], torch.zeros(2).double())
    close(variance[:, 2, 1], torch.full((2,), 16.0**2 / 12, dtype=torch.float64))
    own = factor.factors[0].conditional(Batch(x))[0].detach()  # pyright: ignore
    close(mean[:, :2], own)


def test_single_missing_entries_of_a_family_that_cannot_tell_are_refused() -> None:
    family, batch = Counts.example()
    x = batch.x[:3].clone()
    x[0] = nan
    with pytest.raises(NotImplementedError, match="mean and variance"):
        family.conditional(Batch(x))
    assert torch.equal(family.complete(Batch(x), torch.zeros(3).long(), rng(0))[1:], x[1:])
    x[1, 0] = nan
    with pytest.raises(InvalidArgument, match=r"data: expected rows that are whole.*Counts"):
        family.complete(Batch(x), torch.zeros(3).long())


# ---- mixtures -----------------------------------------------------------------------------------------------------


def mixed() -> torchem.Mixture:
    """Normal, count, binary and named columns."""
    counts, kinds, binary = factors.Poisson(3, 1), factors.Categorical(3, 4), factors.Bernoulli(3, 1)
    counts.rates, kinds.probs = 1 + 6 * rand(3, 1, seed=3), (2 * randn(3, 4, seed=4)).softmax(-1)
    binary.probs = 0.1 + 0.8 * rand(3, 1, seed=5)
    parts = [gaussian(3, 2, "full"), counts, kinds, binary]
    model = torchem.Mixture(factors.Categorical(3), factors.Product(parts, [[1, 4], [0], [2], [3]])).double()
    model.weights = [0.5, 0.3, 0.2]
    return model


def table(n: int = 60, share: float = 0.35) -> tuple[torchem.Mixture, Tensor, Tensor]:
    model = mixed()
    whole = model.sample(n, generator=rng(1))
    holes = rand(n, 5, seed=6) < share
    holes[0], holes[1] = True, False
    return model, whole, torch.where(holes, nan, whole)


def test_means_modes_and_variances_by_enumeration() -> None:
    model, whole, x = table()
    gamma, product = model.posterior(x).detach(), model.component
    mean, variance = (v.detach() for v in product.conditional(Batch(x)))
    found, spread = model.impute(x, "mean", variance=True)
    center = (gamma.unsqueeze(-1) * mean).sum(1)
    own = torch.tensor([0, 1, 3, 4])
    close(found[:, own], center[:, own])
    between = (gamma.unsqueeze(-1) * (variance + (mean - center.unsqueeze(1)).square())).sum(1)
    close(spread[:, own], torch.where(x.isnan(), between, 0.0)[:, own])
    best, unsure = model.impute(x, variance=True)
    assert torch.equal(best[:, [1, 4]], found[:, [1, 4]])  # of continuous columns the mean
    for column, size in ((0, 40), (2, 4), (3, 2)):
        rows = x[:, column].isnan().nonzero()[:, 0]
        joint = []
        for value in range(size):
            given = x[rows].clone()
            given[:, column] = value
            joint.append(model.log_prob(given).detach())
        law = torch.stack(joint, -1).softmax(-1)
        assert torch.equal(best[rows, column], law.argmax(-1).double())
        assert torch.equal(found[rows, column], best[rows, column]) == (column == 2)
        if column == 2:
            close(unsure[rows, column], 1 - law.amax(-1))
    assert torch.equal(best[~x.isnan()], whole[~x.isnan()])
    assert bool(model.log_prob(best).isfinite().all())
    state = model.impute(x, "mode")
    top = gamma.argmax(-1)
    close(state[:, [1, 4]], mean[torch.arange(len(x)), top][:, [1, 4]])
    assert torch.equal(state[:, [0, 2, 3]], best[:, [0, 2, 3]])


def test_draws_are_the_posterior_s() -> None:
    model, whole, x = table(12)
    drawn = model.impute(x, draws=6000, generator=rng(2))
    assert drawn.shape == (6000, 12, 5)
    assert torch.equal(drawn[:, ~x.isnan()], whole[~x.isnan()].expand(6000, -1))
    mean, spread = model.impute(x, "mean", variance=True)
    gap = (drawn.mean(0) - mean) / (spread / 6000).sqrt().clamp(min=1e-12)
    own = x.isnan()
    own[:, 2] = False
    assert float(gap[own].abs().max()) < 5
    close(drawn.var(0)[own], spread[own], rtol=0.25)
    again = model.impute(x, draws=6000, generator=rng(2))
    assert torch.equal(drawn, again)


def test_every_layout_and_type_comes_back() -> None:
    model = torchem.GaussianMixture(2, 1)
    model.means = [[-1.0], [2.0]]
    x = torch.tensor([0.1, nan, 0.3], dtype=torch.float64)
    for data in (x, x.numpy(), x.tolist()):
        found = model.impute(data)
        assert found.shape == (3,)
        assert torch.equal(found[::2].double(), x[::2])
        assert float(found[1]) == pytest.approx(0.5)
    assert model.impute(x[:, None]).dtype == torch.float64
    assert model.impute(Batch(x[:, None])).shape == (3, 1)
    whole = torch.tensor([[1.0], [2.0]])
    assert torch.equal(model.impute(whole), whole)
    assert model.impute(whole, draws=2).shape == (2, 2, 1)


def test_whole_numbers_stay_whole() -> None:
    model = cases.latent_class()
    x = torch.tensor([[3], [0], [1]])
    found = model.impute(x, observed=[[True], [False], [True]])
    assert found.dtype == x.dtype
    assert torch.equal(found[::2], x[::2])
    one = (model.weights @ model.component.probs).argmax()  # pyright: ignore
    assert int(found[1]) == int(one)
    drawn = model.impute(Batch(x, observed=torch.tensor([[True], [False], [True]])), draws=5, generator=rng(0))
    assert bool(((drawn >= 0) & (drawn < 4)).all())
    # Of a normal column there is no whole number to fill in.
    normal = torchem.GaussianMixture(1, 1)
    assert normal.impute(x, observed=[[True], [False], [True]]).is_floating_point()


def test_parts_within_states() -> None:
    """Two binary columns that depend on each other given the state: the mode follows what is seen."""
    part = factors.Bernoulli(2, 2)
    part.probs = [[0.9, 0.95], [0.1, 0.05]]
    inside = factors.Mixture(factors.Categorical(1, 2), part)
    model = torchem.Mixture(factors.Categorical(1), inside).double()
    assert model.impute([[1.0, nan], [0.0, nan]]).tolist() == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("wrap", [torchem.Gradient, torchem.Variational])
def test_wrapped_factors_complete_as_what_they_wrap(wrap: Any) -> None:
    model = cases.mixture(2, 3, "full")
    x = torch.where(rand(20, 3, seed=9) < 0.3, nan, randn(20, 3, seed=8))
    expected = model.component.conditional(Batch(x))[0].detach()
    model.component = wrap(model.component)
    close(model.component.conditional(Batch(x))[0].detach(), expected)
    assert bool(model.impute(x).isfinite().all())
    assert model.impute(x, draws=2, generator=rng(0)).shape == (2, 20, 3)


def test_replicas_are_imputed_together() -> None:
    many = cases.mixture(2, 3, "full").replicate(2)
    x = torch.where(rand(20, 3, seed=9) < 0.3, nan, randn(20, 3, seed=8))
    one = many.take_replicas(1)
    close(many.impute(x)[1], one.impute(x))
    with pytest.raises(InvalidArgument, match="draws: expected a model without replicas"):
        many.impute(x, draws=1)


# ---- chains -------------------------------------------------------------------------------------------------------


def chain() -> torchem.HMM:
    model = hmm(gaussian(2, 2, "full", spread=3.0))
    model.transition_matrix = [[0.9, 0.1], [0.3, 0.7]]
    return model


def sequence() -> Tensor:
    x = randn(4, 2, seed=15)
    x[1], x[2, 0], x[3] = nan, nan, nan
    return x


def paths(model: torchem.HMM, x: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """All paths of the states, and the probability of each given the data."""
    found = list(itertools.product(range(2), repeat=len(x)))
    emit = model.emission.log_prob(Batch(x)).detach()
    emit = torch.where(x.isnan().all(-1, keepdim=True), 0.0, emit)
    first, step = model.initial_probs.detach().log(), model.transition_matrix.detach().log()
    logs = [
        first[z[0]] + sum(step[a, b] for a, b in itertools.pairwise(z)) + sum(emit[t, k] for t, k in enumerate(z))
        for z in found
    ]
    return found, torch.stack(logs).softmax(0)


def test_frames_of_a_chain_by_enumeration_of_paths() -> None:
    model, x = chain(), sequence()
    found, law = paths(model, x)
    mean, variance = (v.detach() for v in model.emission.conditional(Batch(x)))
    time = torch.arange(len(x))
    center = sum(p * mean[time, list(z)] for z, p in zip(found, law, strict=True))
    second = sum(p * (variance + mean.square())[time, list(z)] for z, p in zip(found, law, strict=True))
    assert isinstance(center, Tensor)
    assert isinstance(second, Tensor)
    value, spread = model.impute(x, variance=True)
    close(value, center)
    close(spread, torch.where(x.isnan(), second - center.square(), 0.0), rtol=1e-6, atol=1e-6)
    assert torch.equal(value[~x.isnan()], x[~x.isnan()])


def test_draws_of_frames_follow_one_path() -> None:
    """Frames that are missing on both sides of one that is seen stay in step: their product is that of paths."""
    model, x = chain(), sequence()
    found, law = paths(model, x)
    mean = model.emission.conditional(Batch(x))[0].detach()
    together = sum(float(p) * float(mean[1, z[1], 0] * mean[3, z[3], 0]) for z, p in zip(found, law, strict=True))
    drawn = model.impute(x, draws=8000, generator=rng(3))
    assert drawn.shape == (8000, 4, 2)
    product = drawn[:, 1, 0] * drawn[:, 3, 0]
    assert abs(float(product.mean()) - together) < 5 * float(product.std()) / 8000**0.5
    apart = float(drawn[:, 1, 0].mean() * drawn[:, 3, 0].mean())
    assert abs(apart - together) > 5 * float(product.std()) / 8000**0.5


def test_sequences_come_back_as_they_came() -> None:
    model = chain()
    a, b = torch.cat([sequence(), randn(2, 2)]), sequence()[:3]
    one, two = model.impute(a), model.impute(b)
    listed = model.impute([a, b.numpy()])
    assert torch.equal(listed[0], one)
    assert torch.equal(listed[1], two)
    joined = model.impute(torch.cat([a, b]), lengths=[6, 3])
    close(joined, torch.cat([one, two]))
    padded = torch.full((2, 6, 2), 7.5, dtype=torch.float64)
    padded[0], padded[1, :3] = a, b
    found = model.impute(padded, lengths=[6, 3])
    close(found[0], one)
    close(found[1, :3], two)
    assert bool((found[1, 3:] == 7.5).all())
    assert model.impute(padded, lengths=[6, 3], draws=4, generator=rng(0)).shape == (4, 2, 6, 2)
    assert [part.shape for part in model.impute([a, b], draws=4)] == [(4, 6, 2), (4, 3, 2)]
    mask = ~a.isnan()
    close(model.impute(a.nan_to_num(), observed=mask), one)


def test_symbols_of_a_chain() -> None:
    model = hmm(cases.latent_class().component)
    x = torch.tensor([[0.0], [nan], [2.0]])
    gamma = model.posterior(x)[0, 1].detach()
    law = gamma @ model.emission.probs.detach()  # pyright: ignore
    value, unsure = model.impute(x, variance=True)
    assert int(value[1]) == int(law.argmax())
    close(unsure[1], 1 - law.amax().unsqueeze(0), rtol=1e-6)


def test_a_mixed_emission_beside_an_autoregression() -> None:
    """The other column of a frame may be missing; the regression's own may not."""
    parts = [factors.Autoregressive.gaussian(2, 1, 1), factors.Poisson(2, 1)]
    model = hmm(factors.Product(parts))
    x = torch.cat([randn(6, 1), torch.arange(6.0)[:, None].double()], -1)
    x[[0, 3], 1] = nan
    found = model.impute(x)
    assert bool((found == found.round())[:, 1].all())
    assert torch.equal(found[:, 0], x[:, 0])
    x[2, 0] = nan
    with pytest.raises(InvalidArgument, match="without missing entries for an autoregression"):
        model.impute(x)


@pytest.mark.parametrize("q", ["exact", "structured"])
def test_frames_of_several_chains(q: Any) -> None:
    model = torchem.FactorialHMM.gaussian([2, 3], 2, q=q).double()
    model.contributions = [randn(2, 2, seed=1), randn(3, 2, seed=2)]
    model.transitions[0].probs = [[0.9, 0.1], [0.2, 0.8]]
    x = model.sample(3, 5, generator=rng(0))
    x[0, 2:4] = x[2] = nan
    value, spread = model.impute(x, variance=True)
    marginals = model.posterior(x)
    expected = sum(g.detach() @ w.detach() for g, w in zip(marginals, model.contributions, strict=True))
    close(value[x.isnan()], expected[x.isnan()])  # pyright: ignore
    drawn = model.impute(x, draws=3000, generator=rng(1))
    gap = (drawn.mean(0) - value)[x.isnan()] / (spread[x.isnan()] / 3000).sqrt()
    assert float(gap.abs().max()) < 5
    close(drawn.var(0)[x.isnan()], spread[x.isnan()], rtol=0.2)


@pytest.mark.parametrize("hidden", [False, True])
def test_angles_are_filled_in_by_their_mean_direction(hidden: bool) -> None:
    """Beside a normal column that tells of the state: against quadrature of the density, in a mixture or a part."""
    angles, other = factors.VonMises(3, 1).double(), gaussian(3, 1, "full")
    angles.means, angles.concentrations = [[3.0], [-3.0], [0.5]], [[4.0], [1.0], [20.0]]
    factor: Factor = factors.Product([other, angles])
    if hidden:
        factor = factors.Mixture(factors.Categorical(1, 3), factor)
    model = torchem.Mixture(factors.Categorical(1 if hidden else 3), factor).double()
    x = torch.cat([2 * randn(6, 1, seed=2), torch.full((6, 1), nan)], -1).double()
    value = torch.linspace(-math.pi, math.pi, 2001, dtype=torch.float64)[:-1]
    grid = torch.stack([x[:, :1].expand(-1, 2000), value.expand(6, -1)], -1)
    mass = model.log_prob(grid.flatten(0, 1)).detach().unflatten(0, (6, 2000)).softmax(-1)
    cosine, sine = mass @ value.cos(), mass @ value.sin()
    mean, spread = model.impute(x, "mean", variance=True)
    close(mean[:, 1], torch.atan2(sine, cosine), rtol=1e-9)
    close(spread[:, 1], 1 - torch.hypot(sine, cosine), rtol=1e-9)
    law = model.condition(x[:, :1], columns=[0])
    close(law.mean.detach(), mean[:, 1:], rtol=1e-12)
    close(law.variance.detach(), spread[:, 1:], rtol=1e-12)
    whole = x.clone()
    whole[:, 1] = 3.1
    assert torch.equal(model.impute(whole), whole)
    with pytest.raises(NotImplementedError, match="angles"):
        law.covariance_matrix  # noqa: B018


# ---- conditional laws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.COVARIANCE_TYPES)
def test_a_normal_law_given_some_columns_is_scipy_s(kind: str) -> None:
    scipy = pytest.importorskip("scipy.stats")
    model = cases.mixture(2, 3, kind)
    factor = model.component.structure.dense(model.component.scale, 2, 3).detach()
    means, covariances, weights = model.means.detach().numpy(), (factor @ factor.mT).numpy(), model.weights.detach()
    known, unknown = randn(4, 2, seed=1), randn(4, 1, seed=2)
    law = model.condition(known, columns=[2, 0])

    def density(x: np.ndarray, columns: list[int]) -> np.ndarray:
        parts = (
            float(w) * scipy.multivariate_normal(m[columns], c[np.ix_(columns, columns)]).pdf(x)
            for w, m, c in zip(weights, means, covariances, strict=True)
        )
        return sum(parts)  # pyright: ignore

    together = density(torch.cat([known[:, 1:], unknown, known[:, :1]], -1).numpy(), [0, 1, 2])
    expected = np.log(together) - np.log(density(known.numpy(), [2, 0]))
    close(law.log_prob(unknown), torch.from_numpy(expected), rtol=1e-8, atol=1e-8)
    assert law.columns == [1]
    # Its moments are integrals of its density.
    value = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    mass = law.log_prob(value[:, None, None].expand(-1, 4, 1)).exp().detach() * (value[1] - value[0])
    close(mass.sum(0), torch.ones(4), rtol=1e-8)
    center = (value.unsqueeze(-1) * mass).sum(0)
    close(law.mean[:, 0].detach(), center, rtol=1e-7, atol=1e-7)
    spread = (value.unsqueeze(-1) - center).square()
    close(law.variance[:, 0].detach(), (spread * mass).sum(0), rtol=1e-6, atol=1e-7)


def test_laws_by_pattern_and_by_name_agree() -> None:
    model, whole, _ = table(20)
    x = whole.clone()
    x[:, [1, 3]] = nan
    one, two = model.condition(x), model.condition(whole[:, [0, 2, 4]], columns=[0, 2, 4])
    assert (one.columns, two.columns) == ([0, 1, 2, 3, 4], [1, 3])
    close(one.mean[:, [1, 3]], two.mean)
    close(one.variance[:, [1, 3]], two.variance)
    assert torch.equal(one.mean[:, [0, 4]].detach(), whole[:, [0, 4]])
    close(one.log_prob(whole), two.log_prob(whole[:, [1, 3]]))
    close(one.log_prob(whole), model.log_prob(whole) - model.log_prob(x))
    # A part of what is unknown, and nothing of it.
    part = whole.clone()
    part[:, 3] = nan
    close(one.log_prob(part), model.log_prob(part) - model.log_prob(x))
    close(one.log_prob(x), torch.zeros(20), atol=1e-12)
    drawn = two.sample(4000, generator=rng(1))
    gap = (drawn.mean(0) - two.mean.detach()) / (two.variance.detach() / 4000).sqrt()
    assert float(gap.abs().max()) < 5
    close(two.covariance_matrix.diagonal(dim1=-2, dim2=-1), two.variance)
    close(one.covariance_matrix[:, [1, 3]][..., [1, 3]], two.covariance_matrix)
    assert bool((one.covariance_matrix[:, 0] == 0).all())
    low, high = two.quantile([0.1, 0.9], generator=rng(1))
    assert bool((low <= high).all())


@pytest.mark.parametrize("kind", ["full", "low_rank"])
def test_quantiles_of_laws_are_exact(kind: Any) -> None:
    model = torchem.GaussianMixture(2, 3, kind, rank=1 if kind == "low_rank" else None).double()
    model.means, model.weights = 2 * randn(2, 3), [0.3, 0.7]
    x = randn(6, 3, seed=8)
    x[:, 0], x[3, 2] = nan, nan
    before = torch.random.get_rng_state()
    law = model.condition(x)
    low, middle, high = law.quantile(torch.tensor([0.05, 0.5, 0.95]))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(middle[~x.isnan()], x[~x.isnan()])
    # P(x_0 ≤ q | x_1, x_2) by quadrature of the density.
    for q, share in ((low, 0.05), (middle, 0.5), (high, 0.95)):
        grid = q[:, :1] - torch.linspace(0, 30, 20001, dtype=torch.float64)
        rows = torch.stack([grid[0], *(torch.full_like(grid[0], float(x[0, d])) for d in (1, 2))], -1)
        each = (model.log_prob(rows) - model.log_prob(x[:1])).detach().exp()
        assert float(-torch.trapezoid(each, grid[0])) == pytest.approx(share, abs=1e-5)
    drawn = law.sample(4000, generator=rng(3)).quantile(0.95, 0)
    close(high.detach(), drawn, rtol=0, atol=0.5)


def test_quantiles_of_counts_and_of_families_that_are_drawn_from() -> None:
    counts = torchem.Mixture(factors.Categorical(2), factors.Poisson(2, 2)).double()
    counts.component.rates = [[1.0, 20.0], [10.0, 3.0]]
    x = torch.tensor([[1.0, nan], [9.0, nan], [nan, 3.0]]).double()
    law = counts.condition(x)
    found = law.quantile(0.5)
    assert torch.equal(found, law.sample(4001, generator=rng(0)).quantile(0.5, 0))
    heavy = torchem.Mixture(factors.Categorical(2), factors.StudentT(2, 2)).double().condition(x)
    with pytest.raises(InvalidArgument, match=r"^generator: .*StudentT"):
        heavy.quantile(0.5)
    assert heavy.quantile([0.1, 0.9], generator=rng(0)).shape == (2, 3, 2)


def test_names_have_probabilities_and_no_mean() -> None:
    """By enumeration of the joint law of a name, a number and another name."""
    parts = [factors.Categoricals(2, [3]), factors.Gaussian(2, 1), factors.Categorical(2, 2)]
    model = torchem.Mixture(factors.Categorical(2), factors.Product(parts)).double()
    parts[0].probs, parts[2].probs = rand(2, 1, 3, seed=1).softmax(-1), rand(2, 2, seed=2).softmax(-1)
    parts[1].means, model.weights = [[-1.0], [1.0]], [0.4, 0.6]
    x = torch.tensor([[nan, 0.5, 1.0], [nan, nan, nan], [2.0, -1.0, nan]]).double()
    law = model.condition(x)
    for column, size in ((0, 3), (2, 2)):
        want = []
        for value in range(size):
            full = x.clone()
            full[:, column] = torch.where(x[:, column].isnan(), value, x[:, column])
            want.append((model.log_prob(full) - model.log_prob(x)).exp())
        known = ~x[:, column].isnan()
        probs = law.probs(column)
        close(probs[~known], torch.stack(want, -1)[~known])
        assert torch.equal(probs[known], torch.nn.functional.one_hot(x[known, column].long(), size).double())
        assert torch.equal(law.mean[:, column].isnan(), ~known)
        assert torch.equal(law.variance[:, column].isnan(), ~known)
        assert bool(law.quantile(0.5)[~known, column].isnan().all())
    assert bool(law.mean[:, 1].isfinite().all())
    assert bool(law.quantile(0.5)[:, 1].isfinite().all())
    with pytest.raises(InvalidArgument, match=r"^column: "):
        law.probs(1)


def test_pieces_of_a_law_are_invisible() -> None:
    model, _, x = table(300)
    found = []
    for model.memory_budget in (None, 1):
        law = model.condition(x)
        value = (law.mean + law.variance).nansum() + law.weights.square().sum()
        slopes = torch.autograd.grad(value, list(model.parameters()))
        own = [law.mean, law.variance, law.weights, law.quantile(0.3)]
        found.append([*(part.nan_to_num(nan=-7.0) for part in own), *slopes])
    for one, two in zip(*found, strict=True):
        close(one, two, rtol=1e-9, atol=1e-9)


def test_experts_given_what_they_read() -> None:
    """A mixture of regressions: outputs given other outputs and the covariates."""
    model = torchem.Mixture(factors.Categorical(3), factors.LinearGaussian.example()[0]).double()
    u = torch.cat([torch.ones(5, 1), randn(5, 1)], -1).double()
    known = randn(5, 1, seed=4)
    law = model.condition(known, columns=[1], inputs=u)
    assert law.mean.shape == (5, 2)
    full = torch.full((5, 3), nan, dtype=torch.float64)
    full[:, 1:2] = known
    close(model.impute(full, inputs=u)[:, [0, 2]], law.mean.detach())
    moments = model.predict(u)
    pairs = moments.covariance_matrix.detach()
    close(pairs.diagonal(dim1=-2, dim2=-1), moments.variance.detach())
    drawn = torch.stack([model.sample(5, inputs=u, generator=rng(i)) for i in range(4000)])
    gap = drawn - drawn.mean(0)
    # The error of an empirical covariance is about √((C_aa C_bb + C_ab²) / n).
    size = pairs.diagonal(dim1=-2, dim2=-1)
    error = ((size.unsqueeze(-1) * size.unsqueeze(-2) + pairs.square()) / 4000).sqrt()
    assert float((((gap.unsqueeze(-1) * gap.unsqueeze(-2)).mean(0) - pairs) / error).abs().max()) < 6


def test_gradients_are_those_of_differences() -> None:
    model = cases.mixture(2, 3, "full")
    x = randn(6, 3, seed=3)
    holes = rand(6, 3, seed=5) < 0.4
    holes[0], holes[1] = True, False

    def score(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        values = {"component.mean": mean, "component.scale": scale}
        return torch.func.functional_call(model, values, (Batch(torch.where(holes, nan, x)),))

    inputs = [v.detach().clone().requires_grad_() for v in (x, model.component.mean, model.component.scale)]
    assert torch.autograd.gradcheck(score, inputs)
    (slope,) = torch.autograd.grad(score(*inputs).sum(), inputs[:1])
    assert bool((slope[holes] == 0).all())
    law = model.condition(torch.where(holes, nan, x))
    grads = torch.autograd.grad((law.mean + law.variance).sum(), list(model.parameters()))
    assert all(bool(g.isfinite().all()) for g in grads)


# ---- masks --------------------------------------------------------------------------------------------------------


def gappy() -> tuple[Tensor, Tensor]:
    x = cases.blobs(60, 3, 2)
    seen = rand(60, 3, seed=2) > 0.3
    return x, seen


def test_a_mask_is_nan_in_every_use() -> None:
    x, seen = gappy()
    hidden = torch.where(seen, x, 1e4)
    expected = torchem.GaussianMixture(2, 3).double()
    first = fit(expected, torch.where(seen, x, nan), max_iter=5)
    for data, options in (
        (hidden, {"observed": seen}),
        (hidden.numpy(), {"observed": seen.numpy()}),
        (Batch(hidden, observed=seen), {}),
        (Batch(hidden), {"observed": seen.int()}),
    ):
        model = torchem.GaussianMixture(2, 3).double()
        assert fit(model, data, max_iter=5, **options).history == first.history
        assert same(model, expected)
    loader = DataLoader(range(60), 20, collate_fn=lambda i: Batch(hidden[i], observed=seen[i]))  # pyright: ignore
    found = fit(torchem.GaussianMixture(2, 3).double(), loader, max_iter=5)
    assert found.history == pytest.approx(first.history)
    given: dict[str, Any] = {"observed": seen}
    assert torchem.criteria(expected, hidden, **given) == torchem.criteria(expected, torch.where(seen, x, nan))
    judged = fit(expected, x, validation={"data": hidden, **given}, max_iter=2, init=None)
    assert judged.validation is not None
    rule = torchem.Stochastic()
    one, two = torchem.GaussianMixture(2, 3).double(), torchem.GaussianMixture(2, 3).double()
    score = torchem.partial_fit(one, hidden, rule, **given)
    assert score == torchem.partial_fit(two, torch.where(seen, x, nan), torchem.Stochastic())


def test_masks_of_sequences() -> None:
    x, seen = gappy()
    hidden = torch.where(seen, x, 1e4)
    clear = torch.where(seen, x, nan)
    models = [torchem.GaussianHMM(2, 3).double() for _ in range(4)]
    forms: list[tuple[Any, dict[str, Any]]] = [
        ([clear[:25], clear[25:]], {}),
        ([hidden[:25], hidden[25:]], {"observed": [seen[:25], seen[25:]]}),
        (hidden, {"observed": seen, "lengths": [25, 35]}),
        (Batch(hidden, observed=seen, lengths=torch.tensor([25, 35])), {}),
    ]
    histories = [fit(m, data, max_iter=4, **given).history for m, (data, given) in zip(models, forms, strict=True)]
    assert all(history == histories[0] for history in histories)


@every_family
def test_a_mask_is_nan_for_every_family(build: Any) -> None:
    factor, batch = build()
    rows = complete_rows(factor, batch, 20)
    seen = rand(*rows.x.shape, seed=1) > 0.3
    masked = replace(rows, observed=seen)
    close(factor.log_prob(masked), factor.log_prob(rows.with_x(torch.where(seen, rows.x, nan))))
    assert masked.observed is None
    nothing = replace(rows, observed=torch.zeros_like(seen))
    close(factor.log_prob(nothing), torch.zeros(len(rows), factor.n_components or 1), atol=1e-12)


@pytest.mark.parametrize("family", ["Categorical", "Poisson", "Bernoulli"])
def test_masks_of_whole_numbers(family: str) -> None:
    x = torch.randint(0, 2, (40, 1), generator=rng(1))
    seen = rand(40, 1, seed=3) > 0.3
    build = {"Categorical": lambda: factors.Categorical(2, 2)}.get(family, lambda: getattr(factors, family)(2, 1))
    models = [torchem.Mixture(factors.Categorical(2), build()).double() for _ in range(3)]
    hidden = torch.where(seen, x, 7)
    fit(models[0], torch.where(seen, x.double(), nan), max_iter=4)
    fit(models[1], hidden, observed=seen, max_iter=4)
    fit(models[2], Batch(hidden, observed=seen), max_iter=4)
    assert same(models[0], models[1])
    assert same(models[0], models[2])
    full = Batch(x, observed=torch.ones_like(seen))
    assert full.x is x


def test_bad_masks_are_refused() -> None:
    x, seen = gappy()
    model = torchem.GaussianMixture(2, 3).double()
    for mask in (seen[:5], seen[:, :1], 2 * seen.long()):
        with pytest.raises(InvalidArgument, match="observed: expected true or false for each entry"):
            fit(model, x, observed=mask)
    with pytest.raises(InvalidArgument, match=r"observed: expected a list of 2"):
        fit(torchem.GaussianHMM(2, 3), [x[:5], x[5:]], observed=seen)
    x[4, 1] = math.inf
    seen[4, 1] = False
    with pytest.raises(InvalidArgument, match="row 4, column 1"):
        fit(model, x, observed=seen)


@pytest.mark.parametrize("family", ["Poisson", "Bernoulli", "Exponential", "StudentT", "Gaussian"])
def test_a_column_without_an_entry_is_named(family: str) -> None:
    x = torch.randint(0, 2, (30, 3), generator=rng(1)).double()
    x[:, 1] = nan
    model = torchem.Mixture(factors.Categorical(2), getattr(factors, family)(2, 3)).double()
    with pytest.raises(InvalidArgument, match="data: expected an observed entry in each column, got none in column 1"):
        fit(model, x)


def test_what_cannot_be_imputed_is_refused() -> None:
    model = cases.mixture(2, 2, "full")
    x = torch.tensor([[0.0, nan]], dtype=torch.float64)
    network = torchem.AmortizedModel(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2), 1)
    counts = torchem.Mixture(factors.Categorical(1), factors.Poisson(1, 2))
    counts.component.rates = [[0.0, 1.0]]  # pyright: ignore
    with as_users_run_it():
        for match, call in (
            ("how: ", lambda: model.impute(x, "median")),  # pyright: ignore
            ("draws: .*at least 1", lambda: model.impute(x, draws=0)),
            ("variance: ", lambda: model.impute(x, draws=2, variance=True)),
            ("columns: ", lambda: model.condition(x, columns=[0, 0])),
            ("columns: ", lambda: model.condition(x, columns=[0, 1])),
            ("columns: ", lambda: model.condition(x[:, :1], columns=[2])),
            ("data: expected 1 columns", lambda: model.condition(x, columns=[0])),
            ("x: expected shape", lambda: model.condition(x).log_prob(x[:, :1])),
            ("n: ", lambda: model.condition(x).sample(0)),
            ("q: ", lambda: model.condition(x).quantile(1.5)),
            ("model: expected one that completes", lambda: network.impute(torch.zeros(1, 2))),
            ("probability zero at row 1", lambda: counts.impute([[0.0, 1.0], [1.0, nan]])),
        ):
            with pytest.raises(InvalidArgument, match=match):
                call()
