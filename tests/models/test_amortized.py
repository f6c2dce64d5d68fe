"""Amortised models: held to probabilistic PCA, to numerical integration, and to their bound."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.laws.cases import close, close_stats, randn, rng, state, unchanged
from torchem.batch import Batch
from torchem.errors import ConvergenceWarning, InvalidArgument, InvalidFile
from torchem.models import AmortizedModel

LATENTS, COLUMNS = 2, 5


class Linear(nn.Module):
    """q(z | x) of a linear model: the mean linear in x, the variance the same for all."""

    def __init__(self, n: int = COLUMNS, latents: int = LATENTS):
        super().__init__()
        self.mean = nn.Linear(n, latents)
        self.log_variance = nn.Parameter(torch.zeros(latents))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.log_variance.expand(len(x), -1)


def linear_model(**options) -> AmortizedModel:
    torch.manual_seed(1)
    return AmortizedModel(nn.Linear(LATENTS, COLUMNS), Linear(), LATENTS, noise="spherical", **options).double()


def deep_model(d: int = 4, latents: int = 2, likelihood="gaussian", dropout: float = 0.0, **options) -> AmortizedModel:
    torch.manual_seed(2)
    decoder = nn.Sequential(nn.Linear(latents, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, d))
    encoder = nn.Sequential(nn.Linear(d, 12), nn.Tanh(), nn.Linear(12, 2 * latents))
    return AmortizedModel(decoder, encoder, latents, likelihood, **options).double()


def factors_and_noise(n: int = 400) -> Tensor:
    weight = randn(LATENTS, COLUMNS, seed=1) * torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    return randn(n, LATENTS, seed=2) @ weight + 0.5 * randn(n, COLUMNS, seed=3) + 3.0


def moons(n: int = 200) -> Tensor:
    angle = 3.0 * torch.rand(n, generator=rng(0), dtype=torch.float64)
    curve = torch.stack([angle.cos(), angle.sin(), (2 * angle).cos(), angle / 3], -1)
    return curve + 0.05 * randn(n, 4, seed=4)


def bits(n: int = 150) -> Tensor:
    z = randn(n, 1, seed=5)
    return (torch.rand(n, 4, generator=rng(6), dtype=torch.float64) < (2 * z).sigmoid()).double()


def quietly(model: AmortizedModel, x: Tensor, **options) -> torchem.Result:
    """A fit that may run out of iterations."""
    options = {"seed": 0, "progress": False, "tol": 0.0} | options
    return torchem.fit(model, x, **options)


def never_falls(history: list[float]) -> None:
    assert len(history) > 2
    assert all(b >= a for a, b in itertools.pairwise(history))


# ---- probabilistic principal components ---------------------------------------------------------------------------


def principal(x: Tensor) -> tuple[float, Tensor, Tensor]:
    """Largest log-likelihood, noise variance and W Wᵀ (M. E. Tipping, C. M. Bishop 1999, equations 7, 8 and 10)."""
    n, d = x.shape
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.mT @ centred / n)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = values[LATENTS:].mean()
    best = -n / 2 * (d * math.log(2 * math.pi) + values[:LATENTS].log().sum() + (d - LATENTS) * noise.log() + d)
    top = vectors[:, :LATENTS]
    return float(best), noise, (top * (values[:LATENTS] - noise)) @ top.mT


@pytest.mark.parametrize(
    ("options", "gap"),
    [
        ({"update": "joint", "optimizer": torch.optim.LBFGS, "learning_rate": 1.0, "steps": 5}, 1e-8),
        ({"update": "joint", "learning_rate": 0.03}, 1e-4),
        pytest.param({"update": "alternate", "learning_rate": 0.03}, 1e-4, marks=pytest.mark.slow),
    ],
)
def test_linear_networks_reach_probabilistic_pca(options, gap: float) -> None:
    """To within ``gap`` nats per observation, and with it its parameters."""
    x = factors_and_noise()
    best, noise, explained = principal(x)
    model = linear_model(**options)
    result = torchem.fit(model, x, seed=0, max_iter=400, tol=1e-8, progress=False)
    assert result.converged
    never_falls(result.history)
    assert best - gap * len(x) <= result.bound <= best + 1e-9 * abs(best)
    assert isinstance(model.decoder, nn.Linear)
    weight = model.decoder.weight.detach()
    size = 30 * math.sqrt(gap)
    close(weight @ weight.mT, explained, rtol=0, atol=size)
    close(model.noise_variance, noise.expand(COLUMNS), rtol=0, atol=size)
    close(model.decoder.bias, x.mean(0), rtol=0, atol=size)
    close(model.elbo(x).sum(), torch.tensor(result.bound, dtype=torch.float64))


def exact_model() -> tuple[AmortizedModel, torch.distributions.MultivariateNormal]:
    """Orthogonal loadings, whose posterior is diagonal: an encoder that is exact, and the marginal law."""
    model = linear_model()
    weight = torch.linalg.qr(randn(COLUMNS, LATENTS, seed=7)).Q * torch.tensor([1.5, 0.7], dtype=torch.float64)
    noise, bias = 0.3, randn(COLUMNS, seed=8)
    precision = 1 + weight.square().sum(0) / noise
    assert isinstance(model.decoder, nn.Linear)
    assert isinstance(model.encoder, Linear)
    with torch.no_grad():
        model.decoder.weight.copy_(weight)
        model.decoder.bias.copy_(bias)
        model.encoder.mean.weight.copy_(weight.mT / noise / precision[:, None])
        model.encoder.mean.bias.copy_(-(weight.mT @ bias) / noise / precision)
        model.encoder.log_variance.copy_(-precision.log())
    model.noise_variance = noise
    return model, torch.distributions.MultivariateNormal(bias, weight @ weight.mT + noise * torch.eye(COLUMNS).double())


def test_an_exact_encoder_makes_the_bound_tight() -> None:
    model, law = exact_model()
    x = law.sample((50,))
    truth = law.log_prob(x)
    close(model.elbo(x), truth, rtol=1e-10)
    close(model.log_prob(x), truth, rtol=1e-10)
    close(model.log_prob(x, draws=1), truth, rtol=1e-10)
    stats = model.e_step(Batch(x))
    close(model.bound(stats), truth.sum(), rtol=1e-10)
    entropy = 50 * 0.5 * model.encoder.log_variance.add(1 + math.log(2 * math.pi)).sum()  # pyright: ignore
    close(stats["entropy"], entropy, rtol=1e-10)
    # Away from it the bound lies below by the divergence of the encoder.
    with torch.no_grad():
        model.encoder.log_variance += 0.5  # pyright: ignore
    gap = LATENTS * 0.5 * (math.exp(0.5) - 1 - 0.5)
    close(truth - model.elbo(x), torch.full((50,), gap, dtype=torch.float64), rtol=1e-9)


def test_samples_have_the_law_of_the_model() -> None:
    model, law = exact_model()
    x, z = model.sample(20000, latents=True, generator=rng(0))
    close(x.mean(0), law.mean, rtol=0, atol=0.05)
    close(torch.cov(x.mT), law.covariance_matrix, rtol=0, atol=0.1)
    close(torch.cov(z.mT), torch.eye(LATENTS), rtol=0, atol=0.05)
    residual = x - model.decoder(z)
    close(residual.var(0), torch.full((COLUMNS,), 0.3), rtol=0, atol=0.02)
    assert model.sample(0).shape == (0, COLUMNS)
    assert torch.equal(model.sample(3, generator=rng(1)), model.sample(3, generator=rng(1)))


# ---- against numerical integration --------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_bounds_and_densities_against_quadrature(likelihood: str) -> None:
    """One latent: integrals over z by Gauss–Hermite nodes."""
    model = deep_model(4, 1, likelihood, samples=4000)
    x = bits(6) if likelihood == "bernoulli" else moons(6)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, share = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    with torch.no_grad():
        mean, log_variance = model.encoder(x).chunk(2, -1)

        def log_given(z: Tensor) -> Tensor:
            out = model.decoder(z.reshape(-1, 1)).reshape(*z.shape, 4)
            law = (
                torch.distributions.Bernoulli(logits=out)
                if likelihood == "bernoulli"
                else torch.distributions.Normal(out, model.noise_variance.sqrt())
            )
            return law.log_prob(x.unsqueeze(-2)).sum(-1)

        inner = log_given(mean + (0.5 * log_variance).exp() * nodes) @ share
        q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
        truth = (log_given(nodes.expand(6, -1)) + share.log()).logsumexp(-1)
        close(model.elbo(x), inner - divergence, rtol=0, atol=0.05)
        close(model.log_prob(x, draws=40000), truth, rtol=0, atol=0.02)
        assert bool((model.elbo(x) < model.log_prob(x, draws=40000)).all())


# ---- fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["alternate", "joint"])
@pytest.mark.parametrize(("likelihood", "batch_size"), [("gaussian", None), ("gaussian", 64), ("bernoulli", 50)])
@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
def test_the_bound_rises(update, likelihood, batch_size) -> None:
    x = bits() if likelihood == "bernoulli" else moons()
    model = deep_model(likelihood=likelihood, update=update, steps=3)
    result = quietly(model, x, max_iter=15, batch_size=batch_size)
    never_falls(result.history)
    assert result.history[-1] > result.history[0] + 0.1 * len(x)
    close(model.elbo(x).sum(), torch.tensor(result.bound, dtype=torch.float64))
    assert float(model.log_prob(x).mean().detach()) > result.bound / len(x) - 0.02


def test_alternation_moves_the_networks_one_after_the_other() -> None:
    """The E-step sees the encoder alone, the M-step the decoder alone."""
    for frozen, moved in (("decoder", "encoder"), ("encoder", "decoder")):
        model = deep_model()
        getattr(model, frozen).requires_grad_(False)
        before = {name: state(getattr(model, name)) for name in ("decoder", "encoder")}
        with pytest.warns(ConvergenceWarning):
            torchem.fit(model, moons(), seed=0, max_iter=2, progress=False)
        unchanged(getattr(model, frozen), before[frozen])
        with pytest.raises(AssertionError):
            unchanged(getattr(model, moved), before[moved])
    orders = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            orders.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
            return super().step(closure)

    model = deep_model(optimizer=Watched, steps=2, learning_rate=1e-3)
    quietly(model, moons(), max_iter=1)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert orders == [encoder, encoder, model.n_parameters(), model.n_parameters()]


def test_an_update_that_falls_is_made_again_more_slowly() -> None:
    sgd = functools.partial(torch.optim.SGD, momentum=0.0)
    model = deep_model(optimizer=sgd, learning_rate=50.0, update="joint", steps=1)
    result = quietly(model, moons(), max_iter=8)
    never_falls(result.history)
    assert result.history[-1] > result.history[0] + 10


@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
def test_fits_repeat_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = deep_model(samples=2, steps=2)
        torch.random.set_rng_state(before)
        runs.append(quietly(model, moons(), max_iter=4, seed=seed, batch_size=70, restarts=2))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert runs[0].histories == runs[1].histories
    assert runs[0].histories != runs[2].histories
    assert len(runs[0].restarts) == 2
    # Restarts draw the layers anew: their first bounds differ.
    assert runs[0].histories[0][0] != runs[0].histories[1][0]
    assert runs[0].bound == max(runs[0].restarts)


def test_a_start_takes_the_noise_from_the_data_and_none_keeps_it() -> None:
    x = moons()
    model = deep_model()
    networks = state(model.decoder)
    model.noise_variance = torch.tensor([0.1, 0.2, 0.3, 0.4])
    quietly(model, x, init=None, max_iter=0)
    close(model.noise_variance, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    quietly(model, x, max_iter=0)
    close(model.noise_variance, x.var(0, correction=0))
    unchanged(model.decoder, networks)


def test_modes_and_randomness_of_networks() -> None:
    """Dropout acts while networks are trained, never on a bound; modes are left as found."""
    model = deep_model(dropout=0.5)
    model.train()
    x = moons(40)
    assert torch.equal(model.elbo(x), model.elbo(x))
    assert model.decoder.training
    never_falls(quietly(model, x, max_iter=3).history)
    assert model.decoder.training
    assert torch.equal(model.eval().elbo(x), model.train().elbo(x))


def test_a_fit_that_is_interrupted_returns_whole_iterations() -> None:
    """Ctrl-C in the middle of an update: networks are those of the last bound."""
    count = itertools.count()

    class Struck(torch.optim.Adam):
        def step(self, closure=None):
            if next(count) == 25:
                raise KeyboardInterrupt
            return super().step(closure)

    x = moons()
    model = deep_model(optimizer=Struck, steps=5, update="joint")
    result = quietly(model, x, max_iter=50)
    assert result.status == "interrupted"
    assert result.n_iter == len(result.history) - 1 == 5
    close(model.elbo(x).sum(), torch.tensor(result.history[-1], dtype=torch.float64))


# ---- batch by batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["alternate", "joint"])
def test_steps_on_batches_reach_probabilistic_pca(update) -> None:
    """From a loader that shuffles, with weights: near the optimum, nearly three nats above the start."""
    x = factors_and_noise()
    x = x - x.mean(0)
    best = principal(x)[0]
    model = linear_model(update=update, steps=1, learning_rate=0.05, samples=4)
    loader = DataLoader(TensorDataset(x, torch.ones(len(x))), 50, shuffle=True, generator=rng(0))
    result = quietly(model, loader, accumulate=torchem.Stochastic(), max_iter=10)
    assert best - 0.1 * len(x) < result.bound <= best
    close(model.elbo(x).sum(), torch.tensor(result.bound, dtype=torch.float64))


def test_each_batch_moves_one_network_after_the_other() -> None:
    orders = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            orders.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
            return super().step(closure)

    model = deep_model(optimizer=Watched, steps=2, learning_rate=1e-3)
    quietly(model, moons(), accumulate=torchem.Stochastic(), batch_size=100, max_iter=1)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert orders == [encoder, encoder, model.n_parameters(), model.n_parameters()] * 2


def test_incremental_em_is_full_batch_em() -> None:
    """Nothing of a batch outlives a step of the encoder, so each pass measures all of it anew."""
    histories = []
    for rule in (torchem.FullBatch(), torchem.Incremental()):
        model = deep_model(steps=2)
        histories.append(quietly(model, moons(), accumulate=rule, batch_size=70, max_iter=6).history)
    never_falls(histories[1])
    assert histories[1] == pytest.approx(histories[0], rel=1e-12)


def test_a_stream_is_learnt_batch_by_batch() -> None:
    model, rule = deep_model(update="joint", steps=1), torchem.Stochastic()
    batches = moons(3000).split(50)
    scores = [torchem.partial_fit(model, batch, rule) for batch in batches]
    assert sum(scores[-10:]) > sum(scores[:10]) + 5


@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
def test_a_fit_goes_on_with_the_optimisers_of_the_fit_before() -> None:
    def steps(model: AmortizedModel) -> list[int]:
        return [int(state["state"][0]["step"]) for _, state in model._memory() or []]

    x = moons()
    model = deep_model(steps=3)
    first = quietly(model, x, max_iter=2)
    assert steps(model) == [6, 6]
    again = quietly(model, x, init=None, max_iter=2)
    assert steps(model) == steps(copy.deepcopy(model)) == [12, 12]
    assert again.history[0] == pytest.approx(first.bound, rel=1e-12)
    never_falls(again.history)
    model.update = "joint"  # other optimisers, which know nothing yet
    quietly(model, x, init=None, max_iter=1)
    assert steps(model) == [3]
    quietly(model, x, max_iter=1)
    assert steps(model) == [3]


# ---- laws ---------------------------------------------------------------------------------------------------------


def test_statistics_add_and_weights_count() -> None:
    model = deep_model()
    x = moons(30)
    whole = model.e_step(Batch(x))
    close_stats(whole, model.e_step(Batch(x[:11])) + model.e_step(Batch(x[11:])), rtol=1e-10)
    weight = torch.ones(30).double()
    weight[3], weight[7] = 2.0, 0.0
    again = torch.cat([x[:7], x[8:], x[3:4]])
    close_stats(model.e_step(Batch(x, weight=weight)), model.e_step(Batch(again)), rtol=1e-10)
    model.memory_budget = 1
    close_stats(whole, model.e_step(Batch(x.repeat(10, 1))) * 0.1, rtol=1e-10)
    close(whole["log_likelihood"], model.elbo(x).sum(), rtol=1e-10)
    close(model.bound(whole), whole["log_likelihood"], rtol=1e-12)
    assert float(whole["count"]) == 30


def test_weights_act_on_a_fit() -> None:
    options = {"update": "joint", "optimizer": torch.optim.LBFGS, "learning_rate": 1.0, "steps": 2}
    data = factors_and_noise(90)
    weight = torch.cat([torch.zeros(30), torch.ones(60)])
    model = linear_model(**options)
    result = torchem.fit(model, data, weights=weight, seed=0, max_iter=200, tol=1e-9, progress=False)
    assert result.bound == pytest.approx(principal(data[30:])[0], abs=1e-4)


def test_float32_is_near_float64() -> None:
    model = deep_model()
    x = moons(40)
    close(copy.deepcopy(model).float().elbo(x), model.elbo(x), rtol=1e-4, atol=1e-4)
    small = deep_model(steps=2).float()
    never_falls(quietly(small, x, max_iter=4).history)
    assert small.dtype == torch.float32


def test_posteriors() -> None:
    model = deep_model()
    x = moons(7)
    law = model.posterior(x)
    assert law.mean.shape == (7, 2)
    close(law.mean, model.most_likely(x))
    spread = model.encoder(x).chunk(2, -1)[1].exp()
    close(law.covariance_matrix, torch.diag_embed(spread))
    # An encoder may give a pair, or both at once.
    assert linear_model().posterior(factors_and_noise(3)).mean.shape == (3, LATENTS)


def test_the_bound_is_differentiable() -> None:
    model = deep_model()
    x = moons(5).requires_grad_()
    model.elbo(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert all(p.grad is not None for p in model.parameters())


# ---- files --------------------------------------------------------------------------------------------------------


def test_files_keep_all_but_the_networks_code(tmp_path) -> None:
    model = linear_model(update="joint", steps=3, samples=6, learning_rate=0.5)
    model.noise_variance = 0.7
    torchem.save(model, tmp_path / "m.safetensors")
    with pytest.raises(InvalidFile, match="modules="):
        torchem.load(tmp_path / "m.safetensors")
    x = factors_and_noise(9)
    for modules in (
        {"decoder": nn.Linear(LATENTS, COLUMNS), "encoder": Linear()},
        {"decoder": nn.Linear(LATENTS, COLUMNS), "Linear": Linear},
    ):
        again = torchem.load(tmp_path / "m.safetensors", modules=modules)
        assert isinstance(again, AmortizedModel)
        assert again.dtype == torch.float64
        assert (again.update, again.steps, again.samples, again.learning_rate) == ("joint", 3, 6, 0.5)
        close(again.elbo(x), model.elbo(x), rtol=0, atol=0)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_what_continuous_latents_cannot_do() -> None:
    model, x = deep_model(), moons()
    before = state(model)
    with pytest.raises(InvalidArgument, match="no such configurations"):
        torchem.fit(model, x, e_step="hard", progress=False)
    with pytest.raises(InvalidArgument, match="average: expected False for AmortizedModel"):
        torchem.fit(model, x, accumulate=torchem.Stochastic(average=True), batch_size=50, progress=False)
    for policy in ("respawn", "prune"):
        with pytest.raises(InvalidArgument, match="no components that could be put elsewhere"):
            torchem.fit(model, x, dead=policy, progress=False)
    with pytest.raises(InvalidArgument, match="passes over the data again"):
        torchem.em_map(model)(dict(model.named_parameters()), Batch(x))
    unchanged(model, before)


def test_several_processes_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InvalidArgument, match="several processes"):
        deep_model().begin([rng(0)], 0)


def test_data_that_do_not_fit_are_refused() -> None:
    model, x = deep_model(), moons()
    for message, data, fields in (
        ("4 features", x[:, :3], {}),
        ("inputs", x, {"inputs": x}),
        ("evidence|labels", x, {"labels": torch.ones(len(x), 1).bool()}),
        ("missing", torch.where(x > 0.9, torch.nan, x), {}),
    ):
        with pytest.raises(InvalidArgument, match=message):
            torchem.fit(model, data, progress=False, **fields)
    with pytest.raises(InvalidArgument, match="numbers from 0 to 1"):
        deep_model(likelihood="bernoulli").elbo(x)
    with pytest.raises(InvalidArgument, match="noise_variance"):
        _ = deep_model(likelihood="bernoulli").noise_variance
    with pytest.raises(InvalidArgument, match="noise_variance"):
        model.noise_variance = -1.0


def test_networks_that_do_not_fit_are_refused() -> None:
    good, encoder = nn.Linear(2, 4), nn.Linear(4, 4)
    with pytest.raises(InvalidArgument, match="decoder"):
        AmortizedModel(nn.Linear(3, 4), encoder, 2)
    with pytest.raises(InvalidArgument, match="decoder"):
        AmortizedModel(nn.Sequential(good, nn.Unflatten(1, (2, 2))), encoder, 2)
    with pytest.raises(InvalidArgument, match="encoder"):
        AmortizedModel(good, nn.Linear(5, 4), 2)
    with pytest.raises(InvalidArgument, match="mean and log-variance"):
        AmortizedModel(good, nn.Linear(4, 3), 2)
    for option in ({"steps": 0}, {"samples": 3}, {"samples": 0}, {"learning_rate": 0.0}):
        with pytest.raises(InvalidArgument, match=next(iter(option))):
            AmortizedModel(good, encoder, 2, **option)
    with pytest.raises(InvalidArgument, match="n_latents"):
        AmortizedModel(good, encoder, 0)
    with pytest.raises(InvalidArgument, match="draws"):
        AmortizedModel(good, encoder, 2).log_prob(torch.zeros(1, 4), draws=0)
