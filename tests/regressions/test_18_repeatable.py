"""The same seed gives the same bits; global generators are left alone; restarts differ and the best is returned."""

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import torchem
from tests.regressions.common import COVARIANCE_TYPES, as_users_run_it, blobs, fit, mixture, parameters, same
from torchem.errors import ConvergenceWarning

INITS = ["auto", "kmeans++", "kmeans", "random", "random_from_data", "hierarchical"]


@pytest.fixture(autouse=True)
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA bits repeat where the user asks torch for deterministic kernels; on CPU they repeat anyway."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        # Matrix products are deterministic within one stream; the variable that torch asks for is set too early for us.
        warnings.filterwarnings("ignore", ".*deterministic.*", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(before)


def run(device: torch.device, k: int = 4, covariance_type: str = "full", **options: Any) -> torchem.Result:
    x = blobs(150, 2, 4, gap=2.0).to(device)
    return fit(mixture(k, 2, covariance_type, device=device), x, **{"max_iter": 15, "tol": 0.0, **options})


@pytest.mark.parametrize("restarts", [1, 4])
@pytest.mark.parametrize("init", INITS)
def test_same_seed_same_bits(init: str, restarts: int, device: torch.device) -> None:
    first, second = (run(device, init=init, restarts=restarts, seed=7) for _ in range(2))
    assert first.histories == second.histories
    assert same(first.model, second.model)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
@pytest.mark.parametrize("options", [{"dead": "respawn", "k": 9}, {"batch_size": 40}, {"restarts": 3}], ids=str)
def test_same_seed_same_bits_in_every_mode(covariance_type: str, options: dict[str, Any], device: torch.device) -> None:
    first, second = (run(device, covariance_type=covariance_type, seed=3, **options) for _ in range(2))
    assert first.history == second.history
    assert same(first.model, second.model)


def test_the_global_state_does_not_matter(device: torch.device) -> None:
    first = run(device, seed=7, init="random")
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    random.seed(99)
    torch.rand(17)
    assert same(first.model, run(device, seed=7, init="random").model)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("init", INITS)
def test_global_generators_are_untouched(init: str, seed: int | None, device: torch.device) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state() if device.type == "cuda" else None
    with as_users_run_it():
        run(device, init=init, seed=seed, restarts=2, dead="respawn", k=9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert random.getstate() == before[2]
    assert cuda is None or torch.equal(torch.cuda.get_rng_state(), cuda)


@pytest.mark.parametrize("init", ["random", "random_from_data", "kmeans++"])
def test_different_seeds_differ(init: str, device: torch.device) -> None:
    assert run(device, init=init, seed=1).history[0] != run(device, init=init, seed=2).history[0]
    assert run(device, init=init, seed=None).history[0] != run(device, init=init, seed=None).history[0]


@pytest.mark.parametrize("init", INITS)
def test_restarts_differ(init: str, device: torch.device) -> None:
    result = run(device, init=init, restarts=6, max_iter=0)
    # Hierarchical clusters are much the same each time, their blur is not.
    assert len({history[0] for history in result.histories}) == 6


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_the_best_restart_is_returned(covariance_type: str, device: torch.device) -> None:
    result = run(device, covariance_type=covariance_type, restarts=8, init="random_from_data")
    assert len(result.restarts) == 8
    assert result.bound == max(result.restarts)
    assert min(result.restarts) < result.bound
    assert result.history == result.histories[result.restarts.index(result.bound)]
    x = blobs(150, 2, 4, gap=2.0).to(device)
    assert float(result.model.log_prob(x).sum().detach()) == pytest.approx(result.bound, rel=1e-12)


@pytest.mark.parametrize("init", INITS)
def test_the_first_restart_is_the_single_run(init: str, device: torch.device) -> None:
    single, many = run(device, init=init, seed=5), run(device, init=init, seed=5, restarts=4)
    assert many.histories[0] == pytest.approx(single.history, rel=1e-10)
    assert many.bound >= single.bound - 1e-9 * abs(single.bound)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, np.int64(3)])
def test_seeds_of_any_size(seed: int, device: torch.device) -> None:
    with as_users_run_it():
        assert run(device, seed=seed, max_iter=1).history == run(device, seed=int(seed), max_iter=1).history


def test_settings_of_the_user_are_left_as_found(device: torch.device) -> None:
    default, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        first = run(device, seed=1)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(default)
    assert torch.is_grad_enabled() == grad
    # Nor do they leak into what is computed.
    assert same(first.model, run(device, seed=1).model)


def test_autocast_does_not_lower_the_precision(device: torch.device) -> None:
    plain = run(device, seed=1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = run(device, seed=1)
    assert same(plain.model, inside.model)
    with torch.autocast(device.type, dtype=torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        x = blobs(150, 2, 4, gap=2.0).float().to(device)
        low = fit(mixture(4, 2, "full", torch.float32, device), x, max_iter=5, tol=0.0)
    high = fit(mixture(4, 2, "full", torch.float32, device), x, max_iter=5, tol=0.0)
    assert {k: v.tolist() for k, v in parameters(low.model).items()} == {
        k: v.tolist() for k, v in parameters(high.model).items()
    }


# ---- sequences ----------------------------------------------------------------------------------------------------


def chain(device: torch.device, **options: Any) -> torchem.Result:
    lengths = [1 + 11 * i % 17 for i in range(30)]
    x = [blobs(n, 2, 3, gap=2.0, seed=i) for i, n in enumerate(lengths)]
    k = options.pop("k", 3)
    initial: Any = "stationary" if options.pop("stationary", False) else torchem.factors.Categorical(k)
    model = torchem.HMM(initial, torchem.factors.Categorical(k, k), torchem.factors.Gaussian(k, 2))
    return fit(model.double().to(device), x, **{"max_iter": 8, "tol": 0.0, "seed": 3, **options})


@pytest.mark.parametrize(
    "options",
    [{}, {"restarts": 3}, {"batch_size": 7}, {"e_step": "hard"}, {"stationary": True}, {"dead": "respawn", "k": 6},
     {"init": "random"}],
    ids=str,
)  # fmt: skip
def test_chains_repeat(options: dict[str, Any], device: torch.device) -> None:
    first, second = (chain(device, **options) for _ in range(2))
    assert first.histories == second.histories
    assert same(first.model, second.model)


def test_compiled_chains_do_not_depend_on_threads() -> None:
    """Inference is the same to the last bit on one thread and on two; many sequences, and a single long one."""
    if torchem.ops.dispatch.compiled_chain(torch.device("cpu")) is None:
        pytest.skip("needs numba")
    threads = torch.get_num_threads()
    for s, t in ((200, 40), (1, 20_000)):
        generator = torch.Generator().manual_seed(1)
        shapes = ((1, 5), (1, 5, 5), (s, t, 5))
        parts = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            try:
                found.append(torchem.ops.chain.expectations(*parts))
            finally:
                torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_draws_from_chains_leave_the_global_generator_alone() -> None:
    model = chain(torch.device("cpu"), max_iter=1).model
    before = torch.get_rng_state()
    with as_users_run_it():
        for _ in range(2):
            generators = [torch.Generator().manual_seed(1) for _ in range(2)]
            one, two = (model.sample(3, 4, generator=g) for g in generators)  # pyright: ignore
            assert torch.equal(one, two)
            a, b = (model.sample_posterior(one, 2, generator=g) for g in generators)  # pyright: ignore
            assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
