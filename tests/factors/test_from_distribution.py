"""Laws of torch as families: densities, supports, holes, fits against closed forms, files."""

import copy
import itertools
import math

import pytest
import torch
from torch import distributions as laws

import torchem
from tests.factors.common import with_holes
from tests.laws.cases import close, rand, randn, rng
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidFile, TorchemError
from torchem.factors import Categorical, Exponential, FromDistribution, Gaussian, Poisson, Product, VonMises

LBFGS = {"optimizer": torch.optim.LBFGS, "steps": 2}


def climbing(family: FromDistribution) -> torchem.Gradient:
    return torchem.Gradient(family, **LBFGS)  # pyright: ignore[reportArgumentType]


def mixture(law: type, k: int, d: int = 1, **given) -> torchem.Mixture:
    return torchem.Mixture(Categorical(k), climbing(FromDistribution(law, k, d, **given))).double()


@pytest.mark.parametrize(
    ("law", "x", "given"),
    [
        (laws.Laplace, randn(12, 2), {}),
        (laws.StudentT, randn(12, 2), {"df": 3.0}),
        (laws.Gamma, rand(12, 2) + 0.1, {}),
        (laws.Beta, rand(12, 2), {}),
        (laws.Weibull, rand(12, 2) + 0.1, {}),
        (laws.LogNormal, rand(12, 2) + 0.1, {"loc": [0.5, -0.5]}),
        (laws.Binomial, (6 * rand(12, 2)).floor(), {"total_count": 5}),
        (laws.NegativeBinomial, (6 * rand(12, 2)).floor(), {}),
        (laws.Geometric, (6 * rand(12, 2)).floor(), {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_density_is_the_law_s_own_and_holes_are_left_out(law, x, given) -> None:
    family = FromDistribution(law, 3, 2, **given).double()
    for i, parameter in enumerate(family.parameters()):
        parameter.data = 0.5 * randn(3, 2, seed=i)
    own = {name: getattr(family, name)[1].detach() for name in family.views}
    fixed = {name: torch.as_tensor(value).double() for name, value in given.items()}
    each = law(**own, **fixed).log_prob(x)
    close(family.log_prob(Batch(x))[:, 1], each.sum(-1))
    holes = with_holes(x, 0.3)
    value = family.log_prob(Batch(holes))
    close(value[:, 1], torch.where(holes.isnan(), 0.0, each).sum(-1))
    slopes = torch.autograd.grad(value.sum(), list(family.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)
    family.check(Batch(holes))
    before = torch.random.get_rng_state()
    draws = family.sample(torch.arange(30) % 3, generator=rng(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(draws, family.sample(torch.arange(30) % 3, generator=rng(0)))
    assert family.log_prob(Batch(draws)).isfinite().all()
    small = family.select(torch.tensor([2]))
    close(small.log_prob(Batch(x)), family.log_prob(Batch(x))[:, 2:])


def test_a_copy_starts_from_the_data_as_well() -> None:
    x = 100 * laws.Laplace(5.0, 2.0).icdf(rand(200, 1).double())
    family = FromDistribution(laws.Laplace, 1, 1).double()
    starts = [f.guess(Batch(x), torch.ones_like(x)) for f in (family, copy.deepcopy(family))]
    assert set(starts[0]) == {"raw_loc", "raw_scale"}
    for name, value in starts[0].items():
        close(starts[1][name], value)
    bounds = [
        torchem.fit(model, x, seed=0, max_iter=30, progress=False).bound
        for model in (mixture(laws.Laplace, 1), copy.deepcopy(mixture(laws.Laplace, 1)))
    ]
    scale = (x - x.median()).abs().mean()
    assert bounds == pytest.approx([float(-200 * (2 * scale).log() - 200)] * 2, abs=1.0)


def test_views_keep_their_constraints() -> None:
    family = FromDistribution(laws.Laplace, 2, 1).double()
    family.loc, family.scale = [[1.0], [2.0]], [[0.5], [3.0]]
    assert family.scale.flatten().tolist() == pytest.approx([0.5, 3.0])
    close(family.moments(Batch(torch.zeros(1, 1)))[1][0], 2 * family.scale.square())
    assert family.n_parameters() == 4
    assert family.freeze("scale", mask=torch.tensor([True, False])).n_parameters() == 3
    with pytest.raises(InvalidArgument, match=r"^scale: "):
        family.scale = [[-1.0], [1.0]]
    with pytest.raises(InvalidArgument, match=r"^loc: "):
        family.loc = [1.0, 2.0]
    assert list(FromDistribution(laws.Bernoulli, 2, 1).views) == ["logits"]
    assert list(FromDistribution(laws.NegativeBinomial, 2, 1, probs=0.5).views) == ["total_count"]


@pytest.mark.parametrize(
    ("law", "own", "data"),
    [
        (laws.Exponential, lambda: Exponential(2, 1), lambda: torch.cat([rand(100, 1), 9 * rand(100, 1)])),
        (laws.Normal, lambda: Gaussian(2, 1), lambda: torch.cat([randn(100, 1), 500 + randn(100, 1, seed=1)])),
    ],
    ids=["Exponential", "Normal"],
)
def test_generalised_em_ends_where_closed_forms_end(law, own, data) -> None:
    x = data()
    model = mixture(law, 2)
    result = torchem.fit(model, x, seed=0, max_iter=300, tol=1e-8, progress=False)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(result.history))
    exact = torchem.fit(
        torchem.Mixture(Categorical(2), own()).double(), x, seed=0, max_iter=2000, tol=1e-10, progress=False
    )
    assert result.bound == pytest.approx(exact.bound, abs=0.02)


def test_medians_and_deviations_of_laplace() -> None:
    """One component: the maximum is at the median and the mean distance from it."""
    x = with_holes(3 + randn(501, 1).exp() * randn(501, 1, seed=1).sign(), 0.1)
    model = torchem.Mixture(
        Categorical(1), torchem.Gradient(FromDistribution(laws.Laplace, 1, 1), torch.optim.Adam, steps=20, lr=0.05)
    ).double()
    torchem.fit(model, x, seed=0, max_iter=60, tol=0, progress=False)
    seen = x[~x.isnan()]
    median = seen.median()
    close(model.component.loc[0, 0], median, atol=0.02)
    close(model.component.scale[0, 0], (seen - median).abs().mean(), rtol=0.01)


def test_beside_other_columns_in_a_chain() -> None:
    emission = Product([climbing(FromDistribution(laws.Gumbel, 2, 1)), Poisson(2, 1)])
    model = torchem.HMM(Categorical(2), Categorical(2, 2), emission).double()
    z = torch.arange(200).view(4, 50) // 10 % 2
    x = torch.stack([laws.Gumbel(4.0 * z, 1.0).sample(), torch.poisson(2.0 + 5 * z, generator=rng(1))], -1).double()
    result = torchem.fit(model, x, seed=0, max_iter=15, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    agreement = float((model.most_likely(x) == z).double().mean())
    assert max(agreement, 1 - agreement) > 0.97


def test_alone_it_names_the_remedy() -> None:
    model = torchem.Mixture(Categorical(2), FromDistribution(laws.Laplace, 2, 1))
    with pytest.raises(InvalidArgument, match=r"torchem.Gradient\(FromDistribution"):
        torchem.fit(model, randn(20, 1), progress=False)


def test_own_families_where_there_are_any() -> None:
    for law, kind in ((laws.Normal, Gaussian), (laws.Poisson, Poisson), (laws.VonMises, VonMises)):
        assert type(FromDistribution.of(law, 2, 3)) is kind
    assert type(FromDistribution.of(laws.Cauchy, 2, 3)) is FromDistribution
    x = Batch(randn(5, 3))
    own, plain = (build(laws.Normal, 2, 3).double() for build in (FromDistribution.of, FromDistribution))
    close(own.log_prob(x), plain.log_prob(x))


class Triangle(laws.Distribution):
    """A law of a user's own."""

    arg_constraints = {"width": laws.constraints.positive}
    support = laws.constraints.real

    def __init__(self, width, validate_args=None):
        self.width = width
        super().__init__(width.shape, validate_args=validate_args)

    def log_prob(self, value):
        return torch.nn.functional.logsigmoid(value / self.width) - value / self.width / 2 - self.width.log()


def test_files_name_torch_s_laws_and_take_others_ready(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    model = torchem.Mixture(Categorical(2), climbing(FromDistribution(laws.StudentT, 2, 1, df=[3.0]))).double()
    model.component.loc = [[1.0], [2.0]]
    torchem.save(model, path)
    x = randn(5, 1)
    close(torchem.load(path).log_prob(x), model.log_prob(x), rtol=0, atol=0)
    own = torchem.Mixture(Categorical(2), climbing(FromDistribution(Triangle, 2, 1))).double()
    own.component.width = [[1.0], [4.0]]
    torchem.save(own, path)
    with pytest.raises(InvalidFile, match="pass modules="):
        torchem.load(path)
    again = torchem.load(path, modules={"FromDistribution": FromDistribution(Triangle, 2, 1)})
    close(again.log_prob(x), own.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: FromDistribution(laws.Laplace, 0, 1), "^n_components: "),
        (lambda: FromDistribution(laws.Uniform, 2, 1), "^distribution: .*factors.Uniform"),
        (lambda: FromDistribution(laws.Laplace, 2, 1, width=1.0), "^width: expected an argument of Laplace"),
        (lambda: FromDistribution(laws.Binomial, 2, 1), "^total_count: .*give it: total_count="),
        (lambda: FromDistribution(laws.Dirichlet, 2, 1), "^distribution: expected a law of single numbers"),
        (lambda: FromDistribution(laws.MultivariateNormal, 2, 1), "^covariance_matrix: .*one that is PositiveDefinite"),
        (lambda: FromDistribution(laws.Laplace, 2, 1, loc=0.0, scale=1.0), "^given: "),
        (
            lambda: FromDistribution(laws.Gamma, 2, 1).check(Batch(torch.tensor([[1.0], [-2.0]]))),
            "support of Gamma.*got -2 at row 1, column 0",
        ),
    ],
)
def test_bad_input(act, words: str) -> None:
    with pytest.raises(TorchemError, match=words):
        act()


def test_outside_of_a_support_that_moves_there_is_nothing() -> None:
    family = FromDistribution(laws.Pareto, 2, 1).double()
    family.scale, family.alpha = [[1.0], [3.0]], [[2.0], [2.0]]
    value = family.log_prob(Batch(torch.tensor([[2.0], [torch.nan]]).double()))
    close(value, torch.tensor([[math.log(2 / 8), -math.inf], [0.0, 0.0]], dtype=torch.float64))
    slopes = torch.autograd.grad(value[0, 0] + value[1].sum(), list(family.parameters()))
    assert all(slope.isfinite().all() for slope in slopes)
