"""Chains of discrete states, kernel by kernel, against the sum over all paths and against the plain log domain."""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import hypothesis
import hypothesis.strategies as st
import jaxtyping
import pytest
import torch
from torch import Tensor

from tests.laws.cases import close, rand, randn, rng
from torchem.ops import chain, scan
from torchem.ops.dispatch import compiled_chain, time_blocks
from torchem.ops.reduce import maximum

CPU = torch.device("cpu")
#: Each kernel, and the scan with time cut into a few blocks whatever the costs are.
NAMES = ["scan", "blocks", *(["compiled"] if compiled_chain(CPU) else [])]
# What runs is fixed for all examples of a test.
FIXED = [hypothesis.HealthCheck.function_scoped_fixture]
many = hypothesis.settings(suppress_health_check=FIXED)
few = hypothesis.settings(suppress_health_check=FIXED, max_examples=8)


def use(name: str, monkeypatch: pytest.MonkeyPatch, blocks: int = 4) -> None:
    module = compiled_chain(CPU) if name == "compiled" else scan
    assert isinstance(module, ModuleType)
    monkeypatch.setattr(chain, "chain_kernel", lambda emission: module)
    if name == "blocks":
        monkeypatch.setattr(scan, "time_blocks", lambda s, t, k, device: blocks)


@pytest.fixture(params=NAMES)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> str:
    if request.param == "compiled" and device.type != "cpu":
        pytest.skip("compiled for the CPU")
    use(request.param, monkeypatch)
    return request.param


# ---- cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Potentials of some chains, on the CPU until moved."""

    initial: Tensor
    transition: Tensor
    emission: Tensor
    lengths: Tensor | None = None
    weight: Tensor | None = None

    def on(self, device: torch.device) -> "Case":
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Case(**{name: None if value is None else value.to(device) for name, value in fields.items()})

    @property
    def potentials(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.initial, self.transition, self.emission

    @property
    def varying(self) -> bool:
        return self.transition.dim() > self.emission.dim()

    @property
    def lead(self) -> torch.Size:
        extra = self.transition.dim() - self.emission.dim()
        return torch.broadcast_shapes(
            self.initial.shape[:-1], self.transition.shape[: -2 - extra], self.emission.shape[:-2],
            *([] if self.lengths is None else [self.lengths.shape]),
        )  # fmt: skip


@st.composite
def cases(
    draw: st.DrawFn, states: int = 3, frames: int = 4, holes: bool = True, scale: float = 3.0, dense: bool = False
) -> Case:
    """Chains so small that all paths can be listed, with every freedom that the layout allows."""
    k, t = draw(st.integers(1, states)), draw(st.integers(1, frames))
    lead = draw(st.sampled_from([(), (1,), (3,), (0,), (2, 3), (2, 1), (1, 3)]))
    varying, seed = draw(st.booleans()), draw(st.integers(0, 10_000))
    generator = rng(seed)

    def potential(*event: int, sparse: bool) -> Tensor:
        own = [size if draw(st.booleans()) else 1 for size in lead]
        value = scale * torch.randn(*own, *event, generator=generator, dtype=torch.float64)
        share = draw(st.sampled_from([0.0, 0.2, 0.5])) if sparse and holes else 0.0
        return value.masked_fill(torch.rand(value.shape, generator=generator) < share, -torch.inf)

    initial = potential(k, sparse=True)
    transition = potential(*([t - 1] if varying else []), k, k, sparse=not dense)
    emission = potential(t, k, sparse=True)
    lengths = torch.randint(1, t + 1, lead, generator=generator) if draw(st.booleans()) else None
    weight = torch.randn(lead, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    if weight is not None:
        weight = torch.where(torch.rand(lead, generator=generator) < 0.3, 0.0, weight)
    case = Case(initial, transition, emission, lengths, weight)
    # One potential must have the axes that weights speak of.
    return replace(case, emission=emission.expand(*lead, t, k).contiguous()) if case.lead != torch.Size(lead) else case


@dataclass(frozen=True)
class Truth:
    """What the list of all paths says."""

    log_z: Tensor
    first: Tensor
    pairs: Tensor
    gamma: Tensor
    filtered: Tensor
    score: Tensor
    path: Tensor
    paths: list[tuple[Tensor, Tensor]]


def listed(initial: Tensor, transition: Tensor, emission: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """All paths ``[P, length]`` of one chain and their scores."""
    k = len(initial)
    paths = torch.tensor(list(itertools.product(range(k), repeat=length)))
    score = initial[paths[:, 0]] + emission[torch.arange(length), paths].sum(-1)
    for t in range(1, length):
        step = transition if transition.dim() == 2 else transition[t - 1]
        score = score + step[paths[:, t - 1], paths[:, t]]
    return paths, score


def shares(score: Tensor) -> Tensor:
    """Posterior of each path; zeros where none is possible."""
    top = score.amax()
    return torch.zeros_like(score) if top == -torch.inf else score.softmax(0)


def enumerated(case: Case) -> Truth:
    t, k = case.emission.shape[-2:]
    lead, extra = case.lead, case.transition.dim() - case.emission.dim()
    size = math.prod(lead)
    initial = case.initial.expand(*lead, k).reshape(size, k)
    steps = case.transition.expand(*lead, *case.transition.shape[-2 - extra :])
    steps = steps.reshape((size, *steps.shape[len(lead) :]))
    emission = case.emission.expand(*lead, t, k).reshape(size, t, k)
    lengths = torch.full(lead, t) if case.lengths is None else case.lengths.expand(lead)
    weight = torch.ones(lead, dtype=torch.float64) if case.weight is None else case.weight.expand(lead)
    log_z, score = (torch.full((size,), -torch.inf, dtype=torch.float64) for _ in range(2))
    gamma, filtered = (torch.zeros(size, t, k, dtype=torch.float64) for _ in range(2))
    pairs = torch.zeros(size, max(t - 1, 0), k, k, dtype=torch.float64)
    path, every = torch.full((size, t), -1), []
    for s, length in enumerate(lengths.reshape(-1).tolist()):
        paths, scores = listed(initial[s], steps[s], emission[s], length)
        log_z[s] = scores.logsumexp(0)
        every.append((paths, scores))
        share = shares(scores) * weight.reshape(-1)[s]
        for place in range(length):
            gamma[s, place] = torch.zeros(k, dtype=torch.float64).index_add(0, paths[:, place], share)
            before, so_far = listed(initial[s], steps[s], emission[s], place + 1)
            filtered[s, place].index_add_(0, before[:, place], shares(so_far))
        for place in range(length - 1):
            cell = paths[:, place] * k + paths[:, place + 1]
            pairs[s, place] = torch.zeros(k * k, dtype=torch.float64).index_add(0, cell, share).view(k, k)
        best = scores.amax()
        score[s] = best
        if best > -torch.inf:
            # Ties go to the lowest last state, and so on backwards.
            path[s, :length] = torch.tensor(min(paths[scores == best].tolist(), key=lambda p: p[::-1]))
        else:
            filtered[s] = 0

    def back(value: Tensor) -> Tensor:
        return value.reshape((*lead, *value.shape[1:]))

    steps_like = back(pairs) if case.varying else back(pairs.sum(1))
    return Truth(
        back(log_z), back(gamma[:, 0]).sum_to_size(case.initial.shape), steps_like.sum_to_size(case.transition.shape),
        back(gamma).sum_to_size(case.emission.shape), back(filtered), back(score), back(path), every,
    )  # fmt: skip


# ---- the list of all paths ----------------------------------------------------------------------------------------


@many
@hypothesis.given(case=cases())
def test_reference(case: Case, device: torch.device) -> None:
    truth, case = enumerated(case), case.on(device)
    close(chain.reference(*case.potentials, case.lengths).expand(truth.log_z.shape).cpu(), truth.log_z)
    best = chain.reference(*case.potentials, case.lengths, maximum)
    close(best.expand(truth.score.shape).cpu(), truth.score)


@many
@hypothesis.given(case=cases())
def test_log_normalizer(case: Case, kernel: str, device: torch.device) -> None:
    truth, case = enumerated(case), case.on(device)
    close(chain.log_normalizer(*case.potentials, case.lengths).expand(truth.log_z.shape).cpu(), truth.log_z)


@many
@hypothesis.given(case=cases())
def test_expectations(case: Case, kernel: str, device: torch.device) -> None:
    truth, case = enumerated(case), case.on(device)
    log_z, first, pairs, gamma = chain.expectations(*case.potentials, case.lengths, case.weight)
    close(log_z.expand(truth.log_z.shape).cpu(), truth.log_z)
    for found, wanted in ((first, truth.first), (pairs, truth.pairs), (gamma, truth.gamma)):
        assert found.shape == wanted.shape
        close(found.cpu(), wanted)


@many
@hypothesis.given(case=cases(dense=True, frames=6, states=2))
@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_blocks_of_time(case: Case, blocks: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Every number of blocks, more of them than frames or than some sequences have."""
    use("blocks", monkeypatch, blocks)
    truth, case = enumerated(case), case.on(device)
    close(chain.log_normalizer(*case.potentials, case.lengths).expand(truth.log_z.shape).cpu(), truth.log_z)
    found = chain.expectations(*case.potentials, case.lengths, case.weight)
    for value, wanted in zip(found[1:], (truth.first, truth.pairs, truth.gamma), strict=True):
        close(value.cpu(), wanted)
    close(chain.filter(*case.potentials, case.lengths)[1].expand(truth.filtered.shape).cpu(), truth.filtered)


@many
@hypothesis.given(case=cases())
def test_filter(case: Case, kernel: str, device: torch.device) -> None:
    truth, case = enumerated(case), case.on(device)
    log_z, filtered = chain.filter(*case.potentials, case.lengths)
    close(log_z.expand(truth.log_z.shape).cpu(), truth.log_z)
    close(filtered.expand(truth.filtered.shape).cpu(), truth.filtered)


@many
@hypothesis.given(case=cases())
def test_viterbi(case: Case, kernel: str, device: torch.device) -> None:
    # Whole numbers tie exactly.
    case = replace(case, **{name: getattr(case, name).round() for name in ("initial", "transition", "emission")})
    truth, case = enumerated(case), case.on(device)
    score, path = chain.viterbi(*case.potentials, case.lengths)
    assert torch.equal(score.expand(truth.score.shape).cpu(), truth.score)
    assert torch.equal(path.expand(truth.path.shape).cpu(), truth.path)


@many
@hypothesis.given(case=cases(), count=st.integers(1, 9))
def test_best_paths(case: Case, count: int, device: torch.device) -> None:
    truth, case = enumerated(case), case.on(device)
    scores, paths = chain.best_paths(*case.potentials, count, case.lengths)
    k, t = case.emission.shape[-1], case.emission.shape[-2]
    scores, paths = scores.cpu().reshape(len(truth.paths), count), paths.cpu().reshape(len(truth.paths), count, t)
    for (every, values), score, path in zip(truth.paths, scores, paths, strict=True):
        length = every.shape[1]
        wanted = torch.full((count,), -torch.inf, dtype=torch.float64)
        best = values.sort(descending=True).values[:count]
        wanted[: len(best)] = best
        close(score, wanted)
        found = int((score > -torch.inf).sum())
        assert (path[found:] == -1).all()
        assert (path[:found, length:] == -1).all()
        code = (path[:found, :length] * k ** torch.arange(length - 1, -1, -1)).sum(-1)
        assert len(code.unique()) == found, "each path once"
        close(values[code], score[:found])


def test_ties_go_to_the_lowest_state(kernel: str, device: torch.device) -> None:
    flat = Case(*(torch.zeros(shape, dtype=torch.float64) for shape in ((2, 3), (1, 3, 3), (2, 40, 3)))).on(device)
    assert (chain.viterbi(*flat.potentials)[1] == 0).all()
    assert (chain.best_paths(*flat.potentials, 1)[1] == 0).all()


@few
@hypothesis.given(case=cases(frames=3, scale=1.0))
def test_draws_have_the_posterior(case: Case, kernel: str, device: torch.device) -> None:
    """Frequencies of whole paths, within five standard deviations; what cannot be is never drawn."""
    draws = 4000
    truth = enumerated(replace(case, weight=None))
    k, t = case.emission.shape[-1], case.emission.shape[-2]
    one = Case(
        case.initial.unsqueeze(0), case.transition.unsqueeze(0),
        case.emission.expand(*case.lead, t, k).expand(draws, *case.lead, t, k),
        None if case.lengths is None else case.lengths.expand(case.lead),
    ).on(device)  # fmt: skip
    path = chain.sample(*one.potentials, one.lengths, rng(0)).cpu().reshape(draws, len(truth.paths), t)
    for s, (every, values) in enumerate(truth.paths):
        length = every.shape[1]
        assert (path[:, s, length:] == -1).all()
        if values.amax() == -torch.inf:
            assert (path[:, s] == -1).all()
            continue
        code = (path[:, s, :length] * k ** torch.arange(length - 1, -1, -1)).sum(-1)
        share = torch.bincount(code, minlength=len(values)) / draws
        wanted = shares(values)
        assert (share[values == -torch.inf] == 0).all()
        assert ((share - wanted).abs() <= 5 * (wanted * (1 - wanted) / draws).sqrt() + 1e-3).all()


# ---- what a probability flushes -----------------------------------------------------------------------------------

INF = math.inf


def potentials(initial: object, transition: object, emission: Tensor) -> Case:
    return Case(*(torch.as_tensor(v, dtype=torch.float64) for v in (initial, transition, emission)))


def evidence(frames: int, states: int, nats: float, *spans: tuple[int, int, int]) -> Tensor:
    """Zero but for spans of frames that speak for one state."""
    value = torch.zeros(frames, states, dtype=torch.float64)
    for start, stop, state in spans:
        value[start:stop, state] = nats
    return value


def steps(states: int, stay: float, ahead: float, other: float = -INF) -> Tensor:
    table = torch.full((states, states), other, dtype=torch.float64)
    table[range(states - 1), range(1, states)] = ahead
    return table.fill_diagonal_(stay)


TURNED = evidence(230, 2, 10.0, (0, 100, 0), (100, 230, 1))
TRAPS: dict[str, Case] = {
    "absorbing": potentials([0, 0], steps(2, 0, -INF), TURNED),
    "three absorbing": potentials(
        [0, -1, -2], steps(3, 0, -INF), evidence(330, 3, 10.0, (0, 90, 0), (90, 200, 1), (200, 330, 2))
    ),
    "initial beyond the exponent": potentials([0, -1000], steps(2, 0, -INF), evidence(130, 2, 10.0, (0, 130, 1))),
    "initial beyond float32": potentials([0, -200], steps(2, 0, -INF), evidence(130, 2, 10.0, (0, 130, 1))),
    "one rare step": potentials([0, -INF], steps(2, 0, -1000), TURNED),
    "one step rare in float32": potentials([0, -INF], steps(2, 0, -120), TURNED),
    "rare both ways": potentials([0, -INF], steps(2, 0, -1000, -1000), TURNED),
    "dense of 1e-60": potentials([0, -INF], steps(2, 0, -138, -138), TURNED),
    "dense of 1e-22": potentials([0, -INF], steps(2, 0, -50, -50), TURNED),
    "dense of 1e-5": potentials([0, -INF], steps(2, 0, -11, -11), TURNED),
    "first frame denies the start": potentials([0, -INF], steps(2, 0, -1, -1), evidence(6, 2, -740.3, (0, 1, 0))),
    "the same in float32": potentials([0, -INF], steps(2, 0, -1, -1), evidence(6, 2, -100.3, (0, 1, 0))),
    "start of 1e4": Case(1e4 * randn(3), randn(3, 3, seed=1), 1e4 * randn(50, 3, seed=2)),
    "emissions of 1e4": Case(randn(3), randn(3, 3, seed=1), 1e4 * randn(50, 3, seed=2)),
    "emissions of 1e4, left to right": Case(randn(3), steps(3, 0, -1), 1e4 * randn(50, 3, seed=2)),
    "transitions of 1e4": Case(randn(3), 1e4 * randn(3, 3, seed=1), 1e4 * randn(50, 3, seed=2)),
    "left to right": potentials(
        [0, *[-INF] * 4], steps(5, -0.1, -2), evidence(200, 5, 25.0, *((40 * k, 40 * (k + 1), k) for k in range(5)))
    ),
    "left to right at the last moment": potentials(
        [0, *[-INF] * 4], steps(5, -0.1, -2), evidence(200, 5, 8.0, (0, 190, 0)) + evidence(200, 5, 3e3, (197, 200, 4))
    ),
    "left to right from the start": potentials(
        [0, *[-INF] * 4], steps(5, -0.1, -2), evidence(200, 5, 20.0, (0, 200, 4))
    ),
    "a step seldom taken among zeros": potentials(
        [0, -INF, -INF], steps(3, 0, -700), evidence(200, 3, 12.0, (9, 200, 2))
    ),
}  # fmt: skip


def by_logarithms(case: Case) -> tuple[Tensor, ...]:
    """log Z and its weighted gradients by the plain recursion in float64."""
    inputs = [value.double().requires_grad_() for value in case.potentials]
    log_z = chain.reference(*inputs, case.lengths)
    weight = torch.ones_like(log_z) if case.weight is None else case.weight
    total = (torch.where(log_z > -INF, log_z, 0.0) * weight).sum()
    return log_z.detach(), *torch.autograd.grad(total, inputs)


@functools.cache
def trap(name: str, dtype: torch.dtype) -> tuple[Case, tuple[Tensor, ...]]:
    case = Case(*(value.to(dtype) for value in TRAPS[name].potentials))
    return case, by_logarithms(case)


def near(case: Case, truth: tuple[Tensor, ...], tolerance: float) -> None:
    """All that a kernel gives in a dtype against the plain recursion in float64 on the same numbers."""
    log_z, *found = chain.expectations(*case.potentials, case.lengths, case.weight)
    alone = chain.log_normalizer(*case.potentials, case.lengths)
    for value in (log_z, alone, chain.filter(*case.potentials, case.lengths)[0]):
        assert value.dtype == case.emission.dtype
        close(value.cpu().double(), truth[0], rtol=tolerance, atol=tolerance)
    for value, wanted in zip(found, truth[1:], strict=True):
        # Next to nothing is as good as nothing.
        close(value.cpu().double(), wanted, rtol=100 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", TRAPS)
def test_nothing_that_a_later_frame_needs_is_lost(
    name: str, dtype: torch.dtype, kernel: str, device: torch.device
) -> None:
    case, truth = trap(name, dtype)
    near(case.on(device), truth, 1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("varying", [False, True])
def test_random_chains_of_every_sparsity(varying: bool, dtype: torch.dtype, kernel: str, device: torch.device) -> None:
    for seed in range(6):
        k, t, s = 2 + seed % 3, 40, 5
        shape = (s, t - 1, k, k) if varying else (1, k, k)
        transition = 10.0 ** (seed % 3) * randn(*shape, seed=seed)
        transition = transition.masked_fill(rand(*shape, seed=seed + 1) < 0.15 * (seed % 4), -INF)
        emission = 10.0 ** (1 + seed % 3) * randn(s, t, k, seed=seed + 2)
        emission = emission.masked_fill(rand(s, t, k, seed=seed + 3) < 0.02, -INF)
        lengths = torch.tensor([t, 1, 7, t - 1, t])
        weight = torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64)
        case = Case(100 * randn(1, k, seed=seed + 4), transition, emission, lengths, weight)
        case = replace(case, **{n: getattr(case, n).to(dtype) for n in ("initial", "transition", "emission")})
        near(case.on(device), by_logarithms(case), 1e-9 if dtype == torch.float64 else 2e-6)


@functools.cache
def filtered(name: str) -> dict[int, Tensor]:
    """p(z_t | x_1…t) at some frames: the law of the last state of the chain cut there."""
    initial, transition, emission = TRAPS[name].potentials
    only = torch.full_like(transition, -INF).fill_diagonal_(0)
    laws = {}
    for place in (0, 1, 5, len(emission) // 2, len(emission) - 1):
        before = emission[:place].expand(len(only), -1, -1)
        ends = torch.cat([before, emission[place] + only.unsqueeze(1)], 1)
        laws[place] = chain.reference(initial.unsqueeze(0), transition.unsqueeze(0), ends).softmax(0)
    return laws


@pytest.mark.parametrize("name", TRAPS)
def test_filtered_probabilities_in_the_traps(name: str, kernel: str, device: torch.device) -> None:
    found = chain.filter(*TRAPS[name].on(device).potentials)[1].cpu()
    for place, wanted in filtered(name).items():
        close(found[place], wanted, rtol=1e-8, atol=1e-9)


# ---- impossible chains, broken numbers ----------------------------------------------------------------------------


def test_impossible_chains(kernel: str, device: torch.device) -> None:
    """−inf and zeros for each way of being impossible, and not a trace of it in the other chains."""
    plain = Case(randn(1, 3), randn(1, 3, 3, seed=1), randn(6, 12, 3, seed=2)).on(device)
    emission = plain.emission.clone()
    emission[0, 0], emission[1, 5], emission[2, 11], emission[3, 4:8] = -INF, -INF, -INF, -INF
    lengths = torch.tensor([12, 12, 12, 12, 12, 5], device=device)
    weight = torch.tensor([1.0, 0.0, 2.0, 1.0, 2.0, 0.5], dtype=torch.float64, device=device)
    case = replace(plain, emission=emission, lengths=lengths, weight=weight)
    bad = torch.arange(6, device=device) < 4
    log_z, first, pairs, gamma = chain.expectations(*case.potentials, lengths, weight)
    assert torch.equal(log_z == -INF, bad)
    assert (gamma[:4] == 0).all()
    alone = chain.expectations(*plain.potentials, lengths, torch.where(bad, 0.0, weight))
    for a, b in zip((log_z[4:], first, pairs, gamma), (alone[0][4:], *alone[1:]), strict=True):
        close(a, b, rtol=1e-12)
    assert torch.equal(chain.log_normalizer(*case.potentials, lengths) == -INF, bad)
    found, filtered = chain.filter(*case.potentials, lengths)
    assert torch.equal(found == -INF, bad)
    assert (filtered[:4] == 0).all()
    score, path = chain.viterbi(*case.potentials, lengths)
    assert torch.equal(score == -INF, bad)
    assert (path[:4] == -1).all()
    assert (chain.sample(*case.potentials, lengths, rng(0))[:4] == -1).all()
    scores, paths = chain.best_paths(*case.potentials, 3, lengths)
    assert (scores[:4] == -INF).all()
    assert (paths[:4] == -1).all()


def test_what_forbids_a_chain_may_be_its_start_or_its_steps(kernel: str, device: torch.device) -> None:
    zero = torch.zeros(5, 2, dtype=torch.float64, device=device)
    no = torch.full((2,), -INF, dtype=torch.float64, device=device)
    table = torch.tensor([[-INF, -INF], [0.0, 0.0]], dtype=torch.float64, device=device)
    start = torch.tensor([0.0, -INF], dtype=torch.float64, device=device)
    for initial, transition in ((no, torch.zeros_like(table)), (zero[0], no.expand(2, 2)), (start, table)):
        log_z, *rest = chain.expectations(initial, transition, zero)
        assert log_z == -INF
        assert all((value == 0).all() for value in rest)
        assert chain.log_normalizer(initial, transition, zero) == -INF
        # One frame takes no step.
        one = chain.log_normalizer(initial, transition, zero[:1])
        assert float(one) == float(initial.logsumexp(0))


def test_nan_is_seen_and_stays_where_it_is(kernel: str, device: torch.device) -> None:
    case = Case(randn(1, 2), randn(1, 2, 2, seed=1), randn(3, 9, 2, seed=2)).on(device)
    case.emission[1, 4, 0] = math.nan
    lengths = torch.tensor([9, 9, 9], device=device)
    for value in (chain.log_normalizer(*case.potentials), chain.expectations(*case.potentials, lengths)[0],
                  chain.filter(*case.potentials)[0]):  # fmt: skip
        assert value.isnan().tolist() == [False, True, False]


def test_padding_never_matters(kernel: str, device: torch.device) -> None:
    case = Case(randn(1, 3), randn(1, 3, 3, seed=1), randn(4, 10, 3, seed=2)).on(device)
    lengths = torch.tensor([10, 1, 4, 7], device=device)
    other = case.emission.clone()
    for s, length in enumerate(lengths.tolist()):
        other[s, length:] = torch.tensor([-INF, 1e4, -50.0]) if s % 2 else -INF
    first = chain.expectations(case.initial, case.transition, case.emission, lengths)
    second = chain.expectations(case.initial, case.transition, other, lengths)
    for a, b in zip(first, second, strict=True):
        close(a, b, rtol=1e-12, atol=1e-14)
    for s, length in enumerate(lengths.tolist()):
        alone = chain.expectations(case.initial, case.transition, case.emission[s : s + 1, :length])
        close(first[0][s : s + 1], alone[0], rtol=1e-12)
        close(first[3][s : s + 1, :length], alone[3], rtol=1e-10, atol=1e-12)
        assert (first[3][s, length:] == 0).all()


# ---- derivatives --------------------------------------------------------------------------------------------------


def torn(lead: tuple[int, ...], varying: bool, device: torch.device, k: int = 3, t: int = 4) -> Case:
    """Chains with holes everywhere, padding, weights of either sign and zero, and an impossible one among them."""
    s = math.prod(lead)
    steps = (*lead, t - 1, k, k) if varying else (*[1] * len(lead), k, k)
    initial, transition, emission = randn(*[1] * len(lead), k), randn(*steps, seed=1), randn(*lead, t, k, seed=2)
    initial[..., 1], transition[..., 0, 2] = -INF, -INF
    emission[..., 1, 0] = -INF
    emission.view(s, t, k)[s - 1, 0] = -INF
    lengths = torch.tensor([t, 2, 1, t, 3, t][:s]).view(lead)
    weight = torch.tensor([1.0, -0.7, 2.0, 0.0, 1.3, 0.4][:s], dtype=torch.float64).view(lead)
    return Case(initial, transition, emission, lengths, weight).on(device)


def finite(value: Tensor) -> Tensor:
    return torch.where(value > -INF, value, 0.0)


@pytest.mark.parametrize("varying", [False, True])
def test_gradients_are_those_of_the_reference(varying: bool, kernel: str, device: torch.device) -> None:
    case = torn((4,), varying, device)
    inputs = [value.requires_grad_() for value in case.potentials]
    for weight in (torch.ones(4, dtype=torch.float64, device=device), case.weight):
        ours = torch.autograd.grad(chain.log_normalizer(*inputs, case.lengths), inputs, weight)
        theirs = torch.autograd.grad(chain.reference(*inputs, case.lengths), inputs, weight)
        for a, b, value in zip(ours, theirs, inputs, strict=True):
            assert a.isfinite().all()
            assert (a[value == -INF] == 0).all()
            close(a, b)
        assert (ours[2][3] == 0).all(), "an impossible chain has no gradient"
        assert (ours[2][1, 2:] == 0).all(), "padding has none"


@pytest.mark.parametrize("varying", [False, True])
def test_log_normalizer_gradcheck_twice(varying: bool, kernel: str, device: torch.device) -> None:
    case = torn((3,), varying, device, t=3)

    def value(*inputs: Tensor) -> Tensor:
        return finite(chain.log_normalizer(*inputs, case.lengths))

    inputs = [v.requires_grad_() for v in case.potentials]
    assert torch.autograd.gradcheck(value, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(value, inputs, fast_mode=True)


@pytest.mark.parametrize("varying", [False, True])
def test_expectations_gradcheck_twice(varying: bool, kernel: str, device: torch.device) -> None:
    case = torn((3,), varying, device, t=3)

    def value(weight: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        log_z, *expected = chain.expectations(*inputs, case.lengths, weight)
        return finite(log_z), *expected

    inputs = [case.weight.requires_grad_(), *(v.requires_grad_() for v in case.potentials)]
    assert torch.autograd.gradcheck(value, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_transforms_of_torch_func(kernel: str, device: torch.device) -> None:
    """grad, jacrev, jvp and hessian agree with those of the reference."""
    case = torn((2,), False, device, t=3)
    places = (0, 1, 2)

    def ours(*inputs: Tensor) -> Tensor:
        return finite(chain.log_normalizer(*inputs, case.lengths)) @ case.weight

    def theirs(*inputs: Tensor) -> Tensor:
        return finite(chain.reference(*inputs, case.lengths)) @ case.weight

    inputs = case.potentials
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        for a, b in zip(
            torch.utils._pytree.tree_leaves(transform(ours, argnums=places)(*inputs)),
            torch.utils._pytree.tree_leaves(transform(theirs, argnums=places)(*inputs)),
            strict=True,
        ):
            close(a, b)
    tangents = tuple(torch.ones_like(value) for value in inputs)
    for a, b in zip(torch.func.jvp(ours, inputs, tangents), torch.func.jvp(theirs, inputs, tangents), strict=True):
        close(a, b)


IN_DIMS = [(0, 0, 0, 0), (None, None, 0, None), (0, None, None, None), (None, 0, None, 0), (None, None, None, 0)]


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_is_a_loop(in_dims: tuple[int | None, ...], varying: bool, kernel: str, device: torch.device) -> None:
    """Batched potentials, batched lengths, and any of them shared; values, expectations and gradients."""
    case = torn((2, 3), varying, device)
    table = (
        case.transition
        if varying
        else case.transition.expand(2, 1, 3, 3) * torch.tensor([[1.0], [0.5]]).to(device)[..., None, None]
    )
    parts = [case.initial.expand(2, 1, 3) + randn(2, 1, 1, seed=9).to(device), table, case.emission, case.lengths]
    args = [value if axis == 0 else value[0] for value, axis in zip(parts, in_dims, strict=True)]
    weight = case.weight[0]

    def gradient(*args: Tensor) -> tuple[Tensor, ...]:
        def total(*inputs: Tensor) -> Tensor:
            return finite(chain.log_normalizer(*inputs, args[3])) @ weight

        return torch.func.grad(total, argnums=(0, 1, 2))(*args[:3])

    functions = (
        chain.log_normalizer, lambda *a: chain.expectations(*a), lambda *a: chain.expectations(*a, weight), gradient,
    )  # fmt: skip
    leaves = torch.utils._pytree.tree_leaves
    for function in functions:
        batched = leaves(torch.func.vmap(function, in_dims=in_dims)(*args))
        singles = [[v if axis is None else v[r] for v, axis in zip(args, in_dims, strict=True)] for r in range(2)]
        for found, *wanted in zip(batched, *(leaves(function(*single)) for single in singles), strict=True):
            close(found, torch.stack(wanted))


@pytest.fixture
def _unchecked() -> Iterator[None]:
    """Compile the code itself, not the checks that this suite puts around it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.filterwarnings("ignore:.*_prims_common:FutureWarning")
@pytest.mark.parametrize("varying", [False, True])
def test_compiles(varying: bool, kernel: str, device: torch.device) -> None:
    torch._dynamo.reset()
    case = torn((4,), varying, device)
    inputs = [value.requires_grad_() for value in case.potentials]

    def value(*inputs: Tensor) -> Tensor:
        return finite(chain.log_normalizer(*inputs, case.lengths)) * 2

    found, expected = torch.compile(value, backend="aot_eager", fullgraph=True)(*inputs), value(*inputs)
    close(found, expected)
    for a, b in zip(torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True):
        close(a, b)


# ---- long chains --------------------------------------------------------------------------------------------------


def long(frames: int, dtype: torch.dtype = torch.float32) -> Case:
    """Two states, log-densities of a few nats, as float32 numbers that are exact in float64."""
    emission = -2 + randn(frames, 2, seed=3)
    return Case(*(torch.as_tensor(v).to(torch.float32).to(dtype) for v in (
        torch.tensor([-0.5, -1.0]), torch.tensor([[-0.1, -2.4], [-1.6, -0.2]]), emission,
    )))  # fmt: skip


@functools.cache
def by_hand(frames: int) -> float:
    """log Z of two states in float64, with every logarithm summed exactly."""
    case = long(frames)
    (a, b), ((p, q), (r, s)) = case.initial.double().exp().tolist(), case.transition.double().exp().tolist()
    logs = []
    for place, (x, y) in enumerate(case.emission.double().exp().tolist()):
        if place:
            a, b = a * p + b * r, a * q + b * s
        a, b = a * x, b * y
        total = a + b
        logs.append(math.log(total))
        a, b = a / total, b / total
    return math.fsum(logs)


@pytest.mark.parametrize("frames", [10_000, 100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_float32_does_not_drift(frames: int, kernel: str, device: torch.device) -> None:
    """A pure recursion of logarithms in float32 is 40 nats off after 1e5 frames."""
    if kernel == "blocks":
        pytest.skip("the scan chooses blocks itself")
    case, truth = long(frames).on(device), by_hand(frames)
    found = [chain.log_normalizer(*case.potentials)]
    if frames < 1_000_000:
        found += [chain.expectations(*case.potentials)[0], chain.filter(*case.potentials)[0]]
    for value in found:
        assert value.dtype == torch.float32
        assert abs(float(value) - truth) < 1e-6 * abs(truth)


def test_float32_does_not_drift_in_one_block(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    use("blocks", monkeypatch, 1)
    truth = by_hand(10_000)
    assert abs(float(chain.log_normalizer(*long(10_000).on(device).potentials)) - truth) < 1e-6 * abs(truth)


def test_long_chains_are_cut_into_blocks(device: torch.device) -> None:
    assert time_blocks(1, 10_000, 2, device) > 8


def test_posteriors_of_long_chains(kernel: str, device: torch.device) -> None:
    """The middle of a long chain knows nothing of how time was cut: a window of it has the same posteriors."""
    if kernel == "blocks":
        pytest.skip("the scan chooses blocks itself")
    case = long(20_000, torch.float64).on(device)
    gamma = chain.expectations(*case.potentials)[3]
    close(gamma.sum(-1), torch.ones_like(gamma[:, 0]), rtol=1e-12)
    for start in (3000, 10_001, 17_777):
        window = replace(case, emission=case.emission[start - 150 : start + 250])
        close(gamma[start : start + 100], chain.expectations(*window.potentials)[3][150:250], rtol=1e-9)


# ---- streamed over time -------------------------------------------------------------------------------------------


@many
@hypothesis.given(case=cases(frames=5), block=st.integers(1, 6))
def test_streaming_is_all_at_once(case: Case, block: int, kernel: str, device: torch.device) -> None:
    lead, (t, k) = case.lead, case.emission.shape[-2:]
    if not case.varying:
        case = replace(case, transition=case.transition.unsqueeze(-3).expand(*case.transition.shape[:-2], t - 1, k, k))
    # Lengths and weights that a posterior has: an axis for each chain, nothing negative.
    case = replace(
        case, emission=case.emission.expand(*lead, t, k), weight=None if case.weight is None else case.weight.abs()
    )
    truth, case = enumerated(case), case.on(device)
    seen: list[tuple[int, int, Tensor]] = []
    log_z, first, gamma = chain.stream_expectations(
        case.initial, lambda a, b: case.transition[..., a - 1 : b - 1, :, :], case.emission, case.lengths, case.weight,
        block, lambda a, b, expected: seen.append((a, b, expected)),
    )  # fmt: skip
    close(log_z.cpu(), truth.log_z)
    close(first.cpu(), truth.first)
    close(gamma.cpu(), truth.gamma)
    assert [(a, b) for a, b, _ in seen[::-1]] == [(a, min(a + block, t)) for a in range(0, t, block)]
    for a, b, expected in seen:
        assert expected.shape[-3] == b - a
        inside = expected if a else expected[..., 1:, :, :]
        close(inside.cpu(), truth.pairs[..., max(a, 1) - 1 : b - 1, :, :])
        assert a or (expected[..., 0, :, :] == 0).all()
