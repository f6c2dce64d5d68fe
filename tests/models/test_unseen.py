"""What was not seen: laws of columns, frames and sequences, held to densities on grids, to paths and to each other."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws.cases import close, randn, rng
from tests.models.test_nested import K, chains, flattened, ragged
from tests.models.test_state_space import joint, model_of
from torchem.errors import InvalidArgument
from torchem.factors import Bernoulli, Categorical, LinearGaussian, Poisson, PoissonRegression
from torchem.models import HMM, FactorAnalysis, GaussianHMM, GaussianHSMM, GaussianMixture, Mixture

nan = float("nan")


def moved(model: Any, scale: float = 0.5) -> Any:
    """Other parameters than those that a model begins with, of both components of a mixture."""
    model = model.double()
    for i, value in enumerate(model.parameters()):
        value.data = value.data + scale * randn(*value.shape, seed=i + 1)
    return model


#: Models of rows or sequences with two columns, and whether of sequences.
MODELS: dict[str, tuple[Callable[[], Any], bool]] = {
    "mixture": (lambda: moved(GaussianMixture(2, 2)), False),
    "mixture of mixtures": (lambda: moved(Mixture(Categorical(2), GaussianMixture(2, 2))), False),
    "mixture of factor analyses": (
        lambda: moved(Mixture(Categorical(2), [FactorAnalysis(2, 1), GaussianMixture(2, 2, "diag")])),
        False,
    ),
    "HMM": (lambda: moved(GaussianHMM(3, 2, "full")), True),
    "HSMM": (lambda: moved(GaussianHSMM(2, 2, 3, covariance_type="full")), True),
    "mixture of HMMs": (lambda: moved(Mixture(Categorical(2), GaussianHMM(2, 2, "full"))), True),
    "mixture of chains of two kinds": (
        lambda: moved(Mixture(Categorical(2), [GaussianHMM(2, 2), GaussianHSMM(2, 2, 3, "poisson")])),
        True,
    ),
    "state space": (lambda: model_of(2, 2), True),
    "switching dynamics of one regime": (lambda: moved(torchem.SwitchingLinearDynamics(1, 2, 2), 0.3), True),
    "mixture of state spaces": (
        lambda: moved(Mixture(Categorical(2), torchem.LinearGaussianStateSpace(1, 2)), 0.3),
        True,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_laws_of_one_entry_are_those_of_the_density_on_a_grid(name: str) -> None:
    """Mean, variance, conditional density and draws, from log-likelihoods alone."""
    build, sequences = MODELS[name]
    model = build()
    x = randn(*((3, 4, 2) if sequences else (3, 2)), seed=5)
    place = (1, 2, 0) if sequences else (1, 0)
    holes = x.clone()
    holes[place] = nan
    grid = torch.linspace(-15, 15, 1201, dtype=torch.float64)
    many = x[1:2].repeat(len(grid), *[1] * (x.dim() - 1))
    many[(slice(None), *place[1:])] = grid
    with torch.no_grad():
        density = model.log_prob(many) - model.log_prob(holes[1:2])
        mass = density.exp() * (grid[1] - grid[0])
        close(mass.sum(), torch.ones(()), rtol=1e-5)
        mean = (mass * grid).sum()
        spread = (mass * (grid - mean).square()).sum()
        value, unsure = model.impute(holes, variance=True)
        close(value[place], mean, rtol=1e-5, atol=1e-6)
        close(unsure[place], spread, rtol=1e-4, atol=1e-6)
        law = model.condition(holes)
        close(law.mean, value)
        close(law.variance, unsure)
        other = x.expand(5, *x.shape).clone()
        other[(slice(None), *place)] = grid[::300]
        own = law.log_prob(other)
        close(own[(slice(None), *place[:-1])], density[::300])
        assert (own.abs().amax(0) > 1e-9).sum() == 1
        drawn = model.impute(holes, draws=4000, generator=rng(0))[(slice(None), *place)]
        assert abs(float((drawn.mean() - mean) / (spread / 4000).sqrt())) < 5
        assert 0.85 < float(drawn.var() / spread) < 1.15
        # The other column given this one.
        known = model.condition(x[..., :1], columns=[0])
        assert known.columns == [1]
        blank = torch.stack([x[..., 0], torch.full_like(x[..., 0], nan)], -1)
        close(known.mean[..., 0], model.impute(blank)[..., 1])
        close(known.covariance_matrix[..., 0, 0], known.variance[..., 0])
        assert known.sample(3, generator=rng(1)).shape == (3, *x.shape[:-1], 1)
        assert known.quantile([0.1, 0.9], 50, generator=rng(1)).shape == (2, *x.shape[:-1], 1)


def test_mixtures_of_chains_fill_in_as_the_chain_of_blocks() -> None:
    model, batch = chains(), ragged()
    big = flattened(model)
    several = Mixture(Categorical(K), [copy.deepcopy(model.component[k]) for k in range(K)]).double()
    several.weights = model.weights.detach()
    for other in (model, several):
        for how in ("mean", "mode"):
            if how == "mode":  # the most probable component's most probable state
                value = other.impute(batch, "mode")
                k = int(other.posterior(batch)[0].argmax())
                close(value[0, 1], model.component[k].impute(batch, "mode")[0, 1])
                continue
            mine, theirs = other.impute(batch, how, variance=True), big.impute(batch, how, variance=True)
            for one, two in zip(mine, theirs, strict=True):
                close(one.nan_to_num(), two.nan_to_num())
        ours, law = other.condition(batch), big.condition(batch)
        close(ours.mean, law.mean)
        close(ours.covariance_matrix, law.covariance_matrix)
        point = randn(*batch.x.shape, seed=8)
        close(ours.log_prob(point), law.log_prob(point))
        listed = [batch.x[0], batch.x[2, :3]]
        close(other.impute(listed)[1], other.impute(batch)[2, :3])
    many: Any = model.replicate(2)
    many.component.model.emission.mean.data[1] += 0.5
    filled = many.impute(batch)
    for r in range(2):
        close(filled[r].nan_to_num(), many.take_replicas(r).impute(batch).nan_to_num())


def test_frames_are_drawn_together() -> None:
    """Two symbols in a row, missing in some sequences of some kinds: each pair as often as it should be."""
    component = moved(Mixture(Categorical(2), HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3))), 1.5)
    x = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]]).double().unsqueeze(-1)
    x[0, 1:3] = nan
    x[1, 3] = nan
    pairs = list(itertools.product(range(3), repeat=2))
    full = x[:1].repeat(9, 1, 1)
    full[:, 1:3, 0] = torch.tensor(pairs).double()
    with torch.no_grad():
        chance = (component.log_prob(full) - component.log_prob(x[:1])).exp()
        last = x[1:].repeat(3, 1, 1)
        last[:, 3, 0] = torch.arange(3)
        single = (component.log_prob(last) - component.log_prob(x[1:])).exp()
        drawn = component.impute(x, draws=8000, generator=rng(0))
        counts = torch.bincount((drawn[:, 0, 1, 0] * 3 + drawn[:, 0, 2, 0]).long(), minlength=9) / 8000
        assert float((counts - chance).abs().max()) < 0.025
        table = chance.view(3, 3)
        assert not torch.allclose(table, table.sum(1, True) * table.sum(0), atol=5e-3)
        found, unsure = component.impute(x, variance=True)
        assert int(found[1, 3, 0]) == int(single.argmax())
        close(unsure[1, 3, 0], 1 - single.max())
        assert component.impute(x, "mean")[1, 3, 0] == single.argmax()
        counts = torch.bincount(drawn[:, 1, 3, 0].long(), minlength=3) / 8000
        assert float((counts - single).abs().max()) < 0.025


def test_mixtures_of_mixtures_are_flat() -> None:
    """Counts and numbers: imputations, conditional laws and predictions are those of the mixture of all parts."""
    nested = moved(Mixture(Categorical(2), Mixture(Categorical(2), Poisson(2, 2))))
    inner = nested.component.model
    flat = Mixture(Categorical(4), Poisson(4, 2)).double()
    flat.weights = (nested.weights.unsqueeze(-1) * inner.weights).flatten().detach()
    flat.component.rates = (5 * inner.component.rates).detach().flatten(0, 1)
    inner.component.rates = (5 * inner.component.rates).detach()
    x = torch.tensor([[3.0, nan], [nan, 1.0], [nan, nan], [2.0, 2.0]])
    for how in ("auto", "mean"):
        for one, two in zip(nested.impute(x, how, variance=True), flat.impute(x, how, variance=True), strict=True):
            close(one, two)
    ours, law = nested.condition(x), flat.condition(x)
    point = torch.arange(8).view(4, 2).double()
    close(ours.log_prob(point), law.log_prob(point))
    close(ours.covariance_matrix, law.covariance_matrix)


def test_predictions_of_mixtures_of_regressions_in_groups() -> None:
    u = torch.cat([torch.ones(5, 1), randn(5, 1)], -1).double()
    cases = (LinearGaussian(2, 2, 1), torch.linspace(-2, 2, 5)), (PoissonRegression(2, 2), torch.arange(5))
    for family, points in cases:
        nested = moved(Mixture(Categorical(2), Mixture(Categorical(2), family)), 0.4)
        inner = nested.component.model
        big = type(family)(4, 2, 1) if isinstance(family, LinearGaussian) else PoissonRegression(4, 2)
        flat = Mixture(Categorical(4), big).double()
        flat.weights = (nested.weights.unsqueeze(-1) * inner.weights).flatten().detach()
        big.weight = inner.component.weight.detach().flatten(0, 1)
        if isinstance(big, LinearGaussian):
            big.covariances = inner.component.covariances.detach().flatten(0, 1)  # pyright: ignore
        ours: Any = nested.predict(u)
        law: Any = flat.predict(u)
        close(ours.mean, law.mean)
        close(ours.variance, law.variance)
        close(ours.covariance_matrix, law.covariance_matrix)
        close(ours.density(points.double()), law.density(points.double()))
        close(ours.quantile([0.1, 0.5]), law.quantile([0.1, 0.5]))


def test_predictions_of_frames() -> None:
    """Of sequences of which nothing is known but their covariates: moments of a mixture of chains of regressions."""
    model = moved(Mixture(Categorical(2), HMM(Categorical(2), Categorical(2, 2), LinearGaussian(2, 1, 1))))
    u = randn(3, 4, 1, seed=4)
    with torch.no_grad():
        law = model.predict(u)
    drawn = model.sample(9000, 4, inputs=u.repeat(3000, 1, 1), generator=rng(0)).unflatten(0, (3000, 3))
    assert float(((drawn.mean(0) - law.mean) / (law.variance / 3000).sqrt()).abs().max()) < 5
    assert float((drawn.var(0) / law.variance - 1).abs().max()) < 0.2
    close(model.predict(u[0]).mean, law.mean[:1])


def test_frames_given_some_of_their_columns_are_those_of_all_paths() -> None:
    """Posterior of each state by enumeration, and the normal law of what is left of a frame given the state."""
    model = moved(GaussianHMM(2, 3, "full"))
    lengths = torch.tensor([3, 2])
    x = randn(2, 3, 3, seed=3)
    x[0, 0, 1:] = x[0, 1] = x[0, 2, 0] = x[1, 1, 2] = nan
    x[1, 2] = 7.0
    with torch.no_grad():
        law = model.condition(x, lengths=lengths)
        covariance, point = law.covariance_matrix, randn(2, 3, 3, seed=4)
        values, means, spreads = law.log_prob(point), model.means, model.covariances
        for n, t in enumerate(lengths.tolist()):
            scores = []
            for path in itertools.product(range(2), repeat=t):
                value = model.initial_probs[path[0]].log()
                for a, b in itertools.pairwise(path):
                    value = value + model.transition_matrix[a, b].log()
                scores.append(value + sum(normal(x[n, i], means[k], spreads[k])[0] for i, k in enumerate(path)))
            share = torch.stack(scores).softmax(0)
            for i in range(t):
                weight = torch.zeros(2).double()
                for p, path in zip(share, itertools.product(range(2), repeat=t), strict=True):
                    weight[path[i]] += p
                close(law.weights[n, i], weight)
                each = [normal(x[n, i], means[k], spreads[k]) for k in range(2)]
                mean = torch.stack([w * own[1] for w, own in zip(weight, each, strict=True)]).sum(0)
                close(law.mean[n, i], mean)
                second = torch.stack(
                    [w * (c + torch.outer(m - mean, m - mean)) for w, (_, m, c) in zip(weight, each, strict=True)]
                ).sum(0)
                close(covariance[n, i], second)
                full = torch.where(x[n, i].isnan(), point[n, i], x[n, i])
                dens = [normal(full, means[k], spreads[k])[0] - each[k][0] for k in range(2)]
                close(values[n, i], (weight.log() + torch.stack(dens)).logsumexp(0))
        for value in (law.mean[1, 2], law.variance[1, 2], covariance[1, 2], law.weights[1, 2], values[1, 2]):
            assert (value == 0).all()
    parts = [x[0, :, :1], x[1, :2, :1]]
    both = model.condition(parts, columns=[0])
    close(both.mean[1, :2], model.condition(parts[1], columns=[0]).mean[0])
    assert model.condition(x[0, :, 0].nan_to_num(), columns=[0]).mean.shape == (1, 3, 2)
    with pytest.raises(InvalidArgument, match=r"^x: expected shape \[2, 3, 2\]"):
        both.log_prob(torch.zeros(2, 3, 3))


def normal(x: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log-density of the entries that are there, and mean and covariance of all entries given them."""
    seen = ~x.isnan()
    if not bool(seen.any()):
        return torch.zeros(()).double(), mean, covariance
    value = torch.distributions.MultivariateNormal(mean[seen], covariance[seen][:, seen]).log_prob(x[seen])
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen]).mT
    left = covariance - gain @ covariance[seen]
    return value, mean + gain @ (x - mean)[seen], left * torch.outer(~seen, ~seen)


def test_frames_of_a_state_space_given_some_of_their_columns() -> None:
    model = model_of(2, 3)
    x = 2 * randn(2, 4, 3, seed=9)
    x[0, 1, 1:] = x[0, 2] = x[1, 0, 0] = nan
    with torch.no_grad():
        law = model.condition(x)
        for n in range(2):
            _, found, left, _ = joint(model, x[n], None)
            close(law.mean[n].flatten(), found[8:])
            for i in range(4):
                close(law.covariance_matrix[n, i], left[8 + 3 * i : 11 + 3 * i, 8 + 3 * i : 11 + 3 * i], atol=1e-12)
        point = randn(2, 4, 3, seed=4)
        expected = torch.distributions.MultivariateNormal(law.mean[0, 2], law.covariance_matrix[0, 2])
        close(law.log_prob(point)[0, 2], expected.log_prob(point[0, 2]))


def test_mixtures_of_networks_name_what_is_missing() -> None:
    edges = [("H", "A"), ("H", "B"), ("A", "C")]
    network = torchem.BayesianNetwork({"H": 2, "A": 2, "B": 3, "C": 2}, edges, ("H",))
    model = moved(Mixture(Categorical(2), network), 1.5)
    x = torch.tensor([[0.0, nan, 1.0], [1.0, 2.0, nan]]).double()
    with torch.no_grad():
        found, unsure = model.impute(x, variance=True)
        for row, column, states in ((0, 1, 3), (1, 2, 2)):
            full = x[row : row + 1].repeat(states, 1)
            full[:, column] = torch.arange(states)
            chance = (model.log_prob(full) - model.log_prob(x[row : row + 1])).exp()
            assert int(found[row, column]) == int(chance.argmax())
            close(unsure[row, column], 1 - chance.max())
            drawn = model.impute(x, draws=3000, generator=rng(0))[:, row, column]
            assert float((torch.bincount(drawn.long(), minlength=states) / 3000 - chance).abs().max()) < 0.04
            law = model.condition(x)
            value = torch.where(x.isnan(), torch.ones_like(x), x)
            close(law.log_prob(value)[row], chance[1].log())


def test_what_cannot_be_told_is_refused() -> None:
    model = chains()
    with pytest.raises(InvalidArgument, match="draws: expected a whole number"):
        model.impute(ragged(), draws=0)
    impossible = Mixture(Categorical(2), HMM(Categorical(1), Categorical(1, 1), Categorical(1, 3))).double()
    impossible.component.model.emission.probs = torch.tensor([[[0.5, 0.5, 0.0]], [[0.1, 0.9, 0.0]]]).double()
    x = torch.tensor([[[0.0], [2.0], [nan]]])
    for draws in (None, 2):
        with pytest.raises(InvalidArgument, match="probability zero at row 2"):
            impossible.impute(x, draws=draws)
    angles = Mixture(Categorical(2), Mixture(Categorical(2), Bernoulli(2, 2)))
    assert angles.impute(torch.tensor([[1.0, nan]])).shape == (1, 2)
