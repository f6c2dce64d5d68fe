"""The compiled kernels for chains, against enumeration, and where linear arithmetic would be wrong in silence."""

import itertools
import math
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from torchem.ops import threads
from torchem.ops.numba_ import chain, vectors

DOUBLE = torch.float64


class Chains(NamedTuple):
    """What every kernel takes; the reference reads it in more digits, where there are, than kernels compute with."""

    initial: Tensor
    transition: Tensor
    emission: Tensor
    lengths: Tensor | None

    def to(self, dtype: torch.dtype) -> "Chains":
        parts = (part.to(dtype) for part in self[:3])
        return Chains(*parts, self.lengths)

    def each(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Potentials of each sequence: [K], [length − 1, K, K], [length, K]."""
        s = len(self.emission)
        for i in range(s):
            length = self.emission.shape[1] if self.lengths is None else int(self.lengths[i])
            step = self.transition[i // (s // len(self.transition))].double().numpy().astype(np.longdouble)
            steps = np.broadcast_to(step, (length - 1, *step.shape)) if step.ndim == 2 else step[: length - 1]
            yield (
                self.initial[i // (s // len(self.initial))].double().numpy().astype(np.longdouble),
                steps,
                self.emission[i, :length].double().numpy().astype(np.longdouble),
            )


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.longdouble)


def log_sum(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis)) + top.squeeze(axis)


class Answer(NamedTuple):
    """Of one sequence: log Z, filtered and smoothed posteriors, expected steps, and the best path."""

    log_z: float
    alpha: np.ndarray
    gamma: np.ndarray
    pairs: np.ndarray
    score: float
    path: np.ndarray


def in_logarithms(initial: np.ndarray, steps: np.ndarray, emission: np.ndarray) -> Answer:
    """Everything by plain recursions in the log domain, shifted by each message's maximum."""
    length, k = emission.shape
    alpha, beta, best, back = zeros(length, k), zeros(length, k), zeros(length, k), np.zeros((length, k), int)
    log_z, message, value = np.longdouble(0), initial, initial
    for t in range(length):
        if t:
            message = log_sum(alpha[t - 1][:, None] + steps[t - 1], 0)
            joint = best[t - 1][:, None] + steps[t - 1]
            back[t], value = joint.argmax(0), joint.max(0)
        best[t] = value + emission[t]
        total = log_sum(message + emission[t], 0)
        log_z = log_z + total
        alpha[t] = message + emission[t] - (total if np.isfinite(total) else 0.0)
    impossible = log_z == -np.inf
    if impossible:
        return Answer(-np.inf, zeros(length, k), zeros(length, k), zeros(*steps.shape), -np.inf, np.full(length, -1))
    for t in range(length - 2, -1, -1):
        beta[t] = log_sum(steps[t] + (emission[t + 1] + beta[t + 1]), 1)
        beta[t] -= beta[t].max()
    gamma = alpha + beta
    gamma = np.exp(gamma - log_sum(gamma, 1)[:, None])
    pairs = zeros(length - 1, k, k)
    for t in range(length - 1):
        joint = alpha[t][:, None] + steps[t] + emission[t + 1] + beta[t + 1]
        pairs[t] = np.exp(joint - joint.max()) / np.exp(joint - joint.max()).sum()
    path = np.empty(length, int)
    path[-1] = best[-1].argmax()
    for t in range(length - 1, 0, -1):
        path[t - 1] = back[t, path[t]]
    return Answer(float(log_z), np.exp(alpha), gamma, pairs, float(best[-1].max()), path)


def enumerated(initial: np.ndarray, steps: np.ndarray, emission: np.ndarray) -> Answer:
    """Everything by summing over all paths."""
    length, k = emission.shape
    alpha, gamma, pairs = zeros(length, k), zeros(length, k), zeros(length - 1, k, k)

    def scores(stop: int) -> tuple[np.ndarray, np.ndarray]:
        paths = np.array(list(itertools.product(range(k), repeat=stop)))
        value = initial[paths[:, 0]] + emission[np.arange(stop), paths].sum(1)
        for t in range(stop - 1):
            value = value + steps[t, paths[:, t], paths[:, t + 1]]
        return paths, value

    paths, value = scores(length)
    log_z = log_sum(value, 0)
    if log_z == -np.inf:
        return Answer(-np.inf, alpha, gamma, pairs, -np.inf, np.full(length, -1))
    share = np.exp(value - log_z)
    for t in range(length):
        np.add.at(gamma[t], paths[:, t], share)
        part, prefix = scores(t + 1)
        np.add.at(alpha[t], part[:, t], np.exp(prefix - log_sum(prefix, 0)))
        if t:
            np.add.at(pairs[t - 1], (paths[:, t - 1], paths[:, t]), share)
    return Answer(float(log_z), alpha, gamma, pairs, float(value.max()), paths[value.argmax()])


def close(found: Tensor, expected: Any, dtype: torch.dtype = DOUBLE) -> None:
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == DOUBLE else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found.double(), torch.as_tensor(expected, dtype=DOUBLE), **tolerance)


def check(chains: Chains, weight: Tensor | None = None, answer: Any = enumerated, paths: bool = True) -> None:
    """All kernels give the reference's answer; the same potentials in the reference, whatever their dtype."""
    s, t, k = chains.emission.shape
    dtype = chains.emission.dtype
    mass = torch.ones(s, dtype=DOUBLE) if weight is None else weight
    answers = [answer(*parts) for parts in chains.each()]
    log_z = [a.log_z for a in answers]
    alpha, gamma = np.zeros((s, t, k)), np.zeros((s, t, k))
    pairs = np.zeros(chains.transition.shape)
    for i, a in enumerate(answers):
        length = len(a.path)
        alpha[i, :length], gamma[i, :length] = a.alpha, float(mass[i]) * a.gamma
        group = pairs[i // (s // len(pairs))]
        if pairs.ndim == 3:
            group += float(mass[i]) * a.pairs.sum(0)
        else:
            group[: length - 1] += float(mass[i]) * a.pairs
    close(chain.log_normalizer(*chains), log_z, dtype)
    found = chain.filter(*chains)
    close(found[0], log_z, dtype)
    close(found[1], alpha, dtype)
    smoothed = chain.smooth(*chains, weight)
    close(smoothed[0], log_z, dtype)
    close(smoothed[1], pairs)
    close(smoothed[2], gamma, dtype)
    assert [part.dtype for part in (*found, *smoothed)] == [dtype, dtype, dtype, DOUBLE, dtype]
    # What is impossible is exactly zero.
    assert not smoothed[2][chains.emission == -torch.inf].any()
    if chains.transition.dim() == 3:
        assert not smoothed[1][chains.transition == -torch.inf].any()
    score, path = chain.viterbi(*chains)
    close(score, [a.score for a in answers], dtype)
    if paths:
        for i, a in enumerate(answers):
            assert path[i].tolist() == [*a.path, *[-1] * (t - len(a.path))]
    drawn = chain.sample(*chains, torch.rand(s, t, dtype=DOUBLE))
    for i, (initial, steps, emission) in enumerate(chains.each()):
        assert (drawn[i, len(emission) :] == -1).all()
        z = drawn[i, : len(emission)].numpy()
        if log_z[i] == -np.inf:
            assert (z == -1).all()
        else:
            assert initial[z[0]] + emission[np.arange(len(z)), z].sum() > -np.inf
            assert (steps[np.arange(len(z) - 1), z[:-1], z[1:]] > -np.inf).all()


def random(
    seed: int, *, holes: float = 0.0, sharp: float = 1.0, varying: bool = False, long: int = 5
) -> tuple[Chains, Tensor]:
    """A small problem in groups, of any lengths, with weights of which some are zero."""
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    def potentials(*shape: int) -> Tensor:
        value = sharp * torch.randn(*shape, generator=g, dtype=DOUBLE) + number(-3, 3)
        return value.masked_fill(torch.rand(shape, generator=g) < holes, -torch.inf)

    k, t, s = number(1, 5), number(1, long), 6
    groups = [1, 2, 3, 6]
    step = (t - 1, k, k) if varying else (k, k)
    chains = Chains(
        potentials(groups[number(0, 3)], k),
        potentials(groups[number(0, 3)], *step),
        potentials(s, t, k),
        None if number(0, 3) == 0 else torch.randint(1, t + 1, (s,), generator=g),
    )
    weight = torch.rand(s, generator=g, dtype=DOUBLE) * torch.randint(0, 2, (s,), generator=g)
    return chains, weight


@pytest.fixture(params=["small", "large"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny problems as such, then in the ways of large ones: in parts, and long sequences from both ends."""
    if request.param == "large":
        monkeypatch.setattr(threads, "TASK", 1)


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("holes", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("sharp", [1.0, 300.0])
def test_equal_to_enumeration(varying: bool, holes: float, sharp: float) -> None:
    for seed in range(12):
        chains, weight = random(seed, holes=holes, sharp=sharp, varying=varying)
        check(chains, weight if seed % 2 else None)


@pytest.mark.parametrize("varying", [False, True])
def test_float32_potentials(varying: bool) -> None:
    for seed in range(12):
        chains, weight = random(seed, holes=0.2, sharp=1.0 + 20 * (seed % 2), varying=varying)
        check(chains.to(torch.float32), weight)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 8, 13, 16, 17, 32, 37])
def test_widths(k: int) -> None:
    """Widths about multiples of vectors and of blocks of columns, and lengths about those of blocks of frames."""
    g = torch.Generator().manual_seed(k)
    block = max(16, 2048 // (-(-k // 4) * 4))
    for t in (block - 1, block, block + 1, 2 * block + 3):
        t = min(t, 300)
        chains = Chains(
            torch.randn(1, k, generator=g, dtype=DOUBLE),
            torch.randn(1, k, k, generator=g, dtype=DOUBLE),
            3 * torch.randn(2, t, k, generator=g, dtype=DOUBLE),
            torch.tensor([t, max(1, t - 3)]),
        )
        check(chains, None, in_logarithms)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8])
def test_sequences_abreast(k: int) -> None:
    """Any lengths in the four lanes, impossible frames and empty lanes among them, beyond a block of frames."""
    g = torch.Generator().manual_seed(k)
    for dtype, count in ((DOUBLE, 4), (DOUBLE, 7), (torch.float32, 6)):
        emission = 5 * torch.randn(count, 70, k, generator=g, dtype=DOUBLE) - 700
        emission[1, 3] = -torch.inf
        emission[2, 40:, 1:] = -torch.inf
        chains = Chains(
            torch.randn(count, k, generator=g, dtype=DOUBLE),
            torch.randn(1, k, k, generator=g, dtype=DOUBLE),
            emission,
            torch.tensor([70, 31, 70, 1, 33, 2, 64][:count]),
        ).to(dtype)
        check(chains, torch.randn(count, generator=g, dtype=DOUBLE), in_logarithms)
        check(chains._replace(lengths=None), None, in_logarithms)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("holes", [0.0, 0.3])
@pytest.mark.parametrize("varying", [False, True])
def test_longer_ones_in_groups(holes: float, varying: bool) -> None:
    for seed in range(6):
        chains, weight = random(seed, holes=holes, sharp=3.0, varying=varying, long=40)
        check(chains, weight, in_logarithms)


# ---- what linear messages lose --------------------------------------------------------------------------------------


def absorbing(k: int) -> Tensor:
    return torch.zeros(1, k, k, dtype=DOUBLE).masked_fill(~torch.eye(k, dtype=torch.bool), -torch.inf)


def traps() -> Iterator[tuple[str, Chains]]:
    def favoured(*states: tuple[int, int, float], k: int) -> Tensor:
        """(frames, state, nats), one after the other."""
        parts = [torch.zeros(frames, k, dtype=DOUBLE) for frames, _, _ in states]
        for part, (_, state, nats) in zip(parts, states, strict=True):
            part[:, state] = nats
        return torch.cat(parts)[None]

    flat = torch.zeros(1, 2, dtype=DOUBLE)
    yield "two absorbing states", Chains(flat, absorbing(2), favoured((100, 0, 10.0), (300, 1, 10.0), k=2), None)
    yield "across blocks of frames", Chains(flat, absorbing(2), favoured((500, 0, 10.0), (1000, 1, 10.0), k=2), None)
    almost = absorbing(2).clamp(min=-1e4)
    yield "two nearly so", Chains(flat, almost, favoured((100, 0, 10.0), (300, 1, 10.0), k=2), None)
    for first, second, third in itertools.permutations(range(3)):
        emission = favoured((100, first, 10.0), (150, second, 10.0), (100, third, 10.0), k=3)
        emission[:, :, second] -= 3.0
        yield "three absorbing states", Chains(torch.zeros(1, 3, dtype=DOUBLE), absorbing(3), emission, None)
    # Each direction of passes sees one state only, and neither the one that all turns about.
    emission = torch.zeros(1, 400, 3, dtype=DOUBLE)
    emission[:, :200, 0], emission[:, 200:, 1], emission[:, :, 2] = 10.0, 10.0, 8.0
    yield "the compromise", Chains(torch.zeros(1, 3, dtype=DOUBLE), absorbing(3), emission, None)
    # A state that cannot be reached draws the backward message to itself.
    lonely = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=DOUBLE)
    step = torch.tensor([[[0.0, -1.0, -torch.inf], [-2.0, 0.0, -torch.inf], [-torch.inf, -torch.inf, 0.0]]])
    emission = torch.randn(1, 300, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    emission[..., 2] += 10.0
    yield "out of reach", Chains(lonely, step.double(), emission, None)
    # Left to right, emissions far apart.
    k, t = 6, 300
    forward = torch.full((1, k, k), -torch.inf, dtype=DOUBLE)
    for i in range(k):
        forward[0, i, i : i + 2] = torch.tensor([-0.05, -3.0])[: k - i].double()
    start = torch.full((1, k), -torch.inf, dtype=DOUBLE)
    start[0, 0] = 0.0
    place = torch.arange(t)[:, None] * k / t - torch.arange(k)
    noise = torch.randn(1, t, k, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    for scale in (5.0, 500.0):
        yield f"left to right, {scale}", Chains(start, forward, -scale * place.double().square() + noise, None)
    # Emissions that say the opposite: the end must be reached all the same.
    against = -500.0 * place.flip(0).double().square() + noise
    yield "left to right, against the data", Chains(start, forward, against, None)
    last = against.clone()
    last[0, -1, :-1] = -torch.inf
    yield "forced to the end", Chains(start, forward, last, None)
    # The best path passes once, and at a cost that linear messages do not carry, through a state that leads on.
    bridge = torch.full((1, 3, 3), -torch.inf, dtype=DOUBLE)
    bridge[0, 0, 0] = bridge[0, 0, 1] = bridge[0, 1, 2] = bridge[0, 2, 2] = -0.5
    emission = favoured((100, 0, 0.0), (300, 2, 10.0), k=3)
    emission[..., 1] = -1000.0
    yield "a bridge", Chains(torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=DOUBLE), bridge, emission, None)
    # A ring in which only neighbours are joined.
    ring = torch.full((1, 12, 12), -torch.inf, dtype=DOUBLE)
    for i in range(12):
        ring[0, i, i], ring[0, i, (i + 1) % 12], ring[0, i, i - 1] = -0.1, -3.0, -3.0
    emission = torch.zeros(1, 300, 12, dtype=DOUBLE)
    emission[0, torch.arange(300), (torch.arange(300) // 40 * 5) % 12] = 25.0
    yield "a ring", Chains(torch.zeros(1, 12, dtype=DOUBLE), ring, emission, None)
    for nats in (1e4, 1e6):
        g = torch.Generator().manual_seed(2)
        yield (
            f"emissions of {nats} nats",
            Chains(
                torch.randn(1, 4, generator=g, dtype=DOUBLE),
                torch.randn(1, 4, 4, generator=g, dtype=DOUBLE),
                nats * torch.randn(1, 50, 4, generator=g, dtype=DOUBLE).round(),
                None,
            ),
        )
        yield (
            f"all of {nats} nats",
            Chains(
                nats * torch.randn(1, 4, generator=g, dtype=DOUBLE).round(),
                nats * torch.randn(1, 4, 4, generator=g, dtype=DOUBLE).round(),
                nats * torch.randn(1, 50, 4, generator=g, dtype=DOUBLE).round(),
                None,
            ),
        )
    # Every transition is possible, and each but one is of one part in 1e-100 and less.
    thin = torch.full((1, 3, 3), -1.0, dtype=DOUBLE)
    thin[0, 1, 0] = thin[0, 2, 1] = -600.0
    yield "thin", Chains(torch.zeros(1, 3, dtype=DOUBLE), thin, favoured((90, 2, 9.0), (90, 0, 9.0), k=3), None)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize(("name", "chains"), [pytest.param(*trap, id=trap[0]) for trap in traps()])
def test_traps(name: str, chains: Chains) -> None:
    check(chains, None, in_logarithms)
    # Beside sequences that no trap is set for, and one that ends before it springs.
    s = 5
    emission = chains.emission.expand(s, -1, -1).clone()
    emission[1] = torch.randn(emission.shape[1:], generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    lengths = torch.full((s,), emission.shape[1])
    lengths[2] = 40
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1e6], dtype=DOUBLE)
    check(Chains(chains.initial, chains.transition, emission, lengths), weight, in_logarithms)


def test_the_compromise_is_found() -> None:
    """The reference is not fooled either: log Z by hand."""
    for name, chains in traps():
        if name == "the compromise":
            expected = torch.tensor([2000.0, 2000.0, 3200.0], dtype=DOUBLE).logsumexp(0)
            close(chain.log_normalizer(*chains), expected[None])
            torch.testing.assert_close(chain.smooth(*chains, None)[2][0, :, 2].min().item(), 1.0)


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_both_ways")
def test_impossible_sequences_among_possible_ones() -> None:
    chains, _ = random(3, long=9)
    emission = chains.emission.clone()
    emission[1, 0] = -torch.inf
    emission[4] = -torch.inf
    weight = torch.tensor([1.0, 1.0, 2.0, 0.0, 3.0, 0.5], dtype=DOUBLE)
    chains = chains._replace(emission=emission, lengths=None)
    check(chains, weight)
    assert chain.log_normalizer(*chains).isneginf().tolist() == [False, True, False, False, True, False]


@pytest.mark.usefixtures("_both_ways")
def test_no_first_state_no_step_and_no_frame_at_all() -> None:
    chains, weight = random(1, long=6)
    check(chains._replace(initial=torch.full_like(chains.initial, -torch.inf)), weight)
    check(chains._replace(transition=torch.full_like(chains.transition, -torch.inf)), weight)
    check(chains._replace(emission=torch.full_like(chains.emission, -torch.inf)), weight)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_no_sequence(dtype: torch.dtype, varying: bool) -> None:
    step = torch.zeros(1, 3, 2, 2, dtype=dtype) if varying else torch.zeros(1, 2, 2, dtype=dtype)
    chains = Chains(torch.zeros(1, 2, dtype=dtype), step, torch.zeros(0, 4, 2, dtype=dtype), torch.zeros(0).long())
    assert chain.log_normalizer(*chains).shape == (0,)
    assert [part.shape for part in chain.filter(*chains)] == [(0,), (0, 4, 2)]
    log_z, pairs, gamma = chain.smooth(*chains, None)
    assert (log_z.shape, pairs.shape, gamma.shape) == ((0,), step.shape, (0, 4, 2))
    assert not pairs.any()
    assert [part.shape for part in chain.viterbi(*chains)] == [(0,), (0, 4)]
    assert chain.sample(*chains, torch.zeros(0, 4, dtype=DOUBLE)).shape == (0, 4)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("where", ["initial", "transition", "emission", "first emission", "all"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_visible(varying: bool, where: str, bad: float) -> None:
    k, t = 3, 7
    initial, emission = torch.zeros(2, k, dtype=DOUBLE), torch.zeros(2, t, k, dtype=DOUBLE)
    transition = torch.zeros(2, *((t - 1, k, k) if varying else (k, k)), dtype=DOUBLE)
    # With a chain that must be watched, and one that need not be.
    for sparse in (False, True):
        if sparse:
            transition[..., 0, 1] = -torch.inf
        parts = {"initial": initial, "transition": transition, "emission": emission}
        if where == "all":
            changed = {name: part.clone() for name, part in parts.items()}
            for part in changed.values():
                part[0] = bad
        else:
            name = where.rsplit(maxsplit=1)[-1]
            part = parts[name].clone()
            part[0].view(-1)[0 if where.startswith("first") else -1] = bad
            changed = {**parts, name: part}
        chains = Chains(**changed, lengths=None)
        log_z, _, gamma = chain.smooth(*chains, None)
        for value in (log_z, chain.log_normalizer(*chains), chain.filter(*chains)[0]):
            assert value.isnan().tolist() == [True, False]
        assert gamma[0].isnan().any()
        assert gamma[1].isfinite().all()
        score, path = chain.viterbi(*chains)
        if math.isnan(bad):
            assert score.isnan().tolist() == [True, False]
            assert (path[0] == -1).all()
        assert (path[1] >= 0).all()
        assert chain.sample(*chains, torch.full((2, t), 0.5, dtype=DOUBLE)).shape == (2, t)
        silent = chain.smooth(*chains, torch.tensor([0.0, 1.0], dtype=DOUBLE))
        assert not silent[2][0].any()
        assert silent[1].isfinite().all()


def test_strided_expanded_and_integer_inputs() -> None:
    chains, weight = random(9, long=6)
    expected = chain.smooth(*chains, weight)
    strided = Chains(
        torch.stack([chains.initial, chains.initial], -1)[..., 0],
        chains.transition.mT.contiguous().mT,
        chains.emission.transpose(0, 1).contiguous().transpose(0, 1),
        None if chains.lengths is None else chains.lengths.to(torch.int32),
    )
    for a, b in zip(chain.smooth(*strided, weight.float()), chain.smooth(*chains, weight.float()), strict=True):
        assert torch.equal(a, b)
    own = chains._replace(initial=chains.initial.repeat_interleave(6 // len(chains.initial), 0))
    assert torch.equal(chain.smooth(*own, weight)[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_posteriors_are_never_denormal(dtype: torch.dtype) -> None:
    chains, _ = random(5, sharp=60.0, long=40)
    chains = chains.to(dtype)
    for value in (chain.smooth(*chains, None)[2], chain.filter(*chains)[1]):
        assert not ((value > 0) & (value < torch.finfo(dtype).tiny)).any()


# ---- accuracy, repeatability ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_long_sequence_in_float32(t: int) -> None:
    g = torch.Generator().manual_seed(0)
    step = torch.tensor([[[0.99, 0.01], [0.02, 0.98]]]).log()
    chains = Chains(torch.full((1, 2), 0.5).log(), step, torch.randn(1, t, 2, generator=g) - 1, None)
    single, double = chain.smooth(*chains, None), chain.smooth(*chains.to(DOUBLE), None)
    assert abs(single[0].double() - double[0]) < 1e-6 * abs(double[0])
    torch.testing.assert_close(single[1], double[1], rtol=1e-12, atol=1e-6)
    torch.testing.assert_close(double[1].sum(), torch.tensor(t - 1.0, dtype=DOUBLE), rtol=1e-12, atol=0)
    torch.testing.assert_close(double[2].sum((1, 2)), torch.tensor([float(t)], dtype=DOUBLE), rtol=1e-12, atol=0)
    assert torch.equal(chain.log_normalizer(*chains), chain.filter(*chains)[0])
    torch.testing.assert_close(chain.log_normalizer(*chains.to(DOUBLE)), double[0], rtol=1e-13, atol=0)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(
    ("s", "t", "k"), [(64, 500, 8), (1, 30_000, 8), (3, 20_000, 5), (300, 100, 4), (1, 2_000, 33), (9, 900, 16)]
)
@pytest.mark.parametrize("sparse", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(s: int, t: int, k: int, sparse: bool) -> None:
    g = torch.Generator().manual_seed(0)
    step = torch.randn(1, k, k, generator=g, dtype=DOUBLE)
    if sparse:
        step = step.masked_fill(torch.rand(k, k, generator=g) < 0.4, -torch.inf)
    emission = 4 * torch.randn(s, t, k, generator=g, dtype=DOUBLE)
    chains = Chains(torch.zeros(1, k, dtype=DOUBLE), step, emission, torch.randint(t // 2, t + 1, (s,), generator=g))
    weight, uniforms = torch.rand(s, generator=g, dtype=DOUBLE), torch.rand(s, t, generator=g, dtype=DOUBLE)

    def everything() -> list[Tensor]:
        return [
            chain.log_normalizer(*chains),
            *chain.filter(*chains),
            *chain.smooth(*chains, weight),
            *chain.viterbi(*chains),
            chain.sample(*chains, uniforms),
        ]

    two = everything()
    torch.set_num_threads(1)
    for a, b in zip(two, everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("_two_threads")
def test_threads_are_found_again_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    monkeypatch.setattr(threads, "TASK", 1)
    chains, weight = random(4, long=20)
    expected = chain.smooth(*chains, weight)[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    warnings.simplefilter("ignore", DeprecationWarning)  # to fork beside threads is the point
    child = os.fork()
    if child == 0:  # pragma: no cover
        signal.alarm(30)
        os._exit(0 if torch.equal(chain.smooth(*chains, weight)[0], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_ties_go_to_the_lowest_state() -> None:
    """With whole numbers for potentials most best paths tie, and arithmetic is exact."""
    for seed in range(30):
        chains, _ = random(seed, long=30)
        tied = Chains(*(part.round().clamp(-1, 1) for part in chains[:3]), chains.lengths)
        score, path = chain.viterbi(*tied)
        for i, parts in enumerate(tied.each()):
            expected = in_logarithms(*parts)
            assert path[i, : len(expected.path)].tolist() == expected.path.tolist()
            assert float(score[i]) == expected.score


@pytest.mark.parametrize("sharp", [1.0, 400.0])
@pytest.mark.parametrize("varying", [False, True])
def test_draws_follow_the_posterior_of_paths(sharp: float, varying: bool) -> None:
    count, t, k = 20_000, 3, 3
    g = torch.Generator().manual_seed(7)
    step = torch.randn(1, *((t - 1, k, k) if varying else (k, k)), generator=g, dtype=DOUBLE)
    step[..., 0, 2] = -torch.inf
    step[..., 1, 1] -= sharp - 1  # beyond what linear messages carry
    emission = torch.randn(1, t, k, generator=g, dtype=DOUBLE)
    emission[0, 0, 1] += sharp - 1
    emission[0, 1, 1] += sharp - 1
    chains = Chains(torch.zeros(1, k, dtype=DOUBLE), step, emission.expand(count, t, k), None)
    uniforms = torch.rand(count, t, generator=g, dtype=DOUBLE)
    path = chain.sample(*chains, uniforms)
    initial, steps, frames = next(chains._replace(emission=emission).each())
    paths = np.array(list(itertools.product(range(k), repeat=t)))
    value = initial[paths[:, 0]] + frames[np.arange(t), paths].sum(1)
    for i in range(t - 1):
        value = value + steps[i, paths[:, i], paths[:, i + 1]]
    expected = np.exp(value - log_sum(value, 0))
    code = (path * torch.tensor([k * k, k, 1])).sum(-1)
    found = torch.bincount(code, minlength=k**t).numpy() / count
    assert (found[expected == 0] == 0).all()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53, 1.0])
@pytest.mark.parametrize("deep", [0.0, -1e4])
def test_draws_at_the_ends_of_the_interval_are_possible(u: float, deep: float) -> None:
    step = torch.tensor([[[-torch.inf, 0.0, -torch.inf], [0.0, deep, -torch.inf], [0.0, 0.0, 0.0]]], dtype=DOUBLE)
    initial = torch.tensor([[-torch.inf, 0.0, -torch.inf]], dtype=DOUBLE)
    emission = torch.zeros(1, 6, 3, dtype=DOUBLE)
    path = chain.sample(initial, step, emission, None, torch.full((1, 6), u, dtype=DOUBLE))[0]
    assert path[0] == 1
    assert all(step[0, a, b] > -torch.inf for a, b in itertools.pairwise(path.tolist()))


# ---- compilation ----------------------------------------------------------------------------------------------------


def test_without_a_place_to_keep_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    compile_ = numba.njit

    def nowhere(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_(**options)

    monkeypatch.setattr(numba, "njit", nowhere)

    def twice(x):
        return 2 * x

    assert vectors.kernel(twice)(3) == 6
