"""More zeros than a family has: densities, references, what it wraps, priors and posteriors."""

import itertools

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import close, gaussian, rand, randn, rng
from tests.regressions.common import as_users_run_it
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidType
from torchem.factors import (
    Bernoulli,
    Categorical,
    Censored,
    Gamma,
    Gaussian,
    NegativeBinomial,
    Poisson,
    Product,
    Truncated,
    ZeroInflated,
)

#: Articles of 915 biochemists: bioChemists of R's pscl (J. S. Long 1990), how often there were so many.
ARTICLES = {0: 275, 1: 246, 2: 178, 3: 84, 4: 67, 5: 27, 6: 17, 7: 12, 8: 1, 9: 2, 10: 1, 11: 1, 12: 2, 16: 1, 19: 1}


def articles() -> Tensor:
    return torch.tensor([float(x) for x, n in ARTICLES.items() for _ in range(n)], dtype=torch.float64).unsqueeze(-1)


def inflated(k: int = 3, d: int = 2) -> ZeroInflated:
    z = ZeroInflated(Poisson(k, d).double())
    z.rates, z.zero_probs = 0.5 + 4 * rand(k, d, seed=1), 0.1 + 0.6 * rand(k, d, seed=2)
    return z


def counts(n: int = 40, d: int = 2) -> Tensor:
    return (6 * rand(n, d, seed=3) - 2).floor().clamp(min=0.0)


def climbs(result: torchem.Result) -> bool:
    return all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(result.history))


def test_density_is_a_mixture_with_zero_column_by_column() -> None:
    z, x = inflated(), with_holes(counts(), 0.2)
    for k in range(3):
        rate, share = z.rates[k].detach(), z.zero_probs[k].detach()
        each = (1 - share) * torch.from_numpy(scipy_stats.poisson.pmf(x.nan_to_num().numpy(), rate.numpy()))
        each = torch.where(x.isnan(), 1.0, each + share * (x == 0))
        close(z.log_prob(Batch(x))[:, k], each.log().sum(-1))


def test_a_hurdle_takes_both_parts_apart() -> None:
    """Around a continuous family zeros are structural: each part is fitted as if alone."""
    x = (3 * rand(60, 2, seed=4) - 1).clamp(min=0.0)
    model = torchem.Mixture(Categorical(1), z := ZeroInflated(Gamma(1, 2))).double()
    result = torchem.fit(model, x, seed=0, tol=1e-12, progress=False)
    alone = torchem.Mixture(Categorical(1), g := Gamma(1, 2)).double()
    rest = torchem.fit(alone, torch.where(x == 0, torch.nan, x), seed=0, tol=1e-12, progress=False).bound
    share = (x == 0).double().mean(0)
    close(z.zero_probs[0], share)
    close(z.shapes, g.shapes, rtol=1e-6)
    entropy = -60 * (share * share.log() + (1 - share) * (1 - share).log()).sum()
    assert result.bound == pytest.approx(rest - float(entropy), rel=1e-9)


def test_intercepts_are_those_of_pscl() -> None:
    """R 4.2, pscl 1.5.5: zeroinfl(art ~ 1 | 1, data=bioChemists), exp and plogis of its coefficients."""
    model = torchem.Mixture(Categorical(1), z := ZeroInflated(Poisson(1, 1))).double()
    result = torchem.fit(model, articles(), seed=0, tol=1e-13, max_iter=500, progress=False)
    assert result.bound == pytest.approx(-1679.39108421, abs=1e-7)
    assert float(z.rates.detach()) == pytest.approx(2.1337719724, rel=1e-5)
    assert float(z.zero_probs.detach()) == pytest.approx(0.206618046366, rel=1e-5)
    # dist="negbin" finds no inflation: loglik -1609.93674715, theta 1.70620543886, mean 1.69289645119.
    model = torchem.Mixture(Categorical(1), z := ZeroInflated(NegativeBinomial(1, 1))).double()
    result = torchem.fit(model, articles(), seed=0, accelerate="squarem", tol=1e-12, max_iter=3000, progress=False)
    assert climbs(result)
    assert result.bound == pytest.approx(-1609.93674715, abs=0.02)


def test_around_limits() -> None:
    """Counts without zeros and a hurdle: with nothing but intercepts the likelihood is that of inflated zeros."""
    model = torchem.Mixture(Categorical(1), z := ZeroInflated(Truncated(Poisson(1, 1), low=1))).double()
    result = torchem.fit(model, articles(), seed=0, tol=1e-13, max_iter=500, progress=False)
    assert result.bound == pytest.approx(-1679.39108421, abs=1e-7)
    assert float(z.zero_probs.detach()) == pytest.approx(275 / 915, rel=1e-6)
    z.freeze("rates")
    assert z.n_parameters() == 1
    z = ZeroInflated(Censored(Poisson(2, 1).double(), high=4))
    z.rates, z.zero_probs = [[1.0], [5.0]], [[0.3], [0.1]]
    every = z.log_prob(Batch(torch.arange(5.0, dtype=torch.float64).unsqueeze(-1)))
    close(every.exp().sum(0), torch.ones(2))


def test_views_of_what_it_wraps_are_its_own() -> None:
    z = inflated()
    z.rates = torch.full((3, 2), 2.5)
    close(z.get_parameter("factor.log_rate").exp(), torch.full((3, 2), 2.5))
    free = z.n_parameters()
    z.freeze("zero_probs")
    assert z.n_parameters() == free - 6
    z.unfreeze("zero_probs").freeze("rates", mask=torch.tensor([True, False, False]))
    assert z.n_parameters() == free - 2
    x, expected = Batch(counts()), torch.ones(40, 3, dtype=torch.float64)
    assert torch.equal(z.maximize(z.stats(x, expected))["factor.log_rate"][0], z.factor.get_parameter("log_rate")[0])
    with pytest.raises(InvalidArgument, match="did you mean zero_probs"):
        z.zero_prob = 0.5
    small = z.select(torch.tensor([2, 0]))
    close(small.log_prob(x), z.log_prob(x)[:, [2, 0]])


def test_certain_zeros_and_none() -> None:
    z = inflated(2, 1)
    z.zero_probs = [[1.0], [0.0]]
    x = Batch(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    plain = z.factor.log_prob(x)
    value = z.log_prob(x)
    assert value[:, 0].tolist() == [0.0, -torch.inf]
    close(value[:, 1], plain[:, 1])
    slopes = torch.autograd.grad(value[:, 1].sum() + value[0, 0], list(z.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)
    z.inflation.logits.data = z.maximize(z.stats(x, torch.ones(2, 2).double()))["inflation.logits"].detach()
    assert z.zero_probs.tolist() == [[1.0], [0.0]]


def test_posteriors_and_modes() -> None:
    x = torch.cat([counts(60, 1), 6 + counts(60, 1)])
    x[::3] = 0.0
    bayes = torchem.variational(torchem.Mixture(Categorical(2), ZeroInflated(Poisson(2, 1))).double())
    result = torchem.fit(bayes, x, seed=0, tol=0, max_iter=40, progress=False)
    assert climbs(result)
    mode = torchem.Mixture(Categorical(2), z := ZeroInflated(Poisson(2, 1))).double()
    z.inflation.prior, z.factor.prior = priors.Beta(2.0, 3.0), priors.Gamma(2.0, 0.1)
    assert climbs(torchem.fit(mode, x, seed=0, tol=0, max_iter=40, progress=False))
    # The predictive sums to one, and its zeros are those of both means.
    every = bayes.component.log_prob(Batch(torch.arange(400.0, dtype=torch.float64).unsqueeze(-1))).exp()
    close(every.sum(0), torch.ones(2), rtol=1e-6)


def test_moments_and_draws() -> None:
    z = inflated(2, 2)
    x = z.sample(torch.arange(40_000) % 2, generator=rng(5))
    mean, variance = z.moments(Batch(x))
    for k in range(2):
        close(x[k::2].mean(0), mean[0, k], rtol=0.03, atol=0.02)
        close(x[k::2].var(0), variance[0, k], rtol=0.05)


def test_normal_columns_may_be_zero_too() -> None:
    z = ZeroInflated(gaussian(2, 3, "diag"))
    x = torch.where(rand(200, 3, seed=6) < 0.4, 0.0, randn(200, 3, seed=7) + 2.0)
    model = torchem.Mixture(Categorical(2).double(), z)
    assert climbs(torchem.fit(model, with_holes(x, 0.1), seed=0, tol=0, max_iter=20, progress=False))
    close(model.weights @ z.zero_probs, torch.full((3,), 0.4), atol=0.12)


def test_columns_of_other_kinds_beside_it() -> None:
    product = Product([ZeroInflated(Poisson(2, 1)), Bernoulli(2, 1)])
    x = torch.cat([articles()[:60], (rand(60, 1, seed=8) > 0.5).double()], -1)
    model = torchem.Mixture(Categorical(2), product).double()
    assert climbs(torchem.fit(model, x, seed=0, tol=0, max_iter=20, progress=False))


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: ZeroInflated(Gaussian(2, 3)), "factor"),
        (lambda: ZeroInflated(Categorical(2)), "factor"),
        (lambda: setattr(inflated(), "zero_probs", [[0.5, 1.5]] * 3), "probs"),
        (lambda: setattr(inflated(), "zero_probs", [[0.5, 0.5]]), "probs"),
        (lambda: inflated().check(Batch(torch.tensor([[0.5, 0.0]]))), "data"),
        (lambda: ZeroInflated(Gamma(1, 1)).check(Batch(torch.tensor([[0.0], [-1.0]]))), "data"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()


def test_what_is_no_factor_is_refused() -> None:
    with as_users_run_it(), pytest.raises(InvalidType, match=r"^factor: "):
        ZeroInflated(3)  # pyright: ignore[reportArgumentType]
