"""Switching linear dynamics: held to the list of all paths, to one regime's exact inference, and to the bound."""

import copy
import itertools
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws.cases import close, close_dict, close_stats, randn, rng
from tests.models.test_state_space import LENGTHS, covariance, joint, model_of
from tests.regressions.common import as_users_run_it
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidType
from torchem.models import SwitchingLinearDynamics


def switching_of(k: int = 2, latents: int = 2, d: int = 2, m: int = 0, **options: Any) -> Any:
    model = SwitchingLinearDynamics(k, latents, d, m, **options).double()
    model.dynamics, model.loadings = 0.7 * randn(k, latents, latents, seed=1), randn(d, latents, seed=2)
    model.initial_mean, model.initial_covariance = randn(latents, seed=3), covariance(latents, 4)
    model.dynamics_covariances = torch.stack([covariance(latents, 30 + i) * (0.3 + i) for i in range(k)])
    model.observation_covariance = 0.3 * covariance(d, 6)
    model.initial_probs = randn(k, seed=5).softmax(-1)
    model.transition_matrix = randn(k, k, seed=7).softmax(-1)
    if m and model.inputs != "observation":
        model.dynamics_inputs = randn(k, latents, m, seed=8)
    if m and model.inputs != "dynamics":
        model.observation_inputs = randn(d, m, seed=9)
    return model


def torn(model: Any, n: int = 5, t: int = 5) -> Batch:
    """Ragged, weighted, with missing entries and frames."""
    x = 2 * randn(n, t, model.n_features, seed=11)
    x[0, 2] = x[1, 0, 0] = x[3, :, -1] = x[4, 3, 0] = torch.nan
    u = randn(n, t, model.n_inputs, seed=12) if model.n_inputs else None
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]).double()
    return Batch(x, u=u, lengths=LENGTHS, weight=weight)


def path_density(model: Any, x: Tensor, u: Tensor | None, path: tuple[int, ...]) -> Tensor:
    """log p(x, s) of one sequence along a path, from the joint normal law of what was observed."""
    t, k = len(x), model.n_latents
    means, covs = [model.initial_mean], [model.initial_covariance]
    for i in range(1, t):
        a = model.dynamics[path[i]]
        moved = a @ means[-1] + (0.0 if u is None else model.dynamics_inputs[path[i]] @ u[i])
        means.append(moved)
        covs.append(a @ covs[-1] @ a.mT + model.dynamics_covariances[path[i]])
    whole = torch.zeros(t * k, t * k).double()
    for i in range(t):
        block = covs[i]
        for j in range(i, t):
            whole[j * k : (j + 1) * k, i * k : (i + 1) * k] = block
            whole[i * k : (i + 1) * k, j * k : (j + 1) * k] = block.mT
            if j + 1 < t:
                block = model.dynamics[path[j + 1]] @ block
    see = torch.kron(torch.eye(t).double(), model.loadings)
    mean = see @ torch.stack(means).flatten()
    if u is not None:
        mean = mean + (u @ model.observation_inputs.mT).flatten()
    noise = torch.kron(torch.eye(t).double(), model.observation_covariance)
    seen = ~x.flatten().isnan()
    law = torch.distributions.MultivariateNormal(mean[seen], (see @ whole @ see.mT + noise)[seen][:, seen])
    value = law.log_prob(x.flatten()[seen]) + model.initial_probs[path[0]].log()
    for a, b in itertools.pairwise(path):
        value = value + model.transition_matrix[a, b].log()
    return value


@pytest.mark.parametrize("m", [0, 1])
def test_likelihood_is_the_sum_over_all_paths_and_the_bound_lies_below(m: int) -> None:
    model = switching_of(m=m)
    batch = torn(model)
    with torch.no_grad():
        values, bounds = model.log_prob(batch), model.elbo(batch)
        for n, t in enumerate(LENGTHS.tolist()):
            u = None if batch.u is None else batch.u[n, :t]
            each = [path_density(model, batch.x[n, :t], u, path) for path in itertools.product(range(2), repeat=t)]
            close(values[n], torch.stack(each).logsumexp(0))
    assert (bounds <= values + 1e-9).all()
    assert (bounds > values - 3.0).all()
    # A single frame has no step: nothing is approximated.
    close(bounds[2], values[2])


def test_bound_is_that_of_the_definition() -> None:
    """E_q log p(x, z, s) + H(q), from the moments of q and its entropies, and highest among products near q."""
    model = switching_of()
    batch = Batch(2 * randn(1, 4, 2, seed=13))
    with torch.no_grad():
        found = model._infer(batch)
        problem = found.problem
        # A sweep from other regimes is a bound as well, no higher than where the ascent ended.
        for seed in range(5):
            other = (found.regimes.clamp(min=1e-9).log() + randn(1, 4, 2, seed=seed)).softmax(-1)
            assert float(problem.sweep(other).value) <= float(found.value) + 1e-9
        q = model.posterior(batch)
        mean, cov = found.smoothed.mean[:, 0], found.smoothed.covariance[:, 0]
        cross = found.smoothed.cross[:, 0]
        whole = torch.zeros(8, 8).double()
        # q(z) is Markov: covariances further apart follow from neighbours.
        for i in range(4):
            block = cov[i]
            for j in range(i, 4):
                whole[2 * j : 2 * j + 2, 2 * i : 2 * i + 2] = block
                whole[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block.mT
                if j + 1 < 4:
                    block = cross[j] @ torch.linalg.inv(cov[j]) @ block
        states = torch.distributions.MultivariateNormal(mean.flatten(), whole)
        value = states.entropy()
        z = states.sample(torch.Size((200_000,))).unflatten(-1, (4, 2))
        first = torch.distributions.MultivariateNormal(model.initial_mean, model.initial_covariance).log_prob(z[:, 0])
        noise = torch.distributions.MultivariateNormal(torch.zeros(2).double(), model.observation_covariance)
        each = first + noise.log_prob(batch.x[0] - z @ model.loadings.mT).sum(-1)
        for t in range(1, 4):
            for k in range(2):
                law = torch.distributions.MultivariateNormal(
                    z[:, t - 1] @ model.dynamics[k].mT, model.dynamics_covariances[k]
                )
                each = each + found.regimes[0, t, k] * law.log_prob(z[:, t])
        slack = 5 * float(each.std()) / math.sqrt(len(each))
        value = value + each.mean()
        first_counts, steps = found.first[0], found.steps[0]
        value = value + (first_counts * model.initial_probs.log()).sum() + (steps * model.transition_matrix.log()).sum()
        # Entropy of the chain of regimes: of the first, and of each step given the one before, by its pair marginals.
        fit = problem.fit(found.second)[0]
        log_z = torchem.ops.chain.log_normalizer(*problem.tables, fit.unsqueeze(0))
        expected = (found.regimes[0] * fit).sum() + (first_counts * problem.tables[0]).sum()
        value = value + log_z[0] - expected - (steps * problem.tables[1]).sum()
        assert abs(float(value - found.value)) < slack
        close(q.mean[0], mean)


def test_one_regime_is_a_state_space() -> None:
    """Nothing is approximated: the likelihood, the bound, the moments and the M-step are exact."""
    plain = model_of(2, 3, 1)
    model = SwitchingLinearDynamics(1, 2, 3, 1).double()
    for slot in ("initial", "transition", "observation"):
        getattr(model, slot).load_state_dict(getattr(plain, slot).state_dict())
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]).double()
    x = 2 * randn(5, 5, 3, seed=11)
    x[0, 2] = x[1, 0, 0] = torch.nan
    batch = Batch(x, u=randn(5, 5, 1, seed=12), lengths=LENGTHS, weight=weight)
    with torch.no_grad():
        close(model.log_prob(batch), plain.log_prob(batch))
        close(model.elbo(batch), plain.log_prob(batch))
        close(model.posterior(batch).covariance_matrix, plain.posterior(batch).covariance_matrix)
        close(model.smooth(batch).mean, plain.smooth(batch).mean)
        ours, theirs = model.e_step(batch), plain.e_step(batch)
        for slot in ("initial", "transition", "observation"):
            close_stats(ours[slot], theirs[slot])
        filled, spread = model.impute(batch, variance=True)
        other, beside = plain.impute(batch, variance=True)
        close(filled.nan_to_num(), other.nan_to_num())
        close(spread, beside)


def variants() -> dict[str, Any]:
    prior = switching_of(m=1, inputs="dynamics")
    prior.transition.prior = priors.MatrixNormalInverseWishart(scale=1.0)
    prior.switching.prior = priors.StickyDirichlet(3.0)
    frozen = switching_of(3, m=1, inputs="observation")
    frozen.transition.freeze("weight", mask=torch.tensor([True, False, False]))
    frozen.observation.freeze("weight")
    return {"plain": switching_of(m=1), "variational": torchem.variational(switching_of(m=1)), "prior": prior,
            "frozen": frozen}  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "variational", "prior", "frozen"])
def test_bound_never_falls(name: str) -> None:
    model = variants()[name]
    batch = torn(model)
    values = []
    with torch.no_grad():
        for _ in range(12):
            stats = model.e_step(batch)
            close(model.bound(stats), stats["log_likelihood"] + model.log_prior())
            values.append(float(model.bound(stats)))
            model.m_step(stats)
            values.append(float(model.bound(stats)))
    for before, after in itertools.pairwise(values):
        assert after >= before - 1e-9 * (1 + abs(before))


def test_data_may_be_cut_padded_weighted_and_reordered() -> None:
    model = switching_of(m=1)
    batch = torn(model)
    with torch.no_grad():
        whole, values = model.e_step(batch), model.elbo(batch)
        parts = model.e_step(batch[:2]) + model.e_step(batch[2:])
        close_stats(parts, whole, rtol=1e-8)
        budget, model.memory_budget = model.memory_budget, 1
        close_stats(model.e_step(replace(batch)), whole, rtol=1e-8)
        model.memory_budget = budget
        order = torch.tensor([3, 0, 4, 2, 1])
        close(model.elbo(batch[order]), values[order])
        close(model.elbo(batch.with_frames(9)), values)
        assert (model.posterior(batch.with_frames(9)).regimes[:, 5:] == 0).all()
        paths = model.most_likely(batch)
        assert torch.equal(paths >= 0, torch.arange(5) < LENGTHS.unsqueeze(-1))
        count = torch.tensor([2, 0, 1, 1, 3])
        bare = replace(batch, weight=None)
        repeated = bare[torch.arange(5).repeat_interleave(count)]
        close_stats(model.e_step(replace(bare, weight=count.double())), model.e_step(repeated), rtol=1e-8)


def test_replicas_equal_each_alone() -> None:
    model = switching_of(m=1)
    batch = torn(model)
    many = model.replicate(2)
    many.transition.coefficient.data[1] *= 0.8
    many.observation.scale.data[1] += 0.1
    with torch.no_grad():
        for _ in range(2):
            # New batches, which no ascent goes on from.
            stats, value = many.e_step(replace(batch)), many.log_prob(batch)
            for r in range(2):
                one = many.take_replicas(r)
                close_stats(stats.map(lambda leaf, r=r: leaf[r]), one.e_step(replace(batch)), rtol=1e-7)
                close(value[r], one.log_prob(batch))
            many.m_step(stats)


def test_regimes_are_found() -> None:
    """Turns to the left and to the right: each restart finds them, and where they change."""
    truth = SwitchingLinearDynamics(2, 2, 2).double()
    turn = torch.tensor([0.6, -0.25]).double()
    rows = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1)
    truth.dynamics = 0.95 * rows.view(2, 2, 2)
    truth.dynamics_covariances = 0.05 * torch.eye(2).expand(2, 2, 2)
    truth.observation_covariance = 0.05 * torch.eye(2)
    truth.transition_matrix = [[0.95, 0.05], [0.05, 0.95]]
    x, (_, path) = truth.sample(8, 60, latents=True, generator=rng(0))
    model = SwitchingLinearDynamics(2, 2, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = torchem.fit(model, x, restarts=2, max_iter=20, tol=1e-4, seed=0, progress=False)
    with torch.no_grad():
        assert result.bound > float(truth.elbo(x).sum())
        same = float((model.most_likely(x) == path).double().mean())
        assert max(same, 1 - same) > 0.93
        angles = torch.linalg.eigvals(model.dynamics).imag.amax(-1).sort().values
        close(angles, (0.95 * turn.abs().sin()).sort().values, rtol=0.1)


def test_saved_copied_and_sampled(tmp_path: Any) -> None:
    model = switching_of(m=1)
    batch = torn(model)
    torchem.save(model, tmp_path / "m.safetensors")
    again, twin = torchem.load(tmp_path / "m.safetensors"), copy.deepcopy(model)
    for other in (again, twin):
        close(other.elbo(batch), model.elbo(batch), rtol=1e-12)
    before = dict(model.named_parameters())
    close_dict(
        torchem.em_map(model)({k: v.detach() for k, v in before.items()}, batch), model.maximize(model.e_step(batch))
    )
    x, (z, path) = model.sample(3000, 3, latents=True, inputs=torch.ones(3, 1), generator=rng(0))
    with torch.no_grad():
        first = (path[:, 0] == 0).double().mean()
        assert abs(float(first - model.initial_probs[0])) < 0.04
        chosen = path[:, 2] == 1
        gap = z[chosen, 2] - z[chosen, 1] @ model.dynamics[1].mT - model.dynamics_inputs[1, :, 0]
        close(gap.T.cov(), model.dynamics_covariances[1], rtol=0.15, atol=0.1)
        assert x.shape == (3000, 3, 2)


def test_float32_near_float64() -> None:
    model = switching_of(m=1)
    batch = torn(model)
    small = copy.deepcopy(model).float()
    with torch.no_grad():
        close(small.elbo(batch).double(), model.elbo(batch), rtol=1e-3, atol=2e-2)
        assert all(leaf.dtype == torch.float64 for leaf in small.e_step(batch).leaves())


def test_single_frames_and_no_sequences_at_all() -> None:
    model = switching_of(m=1)
    batch = Batch(randn(4, 1, 2, seed=14), u=randn(4, 1, 1, seed=15))
    with torch.no_grad():
        close(model.elbo(batch), model.log_prob(batch))
        stats = model.e_step(batch)
        assert (stats["transition"]["count"] == 0).all()
        close_stats(model.e_step(batch[:0]) + stats, stats)
        assert torch.equal(model.most_likely(batch), model.initial_probs.argmax().expand(4, 1))


BAD = [
    (lambda: SwitchingLinearDynamics(0, 1, 1), r"^n_states: expected a whole number of at least 1, got 0"),
    (lambda: SwitchingLinearDynamics(2, 1, 1, tolerance=-1.0), r"^tolerance: "),
    (lambda: SwitchingLinearDynamics(2, 1, 1, max_sweeps=0), r"^max_sweeps: "),
    (lambda: setattr(switching_of(), "dynamics", torch.eye(2)), r"^dynamics: expected shape \[2, 2, 2\], got \[2, 2\]"),
    (
        lambda: setattr(switching_of(), "dynamics_covariances", -torch.eye(2).expand(2, 2, 2)),
        r"^dynamics_covariances: expected positive definite",
    ),
    (lambda: setattr(switching_of(), "transition_matrix", [[0.5, 0.6], [0.5, 0.5]]), r"^transition_matrix: "),
    (lambda: switching_of().log_prob(torch.zeros(30, 2)), r"^log_prob: expected at most 4096 paths .*, got 2\^29"),
    (lambda: switching_of().e_step(Batch(torch.zeros(1, 4, 2)), "hard"), r"^e_step: expected 'soft'"),
    (lambda: switching_of().impute(torch.zeros(4, 2), draws=0), r"^draws: "),
    (lambda: switching_of().forecast(torch.zeros(4, 2), 0), r"^steps: "),
    (lambda: switching_of().replicate(2).forecast(torch.zeros(4, 2), 3), r"^model: expected one without replicas"),
    (lambda: switching_of(m=1).forecast(Batch(torch.zeros(1, 4, 2), u=torch.zeros(1, 4, 1)), 3), r"^inputs: "),
    (lambda: switching_of().batch(torch.zeros(4, 2), labels=[0, 1, 0, 2]), r"^labels: expected states from 0 to 1"),
    (lambda: switching_of(m=1).sample(2, 4), r"^inputs: expected shape \[2, 4, 1\], got none"),
]  # fmt: skip


@pytest.mark.parametrize("place", range(len(BAD)))
def test_bad_input(place: int) -> None:
    call, message = BAD[place]
    with as_users_run_it(), pytest.raises((InvalidArgument, InvalidType), match=message):
        call()


def test_labels_are_of_regimes() -> None:
    """Known, candidates and soft ones, in every frame or some: the sum over the paths, each with what it was told."""
    model = switching_of(m=1)
    batch = replace(torn(model), weight=None)
    gen = torch.rand(5, 5, 2, generator=rng(3), dtype=torch.float64)
    gen[1, 2] = gen[4, 0] = torch.tensor([0.0, 1.0])
    told = replace(batch, evidence=torch.where(torch.arange(5)[:, None] < LENGTHS[:, None, None], gen.log(), 0.0))
    with torch.no_grad():
        values, bounds = model.log_prob(told), model.elbo(told)
        for n, t in enumerate(LENGTHS.tolist()):
            each = [
                path_density(model, batch.x[n, :t], batch.u[n, :t], path)  # pyright: ignore
                + sum(float(told.evidence[n, i, s]) for i, s in enumerate(path))  # pyright: ignore
                for path in itertools.product(range(2), repeat=t)
            ]
            close(values[n], torch.stack(each).logsumexp(0))
        assert (bounds <= values + 1e-9).all()
        assert (bounds > values - 3.0).all()
        assert int(model.most_likely(told)[1, 2]) == 1
        close(model.posterior(told).regimes[1, 2], torch.tensor([0.0, 1.0]).double())
        # The entropy is that of q: what labels say is no part of it.
        stats = model.e_step(told)
        gap = stats["entropy"] - model.entropy(told)
        regimes = model.posterior(told).regimes
        close(gap, torch.where(regimes > 0, regimes * told.evidence, 0.0).sum(), rtol=1e-6)


def test_known_regimes_leave_nothing_approximated() -> None:
    model = switching_of(m=1)
    batch = replace(torn(model), weight=None)
    paths = torch.arange(25).view(5, 5) * 7 % 3 % 2
    known = model.batch(batch.x, u=batch.u, lengths=LENGTHS, labels=paths)
    with torch.no_grad():
        exact = [
            path_density(model, known.x[n, :t], known.u[n, :t], tuple(paths[n, :t].tolist()))  # pyright: ignore
            for n, t in enumerate(LENGTHS)
        ]
        close(model.elbo(known), torch.stack(exact))
        close(model.log_prob(known), torch.stack(exact))
        assert torch.equal(model.most_likely(known)[LENGTHS == 5], paths[LENGTHS == 5])
        model.transition_matrix = [[1.0, 0.0], [0.5, 0.5]]
        never = model.batch(torch.zeros(2, 3, 2), u=torch.zeros(2, 3, 1), labels=[[0, 1, 0], [0, 0, -1]])
        assert model.log_prob(never)[0] == model.elbo(never)[0] == -math.inf
        assert model.elbo(never)[1].isfinite()
    with pytest.raises(InvalidArgument, match="probability zero at sequence 0"):
        torchem.fit(model, never, init=None, max_iter=2, progress=False)
    with pytest.raises(InvalidArgument, match="2 columns, one per regime"):
        model.check(Batch(torch.zeros(1, 3, 2), u=torch.zeros(1, 3, 1), evidence=torch.zeros(1, 3, 3)))


def test_labels_name_the_regimes_from_the_start() -> None:
    truth = SwitchingLinearDynamics(2, 1, 1).double()
    truth.dynamics, truth.transition_matrix = [[[0.95]], [[-0.9]]], [[0.9, 0.1], [0.1, 0.9]]
    truth.observation_covariance = [[0.05]]
    x, (_, path) = truth.sample(8, 40, latents=True, generator=rng(0))
    for told in (path, 1 - path):
        labels = torch.where(torch.arange(40) < 15, told, -1)
        model = SwitchingLinearDynamics(2, 1, 1).double()
        torchem.fit(model, x, labels=labels, max_iter=15, tol=0.05, seed=0, progress=False)
        same = (model.most_likely(x, labels=labels) == told).double()
        assert (same[:, :15] == 1).all()
        assert float(same.mean()) > 0.85


def test_forecasts_have_the_moments_of_all_paths_ahead() -> None:
    """Given the posterior of the last frame: each path of regimes to come makes a normal law."""
    model = switching_of(m=1)
    x, u, ahead = 2 * randn(2, 5, 2, seed=11), randn(2, 5, 1, seed=12), randn(2, 3, 1, seed=13)
    lengths = torch.tensor([5, 4])
    with torch.no_grad():
        law = model.forecast(x, 3, inputs=ahead, n=8000, generator=rng(0), u=u, lengths=lengths)
        q = model.posterior(x, u=u, lengths=lengths)
        for n, t in enumerate(lengths.tolist()):
            parts = []
            for path in itertools.product(range(2), repeat=4):
                chance = q.regimes[n, t - 1, path[0]]
                z, cov = q.mean[n, t - 1], q.covariance_matrix[n, t - 1]
                for h, (a, b) in enumerate(itertools.pairwise(path)):
                    chance = chance * model.transition_matrix[a, b]
                    z = model.dynamics[b] @ z + model.dynamics_inputs[b] @ ahead[n, h]
                    cov = model.dynamics[b] @ cov @ model.dynamics[b].mT + model.dynamics_covariances[b]
                seen = model.loadings @ z + model.observation_inputs @ ahead[n, 2]
                parts.append(
                    (chance, seen, model.loadings @ cov @ model.loadings.mT + model.observation_covariance, path)
                )
            chance, seen, cov = (torch.stack([part[i] for part in parts]) for i in range(3))
            mean = chance @ seen
            close(law.mean[n, 2], mean)
            gap = seen - mean
            total = (chance[:, None, None] * (cov + gap[:, :, None] * gap[:, None, :])).sum(0)
            close(law.observations.covariance_matrix[n, 2], total)
            close(law.regimes[n, 2, 1], sum(p for p, *_, path in parts if path[-1] == 1))
        error = (law.variance / 8000).sqrt()
        assert law.draws.shape == (8000, 2, 3, 2)
        assert float(((law.draws.mean(0) - law.mean) / error).abs().max()) < 5
        assert float((law.draws.var(0) / law.variance - 1).abs().max()) < 0.2


def test_forecasts_and_draws_of_one_regime_are_those_of_the_state_space() -> None:
    plain = model_of(2, 3, 1)
    model = SwitchingLinearDynamics(1, 2, 3, 1).double()
    for slot in ("initial", "transition", "observation"):
        getattr(model, slot).load_state_dict(getattr(plain, slot).state_dict())
    x, u, ahead = 2 * randn(2, 5, 3, seed=11), randn(2, 5, 1, seed=12), randn(2, 4, 1, seed=13)
    with torch.no_grad():
        ours, law = model.forecast(x, 4, inputs=ahead, u=u), plain.forecast(x, 4, inputs=ahead, u=u)
        close(ours.mean, law.mean)
        close(ours.states.covariance_matrix, law.states.covariance_matrix)
        close(ours.observations.covariance_matrix, law.observations.covariance_matrix)
        for one, two in zip(*(
            m.sample(2, 3, latents=True, inputs=u[:, :3], generator=rng(1)) for m in (plain, model)
        ), strict=True):  # fmt: skip
            close(one, two[0] if isinstance(two, tuple) else two)
        # Entries and frames that are missing, drawn together: first two moments of the joint law.
        x[0, 1:3] = x[0, 3, 1] = torch.nan
        _, found, left, _ = joint(plain, x[0], u[0])
        drawn = model.impute(x, u=u, draws=20_000, generator=rng(2))[:, 0].flatten(1)
        holes = x[0].isnan().flatten()
        center, spread = found[10:][holes], left[10:, 10:][holes][:, holes]
        size = spread.diagonal()
        assert float(((drawn[:, holes].mean(0) - center) / (size / 20_000).sqrt()).abs().max()) < 5
        error = ((size[:, None] * size + spread.square()) / 20_000).sqrt()
        assert float(((drawn[:, holes].mT.cov() - spread) / error).abs().max()) < 6
        assert torch.equal(drawn[0, ~holes], x[0].flatten()[~holes])


def test_paths_are_drawn_from_q() -> None:
    model = switching_of(m=1)
    batch = torn(model)
    with torch.no_grad():
        q = model.posterior(batch)
        states, regimes = model.sample_posterior(batch, 4000, generator=rng(0))
        inside = torch.arange(5) < LENGTHS.unsqueeze(-1)
        hot = torch.stack([(regimes == k).double().mean(0) for k in range(2)], -1)
        assert float((hot - q.regimes)[inside].abs().max()) < 0.05
        error = (q.covariance_matrix.diagonal(dim1=-2, dim2=-1) / 4000).sqrt()
        assert float(((states.mean(0) - q.mean) / error)[inside].abs().max()) < 5
        drawn = model.impute(batch, draws=4000, generator=rng(1))
        mean, spread = model.impute(batch, variance=True)
        holes = batch.x.isnan() & inside.unsqueeze(-1)
        assert float(((drawn.mean(0) - mean)[holes] / (spread[holes] / 4000).sqrt()).abs().max()) < 5
        assert float((drawn.var(0)[holes] / spread[holes] - 1).abs().max()) < 0.2
