"""Mixed columns: what each factor reads, what is missing, fits, files, memory."""

import copy

import pytest
import torch
from torch import Tensor

import torchem
from tests.factors.common import replicated, with_holes
from tests.laws.cases import assign, close, close_dict, close_stats, rand, randn, rng, soft
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factor import Factor
from torchem.factors import Bernoulli, Categorical, Gaussian, Poisson, Product
from torchem.priors import Dirichlet
from torchem.stats import Stats


class Normals(Factor):
    """Columns of unit variance, from the contract alone: missing entries are beyond it, memory is not."""

    def __init__(self, k: int, d: int, memory: int = 0):
        super().__init__()
        self.k, self.d, self.memory = k, d, memory
        self.new_parameter("mean", torch.zeros(k ** (memory + 1), d))

    @property
    def n_components(self) -> int:
        return self.k

    @property
    def n_features(self) -> int:
        return self.d

    def log_prob(self, batch: Batch) -> Tensor:
        gap = batch.x.unsqueeze(-2) - (self.mean.unsqueeze(1) if self.replicas else self.mean)
        return -0.5 * gap.square().sum(-1)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        return Stats(count=expected.sum(-2).double(), total=(expected.mT @ batch.x).double())

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        return {"mean": (stats["total"] / stats["count"].unsqueeze(-1)).to(self.dtype)}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        return (stats["total"] * self.mean).sum() - (stats["count"] * self.mean.square().sum(-1)).sum() / 2

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls(2, 1), Batch(torch.zeros(3, 1))


def mixed(k: int = 3) -> Product:
    """Two normal columns, one of counts, one of categories, two binary ones, in a scrambled order."""
    normal, counts = Gaussian(k, 2, "diag").double(), Poisson(k, 1).double()
    kinds, bits = Categorical(k, 4).double(), Bernoulli(k, 2).double()
    normal.means, counts.rates = 3 * randn(k, 2, seed=1), 1 + 6 * rand(k, 1, seed=2)
    kinds.probs, bits.probs = (2 * randn(k, 4, seed=3)).softmax(-1), 0.1 + 0.8 * rand(k, 2, seed=4)
    return Product([normal, counts, kinds, bits], [[4, 1], [0], [2], [3, 5]])


def draws(product: Product, n: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    z = torch.randint(0, product.n_components, (n,), generator=rng(seed))
    return product.sample(z, generator=rng(seed + 1)), z


def test_density_is_the_sum_over_the_factors() -> None:
    p = mixed()
    x, _ = draws(p, 20)
    value = sum(f.log_prob(Batch(f.cast(x[:, c]))) for f, c in zip(p.factors, p.columns, strict=True))  # pyright: ignore
    close(p.log_prob(Batch(x)), value)  # pyright: ignore


def test_density_sums_to_one() -> None:
    p = Product([Poisson(2, 1), Bernoulli(2, 1), Categorical(2, 3)]).double()
    p.factors[0].rates = [[1.0], [3.0]]  # pyright: ignore
    axes = [torch.arange(size, dtype=torch.float64) for size in (60, 2, 3)]
    close(p.log_prob(Batch(torch.cartesian_prod(*axes))).exp().sum(0), torch.ones(2))


def test_columns_by_default_follow_one_another() -> None:
    p = Product([Gaussian(2, 3), Categorical(2, 4), Poisson(2, 2)])
    assert p.columns == [[0, 1, 2], [3], [4, 5]]
    assert (p.n_components, p.n_features) == (2, 6)


def test_samples_agree_with_the_density() -> None:
    p = mixed(1)
    x, _ = draws(p, 30_000)
    mean, variance = p.moments(Batch(x[:1]))
    assert mean.shape == (1, 1, 9)  # column 2 as the indicators of its four categories
    indicators = torch.nn.functional.one_hot(x[:, 2].long(), 4)
    wide = torch.cat([x[:, :2], indicators, x[:, 3:]], -1)
    close(mean[0, 0], wide.mean(0), atol=0.06)
    close(variance[0, 0], wide.var(0), rtol=0.05, atol=0.01)
    best = copy.deepcopy(p)
    assign(best, p.maximize(p.stats(Batch(x), torch.ones(30_000, 1, dtype=torch.float64))))
    gain = (best.log_prob(Batch(x)) - p.log_prob(Batch(x))).mean()
    assert 0 <= gain < 0.01


# ---- missing entries ----------------------------------------------------------------------------------------------


def test_missing_entries_reach_the_factors_that_handle_them() -> None:
    p = mixed()
    x = with_holes(draws(p, 40)[0], 0.3)
    x[:, 4] = torch.where(x[:, 1].isnan(), torch.nan, x[:, 1])
    found = p.stats(Batch(x), soft(40, 3))
    bits = p.factors[3]
    close_stats(found["factors.3"], bits.stats(Batch(x[:, [3, 5]]), soft(40, 3)))  # pyright: ignore
    x[7] = torch.nan
    close(p.log_prob(Batch(x))[7], torch.zeros(3))
    close_stats(
        p.stats(Batch(x[7:8]), soft(1, 3)), p.stats(Batch(x[:1]), torch.zeros(1, 3, dtype=torch.float64)), rtol=1e-12
    )


def test_a_factor_that_knows_no_missing_entries_says_nothing_where_its_columns_are() -> None:
    p = Product([Normals(2, 2), Poisson(2, 1)]).double()
    p.factors[0].mean.data = randn(2, 2, seed=1)  # pyright: ignore
    x = torch.cat([randn(12, 2, seed=2), (5 * rand(12, 1, seed=3)).floor()], -1)
    holes, expected = x.clone(), soft(12, 2)
    holes[[0, 3, 11], :2] = torch.nan
    gone = torch.isin(torch.arange(12), torch.tensor([0, 3, 11]))
    value = p.log_prob(Batch(holes))
    close(value[~gone], p.log_prob(Batch(x))[~gone])
    close(value[gone], p.factors[1].log_prob(Batch(x[gone, 2:])))  # pyright: ignore
    found = p.stats(Batch(holes), expected)
    close_stats(found["factors.0"], p.factors[0].stats(Batch(x[~gone, :2]), expected[~gone]))  # pyright: ignore
    kernel = p.kernel()
    close(kernel.log_potential(Batch(holes)), value)
    kernel.collect(Batch(holes), expected)
    close_stats(kernel.stats(), found)
    (grad,) = torch.autograd.grad(value.sum(), [p.factors[0].mean])  # pyright: ignore
    assert grad.isfinite().all()
    batched = torch.func.vmap(lambda rows: p.log_prob(Batch(rows)))(holes.unflatten(0, (2, 6)))
    close(batched.flatten(0, 1), value)


def test_partly_missing_columns_of_such_a_factor_are_refused() -> None:
    model = torchem.Mixture(Categorical(2), Product([Normals(2, 2), Poisson(2, 1)]))
    x = torch.zeros(4, 3)
    x[2, :2] = torch.nan
    model.log_prob(x)
    x[3, 1] = torch.nan
    with pytest.raises(InvalidArgument, match=r"NaN at row 3, column 1 \(columns \[0, 1\], read by Normals"):
        model.log_prob(x)


def test_no_missing_entries_is_the_complete_path_bit_for_bit() -> None:
    p = Product([Normals(3, 2), Bernoulli(3, 2)]).double()
    x = torch.cat([randn(20, 2), torch.ones(20, 2, dtype=torch.float64)], -1)
    alone = p.factors[0].log_prob(Batch(x[:, :2])) + p.factors[1].log_prob(Batch(x[:, 2:]))  # pyright: ignore
    assert torch.equal(p.log_prob(Batch(x)), alone)


# ---- memory, sequences --------------------------------------------------------------------------------------------


def test_a_factor_with_memory_beside_one_without() -> None:
    p = Product([Poisson(2, 1), Normals(2, 1, memory=1)]).double()
    p.factors[1].mean.data = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)  # pyright: ignore
    p.factors[0].rates = [[1.0], [5.0]]  # pyright: ignore
    assert p.memory == 1
    x = torch.tensor([[2.0, 0.5], [4.0, 2.5]], dtype=torch.float64)
    value = p.log_prob(Batch(x))
    counts, normal = p.factors[0].log_prob(Batch(x[:, :1])), p.factors[1].log_prob(Batch(x[:, 1:]))  # pyright: ignore
    # The present state is the most significant digit.
    close(value, counts[:, [0, 0, 1, 1]] + normal)
    expected = soft(2, 4)
    found = p.stats(Batch(x), expected)
    folded = expected.unflatten(-1, (2, 2)).sum(-1)
    close_stats(found["factors.0"], p.factors[0].stats(Batch(x[:, :1]), folded))  # pyright: ignore
    close_stats(found["factors.1"], p.factors[1].stats(Batch(x[:, 1:]), expected))  # pyright: ignore


def test_a_factor_that_reads_sequences_gets_its_own_columns() -> None:
    class Lagged(Normals):
        lags = 1

        def context(self, batch: Batch) -> Batch:
            past = torch.cat([torch.zeros_like(batch.x[:, :1]), batch.x[:, :-1]], 1)
            first = torch.arange(batch.x.shape[1]).unsqueeze(-1) == 0
            return Batch(torch.where(first, torch.nan, batch.x), u=past)

    p = Product([Poisson(2, 1), Lagged(2, 1)]).double()
    x = torch.arange(12.0, dtype=torch.float64).reshape(2, 3, 2)
    found = p.context(Batch(x))
    assert torch.equal(found.x[..., 0], x[..., 0])
    assert found.x[:, 0, 1].isnan().all()
    assert torch.equal(found.u[:, 1:, 0], x[:, :-1, 1])  # pyright: ignore
    assert p.lags == 1
    with pytest.raises(InvalidArgument, match="at most one that reads whole sequences, got 2"):
        Product([Lagged(2, 1), Lagged(2, 1)])


# ---- fits ---------------------------------------------------------------------------------------------------------


def data(share: float, n: int = 1500) -> tuple[Product, Tensor, Tensor]:
    truth = mixed()
    x, z = draws(truth, n)
    x = with_holes(x, share)
    x[:, 4] = torch.where(x[:, 1].isnan(), torch.nan, x[:, 4])
    x[:, 1] = torch.where(x[:, 4].isnan(), torch.nan, x[:, 1])
    return truth, x, z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.0, 0.15])
def test_a_fit_of_mixed_columns(share: float, dtype: torch.dtype) -> None:
    truth, x, _ = data(share)
    kinds = [Gaussian(3, 2, "diag"), Poisson(3, 1), Categorical(3, 4), Bernoulli(3, 2)]
    model = torchem.Mixture(Categorical(3), Product(kinds, truth.columns)).to(dtype)
    result = torchem.fit(model, x.to(dtype), seed=0, restarts=2, max_iter=200, tol=1e-6, progress=False)
    assert result.converged
    assert len(result.restarts) == 2
    slack = 1e-9 if dtype == torch.float64 else 1e-5
    for history in result.histories:
        steps = torch.tensor(history, dtype=torch.float64)
        assert (steps.diff() >= -slack * steps[:-1].abs()).all()
    exact = torchem.Mixture(Categorical(3).double(), truth)
    assert result.bound > float(exact.log_prob(x).detach().sum()) - 1
    assert model.n_parameters() == 2 + 12 + 3 + 9 + 6
    again = torchem.fit(model, x.to(dtype), init=None, max_iter=5, progress=False)
    assert abs(again.history[0] - result.bound) <= 1e-6 * abs(result.bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_over_mixed_columns(dtype: torch.dtype) -> None:
    truth, x, _ = data(0.1, 600)
    kinds = [Gaussian(3, 2, "diag"), Poisson(3, 1), Categorical(3, 4), Bernoulli(3, 2)]
    model = torchem.HMM(Categorical(3), Categorical(3, 3), Product(kinds, truth.columns)).to(dtype)
    x[10:13] = torch.nan
    x = x.reshape(3, 200, 6).to(dtype)
    result = torchem.fit(model, x, seed=0, restarts=2, max_iter=40, tol=1e-5, progress=False)
    steps = torch.tensor(result.history, dtype=torch.float64)
    assert (steps.diff() >= -(1e-9 if dtype == torch.float64 else 1e-5) * steps[:-1].abs()).all()
    assert model.sample(2, 7).shape == (2, 7, 6)


def test_saved_products_come_back_to_the_bit(tmp_path) -> None:
    model = torchem.Mixture(Categorical(3).double(), mixed())
    model.component.factors[3].freeze("probs")  # pyright: ignore
    model.component.factors[2].probs = [[1.0, 0, 0, 0]] * 3  # pyright: ignore
    x = with_holes(draws(mixed(), 30)[0], 0.2)
    x[:, 4] = x[:, 1]
    for name, one in (("a", model), ("b", model.replicate(2))):
        torchem.save(one, tmp_path / name)
        again = torchem.load(tmp_path / name)
        assert again.component.columns == model.component.columns  # pyright: ignore
        assert torch.equal(again.log_prob(x), one.log_prob(x))
        assert again.n_parameters() == one.n_parameters()
    torchem.save(model.component, tmp_path / "c")
    assert torch.equal(torchem.load(tmp_path / "c").log_prob(Batch(x)), model.component.log_prob(Batch(x)))
    many = replicated(mixed(), 2)
    torchem.save(many, tmp_path / "d")
    assert torchem.load(tmp_path / "d").replicas == (2,)


def test_components_can_be_pruned_replaced_and_frozen() -> None:
    p = mixed()
    x = Batch(draws(p, 30)[0])
    keep = torch.tensor([True, False, True])
    close(p.select(keep).log_prob(x), p.log_prob(x)[:, keep])
    stats = p.stats(x, soft(30, 3))
    new, which = p.maximize(stats), torch.tensor([False, True, False])
    for name, value in p.replace_components(which, new).items():
        assert torch.equal(value[1], new[name][1])
        assert torch.equal(value[0], p.get_parameter(name)[0])
    free = p.n_parameters()
    assert p.freeze("factors.1.rates", "factors.0.means") is p
    moved = p.maximize(stats)
    assert p.n_parameters() == free - 3 - 6
    kept = {"factors.1.log_rate", "factors.0.mean"}
    assert all(torch.equal(moved[name], p.get_parameter(name)) for name in kept)
    p.unfreeze("factors.0.means").freeze("factors.3.probs", mask=torch.tensor([True, False, False]))
    assert p.n_parameters() == free - 3 - 2
    close_dict(p.unfreeze().maximize(stats), new, rtol=0)
    assert p.freeze().n_parameters() == 0
    with pytest.raises(InvalidArgument, match=r"freeze: .*did you mean 'factors\.1\.rates'"):
        p.freeze("factors.1.rate")


def test_priors_of_parts_join_the_m_step_and_the_objective() -> None:
    p, (x, _) = mixed(), draws(mixed(), 60)
    kinds = p.factors[2]
    kinds.prior = Dirichlet(2.0)  # pyright: ignore
    model = torchem.Mixture(Categorical(3).double(), p)
    stats = model.e_step(model.batch(x))
    close(model.log_prior(), kinds.prior.log_prob(kinds))  # pyright: ignore
    own = stats["component"]["factors.2"]
    new = kinds.maximize(own + own.map(torch.ones_like))["logits"]  # pyright: ignore
    close(model.maximize(stats)["component.factors.2.logits"], new)
    result = torchem.fit(model, x, seed=0, max_iter=30, tol=1e-6, progress=False)
    steps = torch.tensor(result.history, dtype=torch.float64)
    assert (steps.diff() >= -1e-9 * steps[:-1].abs()).all()
    assert Product([Poisson(2, 1)]).log_prior() is None


def test_scales_are_those_of_each_factors_columns() -> None:
    p = Product([Gaussian(2, 1), Gaussian(2, 1)], [[1], [0]])
    x = torch.stack([100 * randn(50), randn(50, seed=1)], -1).float()
    torchem.fit(torchem.Mixture(Categorical(2), p), x, seed=0, max_iter=1, tol=0.0, progress=False)
    close(p.factors[0].unit, x[:, 1:].var(0, correction=0), rtol=1e-4)  # pyright: ignore
    close(p.factors[1].unit, x[:, :1].var(0, correction=0), rtol=1e-4)  # pyright: ignore


def test_a_collapsed_part_is_told_of() -> None:
    p = Product([Gaussian(2, 1), Poisson(2, 1)]).double()
    assert p.degenerate().tolist() == [False, False]  # pyright: ignore
    p.factors[0].covariances = [[[1e-7]], [[1.0]]]  # pyright: ignore
    assert p.degenerate().tolist() == [True, False]  # pyright: ignore
    assert Product([Poisson(2, 1)]).degenerate() is None


# ---- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "columns", "words"),
    [
        ([], None, "equally many states"),
        ([Poisson(2, 1), Poisson(3, 1)], None, r"equally many states, got \[2, 3\]"),
        ([Categorical(2)], None, "equally many states"),
        ([Poisson(2, 1), Poisson(2, 2)], [[0], [1]], r"columns: expected \[1, 2\]"),
        ([Poisson(2, 1), Poisson(2, 1)], [[0], [0]], "each column from 0 to 1 once"),
        ([Poisson(2, 1), Poisson(2, 1)], [[0], [2]], "each column from 0 to 1 once"),
        ([Poisson(2, 1), Poisson(2, 1)], [[0]], "columns"),
    ],
)
def test_what_does_not_fit_together_is_refused(factors: list, columns: list | None, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        Product(factors, columns)


def test_one_factor_twice_is_refused() -> None:
    one = Poisson(2, 1)
    with pytest.raises(InvalidArgument, match="each factor once"):
        Product([one, one])


def test_bad_data_name_the_columns() -> None:
    model = torchem.Mixture(Categorical(2), Product([Poisson(2, 1), Categorical(2, 3)]))
    with pytest.raises(InvalidArgument, match=r"got 3 at row 0, column 1 \(read by Categorical\)"):
        model.log_prob([[0.0, 3.0]])
    with pytest.raises(InvalidArgument, match="2 features, got 3"):
        model.log_prob([[0.0, 1.0, 2.0]])
