"""Hidden semi-Markov models against the list of all segments, the expanded chain, and what they were drawn from."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import ModelCase, close
from tests.regressions.common import as_users_run_it
from torchem import HMM, HSMM, GaussianHSMM, masks
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Autoregressive, Categorical, Gaussian, PoissonDuration, SoftmaxRegression
from torchem.model import DiscreteModel
from torchem.ops import chain, semi_markov

SEGMENTS = pytest.mark.parametrize(
    "build", [pytest.param(build, id=name) for name, build in cases.MODEL_CASES.items() if name.startswith("HSMM")]
)


def segmentations(k: int, d: int, length: int) -> Iterator[list[tuple[int, int]]]:
    """All lists of (state, duration) that cover so many frames, no state after itself."""
    if length == 0:
        yield []
        return
    for last in range(1, min(d, length) + 1):
        for before in segmentations(k, d, length - last):
            yield from ([*before, (state, last)] for state in range(k) if not before or before[-1][0] != state)


def listed(model: HSMM, batch: Batch, n: int) -> tuple[Tensor, list[list[tuple[int, int]]]]:
    """Every segmentation of a sequence, and its joint log-probability: probabilities are asked, inference is not."""
    length, k, d = int(batch.frames()[n]), model.n_components, model.max_duration
    first, step, law = model.initial_probs.log(), model.transition_matrix.log(), model.duration_probs.log()
    emission = model._kernels()["emission"].log_potential(batch)[n]
    emitted = (emission if batch.evidence is None else emission + batch.evidence[n]).tolist()
    tail = law.exp().flip(-1).cumsum(-1).flip(-1).log().tolist() if model.censored else law.tolist()
    first, step, law = first.tolist(), step.tolist(), law.tolist()
    found = list(segmentations(k, d, length))
    values = []
    for segments in found:
        value, t = first[segments[0][0]], 0
        for place, (state, lasted) in enumerate(segments):
            if place:
                value += step[segments[place - 1][0]][state]
            value += (tail if place == len(segments) - 1 else law)[state][lasted - 1]
            value += sum(emitted[i][state] for i in range(t, t + lasted))
            t += lasted
        values.append(value)
    return torch.tensor(values, dtype=torch.float64), found


@SEGMENTS
def test_segments_equal_the_list_of_them_all(build) -> None:
    case: ModelCase = build()
    model, batch = case.model, case.batch
    assert isinstance(model, HSMM)
    k, d = model.n_components, model.max_duration
    with torch.no_grad():
        posterior, best, log_prob = model.posterior(batch), model.most_likely(batch), model.log_prob(batch)
        filtered, (scores, paths) = model.filter(batch), model.best_paths(batch, 3)
        potentials = {slot: kernel.log_potential(batch) for slot, kernel in model._kernels().items()}
        expected = model.infer(potentials, batch)[1]
        law = model.duration_probs
        counts, pairs, first = torch.zeros(k, d).double(), torch.zeros(k, k).double(), torch.zeros(k).double()
        for n in range(len(batch)):
            joint, found = listed(model, batch, n)
            share, length = joint.softmax(0), int(batch.frames()[n])
            close(log_prob[n], joint.logsumexp(0))
            gamma = torch.zeros(length, k).double()
            weight = 1.0 if batch.weight is None else float(batch.weight[n])
            for p, segments in zip(share.tolist(), found, strict=True):
                t = 0
                first[segments[0][0]] += weight * p
                for place, (state, lasted) in enumerate(segments):
                    gamma[t : t + lasted, state] += p
                    t += lasted
                    if place:
                        pairs[segments[place - 1][0], state] += weight * p
                    if place == len(segments) - 1 and model.censored:
                        rest = torch.where(torch.arange(d) >= lasted - 1, law[state], 0.0)
                        counts[state] += weight * p * rest / rest.sum()
                    else:
                        counts[state, lasted - 1] += weight * p
            close(posterior[n, :length], gamma)
            assert (posterior[n, length:] == 0).all()
            order = joint.sort(descending=True, stable=True)
            states = [[state for state, lasted in found[i] for _ in range(lasted)] for i in order.indices[:3]]
            assert best[n, :length].tolist() == states[0]
            some = min(3, int((joint > -torch.inf).sum()))
            close(scores[n, :some], order.values[:some])
            assert paths[n, :some, :length].tolist() == states[:some]
            # What is known at the last frame of a sequence that may go on is what is known of it in the end.
            if model.censored:
                close(filtered[n, length - 1], gamma[-1])
    close(expected["duration"].squeeze(0), counts)
    close(expected["transition"].squeeze(0), pairs)
    close(expected["initial"].squeeze(0), first)


def chained(model: HSMM) -> HMM:
    """The same law as a chain of states and frames that are left, with structural zeros and tied emissions."""
    k, d = model.n_components, model.max_duration
    law, step, first = (v.detach() for v in (model.duration_probs, model.transition_matrix, model.initial_probs))
    matrix = torch.zeros(k, d, k, d, dtype=torch.float64)
    for left in range(1, d):
        matrix[torch.arange(k), left, torch.arange(k), left - 1] = 1.0
    matrix[:, 0] = step.unsqueeze(-1) * law
    emission = Gaussian(k * d, model.emission.n_features or 1, "diag").double()
    emission.means = model.means.detach().repeat_interleave(d, 0)  # pyright: ignore
    emission.covariances = model.covariances.detach().repeat_interleave(d, 0)  # pyright: ignore
    chain = HMM(Categorical(k * d), Categorical(k * d, k * d), emission).double()
    chain.initial_probs = (first.unsqueeze(-1) * law).flatten()
    chain.transition_matrix = matrix.reshape(k * d, k * d)
    return chain


def drawn(duration: Any = "categorical", n: int = 4, length: int = 60) -> tuple[GaussianHSMM, Tensor, Tensor]:
    truth = GaussianHSMM(3, 2, 8, duration).double()
    truth.means = [[-1.5, 0.0], [1.5, 0.0], [0.0, 2.0]]
    if duration == "categorical":
        truth.duration_probs = cases.randn(3, 8, seed=1).mul(1.5).softmax(-1)
    truth.transition_matrix = [[0.0, 0.7, 0.3], [0.4, 0.0, 0.6], [0.9, 0.1, 0.0]]
    x, z = truth.sample(n, length, latents=True, generator=cases.rng(2))
    return truth, x, z


@pytest.mark.parametrize("duration", ["categorical", "negative_binomial"])
def test_longer_sequences_equal_the_expanded_chain(duration: str) -> None:
    model, x, _ = drawn(duration)
    x[1, 7:12] = torch.nan
    x[2, 3, 0] = torch.nan
    chain, lengths = chained(model), torch.tensor([60, 31, 60, 2])
    with torch.no_grad():
        close(model.log_prob(model.batch(x, lengths=lengths)), chain.log_prob(chain.batch(x, lengths=lengths)))
        left = chain.posterior(x, lengths=lengths).unflatten(-1, (3, 8)).sum(-1)
        close(model.posterior(x, lengths=lengths), left)
        model.censored = False
        chain.end = Categorical(24, 2).double()
        stop = (torch.arange(24) % 8 == 0).double()
        chain.end.probs = torch.stack([torch.ones(24), stop], -1).div(1 + stop.unsqueeze(-1))
        # Each end has probability one half of what it would have: of either choice, where there is one.
        ends = chain.log_prob(chain.batch(x, lengths=lengths)) - model.log_prob(model.batch(x, lengths=lengths))
    assert bool((ends <= -math.log(2) + 1e-9).all())


def expanded(model: HSMM, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials of the chain on (state, frames lasted), of the same Z for every end: K D states, K D × K D steps.

    A segment goes on with the ratio of survivals, and ends with what is left of one.
    """
    potentials = {slot: kernel.log_potential(batch) for slot, kernel in model._kernels().items()}
    initial, transition, duration, emission = model._parts(potentials, batch)
    k, d = duration.shape[-2:]
    alive = semi_markov.survival(duration)
    safe = torch.where(alive > -torch.inf, alive, 0.0)
    ends = duration - safe
    after = torch.cat([alive[..., 1:], torch.full_like(alive[..., :1], -torch.inf)], -1) - safe
    begins = torch.full((*initial.shape[:-1], k, d), -torch.inf).to(initial)
    begins = torch.cat([(initial + alive[..., 0]).unsqueeze(-1), begins[..., 1:]], -1).flatten(-2)
    moves = ends[..., :, :, None, None] + transition[..., :, None, :, None] + alive[..., None, None, :, :1]
    eye, shift = torch.eye(k, dtype=torch.bool)[:, None, :, None], torch.eye(d, dtype=torch.bool).roll(1, -1)
    first = (torch.arange(d) == 0).view(1, 1, 1, d)
    on = torch.where(eye & shift[None, :, None, :], after[..., :, :, None, None], -torch.inf)
    steps = torch.where(first, moves, on)
    seen = emission.repeat_interleave(d, -1)
    if not model.censored:
        last = model._last(batch).unsqueeze(-1)
        seen = seen + torch.where(last, ends.flatten(-2).unsqueeze(-2), 0.0)
    return begins, steps.flatten(-4, -3).flatten(-2), seen


@pytest.mark.parametrize("censored", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_filters_lists_and_draws_equal_those_of_the_expanded_chain(
    censored: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, _ = drawn(n=4, length=20)
    model.duration_probs = [[0.0, 0.3, 0.7, 0, 0, 0, 0, 0], [0.25] * 4 + [0.0] * 4, [0.125] * 8]
    model.censored = censored
    x[1, 7:12] = torch.nan
    labels = torch.full((4, 20), -1)
    labels[0, 3], labels[2, 5] = 2, 1
    batch = model.batch(x, lengths=[20, 15, 1, 20], labels=labels.index_fill(0, torch.tensor([2]), -1))
    if not compiled:
        monkeypatch.setattr(semi_markov, "_kernel", lambda *given: None)
    with torch.no_grad():
        parts = expanded(model, batch)
        close(model.log_normalizer({s: k.log_potential(batch) for s, k in model._kernels().items()}, batch),
              chain.log_normalizer(*parts, batch.lengths))  # fmt: skip
        law = chain.filter(*parts, batch.lengths)[1].unflatten(-1, (3, 8)).sum(-1)
        close(model.filter(batch), law)
        scores, paths = chain.best_paths(*parts, 7, batch.lengths)
        found, states = model.best_paths(batch, 7)
        close(found, scores)
        assert torch.equal(states, torch.where(paths >= 0, paths // 8, -1))
        assert torch.equal(states[:, 0], model.most_likely(batch))
        n = 2000 if compiled else 100
        draws = model.sample_posterior(batch, n, generator=cases.rng(1))
        assert draws.shape == (n, 4, 20)
        hot = torch.stack([(draws == k).double().mean(0) for k in range(3)], -1)
        assert float((hot - model.posterior(batch)).abs().max()) < 2.5 / n**0.5
        many = model.replicate(2)
        close(many.filter(batch)[1], law)
        close(many.best_paths(batch, 7)[0][1], scores)
    with pytest.raises(InvalidArgument, match="one without replicas"):
        many.sample_posterior(batch, 2)


def both_ways(model: HSMM, batch: Batch, monkeypatch: pytest.MonkeyPatch, kind: Any) -> list[Any]:
    with torch.no_grad():
        found = [model.e_step(batch, kind)]
        with monkeypatch.context() as patch:
            patch.setattr(semi_markov, "_kernel", lambda *given: None)
            found.append(model.e_step(batch, kind))
    return found


@SEGMENTS
def test_compiled_loops_equal_the_reference(build, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    case = build()
    assert semi_markov._kernel(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 2)) is not None
    many = case.model.replicate(2)
    for parameter in many.parameters():
        parameter.data[1] = parameter.data[1] * 1.1
    for model in (case.model, many):
        for kind in ("soft", "hard"):
            cases.close_stats(*both_ways(model, case.batch, monkeypatch, kind))


def test_one_long_sequence_does_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages of many frames, windows that are full many times, states that explain most frames badly."""
    model, x, _ = drawn(n=1, length=1500)
    model.means = [[-9.0, 0.0], [9.0, 0.0], [0.0, 12.0]]
    fast, slow = both_ways(model, model.batch(6 * x), monkeypatch, "soft")
    cases.close_stats(fast, slow, rtol=1e-10)
    with torch.no_grad():
        total = model.posterior(6 * x).sum(-1)
        close(total, torch.ones_like(total), rtol=1e-10)
        close(chained(model).log_prob(6 * x), model.log_prob(6 * x), rtol=1e-12)
        close(model.float().log_prob(6 * x), slow["log_likelihood"].unsqueeze(0), rtol=1e-6)


def test_draws_have_the_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.MODEL_CASES["HSMM-table"]()
    model, batch = case.model, case.batch
    assert isinstance(model, HSMM)

    def uniforms(generator: torch.Generator) -> Any:
        return lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64)

    ways = [model.infer_sample, lambda p, b, u: DiscreteModel.infer_sample(model, p, b, u)]
    with torch.no_grad():
        potentials = {slot: kernel.log_potential(batch) for slot, kernel in model._kernels().items()}
        log_z, exact = model.infer(potentials, batch)
        for way, draws in zip(ways, (1000, 40), strict=True):
            source, total = uniforms(cases.rng(3)), {slot: torch.zeros_like(value) for slot, value in exact.items()}
            for _ in range(draws):
                value, one = way(potentials, batch, source)
                total = {slot: total[slot] + one[slot] for slot in total}
            close(value, log_z)
            for slot in total:
                frames = max(1.0, float(exact[slot].sum()))
                assert float((total[slot] / draws - exact[slot]).abs().max()) < 12 * (0.25 * frames / draws) ** 0.5


@pytest.mark.parametrize("duration", ["categorical", "poisson", "negative_binomial"])
def test_truth_is_recovered(duration: str) -> None:
    truth, x, z = drawn(duration, 40, 100)
    model = GaussianHSMM(3, 2, 8, duration).double()  # pyright: ignore
    result = torchem.fit(model, x, seed=0, restarts=2, max_iter=60, tol=1e-4, progress=False)
    with torch.no_grad():
        assert result.bound > float(truth.log_prob(x).sum()) - 1
        order = torch.cdist(truth.means, model.means).argmin(-1)
        found, best = order[z] == model.most_likely(x), z == truth.most_likely(x)
        assert float(found.double().mean()) > float(best.double().mean()) - 0.02
        close(model.mean_durations[order], truth.mean_durations, rtol=0.08)
        close(model.transition_matrix[order][:, order], truth.transition_matrix, atol=0.08)


def test_geometric_durations_are_a_chain() -> None:
    """Of size one the negative binomial has no memory: but for where it is cut off, a hidden Markov model."""
    model = GaussianHSMM(2, 1, 400, "negative_binomial").double()
    model.means, model.duration.means, model.duration.dispersions = [[-1.0], [1.0]], [9.0, 4.0], [1.0, 1.0]
    chain = torchem.GaussianHMM(2, 1).double()
    chain.means, chain.transition_matrix = [[-1.0], [1.0]], [[0.9, 0.1], [0.2, 0.8]]
    x = chain.sample(2, 80, generator=cases.rng(4))
    with torch.no_grad():
        close(model.log_prob(x), chain.log_prob(x), rtol=1e-12)
        close(model.posterior(x), chain.posterior(x))
        close(model.forecast(x, 5).states, chain.forecast(x, 5).states)
        close(model.forecast(x, 5).variance, chain.forecast(x, 5).variance)  # pyright: ignore


@pytest.mark.parametrize("censored", [True, False])
def test_forecasts_are_those_of_the_expanded_chain(censored: bool) -> None:
    """Laws ahead and draws, from sequences of different lengths, whose last segment has lasted for some time."""
    model, x, _ = drawn(n=3, length=12)
    model.duration_probs = [[0.0, 0.3, 0.7, 0, 0, 0, 0, 0], [0.25] * 4 + [0.0] * 4, [0.125] * 8]
    lengths = torch.tensor([12, 5, 9])
    with torch.no_grad():
        chain = chained(model)
        far = chain.forecast(x, 6, lengths=lengths)
        model.censored = censored
        ahead = model.forecast(x, 6, lengths=lengths, n=6000, generator=cases.rng(5))
        close(ahead.states, far.states.unflatten(-1, (3, 8)).sum(-1))
        close(ahead.mean, far.mean)  # pyright: ignore
        close(ahead.variance, far.variance)  # pyright: ignore
        assert ahead.draws is not None
        error = (ahead.variance / 6000).sqrt()  # pyright: ignore
        assert float(((ahead.draws.mean(0) - ahead.mean) / error).abs().max()) < 5
        # Frames to come depend on each other: two of them together, by the chain of both.
        other = chain.forecast(x, 6, lengths=lengths, n=6000, generator=cases.rng(6)).draws
        assert other is not None
        for one, two in ((ahead.draws[:, 0, 0, 0], ahead.draws[:, 0, 2, 0]),):
            theirs = other[:, 0, 0, 0], other[:, 0, 2, 0]
            both = (torch.stack(pair).cov()[0, 1] for pair in ((one, two), theirs))
            assert abs(float(next(both) - next(both))) < 0.15
        whole = model.replicate(2).forecast(x, 3, lengths=lengths)
        close(whole.states[1], ahead.states[:, :3])


def test_an_emission_with_lags_is_followed() -> None:
    model = HSMM(Categorical(2), Categorical(2, 2), PoissonDuration(2, 6), Autoregressive.gaussian(2, 1, 1, "diag"))
    model = model.double()
    x = model.sample(3, 30, generator=cases.rng(8))
    with torch.no_grad():
        ahead = model.forecast(x, 3, n=5, generator=cases.rng(1))
        assert ahead.draws is not None
        assert ahead.mean is not None
        close(ahead.mean, ahead.draws.mean(0))
        assert model.forecast(x, 3).mean is None


def test_use() -> None:
    model, x, z = drawn(n=3, length=20)
    with torch.no_grad():
        assert model.forecast(x, 3).states.sum(-1).allclose(torch.ones(3, 3).double())
        holes = x.clone()
        holes[0, 4:7] = torch.nan
        mean, variance = model.impute(holes, variance=True)
        share = model.posterior(holes)[0, 5]
        close(mean[0, 5], share @ model.means)
        assert bool((variance[0, 4:7] > 0).all())
        draws = model.impute(holes, draws=4, generator=cases.rng(5))
        assert draws.shape == (4, 3, 20, 2)
        paths = model.sample_posterior(x, 200, generator=cases.rng(6))
        assert paths.max() < 3
        hot = torch.nn.functional.one_hot(paths, 3).double().mean(0)
        assert float((hot - model.posterior(x)).abs().max()) < 0.2
        labels = torch.full(z.shape, -1)
        labels[:, 5] = z[:, 5]
        assert torch.equal(model.most_likely(x, labels=labels)[:, 5], z[:, 5])
    assert model.n_parameters() == 2 + 3 * 1 + 3 * 7 + 12
    assert int(model.mean_durations.argmax()) == int((model.duration_probs @ torch.arange(1, 9).double()).argmax())
    model.restrict(masks.cyclic(3))
    assert torch.equal(model.transition_matrix > 0, torch.eye(3).roll(1, -1) > 0)
    model.prune(torch.tensor([True, False, True]))
    assert model.log_prob(x).shape == (3,)


def test_zeros_stay_zeros() -> None:
    model, x, _ = drawn(n=6, length=40)
    model.duration_probs = [[0.0, 0.5, 0.5, 0, 0, 0, 0, 0], [0.25] * 4 + [0.0] * 4, [0.125] * 8]
    before = model.duration_probs == 0
    torchem.fit(model, x, init=None, max_iter=5, tol=0.0, progress=False)
    assert torch.equal(model.duration_probs == 0, before)
    assert bool((model.transition_matrix.diagonal() == 0).all())


def test_impossible_sequences_are_so_and_named() -> None:
    """Two states that last two frames each cannot fill five complete ones."""
    model = HSMM(Categorical(2), Categorical(2, 2), Categorical(2, 2), Categorical(2, 2), censored=False).double()
    model.duration_probs = [[0.0, 1.0], [0.0, 1.0]]
    x = torch.zeros(2, 5, 1).long()
    with torch.no_grad():
        assert model.log_prob(model.batch(x, lengths=[5, 4])).tolist()[0] == -math.inf
        assert model.posterior(x, lengths=[5, 4])[0].abs().sum() == 0
        assert model.most_likely(x, lengths=[5, 4])[0].tolist() == [-1] * 5
    with pytest.raises(InvalidArgument, match="sequence 0"):
        torchem.fit(model, x, lengths=[5, 4], progress=False)


def test_save_and_load(tmp_path) -> None:
    model, x, _ = drawn("poisson", 2, 10)
    model.restrict(masks.cyclic(3))
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    assert isinstance(again, GaussianHSMM)
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_memory_is_linear_in_the_longest_duration() -> None:
    """No tensor of T K D numbers, nor of T K K, where loops are compiled."""
    pytest.importorskip("numba")
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                largest[0] = max(largest[0], value.numel() if isinstance(value, Tensor) else 0)
            return out

    model = GaussianHSMM(4, 1, 50).double()
    model.means = [[-2.0], [-1.0], [1.0], [2.0]]
    batch = model.batch(model.sample(2, 500, generator=cases.rng(7)))
    with torch.no_grad(), Watch():
        for kind in ("soft", "hard", "sample"):
            model.e_step(batch, kind)
    assert 0 < largest[0] <= 2 * 2 * 501 * 4  # uniform numbers of draws, two for each frame; posteriors


WRONG = [
    (lambda: GaussianHSMM(1, 1, 5), "at least two states"),
    (lambda: GaussianHSMM(2, 1, 0), "max_duration"),
    (lambda: GaussianHSMM(2, 1, 5, "weibull"), "duration"),  # pyright: ignore
    (lambda: HSMM(Categorical(2), Categorical(2, 2), Categorical(3, 5), Gaussian(2, 1)), "shape \\[2, D\\]"),
    (lambda: HSMM(Categorical(2), SoftmaxRegression(2, 2, n_parents=2), Categorical(2, 5), Gaussian(2, 1)), "no cov"),
    (lambda: HSMM("stationary", Categorical(2, 2), Categorical(2, 5), Gaussian(2, 1)), "covariates"),  # pyright: ignore
    (lambda: PoissonDuration(2, 0), "max_duration"),
    (lambda: PoissonDuration(2, 5).check(Batch(torch.tensor([[6.0]]))), "from 1 to 5"),
    (lambda: setattr(PoissonDuration(2, 5), "rates", [1.0, -1.0]), "positive"),
    (lambda: setattr(GaussianHSMM(2, 1, 3), "transition_matrix", [[0.5, 0.5], [1.0, 0.0]]), "diagonal"),
    (lambda: setattr(GaussianHSMM(2, 1, 3, "poisson"), "duration_probs", [[1.0, 0, 0], [1.0, 0, 0]]), "rates"),
    (lambda: setattr(GaussianHSMM(2, 1, 3), "duration_probs", [[0.5, 0.1, 0.0], [1.0, 0, 0]]), "duration_probs"),
    (lambda: GaussianHSMM(2, 1, 3).sample(1), "length"),
    (lambda: GaussianHSMM(2, 1, 3).prune(torch.tensor([True, False])), "two states"),
    (lambda: GaussianHSMM(2, 1, 3).replicate(2).forecast(torch.zeros(4, 1), 2, n=3), "no draws"),
    (lambda: GaussianHSMM(2, 1, 3).restrict(torch.eye(2, dtype=torch.bool)), "successor"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_input(case, message: str) -> None:
    with as_users_run_it(), pytest.raises(InvalidArgument, match=message):
        case()


def test_a_table_with_steps_to_itself_is_refused_where_it_is_read() -> None:
    model = GaussianHSMM(2, 1, 3)
    model.transition = Categorical(2, 2)
    with pytest.raises(InvalidArgument, match="from a state to itself"):
        model.log_prob(torch.zeros(4, 1))


def test_an_autoregression_reads_its_lags() -> None:
    model = HSMM(Categorical(2), Categorical(2, 2), PoissonDuration(2, 6), Autoregressive.gaussian(2, 1, 1, "diag"))
    x = model.double().sample(3, 30, generator=cases.rng(8))
    assert torchem.fit(model, x, max_iter=3, tol=0.0, seed=0, progress=False).bound > -1e9
