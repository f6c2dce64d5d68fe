"""The laws of a model, for every model that exists."""

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import ModelCase, close, close_dict, close_stats, every_model
from tests.laws.paths import all_paths
from torchem.batch import Batch, concatenate
from torchem.factors import Bernoulli, Categoricals, Exponential, Gaussian, Poisson, StudentT
from torchem.model import DiscreteModel, LatentModel
from torchem.models import HMM, GaussianMixture
from torchem.models.frames import FramesPass
from torchem.models.stationary import Stationary
from torchem.ops import dispatch, gaussian

pytestmark = pytest.mark.usefixtures("_routes_by_rounding")
ROOMY = every_model(only=lambda name: "N1" not in name)
CHAINS = every_model(only=lambda name: name.startswith("HMM"))
MIXTURES = every_model(only=lambda name: name.startswith(("GaussianMixture", "Mixture")))


def test_every_model_has_cases() -> None:
    kinds = [getattr(torchem.models, name) for name in torchem.models.__all__]
    concrete = {kind for kind in kinds if inspect.isclass(kind) and not inspect.isabstract(kind)}
    # What approximates its posterior keeps laws of its own, in tests/models.
    covered = {type(build().model) for build in cases.MODEL_CASES.values()} | cases.APPROXIMATE
    assert concrete <= covered, f"give these a classmethod example(): {concrete - covered}"


@every_model()
def test_passes_are_the_factors_own_kernels(build: Callable[[], ModelCase]) -> None:
    model = build().model
    kernels, tables = model._kernels(), model.table_slots()
    for slot, factor in model.slots():
        if slot not in tables:
            asked = kernels[slot].kernel if isinstance(kernels[slot], FramesPass) else kernels[slot]
            assert type(asked) is type(factor.kernel())


@MIXTURES
def test_whole_passes_equal_those_in_pieces(build, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    case = build().to(device)
    found = []
    monkeypatch.setattr(gaussian, "_FEW", 1)
    monkeypatch.setattr(gaussian, "_FEW_HEAVY", 1)
    with torch.no_grad():
        for least in (0, 1 << 60):
            monkeypatch.setattr(dispatch, "_MANY", least)
            found.append(case.model.e_step(case.batch))
    close_stats(found[0], found[1], rtol=1e-10)


@pytest.mark.parametrize("component", [
    Poisson(8, 2), Bernoulli(8, 2), Exponential(8, 2), Categoricals(8, [2, 2]),
    *(family(8, 2, kind) for family in (Gaussian, StudentT) for kind in ("full", "diag", "spherical")),
], ids=lambda component: type(component).__name__)  # fmt: skip
def test_whole_passes_are_taken(component: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(dispatch, "_MANY", 0)
    component, x = component.double(), torch.ones(4, 2, dtype=torch.float64)
    if isinstance(component, (Gaussian, StudentT)):
        getattr(component, "normal", component).direct = False
    with torch.no_grad():
        assert component.kernel().mixed(Batch(x), torch.zeros(1, 8, dtype=torch.float64)) is not None
    # What derivatives follow goes by way of what has some.
    assert component.kernel().mixed(Batch(x), torch.zeros(1, 8, dtype=torch.float64)) is None


def test_every_factor_stands_in_a_chain() -> None:
    found = {type(f).__name__ for name, build in cases.MODEL_CASES.items() if name.startswith(("HMM", "HSMM"))
             for f in build().model.modules()}  # fmt: skip
    # Those without a Q of statistics keep laws of their own, in tests/test_gradient.py.
    assert {kind.__name__ for kind in cases.concrete_factors()} <= found


def potentials_of(model: DiscreteModel, batch: Batch) -> dict[str, Tensor]:
    return {slot: kernel.log_potential(batch) for slot, kernel in model._kernels().items()}


def objective(model: LatentModel, stats: torchem.Stats) -> Tensor:
    """What the bound is where the statistics were taken: the log-likelihood, and the prior."""
    return stats["log_likelihood"] + model.log_prior()


def reweighted(batch: Batch, weight: Tensor | None) -> Batch:
    return replace(batch, weight=weight)


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, missing entries included."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


def weights_of(batch: Batch) -> Tensor:
    return torch.ones(len(batch), dtype=torch.float64, device=batch.x.device) if batch.weight is None else batch.weight


def parameters(model: LatentModel) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def total_log_prob(model: LatentModel, batch: Batch) -> Tensor:
    weight = weights_of(batch)
    return torch.where(weight > 0, model.log_prob(batch), 0.0).mul(weight).sum()


def fitted(model: LatentModel, batch: Batch, steps: int) -> LatentModel:
    model = copy.deepcopy(model)
    for _ in range(steps):
        model.m_step(model.e_step(batch))
    return model


# ---- the bound ----------------------------------------------------------------------------------------------------


def never_falls(case: ModelCase, rows: int) -> None:
    """15 iterations, tuned as for a pass of so many rows: few take differences, many features about one origin."""
    model, batch = case.model, case.batch
    model.project()
    model.tune(rows)
    values = []
    with torch.no_grad():
        for _ in range(15):
            stats = model.e_step(batch)
            values.append(float(model.bound(stats)))
            model.m_step(stats)
            # Between E and M the bound may only rise too.
            values.append(float(model.bound(stats)))
            model.tune(rows)
    for before, after in itertools.pairwise(values):
        assert after >= before - 1e-9 * (1 + abs(before))


FEW, MANY = 1, 1 << 40
#: Each model tuned as for a long pass; those whose route through normal densities it decides as for a short one too.
ROUTES = pytest.mark.parametrize(
    ("build", "rows"),
    [
        pytest.param(build, rows, id=f"{name}-{route}")
        for name, build in cases.MODEL_CASES.items()
        for route, rows in (("few", FEW), ("many", MANY))
        if rows == MANY or "Gaussian" in name
    ],
)


@ROUTES
def test_bound_never_falls(build, rows: int, device: torch.device) -> None:
    never_falls(build().to(device), rows)


@pytest.mark.parametrize("kind", cases.COVARIANCE_TYPES)
@pytest.mark.parametrize("data", ["noise", "tight", "duplicates", "line", "outlier"])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_bound_never_falls_from_hard_starts(kind: str, data: str, rows: int, device: torch.device) -> None:
    x = cases.randn(60, 3, seed=2)
    if data == "tight":
        x = cases.blobs(60, 3, 4, spread=1e3)
    elif data == "duplicates":
        x = torch.cat([x[:20].repeat(2, 1), x[:1].repeat(20, 1)])
    elif data == "line":
        x = x[:, :1] * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    elif data == "outlier":
        x[0] = 1e3
    for seed in range(3):
        model = GaussianMixture(4, 3, kind).double()  # pyright: ignore
        model.means = x[torch.randperm(60, generator=cases.rng(seed))[:4]]
        case = ModelCase(model, Batch(x))
        model.component.prepare(_Moments(x.mean(0), x.var(0, unbiased=False)))
        never_falls(case.to(device), rows)
        assert all(p.isfinite().all() for p in model.parameters())


class _Moments:
    def __init__(self, mean: Tensor, variance: Tensor):
        self.mean, self.variance = mean, variance
        self.low = self.high = mean


@every_model()
def test_bound_is_the_log_likelihood_where_it_was_computed(build, device: torch.device) -> None:
    case = build().to(device)
    stats = case.model.e_step(case.batch)
    close(case.model.bound(stats), objective(case.model, stats), rtol=1e-12)
    close(stats["log_likelihood"], total_log_prob(case.model, case.batch), rtol=1e-9)
    frames = case.batch.frames() if case.model.sequential else 1
    close(stats["count"], (weights_of(case.batch) * frames).sum(), rtol=1e-12)


@ROOMY
def test_bound_lies_below_the_log_likelihood_elsewhere(build, device: torch.device) -> None:
    case = build().to(device)
    stats = case.model.e_step(case.batch)
    other = fitted(case.model, case.batch, 1)
    gap = float((total_log_prob(other, case.batch) + other.log_prior() - other.bound(stats)).detach())
    assert gap >= -1e-8 * (1 + abs(float(stats["log_likelihood"].detach())))
    if other.n_parameters() and isinstance(other, GaussianMixture) and other.n_components > 1:
        assert gap > 1e-6, "the bound must be loose once the parameters have moved"


@every_model(only=lambda name: name.startswith(("GaussianMixture", "Mixture-Categorical")))
def test_entropy_is_that_of_the_posteriors(build, device: torch.device) -> None:
    """Gaussian and categorical Q leave nothing out, so what remains is Σ w H(γ) and the evidence's own share."""
    case = build().to(device)
    stats = case.model.e_step(case.batch)
    posterior = case.model.posterior(case.batch)
    entropy = -torch.where(posterior > 0, posterior * posterior.log(), 0.0).sum(-1)
    if case.batch.evidence is not None:
        entropy = entropy + torch.where(posterior > 0, posterior * case.batch.evidence, 0.0).sum(-1)
    close(stats["entropy"], (weights_of(case.batch) * entropy).sum(), rtol=1e-7, atol=1e-6)


@every_model()
def test_fisher_identity(build, device: torch.device) -> None:
    """∇ (Σ w log p(x; θ) + log p(θ)) = ∇ (Q(θ; S(θ)) + log p(θ)), with S held."""
    case = build().to(device)
    model, values = case.model, list(case.model.parameters())
    with torch.no_grad():
        stats = model.e_step(case.batch)
    score = torch.autograd.grad(total_log_prob(model, case.batch) + model.log_prior(), values)
    surrogate = torch.autograd.grad(model.bound(stats), values)
    for name, a, b in zip(parameters(model), score, surrogate, strict=True):
        assert a.isfinite().all()
        size = float(a.abs().max()) + 1e-6
        close(b / size, a / size, rtol=1e-6, atol=1e-6)
        assert name


# ---- inference ----------------------------------------------------------------------------------------------------


def hard_potentials(model: DiscreteModel, batch: Batch) -> tuple[dict[str, Tensor], Batch]:
    """The model's own potentials with impossible entries and whole impossible rows, under uneven weights."""
    potentials = potentials_of(model, batch)
    torn = {}
    for slot, value in potentials.items():
        hole = cases.rand(*value.shape, seed=17).to(value.device) < 0.15
        torn[slot] = value.detach().masked_fill(hole, -torch.inf) if slot not in model.table_slots() else value.detach()
        if slot not in model.table_slots():
            torn[slot][:1] = -torch.inf
    weight = cases.rand(len(batch), seed=18).to(batch.x.device)
    weight[::3] = 0.0
    return torn, reweighted(batch, weight)


@every_model()
def test_infer_equals_the_autograd_default(build, device: torch.device) -> None:
    case = build().to(device)
    model = case.model
    if not isinstance(model, DiscreteModel):
        return
    plain = {k: v.detach() for k, v in potentials_of(model, case.batch).items()}
    for potentials, batch in ((plain, case.batch), hard_potentials(model, case.batch)):
        log_z, expected = model.infer(potentials, batch)
        reference, gradient = DiscreteModel.infer(model, potentials, batch)
        close(log_z, reference)
        assert expected.keys() == gradient.keys()
        for slot in potentials:
            assert expected[slot].shape == potentials[slot].shape
            assert expected[slot].isfinite().all()
            close(expected[slot], gradient[slot])


@ROOMY
def test_weights_may_differ_between_replicas(build, device: torch.device) -> None:
    """Responsibilities are the weights of the models in a mixture."""
    case = build().to(device)
    if not isinstance(case.model, DiscreteModel):
        return
    many = case.model.replicate(2)
    for name, parameter in many.named_parameters():
        spread = 0.1 * cases.randn(*parameter.shape, seed=len(name)).to(parameter)
        parameter.data = parameter.data + spread * parameter.data.abs().clamp(min=1e-3)
    weight = cases.rand(2, len(case.batch), seed=19).to(device)
    weight[:, ::3] = 0.0
    log_z, expected = many.infer(potentials_of(many, case.batch), reweighted(case.batch, weight))
    close(many.log_normalizer(potentials_of(many, case.batch), case.batch), log_z)
    for r in range(2):
        one = many.take_replicas(r)
        own = one.infer(potentials_of(one, case.batch), reweighted(case.batch, weight[r]))
        close(log_z[r], own[0])
        for slot, value in own[1].items():
            close(expected[slot][r], value)


@MIXTURES
def test_infer_equals_enumeration(build, device: torch.device) -> None:
    case = build().to(device)
    model = case.model
    for potentials, batch in ((potentials_of(model, case.batch), case.batch), hard_potentials(model, case.batch)):
        log_z, expected = model.infer(potentials, batch)
        shape = (len(batch), model.n_components)
        rows = [potentials[slot].expand(shape).tolist() for slot in ("mixing", "component")]
        known = batch.evidence if batch.evidence is None or batch.evidence.dim() == 2 else batch.evidence.sum(1)
        evidence = [[0.0] * shape[1]] * shape[0] if known is None else known.tolist()
        weight = weights_of(batch).tolist()
        mixing = torch.zeros(shape[1], dtype=torch.float64)
        for n in range(shape[0]):
            joint = torch.tensor(
                [a + b + e for a, b, e in zip(rows[0][n], rows[1][n], evidence[n], strict=True)]
            ).double()
            top = float(joint.max())
            mass = torch.zeros_like(joint) if top == -torch.inf else (joint - top).exp()
            total = float(mass.sum())
            truth = -torch.inf if total == 0 else top + float(torch.tensor(total, dtype=torch.float64).log())
            close(log_z[n].detach().cpu(), torch.tensor(truth, dtype=torch.float64), rtol=1e-6, atol=1e-6)
            share = weight[n] * mass / (total or 1.0)
            close(expected["component"][n].detach().cpu(), share, rtol=1e-5, atol=1e-6)
            mixing += share
        close(expected["mixing"].reshape(-1).detach().cpu(), mixing, rtol=1e-5, atol=1e-6)


@MIXTURES
def test_most_likely_is_the_maximum_of_the_posterior(build, device: torch.device) -> None:
    case = build().to(device)
    posterior = case.model.posterior(case.batch)
    close(posterior.sum(-1), torch.ones(len(case.batch)), rtol=1e-12)
    chosen = case.model.most_likely(case.batch)
    assert chosen.dtype == torch.long
    best = posterior.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    close(best, posterior.amax(-1), rtol=1e-12)


@MIXTURES
def test_most_likely_is_log_partition_with_a_maximum(build, device: torch.device) -> None:
    case = build().to(device)
    potentials = {k: v.detach() for k, v in potentials_of(case.model, case.batch).items()}
    best, pull = torch.func.vjp(
        lambda p: case.model.log_partition(p, case.batch, plus=torchem.ops.reduce.maximum), potentials
    )
    one_hot = pull(torch.ones_like(best))[0]["component"]
    assert torch.equal(one_hot.sum(-1), torch.ones_like(best))
    assert torch.equal(one_hot.argmax(-1), case.model.most_likely(case.batch))


@every_model()
def test_hard_inference_equals_the_autograd_default(build, device: torch.device) -> None:
    case = build().to(device)
    model = case.model
    plain = {k: v.detach() for k, v in potentials_of(model, case.batch).items()}
    for potentials, batch in ((plain, case.batch), hard_potentials(model, case.batch)):
        score, chosen = model.infer_hard(potentials, batch)
        reference, gradient = DiscreteModel.infer_hard(model, potentials, batch)
        close(score, reference, rtol=1e-12)
        assert chosen.keys() == gradient.keys()
        for slot in potentials:
            assert chosen[slot].shape == potentials[slot].shape
            close(chosen[slot], gradient[slot], rtol=1e-12)


@every_model()
def test_hard_objective_never_falls(build, device: torch.device) -> None:
    """Classification EM and Viterbi training climb the density of data and latents together."""
    case = build().to(device)
    model = case.model
    model.project()
    values = []
    with torch.no_grad():
        for _ in range(12):
            stats = model.e_step(case.batch, "hard")
            values.append(float(objective(model, stats)))
            close(model.bound(stats), objective(model, stats))
            model.m_step(stats)
    for before, after in itertools.pairwise(values):
        assert after >= before - 1e-9 * (1 + abs(before))


@CHAINS
def test_chains_equal_the_list_of_their_paths(build) -> None:
    """Log-likelihood with its gradient, posteriors, expected steps, entropy and the best path."""
    case = build()
    model, batch = case.model, case.batch
    assert isinstance(model, HMM)
    paths, k, weight = all_paths(model, batch), model.n_components, weights_of(batch)
    truth = torch.stack([each.log_prob for each in paths])
    values = model.log_prob(batch)
    close(values, truth)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(values @ weight, parameters),
        torch.autograd.grad(truth @ weight, parameters, allow_unused=True),
        strict=True,
    ):
        close(a, torch.zeros_like(a) if b is None else b, atol=1e-8)
    posterior, best = model.posterior(batch), model.most_likely(batch)
    with torch.no_grad():
        potentials = potentials_of(model, batch)
        expected = model.infer(potentials, batch)[1]
    gates = {slot: value.dim() > rank for slot, value, rank in (
        ("initial", potentials["initial"], 2), ("transition", potentials["transition"], 3))}  # fmt: skip
    entropy, steps, first = 0.0, torch.zeros(k, k).double(), torch.zeros(k).double()
    ends = torch.zeros(k, 2).double()
    for n, each in enumerate(paths):
        length = each.states.shape[1]
        assert best[n].tolist() == [*each.states[each.log_joint.argmax()].tolist(), *[-1] * (batch.x.shape[1] - length)]
        assert (posterior[n, length:] == 0).all()
        assert (expected["emission"][n, length:] == 0).all()
        for t in range(length):
            gamma = each.expected(t, k)
            close(posterior[n, t], gamma)
            close(
                expected["emission"][n, t], weight[n] * each.expected(t, k ** (model.emission.memory + 1), codes=True)
            )
            ends[:, int(t == length - 1)] += weight[n] * gamma
            if t:
                steps += weight[n] * each.steps(t, k)
                if gates["transition"]:
                    close(expected["transition"][n, t], weight[n] * each.steps(t, k))
        first += weight[n] * each.expected(0, k)
        entropy += weight[n] * each.entropy
    for slot, total in (("initial", first), ("transition", steps), ("end", ends)):
        if slot in expected:
            assert expected[slot].shape == potentials[slot].shape
            close(expected[slot].flatten(0, -1 - total.dim()).sum(0), total)
    close(model.entropy(batch).detach(), entropy, atol=1e-8)


@CHAINS
def test_filtering_stops_at_each_frame(build) -> None:
    """p(z_t | x_1…t) is the posterior at the last frame of the sequence cut there."""
    case = build()
    model, batch = case.model, case.batch
    filtered = model.filter(batch)
    close(filtered.sum(-1), (torch.arange(batch.x.shape[1]) < batch.frames().unsqueeze(-1)).double())
    last = (batch.frames() - 1).view(-1, 1, 1).expand(-1, 1, filtered.shape[-1])
    close(filtered.gather(1, last), model.posterior(batch).gather(1, last))
    model.end = None  # what is cut has not ended
    filtered = model.filter(batch)
    for t in range(batch.x.shape[1]):
        cut = batch.with_frames(t + 1)
        inside = batch.frames() > t
        close(filtered[inside, t], model.posterior(cut)[inside, t])


@CHAINS
def test_padding_is_never_read(build, device: torch.device) -> None:
    """Other valid data in the padding, more of it, or none: the same numbers."""
    case = build().to(device)
    model, batch = case.model, case.batch
    stats, values, posterior = model.e_step(batch), model.log_prob(batch), model.posterior(batch)
    longer = batch.with_frames(batch.x.shape[1] + 3)
    assert longer.lengths is not None
    other = longer.map(torch.clone)
    for n, length in enumerate(batch.frames().tolist()):
        source = (n + 1) % len(batch)
        for value in (other.x, *([] if other.u is None else [other.u])):
            value[n, length:] = torch.where(value[source, :1].isnan(), value[n, :1], value[source, :1])
    for changed in (longer, other):
        close_stats(model.e_step(changed), stats, rtol=1e-12)
        close(model.log_prob(changed), values, rtol=1e-12)
        close(model.posterior(changed)[:, : batch.x.shape[1]], posterior, rtol=1e-10, atol=1e-12)
    for n, length in enumerate(batch.frames().tolist()):
        alone = batch[n : n + 1].with_frames(length)
        close(model.log_prob(alone), values[n : n + 1], rtol=1e-12)
        close(model.posterior(alone)[0], posterior[n, :length], rtol=1e-10, atol=1e-12)


@CHAINS
def test_labels_pin_the_path(build) -> None:
    """A state given for each frame leaves one path, and its joint density."""
    case = build()
    model, batch = case.model, reweighted(case.batch, None)
    k = model.n_components
    paths = all_paths(model, batch)
    chosen = [torch.nonzero(each.log_joint > -torch.inf)[-1, 0] for each in paths]
    label = torch.zeros(batch.x.shape[:2], dtype=torch.long)
    for n, (each, place) in enumerate(zip(paths, chosen, strict=True)):
        label[n, : each.states.shape[1]] = each.states[place]
    hot = torch.nn.functional.one_hot(label, k)
    evidence = torch.zeros(hot.shape, dtype=torch.float64).masked_fill(hot == 0, -torch.inf)
    soft = evidence if batch.evidence is None else evidence + batch.evidence
    pinned = replace(batch, evidence=soft)
    inside = torch.arange(label.shape[1]) < batch.frames().unsqueeze(-1)
    close(model.posterior(pinned)[inside], hot[inside].double())
    assert torch.equal(model.most_likely(pinned)[inside], label[inside])
    close(model.log_prob(pinned), torch.stack([e.log_joint[place] for e, place in zip(paths, chosen, strict=True)]))
    if batch.evidence is None:
        free = replace(batch, evidence=torch.zeros_like(evidence))
        close(model.log_prob(free), model.log_prob(batch), rtol=1e-12)


# ---- invariances --------------------------------------------------------------------------------------------------


def tiled(batch: Batch, rows: int) -> Batch:
    """Enough rows for several pieces, none equal to another."""
    index = torch.arange(rows, device=batch.x.device) % len(batch)
    many = batch[index]
    return reweighted(many, weights_of(many) * (0.5 + cases.rand(rows, seed=5).to(batch.x.device)))


@ROOMY
def test_invariance_to_chunks_and_order(build, device: torch.device) -> None:
    case = build().to(device)
    # Pieces of 128 rows, or of one sequence.
    rows, pieces = (11, 11) if case.model.sequential else (300, 3)
    batch = tiled(case.batch, rows)
    model = case.model
    whole, log_prob, posterior = model.e_step(batch), model.log_prob(batch), cases.posterior(model, batch)
    model.memory_budget = 1
    assert len(list(model.stream(batch))) == pieces
    close_stats(model.e_step(batch), whole, rtol=1e-10)
    close(model.log_prob(batch), log_prob, rtol=1e-12)
    close(cases.posterior(model, batch), posterior, rtol=1e-9)
    order = torch.randperm(rows, generator=cases.rng(1)).to(device)
    close_stats(model.e_step(batch[order]), whole, rtol=1e-10)
    close(model.log_prob(batch[order]), log_prob[order], rtol=1e-12)


@ROOMY
def test_statistics_of_parts_add_to_those_of_the_whole(build, device: torch.device) -> None:
    case = build().to(device)
    cut = len(case.batch) // 3
    parts = case.batch[:cut], case.batch[cut:]
    close_stats(case.model.e_step(parts[0]) + case.model.e_step(parts[1]), case.model.e_step(concatenate(parts)))
    nothing = case.model.e_step(case.batch[:0])
    assert nothing["log_likelihood"] == 0
    close_stats(nothing + case.model.e_step(case.batch), case.model.e_step(case.batch))


@ROOMY
def test_weights_are_repetitions(build, device: torch.device) -> None:
    case = build().to(device)
    repeats = torch.arange(len(case.batch), device=device) % 3
    bare = reweighted(case.batch, None)
    weighted = reweighted(bare, repeats.double())
    repeated = bare[torch.repeat_interleave(torch.arange(len(bare), device=device), repeats)]
    close_stats(case.model.e_step(weighted), case.model.e_step(repeated))
    close(case.model.log_prob(weighted), case.model.log_prob(bare), rtol=1e-12)
    ones = reweighted(bare, torch.ones(len(bare), dtype=torch.float64, device=device))
    close_stats(case.model.e_step(ones), case.model.e_step(bare), rtol=1e-12)


@MIXTURES
def test_labels_pin_the_posterior(build, device: torch.device) -> None:
    case = build().to(device)
    k = case.model.n_components
    label = torch.arange(len(case.batch), device=device) % k
    evidence = torch.zeros(len(label), k, dtype=torch.float64, device=device).masked_fill_(
        torch.nn.functional.one_hot(label, k) == 0, -torch.inf
    )
    batch = Batch(case.batch.x, evidence=evidence)
    posterior = case.model.posterior(batch)
    possible = case.model.log_prob(batch).isfinite()
    assert torch.equal(posterior[possible], torch.nn.functional.one_hot(label, k).double()[possible])
    assert torch.equal(case.model.most_likely(batch)[possible], label[possible])
    potentials = potentials_of(case.model, batch)
    joint = (potentials["mixing"] + potentials["component"]).gather(-1, label.unsqueeze(-1)).squeeze(-1)
    close(case.model.log_prob(batch), joint)
    free = Batch(case.batch.x, evidence=torch.zeros_like(evidence))
    close(case.model.log_prob(free), case.model.log_prob(Batch(case.batch.x)), rtol=1e-12)


@every_model()
def test_data_may_live_on_the_host(build, device: torch.device) -> None:
    """A batch that is elsewhere is brought to the model piece by piece; results are the same."""
    case = build()
    there, far = case.batch.to(device), case.batch
    model = case.model.to(device)
    close_stats(model.e_step(far), model.e_step(there), rtol=1e-12)
    assert model.log_prob(far).device.type == device.type
    close(model.log_prob(far), model.log_prob(there), rtol=1e-12)


@every_model()
def test_nothing_is_mutated(build, device: torch.device) -> None:
    case = build().to(device)
    before = cases.state(case.model)
    kept = case.batch.map(torch.clone)
    stats = case.model.e_step(case.batch)
    copied = stats.map(torch.clone)
    case.model.maximize(stats)
    case.model.log_prob(case.batch), case.model.posterior(case.batch), case.model.most_likely(case.batch)
    case.model.bound(stats)
    cases.unchanged(case.model, before)
    for mine, theirs in zip(case.batch.values(), kept.values(), strict=True):
        assert (mine is None and theirs is None) or identical(mine, theirs)
    for a, b in zip(stats.leaves(), copied.leaves(), strict=True):
        assert torch.equal(a, b)


@every_model()
def test_m_step_leaves_old_tensors_alone(build) -> None:
    case = build()
    old = case.model.snapshot()
    copied = {name: value.clone() for name, value in old.items()}
    case.model.m_step(case.model.e_step(case.batch))
    assert all(torch.equal(old[name], copied[name]) for name in old)
    case.model.assign(old)
    assert all(torch.equal(value, copied[name]) for name, value in case.model.snapshot().items())


@every_model()
def test_state_dict_round_trip(build, device: torch.device) -> None:
    case = build().to(device)
    model = fitted(case.model, case.batch, 3)
    model.tune(MANY)
    fresh = build().to(device).model
    fresh.load_state_dict(model.state_dict())
    close(fresh.log_prob(case.batch), model.log_prob(case.batch), rtol=1e-9)
    close_stats(fresh.e_step(case.batch), model.e_step(case.batch), rtol=1e-8)


@every_model(only=lambda name: "1e" not in name)
def test_float32_near_float64(build, device: torch.device) -> None:
    case = build().to(device)
    x = case.batch.x
    small = copy.deepcopy(case.model).float()
    batch = case.batch.with_x(x.float() if x.is_floating_point() else x)
    value, exact = small.log_prob(batch), case.model.log_prob(case.batch)
    assert value.dtype == torch.float32
    close(value, exact.float(), rtol=1e-4, atol=1e-3)
    stats = small.e_step(batch)
    assert all(leaf.dtype == torch.float64 for leaf in stats.leaves())
    close(stats["log_likelihood"], case.model.e_step(case.batch)["log_likelihood"], rtol=1e-5, atol=1e-3)
    close(small.bound(stats), objective(small, stats), rtol=1e-6, atol=1e-4)


# ---- replicas -----------------------------------------------------------------------------------------------------


@ROUTES
def test_replicas_equal_each_alone(build, rows: int, device: torch.device) -> None:
    case = build().to(device)
    model, batch = case.model, case.batch
    many = model.replicate(3)
    assert many.replicas == (3,)
    assert model.replicas == ()
    for name, parameter in many.named_parameters():
        spread = 0.1 * cases.randn(*parameter.shape, seed=51).to(parameter)
        parameter.data = parameter.data + spread * parameter.data.abs().clamp(min=1e-3)
        assert name
    for _ in range(3):
        stats = many.e_step(batch)
        singles = [many.take_replicas(r) for r in range(3)]
        value, posterior, bound, chosen = (
            many.log_prob(batch), cases.posterior(many, batch), many.bound(stats), many.most_likely(batch),
        )  # fmt: skip
        for r, single in enumerate(singles):
            assert single.replicas == ()
            own = single.e_step(batch)
            close_stats(stats.map(lambda leaf, r=r: leaf[r]), own, rtol=1e-8)
            close(value[r], single.log_prob(batch), rtol=1e-9)
            close(posterior[r], cases.posterior(single, batch), rtol=1e-7)
            close(bound[r], single.bound(own), rtol=1e-9)
            close(chosen[r], single.most_likely(batch), rtol=1e-7)
            single.m_step(own)
        many.m_step(stats)
        for r, single in enumerate(singles):
            close_dict({k: v[r] for k, v in parameters(many).items()}, parameters(single), rtol=1e-7)
        many.tune(rows)
    some = many.take_replicas(torch.tensor([2, 0], device=device))
    assert some.replicas == (2,)
    close(some.log_prob(batch), many.log_prob(batch)[[2, 0]], rtol=1e-9)


# ---- torch.func and torch.compile ---------------------------------------------------------------------------------


def with_detached(model: LatentModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@every_model()
def test_em_map_is_an_em_iteration(build, device: torch.device) -> None:
    case = build().to(device)
    before = cases.state(case.model)
    new = torchem.em_map(case.model)(with_detached(case.model), case.batch)
    cases.unchanged(case.model, before)
    close_dict(new, parameters(fitted(case.model, case.batch, 1)), rtol=1e-12)


@ROOMY
def test_em_map_under_vmap(build, device: torch.device) -> None:
    case = build().to(device)
    step = torchem.em_map(case.model)
    start = with_detached(case.model)
    many = {name: torch.stack([value, value * 1.05, value * 0.9]) for name, value in start.items()}
    batched = torch.func.vmap(step, in_dims=(0, None))(many, case.batch)
    for r in range(3):
        close_dict(
            {k: v[r] for k, v in batched.items()}, step({k: v[r] for k, v in many.items()}, case.batch), rtol=1e-7
        )


@ROOMY
def test_em_map_of_many_problems_at_once(build, device: torch.device) -> None:
    """Parameters and data batched together: many small problems in one call."""
    case = build().to(device)
    half = len(case.batch) // 2
    step, start = torchem.em_map(case.model), with_detached(case.model)
    problems = case.batch[: 2 * half].map(lambda value: value.unflatten(0, (2, half)))
    many = {name: torch.stack([value, value * 0.95]) for name, value in start.items()}
    batched = torch.func.vmap(step)(many, problems)
    for r in range(2):
        alone = step({k: v[r] for k, v in many.items()}, problems.map(lambda value, r=r: value[r]))
        close_dict({k: v[r] for k, v in batched.items()}, alone, rtol=1e-7)


def is_continuous(x: Tensor) -> bool:
    """Whether data may move: no column of them holds counts or categories."""
    return x.is_floating_point() and not bool(((x == x.round()) | x.isnan()).flatten(0, -2).all(0).any())


SMOOTH = every_model(only=lambda name: not any(part in name for part in ("N1", "1e", "Counts", "missing")))


@SMOOTH
def test_em_map_is_differentiable_in_parameters_and_data(build, device: torch.device) -> None:
    case = build().to(device)
    batch = case.batch[:12] if len(case.batch) > 12 else case.batch
    step = torchem.em_map(case.model)
    names = list(parameters(case.model))
    start = [value.requires_grad_() for value in with_detached(case.model).values()]

    def views(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        new = step(dict(zip(names, values, strict=True)), batch.with_x(x))
        # What a finite difference sees of a log-probability is the probability.
        return tuple(v.softmax(-1) if "logits" in name else v for name, v in new.items())

    x = batch.x.clone()
    if is_continuous(x):
        x = x.requires_grad_()
    # Inner ascents end where rounding hides a further rise: their results are exact to its square root only.
    inner = list(case.model.modules())
    ascents, chained = (any(isinstance(module, kind) for module in inner) for kind in (Stationary, HMM))
    eps = 1e-4 if ascents else 1e-5 if chained else 1e-6
    assert torch.autograd.gradcheck(views, (x, *start), eps=eps, atol=1e-4, rtol=1e-4, fast_mode=True, nondet_tol=1e-9)


@every_model(only=lambda name: name.endswith(("K3-D2-N60", "Mixture-Categorical", "Gaussian-full", "HMM-memory")))
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_em_map_by_every_transform_of_torch_func(build) -> None:
    """Reverse, forward and second derivatives agree with each other and under vmap."""
    case = build()
    batch, start = case.batch[:15], with_detached(case.model)
    step = torchem.em_map(case.model)
    reverse = torch.func.jacrev(step)(start, batch)
    forward = torch.func.jacfwd(step)(start, batch)
    for name in start:
        for other in start:
            close(forward[name][other], reverse[name][other], rtol=1e-6, atol=1e-8)


@ROOMY
def test_differentiating_the_e_step_gives_the_score(build, device: torch.device) -> None:
    """The likelihood inside the statistics carries the same gradient as log_prob, weights and evidence included."""
    case = build().to(device)
    values = list(case.model.parameters())
    ours = torch.autograd.grad(case.model.e_step(case.batch)["log_likelihood"], values)
    theirs = torch.autograd.grad(total_log_prob(case.model, case.batch), values)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()) + 1e-12)


@SMOOTH
def test_log_prob_gradcheck_twice(build) -> None:
    case = build()
    batch = case.batch[:4]
    names = list(parameters(case.model))
    start = [value.requires_grad_() for value in with_detached(case.model).values()]
    x = batch.x.clone()
    if is_continuous(x):
        x.requires_grad_()

    def value(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(case.model, dict(zip(names, values, strict=True)), (batch.with_x(x),))

    assert torch.autograd.gradcheck(value, (x, *start), atol=1e-5, rtol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (x, *start), atol=1e-4, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("weighted", [False, True])
def test_impossible_rows_give_minus_infinity_and_no_nan(weighted: bool, device: torch.device) -> None:
    model = cases.mixture(3, 2, "full").to(device)
    evidence = torch.zeros(6, 3, dtype=torch.float64, device=device)
    evidence[2] = -torch.inf
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 0.5], dtype=torch.float64, device=device) if weighted else None
    x = cases.randn(6, 2).to(device).requires_grad_()
    batch = Batch(x, evidence=evidence, weight=weight)
    value = model.log_prob(batch)
    assert torch.equal(value == -torch.inf, torch.arange(6, device=device) == 2)
    posterior = cases.posterior(model, batch)
    assert (posterior[2] == 0).all()
    assert posterior.isfinite().all()
    possible = torch.where(value.isfinite(), value, 0.0)
    grads = torch.autograd.grad(value.sum(), [x, *model.parameters()], retain_graph=True)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][2] == 0).all()
    for a, b in zip(grads, torch.autograd.grad(possible.sum(), [x, *model.parameters()]), strict=True):
        close(a, b)
    if weighted:
        stats = model.e_step(batch)
        assert all(leaf.isfinite().all() for leaf in stats.leaves())
        close(model.bound(stats), (torch.where(weight > 0, value, 0.0) * weight).sum())
        # A row of weight zero is absent from the EM map's derivative as well.
        grads = torch.autograd.grad(sum(v.sum() for v in model.maximize(stats).values()), [x, *model.parameters()])
        assert all(g.isfinite().all() for g in grads)
        assert (grads[0][[2, 4]] == 0).all()
        grads = torch.autograd.grad(model.e_step(batch)["log_likelihood"], [x, *model.parameters()])
        assert all(g.isfinite().all() for g in grads)


@pytest.fixture
def _unchecked():
    """Compile the code itself, not the checks that this suite puts around it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def compiled(model: LatentModel, batch: Batch, backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(lambda b: model.log_prob(b), backend=backend)
    expected = model.log_prob(batch)
    found = run(batch)
    close(found, expected, rtol=1e-9)
    values = list(model.parameters())
    for a, b in zip(torch.autograd.grad(found.sum(), values), torch.autograd.grad(expected.sum(), values), strict=True):
        close(a, b, rtol=1e-8)


COMPILED = ("K3-D2-N60", "Mixture-Categorical-zeros", "HMM-inputs", "HMM-labels")


@every_model(only=lambda name: name.endswith(("full-K3-D2-N60", *COMPILED[1:])))
@pytest.mark.usefixtures("_unchecked")
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:The .grad attribute:UserWarning",
    "ignore:.*_prims_common:FutureWarning",
)
def test_log_prob_compiles(build, device: torch.device) -> None:
    case = build().to(device)
    compiled(case.model, case.batch, "aot_eager")


@pytest.mark.slow
@every_model(only=lambda name: name.endswith(COMPILED))
@pytest.mark.usefixtures("_unchecked")
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:The .grad attribute:UserWarning",
    "ignore:.*_prims_common:FutureWarning",
)
def test_log_prob_compiles_with_inductor(build, device: torch.device) -> None:
    case = build().to(device)
    compiled(case.model, case.batch, "inductor")
