"""Mixtures whose components are models: sequences clustered by their dynamics."""

import copy
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws.cases import close, close_dict, gaussian, hmm, mixture, randn, rng
from tests.laws.paths import all_paths
from tests.regressions.common import as_users_run_it
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidType
from torchem.factors import Bernoulli, Categorical, Gaussian, LinearGaussian, SoftmaxRegression
from torchem.models import HMM, FactorialHMM, GaussianHMM, GaussianMixture, Mixture
from torchem.models.nested import Copies, Several, described

K, S, D = 2, 2, 2
LENGTHS = torch.tensor([4, 1, 3, 4, 2, 4])


def chains(seed: int = 0) -> Mixture:
    """Two chains of two states that are not alike."""
    model = Mixture(Categorical(K), hmm(gaussian(S, D, "diag"))).double()
    for i, value in enumerate(model.component.parameters()):
        value.data = value.data + 0.6 * randn(*value.shape, seed=seed + i)
    model.weights = [0.3, 0.7]
    return model


def ragged() -> Batch:
    x = 1.5 * randn(len(LENGTHS), 4, D, seed=3)
    x[0, 1] = x[3, 0] = torch.nan
    x[5, 2, 0] = torch.nan
    return Batch(x, lengths=LENGTHS)


def flattened(model: Mixture) -> HMM:
    """The one chain that a mixture of chains is: transitions in blocks, one first state for each pair (k, s)."""
    inner = model.component.model
    big = HMM(Categorical(K * S), Categorical(K * S, K * S), Gaussian(K * S, D, "diag")).double()
    big.initial_probs = (model.weights.unsqueeze(-1) * inner.initial_probs).flatten().detach()
    big.transition_matrix = torch.block_diag(*inner.transition_matrix.detach())
    big.emission.means = inner.emission.means.detach().flatten(0, 1)
    big.emission.covariances = inner.emission.covariances.detach().flatten(0, 1)
    return big


# ---- oracles ------------------------------------------------------------------------------------------------------


def test_a_mixture_of_chains_is_a_chain_of_blocks() -> None:
    """Log-likelihoods, clusters, paths and steps of EM are those of the block-diagonal chain."""
    model, batch = chains(), ragged()
    big = flattened(model)
    for _ in range(3):
        close(model.log_prob(batch), big.log_prob(batch))
        share = big.posterior(batch)[:, 0].unflatten(-1, (K, S)).sum(-1)
        close(model.posterior(batch), share)
        for k in range(K):
            inside = big.posterior(batch).unflatten(-1, (K, S))[..., k, :] / share[:, None, k, None]
            close(model.component[k].posterior(batch), inside)
        model.m_step(model.e_step(batch))
        big.m_step(big.e_step(batch))
    other = flattened(model)
    close(other.initial_probs, big.initial_probs)
    close(other.transition_matrix, big.transition_matrix)
    close(other.emission.means, big.emission.means)
    close(other.emission.covariances, big.emission.covariances)


@pytest.mark.parametrize("beta", [1.0, 0.6])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_e_steps_equal_those_of_the_chain_of_blocks(kind: Any, beta: float) -> None:
    """Most likely cluster and path together; the joint density of both to the power β."""
    model, batch = chains(), replace(ragged(), weight=torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0]).double())
    big = flattened(model)
    ours, theirs = model.e_step(batch, kind, beta), big.e_step(batch, kind, beta)
    close(ours["log_likelihood"], theirs["log_likelihood"])
    close(model.bound(ours), theirs["log_likelihood"])
    inner, counts = ours["component"], theirs["transition"]["counts"].unflatten(0, (K, S)).unflatten(-1, (K, S))
    close(inner["initial"]["counts"], theirs["initial"]["counts"].unflatten(0, (K, S)))
    for k in range(K):
        close(inner["transition"]["counts"][k], counts[k, :, k])
    close(inner["emission"]["first"].flatten(0, 1), _about(big, theirs, model))


def _about(big: HMM, stats: torchem.Stats, model: Mixture) -> Tensor:
    """First moments of the big chain about the origin of the small ones."""
    own = stats["emission"]
    shift = big.emission.origin - model.component.model.emission.origin
    return own["first"] + own["count"] * shift


def test_sampled_e_steps_draw_cluster_and_path_from_their_posterior() -> None:
    model, batch = chains(), ragged()
    generator = rng(5)
    batch = batch[torch.arange(60 * len(batch)) % len(batch)]
    soft = model.e_step(batch)
    with torch.no_grad():
        many = [
            model.e_step(
                batch, "sample", 1.0, lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64)
            )
            for _ in range(10)
        ]
    close(many[0]["log_likelihood"], soft["log_likelihood"])
    for slot in ("initial", "transition"):
        drawn = torch.stack([stats["component"][slot]["counts"] for stats in many])
        assert bool((drawn == drawn.round()).all())
        error = (drawn.mean(0) - soft["component"][slot]["counts"]).abs()
        assert bool((error <= 4.5 * drawn.std(0) / 10**0.5 + 1e-9).all())
    each = torch.stack([stats["component"]["initial"]["counts"].sum(-1) for stats in many])
    assert torch.equal(each, torch.stack([stats["mixing"]["counts"] for stats in many]))


def test_likelihoods_and_counts_equal_the_list_of_clusters_and_paths() -> None:
    model = Mixture(Categorical(2), [hmm(Categorical(2, 3)), hmm(Categorical(3, 3), 4)]).double()
    model.weights = [0.4, 0.6]
    for i, part in enumerate(model.component):
        part.emission.probs = randn(*part.emission.shape, seed=8 + i).softmax(-1)  # pyright: ignore
    batch = Batch(torch.randint(0, 3, (5, 3, 1), generator=rng(2)))
    lists = [all_paths(part, batch) for part in model.component]  # pyright: ignore
    joint = torch.stack([torch.stack([each.log_prob for each in own]) for own in lists], -1) + model.weights.log()
    close(model.log_prob(batch), joint.logsumexp(-1))
    share = joint.softmax(-1)
    close(model.posterior(batch), share)
    stats = model.e_step(batch)
    for k, own in enumerate(lists):
        size = model.component[k].n_components  # pyright: ignore
        first = sum(share[n, k] * each.expected(0, size) for n, each in enumerate(own))
        steps = sum(share[n, k] * each.steps(t, size) for n, each in enumerate(own) for t in (1, 2))
        close(stats["component"][f"models.{k}"]["initial"]["counts"], first)
        close(stats["component"][f"models.{k}"]["transition"]["counts"], steps)


def test_a_mixture_of_mixtures_is_one_mixture() -> None:
    """log-likelihood and steps of EM, with missing entries."""
    x = 2 * randn(60, 2, seed=4)
    x[::7, 0] = torch.nan
    model = Mixture(Categorical(2), mixture(3, 2, "full")).double()
    inner = model.component.model
    inner.means = inner.means.detach() + randn(2, 3, 2, seed=5)
    model.weights = [0.2, 0.8]
    flat = GaussianMixture(6, 2).double()
    flat.weights = (model.weights.unsqueeze(-1) * inner.weights).flatten().detach()
    flat.means, flat.covariances = inner.means.detach().flatten(0, 1), inner.covariances.detach().flatten(0, 1)
    for _ in range(2):
        close(model.log_prob(x), flat.log_prob(x))
        close(model.posterior(x), flat.posterior(x).unflatten(-1, (2, 3)).sum(-1))
        model.m_step(model.e_step(model.batch(x)))
        flat.m_step(flat.e_step(flat.batch(x)))
    close(inner.covariances.flatten(0, 1), flat.covariances)
    hard = model.e_step(model.batch(x), "hard")
    close(hard["log_likelihood"], flat.e_step(flat.batch(x), "hard")["log_likelihood"])


def test_copies_equal_the_list_of_their_models() -> None:
    """One batched E-step, and one for each model: the same statistics and the same M-step."""
    copies, batch = chains(), ragged()
    several = Mixture(Categorical(K), [copies.component[k] for k in range(K)]).double()
    several.weights = copies.weights.detach()
    for beta, kind in ((1.0, "soft"), (0.5, "soft"), (1.0, "hard")):
        one, two = (m.e_step(batch, kind, beta) for m in (copies, several))  # pyright: ignore
        close(one["log_likelihood"], two["log_likelihood"])
        close(copies.bound(one), several.bound(two))
        mine, theirs = copies.maximize(one), several.maximize(two)
        for name in ("initial.logits", "transition.logits", "emission.mean", "emission.scale"):
            for k in range(K):
                close(mine[f"component.model.{name}"][k], theirs[f"component.models.{k}.{name}"])


class Still(torchem.LatentModel):
    """A model without latents: independent normal frames, by an E-step of its own alone."""

    sequential = exact = True

    def __init__(self, mean: float = 0.0):
        super().__init__()
        self.noise = Gaussian(1, D, "diag").double()
        self.noise.means = [[mean] * D]

    def slots(self) -> tuple[tuple[str, torchem.Factor], ...]:
        return (("noise", self.noise),)

    def _hmm(self) -> HMM:
        return HMM(Categorical(1), Categorical(1, 1), self.noise).double()

    def e_step(self, batch: Batch, kind: Any = "soft") -> torchem.Stats:
        assert batch.weight is None or batch.weight.dim() == 1
        stats = self._hmm().e_step(batch)
        own = torchem.Stats(noise=stats["emission"], log_likelihood=stats["log_likelihood"], count=stats["count"])
        own["entropy"] = own["log_likelihood"] - self.expected_log_prob(own)
        return own

    def log_prob(self, data: Any) -> Tensor:
        return self._hmm().log_prob(data)

    def rows(self, batch: Batch) -> Batch:
        return self._hmm().rows(batch)

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        self.assign({f"noise.{name}": value for name, value in self.noise.initialize(batch, expected).items()})

    def initialize_at(self, batch: Batch, index: Tensor) -> None: ...
    def posterior(self, data: Any) -> Any: ...
    def most_likely(self, data: Any) -> Any: ...
    def sample(self, n: int, *, latents: bool = False, generator: Any = None, length: int = 1) -> Any: ...


def test_a_model_of_any_latents_needs_its_own_e_step_alone() -> None:
    """Copies of a model that has no posteriors to weigh equal chains of one state, with replicas too."""
    whole = Mixture(Categorical(2), [Still(-1.0), Still(1.0)]).double()
    chain = Mixture(Categorical(2), hmm(Gaussian(1, D, "diag"))).double()
    chain.component.model.emission.means = torch.tensor([[[-1.0] * D], [[1.0] * D]]).double()
    x, options = randn(12, 5, D, seed=6), {"init": None, "tol": 0.0, "max_iter": 4, "progress": False}
    one, two = (torchem.fit(model, x, **options) for model in (whole, chain))
    assert one.history == pytest.approx(two.history, rel=1e-10)
    copied = Mixture(Categorical(2), Still()).double()
    assert isinstance(copied.component, Several)
    result = torchem.fit(copied, x, restarts=3, seed=0, tol=1e-4, max_iter=500, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for own in result.histories for a, b in itertools.pairwise(own))
    assert len(result.restarts) == 3


# ---- what is shared, known, kept ----------------------------------------------------------------------------------


def test_a_factor_that_models_share_is_one_parameter() -> None:
    """Chains of one emission: its statistics are summed, and it is counted, saved and maximised once."""
    emission = gaussian(2, D, "full")
    model = Mixture(Categorical(2), [hmm(emission), hmm(emission, 5)]).double()
    batch = ragged()
    names = [name for name, _ in model.named_parameters()]
    assert sum("emission" in name for name in names) == 2
    assert model.n_parameters() == 1 + 2 * (1 + 2) + emission.n_parameters()
    stats = model.e_step(batch)
    own = [stats["component"][f"models.{k}"]["emission"] for k in range(2)]
    truth = emission.maximize(own[0] + own[1])
    found = model.maximize(stats)
    close_dict({k.rsplit(".", 1)[1]: v for k, v in found.items() if "emission" in k}, truth)
    before = float(model.bound(stats).detach())
    model.m_step(stats)
    assert float(model.bound(stats).detach()) > before


def test_priors_inside_count_once_for_each_component() -> None:
    model = chains()
    inner = model.component.model
    inner.transition.prior, inner.emission.prior = priors.StickyDirichlet(3.0), priors.NormalInverseGamma()
    batch = ragged()
    model.prepare(_Moments())
    stats = model.e_step(batch)
    each = [model.component[k] for k in range(K)]
    close(model.log_prior(), torch.stack([part.log_prior() for part in each]).sum())  # pyright: ignore
    values = model.maximize(stats)
    for k, part in enumerate(each):
        share = model.posterior(batch)[:, k].detach()
        own = part.maximize(part.e_step(replace(batch, weight=share)))
        for name, value in own.items():
            close(values[f"component.model.{name}"][k], value)


class _Moments:
    mean, variance = torch.zeros(D).double(), torch.ones(D).double()
    low = high = mean


def test_variational_inside_and_around_are_the_same() -> None:
    x = randn(10, 6, D, seed=7)
    inside = Mixture(torchem.Variational(Categorical(2)), torchem.variational(GaussianHMM(2, D))).double()
    around = torchem.variational(Mixture(Categorical(2), GaussianHMM(2, D))).double()
    results = [torchem.fit(m, x, seed=0, restarts=2, tol=1e-5, max_iter=200, progress=False) for m in (inside, around)]
    assert results[0].history == pytest.approx(results[1].history, rel=1e-9)
    model = results[0].model
    assert results[0].bound < float(model.log_prob(x).sum().detach())
    close(
        model.component.log_prior(),
        sum(part.log_prior() for k in range(2) for part in model.component[k].factors()),
    )


def test_freezing_inside(tmp_path: Any) -> None:
    model, batch = chains(), ragged()
    model.component.freeze("model.emission.means", mask=torch.tensor([True, False]))
    model.component.model.initial.freeze()
    before = copy.deepcopy(model)
    model.m_step(model.e_step(batch))
    old, new = before.component.model, model.component.model
    assert torch.equal(old.initial_probs, new.initial_probs)
    assert torch.equal(old.emission.means[:, 0], new.emission.means[:, 0])
    assert not torch.equal(old.emission.means[:, 1], new.emission.means[:, 1])
    assert model.n_parameters() == 1 + K * (2 + D + 2 * D)
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    again.m_step(again.e_step(batch))
    model.m_step(model.e_step(batch))
    close_dict(dict(again.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("replicas", [None, 3])
def test_files(tmp_path: Any, replicas: int | None) -> None:
    emission = gaussian(2, D, "full")
    shared = Mixture(Categorical(2), [hmm(emission), hmm(emission, 5)]).double()
    deep = Mixture(Categorical(2), Mixture(Categorical(2), hmm(gaussian(2, D, "tied")))).double()
    deep.component.model.mixing.prior = priors.Dirichlet(2.0)
    for i, model in enumerate([chains(), shared, deep]):
        model = model if replicas is None else model.replicate(replicas)
        for j, value in enumerate(model.parameters()):
            value.data = value.data + 0.1 * randn(*value.shape, seed=j)
        torchem.save(model, tmp_path / f"{i}.safetensors")
        again = torchem.load(tmp_path / f"{i}.safetensors")
        close(again.log_prob(ragged()), model.log_prob(ragged()), rtol=1e-12)
        close(again.bound(again.e_step(ragged())), model.bound(model.e_step(ragged())), rtol=1e-12)


# ---- labels, starts, use ------------------------------------------------------------------------------------------


def test_labels_are_of_sequences_in_every_form_of_the_data() -> None:
    model = chains()
    x = randn(3, 4, D, seed=9)
    lengths = torch.tensor([4, 2, 3])
    listed = [own[:length] for own, length in zip(x, lengths.tolist(), strict=True)]
    table = torch.tensor([[True, False], [True, True], [False, True]])
    truth = model.component.log_prob(model.batch(listed)) + model.weights.log()
    expected = torch.where(table, truth, -torch.inf).logsumexp(-1)
    for labels in ([0, -1, 1], table, table.double() * 0.2):
        close(model.log_prob(listed, labels=labels), expected)
        close(model.log_prob(x, lengths=lengths, labels=labels), expected)
        close(model.log_prob(torch.cat(listed), lengths=lengths, labels=labels), expected)
        assert model.most_likely(listed, labels=labels)[[0, 2]].tolist() == [0, 1]
        assert model.posterior(listed, labels=labels)[[0, 2], [1, 0]].tolist() == [0.0, 0.0]
    longer = model.batch(listed, labels=[0, -1, 1]).with_frames(7)
    close(model.log_prob(longer), expected)


def test_mixtures_take_labels_where_they_are_used() -> None:
    """Posteriors given candidates, and the joint density of data and labels."""
    model = mixture(3, 2, "full")
    x = randn(4, 2)
    candidates = torch.tensor([[True, True, False], [False, True, False], [True, True, True], [True, False, True]])
    joint = (model.component.log_prob(Batch(x)) + model.weights.log()).masked_fill(~candidates, -torch.inf)
    close(model.posterior(x, labels=candidates), joint.softmax(-1))
    close(model.log_prob(x, labels=candidates), joint.logsumexp(-1))
    assert torch.equal(model.most_likely(x, labels=candidates), joint.argmax(-1))


def two_ways(n: int = 20, frames: int = 30) -> tuple[Tensor, Tensor]:
    """Sequences of the same frames in two orders: states that stay, and states that change."""
    parts = []
    for seed, stay in enumerate((0.95, 0.15)):
        chain = GaussianHMM(2, 1).double()
        chain.means, chain.covariances = [[-1.0], [1.0]], [[0.25], [0.25]]
        chain.transition_matrix = [[stay, 1 - stay], [1 - stay, stay]]
        parts.append(chain.sample(n, frames, generator=rng(seed)))
    order = torch.randperm(2 * n, generator=rng(9))
    return torch.cat(parts)[order], (torch.arange(2 * n) // n)[order]


def agreement(found: Tensor, truth: Tensor) -> float:
    share = float((found == truth).double().mean())
    return max(share, 1 - share)


def test_sequences_are_clustered_by_their_dynamics() -> None:
    x, truth = two_ways()
    model = Mixture(Categorical(2), GaussianHMM(2, 1)).double()
    result = torchem.fit(model, x, seed=0, tol=1e-5, max_iter=300, progress=False)
    assert result.converged
    assert agreement(model.most_likely(x), truth) == 1.0
    stay = model.component.model.transition_matrix.diagonal(dim1=-2, dim2=-1).mean(-1).sort().values
    close(stay, torch.tensor([0.15, 0.95]), atol=0.05, rtol=0)
    y, z = model.sample(6, 9, latents=True, generator=rng(0))
    assert y.shape == (6, 9, 1)
    assert z.shape == (6,)


def test_starts_look_at_what_the_halves_of_sequences_agree_about() -> None:
    """Means of chains that differ in their steps alone are noise; categories have indicators."""
    x, truth = two_ways()
    found = described(Batch(x), [False])
    assert found.shape == (40, 2)  # of mean, spread and correlation
    found = found[:, 1]
    gap = (found[truth == 0].mean() - found[truth == 1].mean()).abs()
    assert float(gap) > 3 * float(torch.stack([found[truth == k].std() for k in (0, 1)]).max())
    names = described(Batch((x > 0).double()), [True])
    assert names.shape[1] < 6
    assert described(Batch(torch.ones(5, 1, 1)), [False]).shape == (5, 3)


def test_some_labels_name_the_clusters() -> None:
    x, truth = two_ways(10, 20)
    for flip in (False, True):
        labels = torch.full((20,), -1)
        labels[:6] = 1 - truth[:6] if flip else truth[:6]
        model = Mixture(Categorical(2), GaussianHMM(2, 1)).double()
        torchem.fit(model, x, labels=labels, seed=0, tol=1e-4, max_iter=300, progress=False)
        assert torch.equal(model.most_likely(x), 1 - truth if flip else truth)


def test_categorical_sequences_are_clustered_too() -> None:
    model = Mixture(Categorical(2), HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3))).double()
    for k, stay in enumerate((0.95, 0.1)):
        one = model.component[k]
        one.emission.probs = [[0.9, 0.1, 0.0], [0.0, 0.1, 0.9]]  # pyright: ignore
        one.transition_matrix = [[stay, 1 - stay], [1 - stay, stay]]  # pyright: ignore
        model.component[k] = one  # pyright: ignore
    x, truth = model.sample(40, 30, latents=True, generator=rng(1))
    found = Mixture(Categorical(2), HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3))).double()
    torchem.fit(found, x, seed=0, tol=1e-4, max_iter=300, restarts=2, progress=False)
    assert agreement(found.most_likely(x), truth) == 1.0


@pytest.mark.parametrize("init", ["kmeans++", "random", "random_from_data", "hierarchical"])
def test_every_start_tells_components_and_restarts_apart(init: str) -> None:
    x, _ = two_ways(8, 10)
    model = Mixture(Categorical(2), GaussianHMM(2, 1)).double()
    result = torchem.fit(model, x, init=init, restarts=3, max_iter=2, tol=0.0, seed=1, progress=False)
    if init in ("random", "random_from_data"):
        assert len({round(own[0], 6) for own in result.histories}) == 3
    assert not model.twins(model.batch(x))
    means = model.component.model.emission.means.detach()
    assert float((means[0] - means[1]).abs().max()) > 1e-3
    assert float((means[:, 0] - means[:, 1]).abs().min()) > 0.5  # the states inside, too


@pytest.mark.filterwarnings("ignore:fit. components 0 and 1 ended as nearly")
def test_copies_that_start_equal_are_warned_of() -> None:
    x, _ = two_ways(4, 5)
    model = Mixture(Categorical(2), GaussianHMM(2, 1)).double()
    model.component.model.means = torch.tensor([[[-1.0], [1.0]]] * 2).double()
    with pytest.warns(torchem.errors.SymmetryWarning, match="components 0 and 1 start identical"):
        torchem.fit(model, x, init=None, max_iter=200, tol=1e-3, seed=0, progress=False)


@pytest.mark.parametrize("dead", ["respawn", "prune"])
def test_dead_components(dead: Any) -> None:
    x, _ = two_ways(6, 10)
    model = Mixture(Categorical(3), GaussianHMM(2, 1)).double()
    model.component.model.means = torch.tensor([[[-1.0], [1.0]], [[-1.2], [0.8]], [[500.0], [501.0]]]).double()
    result = torchem.fit(model, x, init=None, dead=dead, max_iter=300, tol=1e-3, seed=0, progress=False)
    assert result.model.n_components == (2 if dead == "prune" else 3)
    assert float(model.weights.detach().min()) > 1e-3
    close(model.posterior(x).sum(-1), torch.ones(12))


def test_a_gate_reads_the_first_frame() -> None:
    """Covariates of the first frames choose the component, those of all frames reach the models."""
    gate = SoftmaxRegression(2, 2)
    gate.weight = randn(2, 2, seed=1)
    model = Mixture(gate, hmm(LinearGaussian(2, 2, 1))).double()
    for i, value in enumerate(model.component.parameters()):
        value.data = value.data + 0.5 * randn(*value.shape, seed=i)
    u, x = randn(7, 4, 2, seed=2), randn(7, 4, 1, seed=3)
    batch = model.batch(x, u=u)
    table = gate.log_table(Batch(x[:, 0], u=u[:, 0]))
    each = torch.stack([model.component[k].log_prob(batch) for k in range(2)], -1)
    close(model.log_prob(batch), (table + each).logsumexp(-1))
    result = torchem.fit(model, x, inputs=u, seed=0, max_iter=300, tol=1e-3, progress=False)
    assert result.bound > result.history[0]
    assert model.sample(3, 5, inputs=randn(3, 5, 2)).shape == (3, 5, 1)


def test_labels_pieces_and_loaders_agree() -> None:
    """Batches of a loader and small pieces give what all data at once give."""
    x, truth = two_ways(10, 12)
    model = chains_of(1)
    batch = model.batch(x, labels=torch.where(torch.arange(20) < 5, truth, -1))
    whole = model.e_step(batch)
    parts = model.e_step(batch[:7]) + model.e_step(batch[7:])
    for name in ("log_likelihood", "entropy"):
        close(whole[name], parts[name])
    options: dict[str, Any] = {"init": None, "tol": 0.0, "max_iter": 3, "seed": 0, "progress": False}
    one = torchem.fit(copy.deepcopy(model), batch, **options)
    two = torchem.fit(copy.deepcopy(model), [batch[:7], batch[7:]], **options)
    assert one.history == pytest.approx(two.history, rel=1e-10)


def chains_of(d: int) -> Mixture:
    model = Mixture(Categorical(2), GaussianHMM(2, d)).double()
    model.component.model.means = torch.tensor([[[-1.0], [1.0]], [[-0.5], [0.8]]]).double().expand(-1, -1, d)
    return model


def test_components_are_read_and_assigned() -> None:
    model = chains()
    assert isinstance(model.component, Copies)
    one = model.component[1]
    assert one.replicas == ()
    one.transition_matrix = torch.tensor([[0.5, 0.5], [0.1, 0.9]]).double()  # pyright: ignore
    model.component[1] = one
    close(model.component.model.transition_matrix[1], torch.tensor([[0.5, 0.5], [0.1, 0.9]]), atol=1e-7)
    close(model.component[1].log_prob(ragged()), one.log_prob(ragged()))
    assert len(list(model.component)) == len(model.component) == 2
    with pytest.raises(IndexError):
        model.component[2]
    with pytest.raises(InvalidArgument, match="a model of the same structure"):
        model.component[0] = hmm(gaussian(3, D, "diag"))


def test_models_held_one_by_one_are_read_and_assigned() -> None:
    model = Mixture(Categorical(2), torchem.LinearGaussianStateSpace(1, 1))
    other = torchem.LinearGaussianStateSpace(2, 1)
    model.component[1] = other
    assert model.component[1] is other
    assert model.component[0] is not other
    x = randn(3, 4, 1).float()
    own = torch.stack([part.log_prob(x) for part in model.component], -1)
    close(model.log_prob(x), (model.weights.log() + own).logsumexp(-1))
    for bad in (torchem.LinearGaussianStateSpace(1, 2), GaussianMixture(2, 1), model.component[0], other.double()):
        with pytest.raises(InvalidArgument, match="component"):
            model.component[1] = bad
        assert model.component[1] is other
    with pytest.raises(IndexError):
        model.component[2] = other


def test_criteria_and_forecasts_of_components() -> None:
    x, _ = two_ways(8, 12)
    model = chains_of(1)
    found = torchem.criteria(model, x)
    assert found.n_parameters == 1 + 2 * (1 + 2 + 2 + 2)
    assert float(found.loglik) == pytest.approx(float(model.log_prob(x).sum().detach()))
    ahead = torch.stack([part.forecast(x, 3).mean for part in model.component], -1)  # pyright: ignore
    assert (model.posterior(x)[:, None, None] * ahead).sum(-1).shape == (16, 3, 1)


# ---- bad input ----------------------------------------------------------------------------------------------------


def _components() -> dict[str, Any]:
    ss = torchem.LinearGaussianStateSpace
    leaf = {"x": (("A",), Gaussian(2, 2, "diag"))}
    return {
        "state space": ss(1, 2),
        "state spaces of two sizes": [ss(1, 2), ss(2, 2)],
        "a chain and a state space": [GaussianHMM(2, 2), ss(1, 2)],
        "durations": torchem.HSMM(Categorical(2), Categorical(2, 2), Categorical(2, 3), Gaussian(2, 2)),
        "a network with a leaf": torchem.BayesianNetwork({"A": 2}, [], hidden=("A",), leaves=leaf),
        "factor analysis": torchem.FactorAnalysis(2, 1),
    }


def test_bounds_of_continuous_latents_under_posteriors_never_fall() -> None:
    components = [torchem.LinearGaussianStateSpace(1, 2), torchem.LinearGaussianStateSpace(2, 2)]
    model = torchem.variational(Mixture(Categorical(2), components).double())
    x = randn(6, 8, 2, seed=4)
    result = torchem.fit(model, x, seed=0, max_iter=5, tol=0, progress=False)
    assert result.status == "max_iter"
    # The posterior of components is that of the objective: what it says is what their own bounds say.
    batch = model.batch(x)
    own = torch.stack([part.log_bound(batch) for part in model.component], -1)
    expected = (model.mixing.log_potential(batch).reshape(-1, 2)[:1] + own).logsumexp(-1).sum()
    close(model.e_step(batch)["log_likelihood"], expected)
    assert float(model.log_prob(batch).sum().detach()) != pytest.approx(float(expected.detach()))


@pytest.mark.parametrize(
    ("name", "variational"),
    [
        ("state space", False),
        ("state space", True),
        ("state spaces of two sizes", False),
        ("a chain and a state space", False),
        ("a chain and a state space", True),
        ("durations", True),
        ("a network with a leaf", False),
        ("a network with a leaf", True),
        ("factor analysis", False),
    ],
)
def test_mixtures_of_models_are_equivariant_to_units(name: str, variational: bool) -> None:
    x = randn(5, 6, 2, seed=4)
    x = x if Mixture(Categorical(2), _components()[name]).sequential else x.flatten(0, 1)
    bounds = []
    for unit in (1.0, 1e-6):
        model = Mixture(Categorical(2), _components()[name]).double()
        model = torchem.variational(model) if variational else model
        result = torchem.fit(model, x * unit, seed=0, max_iter=3, tol=0, progress=False)
        bounds.append(result.bound + x.numel() * math.log(unit))
    assert bounds == pytest.approx(bounds[:1] * 2, abs=1e-6)


def test_what_cannot_be_a_component_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"models of the same columns, got \[1, 2\]"):
        Mixture(Categorical(2), [GaussianHMM(2, 1), GaussianHMM(2, 2)])
    chain = GaussianHMM(2, 1)
    with pytest.raises(InvalidArgument, match="2 models, as many as mixing has classes, got 1"):
        Mixture(Categorical(2), [chain])
    with pytest.raises(InvalidArgument, match="each model once"):
        Mixture(Categorical(2), [chain, chain])
    with pytest.raises(InvalidArgument, match="all read sequences, or all rows"):
        Mixture(Categorical(2), [chain, GaussianMixture(2, 1)])
    with pytest.raises(InvalidArgument, match="one dtype"):
        Mixture(Categorical(2), [chain, GaussianHMM(2, 1).double()])
    with pytest.raises(InvalidArgument, match="exact posteriors"):
        Mixture(Categorical(2), FactorialHMM.gaussian([2, 2], 1))
    with pytest.raises(InvalidArgument, match="without replicas"):
        Mixture(Categorical(2), chain.replicate(3))
    table = Categorical(2, 2)
    with pytest.raises(InvalidArgument, match="one that models share"):
        Mixture(Categorical(2), [HMM("stationary", table, Gaussian(2, 1)) for _ in range(2)])
    with as_users_run_it():
        for component in (chain, [chain, Gaussian(2, 1)]):
            with pytest.raises(InvalidType, match="mixing" if component is chain else r"component\[1\]"):
                Mixture(chain if component is chain else Categorical(2), component)  # pyright: ignore


def test_data_that_do_not_fit_are_refused() -> None:
    model = chains()
    x = randn(3, 4, D)
    with pytest.raises(InvalidArgument, match=f"{D} features"):
        model.log_prob(randn(3, 4, D + 1))
    with pytest.raises(InvalidArgument, match=r"labels: expected whole numbers \[3\], or a table \[3, K\]"):
        model.log_prob(x, labels=torch.zeros(4).long())
    with pytest.raises(InvalidArgument, match="got 5 at sequence 1"):
        model.log_prob(x, labels=[0, 5, 1])
    with pytest.raises(InvalidArgument, match="length"):
        mixture(2, 2, "full").sample(3, 4)
    with pytest.raises(InvalidArgument, match="observations as components"):
        torchem.fit(model, x[:1], progress=False)
    one = Mixture(Categorical(2), torchem.Mixture(Categorical(2), Bernoulli(2, 2)))
    with pytest.raises(InvalidArgument):
        one.log_prob(torch.full((3, 2), 7.0))


def test_an_impossible_sequence_is_named() -> None:
    model = Mixture(Categorical(2), HMM(Categorical(1), Categorical(1, 1), Categorical(1, 3))).double()
    model.component.model.emission.probs = torch.tensor([[[0.5, 0.5, 0.0]], [[0.1, 0.9, 0.0]]]).double()
    x = torch.zeros(4, 3, 1).long()
    x[2, 1] = 2
    assert model.log_prob(x)[2] == -torch.inf
    assert model.posterior(x)[2].tolist() == [0.0, 0.0]
    with pytest.raises(InvalidArgument, match="probability zero at sequence 2"):
        torchem.fit(model, x, init=None, progress=False)
