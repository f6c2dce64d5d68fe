"""Autoregressions as emissions: what of a sequence they read, and hidden Markov models over them."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidType
from torchem.factors import Autoregressive, Categorical, Gaussian, LinearGaussian


def sequences(n: int = 3, length: int = 7, d: int = 2) -> Tensor:
    return torch.arange(1.0, n * length * d + 1, dtype=torch.float64).reshape(n, length, d)


def switching(lags: int = 2) -> torchem.HMM:
    """Two regimes that only their dynamics tell apart."""
    emission = Autoregressive.gaussian(2, 1, lags)
    model = torchem.HMM(Categorical(2), Categorical(2, 2), emission).double()
    weight = torch.zeros(2, 1, lags + 1)
    weight[0, 0, :2], weight[1, 0, :2] = torch.tensor([0.5, 0.8]), torch.tensor([0.0, -0.7])
    emission.weight, emission.covariances = weight, torch.full((2, 1, 1), 0.2)
    model.transition_matrix = [[0.95, 0.05], [0.05, 0.95]]
    return model


# ---- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("own", [0, 2])
def test_context_is_ones_then_lags_then_own_covariates(intercept: bool, own: int) -> None:
    factor = Autoregressive.gaussian(2, 2, 3, intercept=intercept, n_inputs=own).double()
    assert (factor.lags, factor.n_inputs, factor.n_features, factor.n_components) == (3, own, 2, 2)
    x, u = sequences(), 100 * cases.randn(3, 7, 2)
    batch = Batch(x, u=u, weight=torch.ones(3))
    seen = factor.context(batch)
    assert seen.u is not None
    assert seen.weight is batch.weight
    for t in range(3, 7):
        parts = [torch.ones(3, 1)] * intercept + [x[:, t - lag] for lag in (1, 2, 3)] + [u[:, t]] * (own > 0)
        close(seen.u[:, t], torch.cat(parts, -1), rtol=0)
    assert torch.equal(seen.x.isnan().all(-1), (torch.arange(7) < 3).expand(3, 7))
    assert torch.equal(seen.x[:, 3:], x[:, 3:])
    assert bool(seen.u.isfinite().all())


def test_density_of_a_frame_is_that_of_the_regression_on_frames_before() -> None:
    factor = Autoregressive.gaussian(3, 2, 2, "diag").double()
    factor.weight = weight = 0.3 * cases.randn(3, 2, 5)
    x = cases.randn(4, 6, 2, seed=3)
    rows = factor.context(Batch(x)).rows()
    found = factor.log_prob(rows).unflatten(0, (4, 6))[:, 2:]
    mean = weight[..., 0] + torch.einsum("kdi,nti->ntkd", weight[..., 1:3], x[:, 1:-1])
    mean = mean + torch.einsum("kdi,nti->ntkd", weight[..., 3:], x[:, :-2])
    normal = torch.distributions.Normal(mean, torch.ones(()).double())
    close(found, normal.log_prob(x[:, 2:].unsqueeze(2)).sum(-1))
    center, variance = factor.moments(rows)
    close(center.unflatten(0, (4, 6))[:, 2:], mean)
    close(variance, torch.ones(1, 3, 2))


def test_integers_become_numbers() -> None:
    factor = Autoregressive.gaussian(2, 1, 1)
    seen = factor.context(Batch(torch.arange(5).reshape(1, 5, 1)))
    assert seen.x.dtype == torch.float32
    assert seen.u is not None
    assert seen.u[0, 1:, 1].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_padding_is_never_a_lag() -> None:
    model = switching()
    long, short = cases.randn(12, 1, seed=1), cases.randn(5, 1, seed=2)
    alone = [model.log_prob(Batch(x.unsqueeze(0))) for x in (long, short)]
    together = model.log_prob([long, short])
    close(together, torch.cat(alone))


def test_short_sequences_say_nothing() -> None:
    model = switching(lags=3)
    close(model.log_prob([cases.randn(3, 1), cases.randn(1, 1), cases.randn(2, 1)]), torch.zeros(3))
    mixed = model.e_step(model.batch([cases.randn(3, 1), cases.randn(40, 1, seed=1)]))
    alone = model.e_step(model.batch([cases.randn(40, 1, seed=1)]))
    cases.close_stats(mixed["emission"], alone["emission"])


def test_missing_frames_are_refused_and_named() -> None:
    model = switching()
    x = cases.randn(2, 9, 1)
    x[1, 4] = torch.nan
    with pytest.raises(InvalidArgument, match=r"without missing entries.*sequence 1, frame 4"):
        model.emission.check(Batch(x))
    with pytest.raises(InvalidArgument, match="without missing"):
        model.log_prob(x)
    # What stands in the padding never matters.
    model.emission.check(Batch(x, lengths=torch.tensor([9, 4])))


def test_covariates_are_required_where_they_are_read() -> None:
    factor = Autoregressive.gaussian(2, 1, 1, n_inputs=2)
    for u in (None, torch.zeros(1, 5, 3)):
        with pytest.raises(InvalidArgument, match=r"inputs: expected covariates \[N, T, 2\]"):
            factor.check(Batch(torch.zeros(1, 5, 1), u=u))
    factor.check(Batch(torch.zeros(1, 5, 1), u=torch.zeros(1, 5, 2)))
    # Covariates that it does not read may be the transition's.
    Autoregressive.gaussian(2, 1, 1).check(Batch(torch.zeros(1, 5, 1), u=torch.zeros(1, 5, 3)))
    with pytest.raises(InvalidArgument, match="data: expected 1 features"):
        factor.check(Batch(torch.zeros(1, 5, 2), u=torch.zeros(1, 5, 2)))


def test_bad_options() -> None:
    with pytest.raises(InvalidArgument, match="lags"):
        Autoregressive.gaussian(2, 1, 0)
    with pytest.raises(InvalidArgument, match=r"regression: expected at least 5 inputs \(2 lags × 2, intercept True\)"):
        Autoregressive(LinearGaussian(2, 4, 2), 2)
    Autoregressive(LinearGaussian(2, 4, 2), 2, intercept=False)
    with pytest.raises(InvalidType, match="regression"):
        Autoregressive(Gaussian(2, 1), 1)


# ---- the wrapped regression ---------------------------------------------------------------------------------------


def test_views_freezing_and_counts_are_the_regressions() -> None:
    factor = Autoregressive.gaussian(2, 1, 1, "diag").double()
    weight = cases.randn(2, 1, 2)
    factor.weight, factor.covariances = weight, [[0.5], [2.0]]
    close(factor.regression.weight, weight)  # pyright: ignore
    close(factor.covariances, torch.tensor([[0.5], [2.0]]))
    assert set(dict(factor.named_parameters())) == {"regression.coefficient", "regression.scale"}
    assert factor.views == {"weight": "regression.coefficient", "covariances": "regression.scale"}
    assert factor.n_parameters() == 4 + 2
    assert factor.freeze("weight", mask=torch.tensor([True, False])) is factor
    assert factor.n_parameters() == 2 + 2
    assert factor.unfreeze().n_parameters() == 6
    assert Autoregressive.gaussian(2, 1, 1, "tied").shared_parameters == {"regression.scale"}
    with pytest.raises(AttributeError):
        _ = factor.no_such_view
    small = factor.select(torch.tensor([False, True]))
    close(small.weight, weight[1:])
    assert small.lags == 1


def test_configuration_and_state_rebuild_it() -> None:
    factor = Autoregressive.gaussian(2, 1, 2).double()
    factor.weight = cases.randn(2, 1, 3)
    config = factor.config()
    assert set(config) == {"regression", "lags", "intercept"}
    other = Autoregressive(LinearGaussian(2, 3, 1).double(), config["lags"], config["intercept"])
    other.load_state_dict(factor.state_dict())
    close(other.weight, factor.weight, rtol=0, atol=0)


def test_files(tmp_path) -> None:
    model = switching()
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    x = cases.randn(1, 20, 1)
    close(again.log_prob(x), model.log_prob(x), rtol=0, atol=0)


# ---- torch.func ---------------------------------------------------------------------------------------------------


def test_missing_frames_at_the_end_are_exact() -> None:
    """Nothing that was seen depends on them; any others are refused, and so is what would have to read them."""
    model = switching(lags=2)
    x = model.sample(3, 12, generator=torch.Generator().manual_seed(0)).detach()
    cut = model.batch([x[0], x[1, :9], x[2, :10]])
    gone = x.clone()
    gone[1, 9:], gone[2, 10:] = torch.nan, torch.nan
    whole = model.batch(gone)
    torch.testing.assert_close(model.log_prob(whole), model.log_prob(cut))
    posterior = model.posterior(whole)
    torch.testing.assert_close(posterior[1, :9], model.posterior(cut)[1, :9])
    ahead = posterior[1, 8] @ model.transition_matrix
    torch.testing.assert_close(posterior[1, 9], ahead)
    one, two = (model.e_step(batch)["emission"] for batch in (whole, cut))
    for name, leaf in one.items():
        assert leaf.isfinite().all()
        torch.testing.assert_close(leaf, two[name])
    for call in (model.impute, lambda batch: model.forecast(batch, 2)):
        with pytest.raises(InvalidArgument, match="cut them off"):
            call(whole)
    gone[2, 11] = 0.0
    with pytest.raises(InvalidArgument, match="sequence 2, frame 10"):
        model.log_prob(gone)


def test_likelihood_is_differentiable_in_the_sequence_also_through_its_lags() -> None:
    model = switching()
    x = cases.randn(1, 6, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.log_prob(Batch(x)), (x,), fast_mode=True)
    (slope,) = torch.autograd.grad(model.log_prob(Batch(x)).sum(), x)
    assert bool((slope[:, 1:] != 0).all())  # the second frame too: later ones depend on it


def test_em_map_under_vmap() -> None:
    model = switching()
    step = torchem.em_map(model)
    start = {name: value.detach() for name, value in model.named_parameters()}
    many = {name: torch.stack([value, 0.9 * value]) for name, value in start.items()}
    batch = Batch(cases.randn(2, 15, 1))
    batched = torch.func.vmap(step, in_dims=(0, None))(many, batch)
    for r in range(2):
        alone = step({name: value[r] for name, value in many.items()}, batch)
        cases.close_dict({name: value[r] for name, value in batched.items()}, alone, rtol=1e-7)


# ---- in a hidden Markov model -------------------------------------------------------------------------------------


def forward(model: torchem.HMM, x: Tensor) -> Tensor:
    """log p of one sequence by the plain recursion, from the second frame given the first."""
    emission = model.emission
    weight, variance = emission.weight[:, 0], emission.covariances[:, 0, 0]  # pyright: ignore
    lags = weight.shape[1] - 1
    alpha = model.initial_probs
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(x)):
        if t > 0:
            alpha = alpha @ model.transition_matrix
        if t >= lags:
            past = torch.cat([torch.ones(1, dtype=torch.float64), x[t - lags : t].flip(0)])
            alpha = alpha * torch.distributions.Normal(weight @ past, variance.sqrt()).log_prob(x[t]).exp()
            total, alpha = total + alpha.sum().log(), alpha / alpha.sum()
    return total


def test_likelihood_is_that_of_the_plain_recursion() -> None:
    model = switching()
    model.initial_probs = [0.3, 0.7]
    x = cases.randn(30, seed=5)
    close(model.log_prob(Batch(x.reshape(1, -1, 1)))[0], forward(model, x))


def test_regimes_are_recovered_and_no_step_falls() -> None:
    truth = switching()
    x, z = truth.sample(6, 400, latents=True, generator=cases.rng(1))
    assert x.shape == (6, 400, 1)
    model = copy.deepcopy(truth)
    model.emission.weight = torch.tensor([[[0.0, 0.2, 0.0]], [[0.0, -0.2, 0.0]]])  # pyright: ignore
    model.emission.covariances = torch.ones(2, 1, 1)  # pyright: ignore
    batch, last = Batch(x), -torch.inf
    for _ in range(80):
        stats = model.e_step(batch).map(torch.Tensor.detach)
        value = float(stats["log_likelihood"])
        close(model.bound(stats), stats["log_likelihood"])
        assert value >= last - 1e-9 * abs(value)
        last = value
        model.m_step(stats)
    close(model.emission.weight, truth.emission.weight, atol=0.12, rtol=0)  # pyright: ignore
    close(model.emission.covariances, truth.emission.covariances, rtol=0.2)  # pyright: ignore
    assert float((model.most_likely(batch) == z).double().mean()) > 0.85


def test_fit_finds_the_regimes_from_its_own_start() -> None:
    truth = switching()
    x = truth.sample(6, 400, generator=cases.rng(1))
    model = torchem.HMM(Categorical(2), Categorical(2, 2), Autoregressive.gaussian(2, 1, 2)).double()
    result = torchem.fit(model, x, restarts=4, seed=0, max_iter=200, progress=False)
    own = float(truth.log_prob(Batch(x)).sum().detach())
    assert float(result.bound) > own - 1


def test_entries_that_nothing_reads_are_exact() -> None:
    """Of the last frame that was seen: its density is that of the columns observed, by the joint normal one.

    So are those of given frames that no frame follows; what a later frame reads is refused by its place.
    """
    emission = Autoregressive.gaussian(2, 2, 2)
    model = torchem.HMM(Categorical(2), Categorical(2, 2), emission).double()
    emission.weight = 0.2 * cases.randn(2, 2, 5, seed=1)
    emission.covariances = [[[1.0, 0.6], [0.6, 1.0]], [[0.5, -0.2], [-0.2, 0.4]]]
    x = model.sample(3, 8, generator=cases.rng(0)).detach()
    holed = x.clone()
    holed[0, 7, 1] = holed[1, 5, 0] = torch.nan
    holed[1, 6:] = holed[2, 2:] = holed[2, 1, 0] = torch.nan
    batch = model.batch(holed)
    close(model.log_prob(batch)[2], torch.zeros(()))
    for row, end, column in ((0, 8, 1), (1, 6, 0)):
        # Over a grid of the missing entry the complete density integrates to the marginal one.
        grid = torch.linspace(-30, 30, 4001, dtype=torch.float64)
        many = x[row : row + 1, :end].repeat(4001, 1, 1)
        many[:, end - 1, column] = grid
        mass = torch.trapezoid(model.log_prob(many).detach().exp(), grid)
        close(model.log_prob(batch)[row], mass.log(), rtol=1e-7)
    result = torchem.fit(model, holed, init=None, max_iter=6, tol=0.0, progress=False)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(result.history))
    # The mean of what the grid says.
    many = x[:1].repeat(4001, 1, 1)
    many[:, 7, 1] = grid = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    share = model.log_prob(many).detach().softmax(0)
    close(model.impute(holed[:1])[0, 7, 1], share @ grid, rtol=1e-7)
    with pytest.raises(InvalidArgument, match="cut them off"):
        model.impute(holed[1:2])
    for frame in (0, 4, 6):
        bad = x.clone()
        bad[1, frame, 0] = torch.nan
        with pytest.raises(InvalidArgument, match=f"frame follows, got NaN at sequence 1, frame {frame}; cut"):
            model.log_prob(bad)
    # A gap longer than the order does not end it.
    bad = x.clone()
    bad[0, 3:6] = torch.nan
    with pytest.raises(InvalidArgument, match="sequence 0, frame 3"):
        model.log_prob(bad)
