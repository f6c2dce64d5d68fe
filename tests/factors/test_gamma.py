"""Positive numbers: densities, shapes at their limit, frozen views, references, units."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import close, rand, rng, soft
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Exponential, Gamma


def gamma(k: int = 3, d: int = 2, seed: int = 0) -> Gamma:
    g = Gamma(k, d).double()
    g.shapes, g.rates = 0.3 + 4 * rand(k, d, seed=seed), 0.5 + rand(k, d, seed=seed + 1)
    return g


@pytest.mark.parametrize("size", [1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_density_is_that_of_scipy(size: float, dtype: torch.dtype) -> None:
    """The terms of large shapes cancel: of 1e6 at a shape of 1e5."""
    g, x = gamma().to(dtype), (0.1 + 4 * rand(20, 2, seed=1)).to(dtype)
    g.shapes = size * g.shapes.detach()
    g.rates = size * g.rates.detach()
    exact = [
        scipy_stats.gamma.logpdf(x.double().numpy(), shape, scale=1 / rate).sum(-1)
        for shape, rate in zip(g.shapes.detach().double().numpy(), g.rates.detach().double().numpy(), strict=True)
    ]
    value = torch.from_numpy(np.stack(exact, -1))
    close(g.log_prob(Batch(x)).double(), value, rtol=1e-7 if dtype == torch.float64 else 1e-4, atol=1e-6 * size)
    mean, variance = g.moments(Batch(x))
    close(mean[0], g.shapes / g.rates, rtol=1e-5)
    close(variance[0], g.shapes / g.rates**2, rtol=1e-5)


def test_one_component_is_the_fit_of_scipy() -> None:
    x = torch.from_numpy(np.random.default_rng(0).gamma(2.5, 3.0, 200))
    model = torchem.Mixture(Categorical(1), g := Gamma(1, 1)).double()
    torchem.fit(model, x.unsqueeze(-1), seed=0, tol=1e-12, progress=False)
    shape, _, scale = scipy_stats.gamma.fit(x.numpy(), floc=0)
    close(g.shapes[0, 0], torch.tensor(shape).double(), rtol=1e-5)
    close(1 / g.rates[0, 0], torch.tensor(scale).double(), rtol=1e-5)


def test_a_mixture_is_that_of_mixtools() -> None:
    """R 4.2, mixtools 2.0.0: gammamixEM(faithful$waiting, k=2, epsilon=1e-12, mom.start=FALSE, …) from this start."""
    path = Path(torchem.__file__).parent / "datasets" / "faithful.csv"
    x = torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=1)[:, 1:])
    model = torchem.Mixture(Categorical(2), g := Gamma(2, 1)).double()
    model.weights, g.shapes, g.rates = [0.36, 0.64], [[80.0], [180.0]], [[80 / 54], [180 / 80]]
    result = torchem.fit(model, x, init=None, accelerate="squarem", tol=1e-13, max_iter=1000, progress=False)
    assert result.bound == pytest.approx(-1033.05821249, abs=1e-5)
    close(model.weights, torch.tensor([0.370921824696, 0.629078175304]).double(), atol=1e-5)
    close(g.shapes[:, 0], torch.tensor([79.706261248712, 199.704394613085]).double(), rtol=1e-3)
    close(1 / g.rates[:, 0], torch.tensor([0.689653659486, 0.402035517931]).double(), rtol=1e-3)


def test_a_component_of_equal_numbers_stays_at_its_limit() -> None:
    x = torch.cat([torch.full((30, 1), 2.5), 10 + 5 * rand(70, 1, seed=3).float()]).double()
    model = torchem.Mixture(Categorical(2), g := Gamma(2, 1, shape_limit=1e4)).double()
    result = torchem.fit(model, x, seed=0, progress=False, max_iter=300)
    place = int(g.shapes[:, 0].argmax())
    assert result.floored == [place]
    close(g.shapes[place, 0], torch.tensor(1e4).double(), rtol=1e-6)
    close((g.shapes / g.rates)[place, 0], torch.tensor(2.5).double(), rtol=1e-5)
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))


def test_shapes_of_one_are_exponential() -> None:
    x, expected = with_holes(0.1 + rand(40, 2, seed=2), 0.2), soft(40, 3)
    times, g = Exponential(3, 2).double(), Gamma(3, 2).double().freeze("shapes")
    close(g.log_prob(Batch(x)), times.log_prob(Batch(x)))
    new = g.maximize(g.stats(Batch(x), expected))
    close(new["log_rate"], times.maximize(times.stats(Batch(x), expected))["log_rate"])
    assert torch.equal(new["log_shape"], g.get_parameter("log_shape"))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units(scale: float) -> None:
    x = gamma(1, 1).sample(torch.zeros(100).long(), generator=rng(5))
    fits = []
    for unit in (1.0, scale):
        model = torchem.Mixture(Categorical(1), g := Gamma(1, 1)).double()
        fits.append((torchem.fit(model, x * unit, seed=0, tol=1e-12, progress=False).bound, g))
    close(fits[1][1].shapes, fits[0][1].shapes, rtol=1e-6)
    close(fits[1][1].rates * scale, fits[0][1].rates, rtol=1e-6)
    assert fits[1][0] == pytest.approx(fits[0][0] - 100 * np.log(scale), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truth_is_recovered_by_a_fit(dtype: torch.dtype) -> None:
    truth = Gamma(2, 2).to(dtype)
    truth.shapes, truth.rates = [[2.0, 9.0], [12.0, 3.0]], [[1.0, 1.0], [1.0, 1.0]]
    x = with_holes(truth.sample(torch.arange(6000) % 2, generator=rng(4)), 0.1)
    found = Gamma(2, 2)
    torchem.fit(torchem.Mixture(Categorical(2), found).to(dtype), x, seed=0, tol=1e-6, max_iter=300, progress=False)
    order = found.shapes[:, 0].argsort()
    close(found.shapes[order], truth.shapes, rtol=0.1)
    close(found.rates[order], truth.rates, rtol=0.1)


def test_pruning_keeps_what_belongs_to_components() -> None:
    g = gamma().freeze("rates", mask=torch.tensor([True, False, True]))
    small = copy.deepcopy(g).select(torch.tensor([2, 1]))
    x = Batch(rand(5, 2, seed=7))
    close(small.log_prob(x), g.log_prob(x)[:, [2, 1]])
    assert small.n_parameters() == 2 * 2 + 2
    assert small.shape_limit == g.shape_limit


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: Gamma(0, 2), "n_components"),
        (lambda: Gamma(2, 2, shape_limit=1.0), "shape_limit"),
        (lambda: setattr(Gamma(1, 1), "shapes", [[0.0]]), "shapes"),
        (lambda: setattr(Gamma(2, 1), "rates", [[1.0]]), "rates"),
        (lambda: Gamma(2, 1).check(Batch(torch.tensor([[1.0], [0.0]]))), "data"),
        (lambda: setattr(Gamma(2, 1), "prior", priors.Gamma(2.0)), "prior"),
        (lambda: torchem.variational(torchem.Mixture(Categorical(2), Gamma(2, 1))), "factor"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()
