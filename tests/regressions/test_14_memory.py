"""Memory is data, parameters and a stated budget: no tensor of N × K elements, neither in an E-step nor in a fit."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import torchem
from tests.regressions.common import COVARIANCE_TYPES, DTYPES, fit, mixture, rand, rng, started
from torchem.ops import dispatch
from torchem.ops.dispatch import PIECE, keep_freed_memory

N, K, D = 200_000, 8, 4


class Watch(TorchDispatchMode):
    """Follows every tensor that an operation makes: the largest, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.alive: dict[int, int] = {}
        self.bytes = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {self._key(t) for t in self._tensors((args, kwargs))}
        for tensor in self._tensors(out):
            self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
            # Views and in-place results own nothing new.
            if self._key(tensor) not in given:
                self._track(tensor)
        return out

    @staticmethod
    def _tensors(tree: Any) -> Iterator[torch.Tensor]:
        return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.bytes -= self.alive.pop(key, 0)


def test_the_watch_sees(device: torch.device) -> None:
    """The instrument itself: a storage counts while it lives, views do not, a hidden N × K is found."""
    with Watch() as watch:
        a = torch.zeros(1000, dtype=torch.float64, device=device)
        b = a.view(10, 100)[3:]
        assert (watch.bytes, watch.largest) == (8000, 1000)
        c = b + 1
        assert (watch.bytes, watch.largest) == (8000 + 5600, 1000)
        del c
        assert watch.bytes == 8000
        del a
        assert watch.bytes == 8000
        del b
        assert (watch.bytes, watch.peak) == (0, 13_600)
        torch.ones(5000, device=device).sum()
        assert watch.largest == 5000


def data(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = torch.randn(N, D, generator=rng(5), dtype=dtype)
    x += 4 * torch.randint(0, K, (N, 1), generator=rng(6))
    return x.to(device)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_e_step_never_holds_the_responsibilities(
    covariance_type: str, direct: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x = data(dtype, device)
    model = started(x[:1000].cpu(), K, covariance_type, dtype, device)
    model.component.direct = direct
    batch = model.batch(x)
    with torch.no_grad(), Watch() as watch:
        model.e_step(batch)
    assert 0 < watch.largest < _limit(device)
    assert watch.peak < _budget(device)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("init", ["auto", "kmeans++", "random", "random_from_data", "hierarchical"])
def test_a_whole_fit_never_holds_them(covariance_type: str, init: str, device: torch.device) -> None:
    keep_freed_memory()  # once for a process; not what a fit holds
    if init != "auto" and covariance_type != "full":
        pytest.skip("one covariance type is enough for the other starts")
    x = data(torch.float32, device)
    model = mixture(K, D, covariance_type, torch.float32, device)
    with Watch() as watch:
        fit(model, x, max_iter=3, tol=0.0, init=init)
    assert 0 < watch.largest < _limit(device)
    # A fit surveys the data once, in float64.
    assert watch.peak < _budget(device) + (8 * N * D if device.type == "cpu" else 0)


def test_weights_and_restarts_do_not_change_that(device: torch.device) -> None:
    x = data(torch.float32, device)
    model = mixture(K, D, "full", torch.float32, device)
    with Watch() as watch:
        fit(model, x, max_iter=2, tol=0.0, restarts=4, weights=rand(N).to(device))
    # The sample that starts are made from is bounded for all restarts together, but may exceed one restart's N × K.
    assert 0 < watch.largest < 4 * _limit(device) / 2


@pytest.mark.parametrize("what", ["log_prob", "most_likely"])
def test_using_a_model_streams_too(what: str, device: torch.device) -> None:
    x = data(torch.float32, device)
    model = started(x[:1000].cpu(), K, "full", torch.float32, device)
    with torch.no_grad(), Watch() as watch:
        getattr(model, what)(x)
    assert 0 < watch.largest < _limit(device)


def test_criteria_stream(device: torch.device) -> None:
    x = data(torch.float32, device)
    model = started(x[:1000].cpu(), K, "full", torch.float32, device)
    with Watch() as watch:
        torchem.criteria(model, x)
    assert 0 < watch.largest < _limit(device)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_budget_is_the_users(compiled: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces have its size; compiled passes hold less than any."""
    if not compiled:
        monkeypatch.setattr(dispatch, "_MANY", 1 << 60)
    x = data(torch.float32, device)
    model = started(x[:1000].cpu(), K, "full", torch.float32, device)
    batch = model.batch(x)
    peaks = []
    for budget in (1 << 18, 1 << 22):
        model.memory_budget = budget
        with torch.no_grad(), Watch() as watch:
            model.e_step(batch)
        assert watch.peak < 3 * budget
        peaks.append(watch.peak)
    assert compiled or peaks[0] < peaks[1] / 4


def _limit(device: torch.device) -> int:
    """Elements that no tensor may have: N × K; on an accelerator a piece may be as large as its budget."""
    return N * K if device.type == "cpu" else max(N * K + 1, PIECE[device.type] // 4)


def _budget(device: torch.device) -> int:
    return 3 * PIECE.get(device.type, PIECE["cuda"])


# ---- chains -------------------------------------------------------------------------------------------------------

STATES = 16


def chain(device: torch.device) -> torchem.GaussianHMM:
    model = torchem.GaussianHMM(STATES, 2).to(device)
    model.means = 4 * torch.randn(STATES, 2, generator=rng(1))
    model.transition_matrix = rand(STATES, STATES, seed=2).softmax(-1)
    return model


USES: dict[str, Any] = {
    "e_step": lambda m, b: m.e_step(b),
    "hard e_step": lambda m, b: m.e_step(b, "hard"),
    "log_prob": lambda m, b: m.log_prob(b),
    "posterior": lambda m, b: m.posterior(b),
    "filter": lambda m, b: m.filter(b),
    "most_likely": lambda m, b: m.most_likely(b),
    "sample_posterior": lambda m, b: m.sample_posterior(b),
    "entropy": lambda m, b: m.entropy(b),
}


@pytest.fixture(params=["compiled", "scan"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "scan":
        monkeypatch.setattr(torchem.ops.chain, "chain_kernel", lambda emission: torchem.ops.scan)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize(("sequences", "frames"), [(1, 4000), (80, 50)])
@pytest.mark.parametrize("use", USES)
def test_a_chain_never_holds_a_matrix_for_each_frame(
    use: str, sequences: int, frames: int, device: torch.device
) -> None:
    model = chain(device)
    batch = torchem.Batch(torch.randn(sequences, frames, 2, generator=rng(3)).to(device))
    with torch.no_grad(), Watch() as watch:
        USES[use](model, batch)
    assert 0 < watch.largest < sequences * frames * STATES**2


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize(("sequences", "frames"), [(1, 4000), (80, 50)])
def test_nor_does_its_gradient(sequences: int, frames: int, device: torch.device) -> None:
    model = chain(device)
    x = torch.randn(sequences, frames, 2, generator=rng(3)).to(device).requires_grad_()
    with Watch() as watch:
        model.log_prob(torchem.Batch(x)).sum().backward()
    assert 0 < watch.largest < sequences * frames * STATES**2
    assert x.grad is not None
    assert all(p.grad is not None for p in model.parameters())


def test_nor_do_structural_zeros_make_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done again in the logarithms keeps to a budget of its own."""
    monkeypatch.setattr(torchem.ops.chain, "chain_kernel", lambda emission: torchem.ops.scan)
    monkeypatch.setattr(torchem.ops.scan, "_PIECE", 1 << 14)
    model, frames = chain(device), 400
    model.restrict(torchem.masks.left_right(STATES))
    with torch.no_grad(), Watch() as watch:
        model.e_step(torchem.Batch(torch.randn(1, frames, 2, generator=rng(3)).to(device)))
    assert 0 < watch.largest < frames * STATES**2 / 4


def test_tables_that_read_covariates_are_streamed(device: torch.device) -> None:
    gate = torchem.factors.SoftmaxRegression(STATES, 2, n_parents=STATES)
    model = torchem.HMM(torchem.factors.Categorical(STATES), gate, chain(device).emission).to(device)
    model.memory_budget = 1 << 20
    sequences, frames = 3, 1000
    x = torch.randn(sequences, frames, 2, generator=rng(3)).to(device)
    batch = torchem.Batch(x, u=torch.ones(sequences, frames, 2, device=device))
    with torch.no_grad(), Watch() as watch:
        model.e_step(batch)
    assert 0 < watch.largest < sequences * frames * STATES**2 / 4


def test_sequences_of_very_different_lengths_are_not_padded_together(device: torch.device) -> None:
    model = torchem.GaussianHMM(2, 1).to(device)
    model.means = [[-1.0], [1.0]]
    lengths = [300_000, *[10] * 100]
    x = [torch.randn(n, 1, generator=rng(i)) for i, n in enumerate(lengths)]
    with Watch() as watch:
        fit(model, x, max_iter=1, tol=0.0, init=None)
    assert watch.largest < 20 * sum(lengths)
