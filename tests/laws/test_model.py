"""The laws of a model, for every model that exists."""

import copy
import inspect
import itertools

import jaxtyping
import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import ModelCase, close, close_dict, close_stats, every_model
from torchem.batch import Batch, concatenate
from torchem.model import DiscreteModel, LatentModel
from torchem.models import GaussianMixture

pytestmark = pytest.mark.usefixtures("_routes_by_rounding")
ROOMY = every_model(only=lambda name: "N1" not in name)


def test_every_model_has_cases() -> None:
    kinds = [getattr(torchem.models, name) for name in torchem.models.__all__]
    concrete = {kind for kind in kinds if inspect.isclass(kind) and not inspect.isabstract(kind)}
    covered = {type(build().model) for build in cases.MODEL_CASES.values()}
    assert concrete <= covered, f"give these a classmethod example(): {concrete - covered}"


def potentials_of(model: DiscreteModel, batch: Batch) -> dict[str, Tensor]:
    tables = model.table_slots()
    return {slot: f.log_table(batch) if slot in tables else f.log_potential(batch) for slot, f in model.slots()}


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
    """25 iterations, tuned as for a pass of so many rows: few take differences, many features about one origin."""
    model, batch = case.model, case.batch
    model.project()
    model.tune(rows)
    values = []
    with torch.no_grad():
        for _ in range(25):
            stats = model.e_step(batch)
            values.append(float(model.bound(stats)))
            model.m_step(stats)
            # Between E and M the bound may only rise too.
            values.append(float(model.bound(stats)))
            model.tune(rows)
    for before, after in itertools.pairwise(values):
        assert after >= before - 1e-9 * (1 + abs(before))


FEW, MANY = 1, 1 << 40


@every_model()
@pytest.mark.parametrize("rows", [FEW, MANY])
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


@every_model()
def test_bound_is_the_log_likelihood_where_it_was_computed(build, device: torch.device) -> None:
    case = build().to(device)
    stats = case.model.e_step(case.batch)
    close(case.model.bound(stats), stats["log_likelihood"], rtol=1e-12)
    close(stats["log_likelihood"], total_log_prob(case.model, case.batch), rtol=1e-9)
    close(stats["count"], weights_of(case.batch).sum(), rtol=1e-12)


@ROOMY
def test_bound_lies_below_the_log_likelihood_elsewhere(build, device: torch.device) -> None:
    case = build().to(device)
    stats = case.model.e_step(case.batch)
    other = fitted(case.model, case.batch, 1)
    gap = float((total_log_prob(other, case.batch) - other.bound(stats)).detach())
    assert gap >= -1e-8 * (1 + abs(float(stats["log_likelihood"].detach())))
    if other.n_parameters() and isinstance(other, GaussianMixture) and other.n_components > 1:
        assert gap > 1e-6, "the bound must be loose once the parameters have moved"


@every_model(only=lambda name: name.startswith("GaussianMixture") or "Categorical" in name)
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
    """∇ Σ w log p(x; θ) = ∇ Q(θ; S(θ)), with S held."""
    case = build().to(device)
    model, values = case.model, list(case.model.parameters())
    with torch.no_grad():
        stats = model.e_step(case.batch)
    score = torch.autograd.grad(total_log_prob(model, case.batch), values)
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
            torn[slot][..., :1, :] = -torch.inf
    weight = cases.rand(len(batch), seed=18).to(batch.x.device)
    weight[::3] = 0.0
    return torn, Batch(*[weight if n == "weight" else getattr(batch, n) for n in batch.__dataclass_fields__])


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


@every_model(only=lambda name: "ixture" in name)
def test_infer_equals_enumeration(build, device: torch.device) -> None:
    case = build().to(device)
    model = case.model
    for potentials, batch in ((potentials_of(model, case.batch), case.batch), hard_potentials(model, case.batch)):
        log_z, expected = model.infer(potentials, batch)
        shape = (len(batch), model.n_components)
        rows = [potentials[slot].expand(shape).tolist() for slot in ("mixing", "component")]
        evidence = [[0.0] * shape[1]] * shape[0] if batch.evidence is None else batch.evidence.tolist()
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


@every_model(only=lambda name: "ixture" in name)
def test_most_likely_is_the_maximum_of_the_posterior(build, device: torch.device) -> None:
    case = build().to(device)
    posterior = case.model.posterior(case.batch)
    close(posterior.sum(-1), torch.ones(len(case.batch)), rtol=1e-12)
    chosen = case.model.most_likely(case.batch)
    assert chosen.dtype == torch.long
    best = posterior.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    close(best, posterior.amax(-1), rtol=1e-12)


@every_model(only=lambda name: "ixture" in name)
def test_most_likely_is_log_partition_with_a_maximum(build, device: torch.device) -> None:
    case = build().to(device)
    potentials = {k: v.detach() for k, v in potentials_of(case.model, case.batch).items()}
    best, pull = torch.func.vjp(
        lambda p: case.model.log_partition(p, case.batch, plus=torchem.ops.reduce.maximum), potentials
    )
    one_hot = pull(torch.ones_like(best))[0]["component"]
    assert torch.equal(one_hot.sum(-1), torch.ones_like(best))
    assert torch.equal(one_hot.argmax(-1), case.model.most_likely(case.batch))


# ---- invariances --------------------------------------------------------------------------------------------------


def tiled(batch: Batch, rows: int) -> Batch:
    """Enough rows for several pieces, none equal to another."""
    index = torch.arange(rows, device=batch.x.device) % len(batch)
    many = batch[index]
    weight = weights_of(many) * (0.5 + cases.rand(rows, seed=5).to(batch.x.device))
    return Batch(*[weight if n == "weight" else getattr(many, n) for n in batch.__dataclass_fields__])


@ROOMY
def test_invariance_to_chunks_and_order(build, device: torch.device) -> None:
    case = build().to(device)
    batch = tiled(case.batch, 300)
    model = case.model
    whole, log_prob, posterior = model.e_step(batch), model.log_prob(batch), model.posterior(batch)
    model.memory_budget = 1  # pieces of 128 rows
    assert len(list(model.stream(batch))) == 3
    close_stats(model.e_step(batch), whole, rtol=1e-10)
    close(model.log_prob(batch), log_prob, rtol=1e-12)
    close(model.posterior(batch), posterior, rtol=1e-9)
    order = torch.randperm(300, generator=cases.rng(1)).to(device)
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
    bare = Batch(*[None if n == "weight" else getattr(case.batch, n) for n in case.batch.__dataclass_fields__])
    weighted = Batch(*[repeats.double() if n == "weight" else getattr(bare, n) for n in bare.__dataclass_fields__])
    repeated = bare[torch.repeat_interleave(torch.arange(len(bare), device=device), repeats)]
    close_stats(case.model.e_step(weighted), case.model.e_step(repeated))
    close(case.model.log_prob(weighted), case.model.log_prob(bare), rtol=1e-12)
    ones = Batch(
        *[torch.ones_like(weighted.weight) if n == "weight" else getattr(bare, n) for n in bare.__dataclass_fields__]
    )
    close_stats(case.model.e_step(ones), case.model.e_step(bare), rtol=1e-12)


@every_model(only=lambda name: "ixture" in name)
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
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
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
    close(small.bound(stats), stats["log_likelihood"], rtol=1e-6, atol=1e-4)


# ---- replicas -----------------------------------------------------------------------------------------------------


@every_model()
@pytest.mark.parametrize("rows", [FEW, MANY])
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
            many.log_prob(batch), many.posterior(batch), many.bound(stats), many.most_likely(batch),
        )  # fmt: skip
        for r, single in enumerate(singles):
            assert single.replicas == ()
            own = single.e_step(batch)
            close_stats(stats.map(lambda leaf, r=r: leaf[r]), own, rtol=1e-8)
            close(value[r], single.log_prob(batch), rtol=1e-9)
            close(posterior[r], single.posterior(batch), rtol=1e-7)
            close(bound[r], single.bound(own), rtol=1e-9)
            assert torch.equal(chosen[r], single.most_likely(batch))
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


SMOOTH = every_model(only=lambda name: "N1" not in name and "1e" not in name and "Counts" not in name)


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
    if x.is_floating_point():
        x = x.requires_grad_()
    assert torch.autograd.gradcheck(views, (x, *start), eps=1e-6, atol=1e-4, rtol=1e-4, fast_mode=True, nondet_tol=1e-9)


@every_model(only=lambda name: name.endswith(("K3-D2-N60", "Mixture-Categorical")))
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
    if x.is_floating_point():
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
    posterior = model.posterior(batch)
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


COMPILED = every_model(only=lambda name: name.endswith(("K3-D2-N60", "Mixture-Categorical-zeros")))


@COMPILED
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
@COMPILED
@pytest.mark.usefixtures("_unchecked")
@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:The .grad attribute:UserWarning",
    "ignore:.*_prims_common:FutureWarning",
)
def test_log_prob_compiles_with_inductor(build, device: torch.device) -> None:
    case = build().to(device)
    compiled(case.model, case.batch, "inductor")
