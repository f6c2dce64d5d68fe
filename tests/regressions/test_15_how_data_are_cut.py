"""How data are cut up is invisible: pieces, batches, loaders, their order, and ranks of any size, empty ones too."""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.regressions import ranks
from tests.regressions.common import COVARIANCE_TYPES, blobs, fit, gap, mixture, parameters, rand, rng, started

N = 101
TOLERANCE = 1e-10
FIXED: dict[str, Any] = {"init": None, "tol": 0.0, "max_iter": 8}


def data() -> torch.Tensor:
    return blobs(N, 3, 3, gap=2.5)


def reference(covariance_type: str = "full", device: Any = "cpu", **options: Any) -> torchem.Result:
    return fit(started(data(), 3, covariance_type, device=device), data().to(device), **{**FIXED, **options})


def agree(result: torchem.Result, expected: torchem.Result) -> None:
    assert gap(result.model, expected.model) < TOLERANCE
    assert result.history == pytest.approx(expected.history, rel=TOLERANCE)
    assert result.bound == pytest.approx(expected.bound, rel=TOLERANCE)


# ---- one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("covariance_type", "rows"), [("full", 1), *itertools.product(COVARIANCE_TYPES, (7, 100, 101))]
)
def test_batch_size(covariance_type: str, rows: int, device: torch.device) -> None:
    model = started(data(), 3, covariance_type, device=device)
    agree(fit(model, data().to(device), batch_size=rows, **FIXED), reference(covariance_type, device))


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_pieces(covariance_type: str, direct: bool, device: torch.device) -> None:
    x = blobs(3000, 3, 3, gap=2.5).to(device)
    batch = torchem.Batch(x, weight=rand(3000, seed=2).to(device))
    model = started(x.cpu(), 3, covariance_type, device=device)
    model.component.direct = direct
    with torch.no_grad():
        whole = model.e_step(batch)
        # 128 rows is the least that a piece may have.
        model.memory_budget = 1
        pieces = model.e_step(batch)
    flat = whole.flatten()
    assert float((pieces.flatten() - flat).abs().max()) < 1e-12 * float(flat.abs().max())


@pytest.mark.parametrize("rows", [3, 64, 200])
@pytest.mark.parametrize("shuffle", [False, True])
def test_loader(rows: int, shuffle: bool, device: torch.device) -> None:
    # A shuffling loader takes its order from the global generator, which the fit leaves alone.
    loader = DataLoader(TensorDataset(data()), batch_size=rows, shuffle=shuffle)
    agree(fit(started(data(), 3, device=device), loader, **FIXED), reference(device=device))


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_order_of_rows(covariance_type: str, device: torch.device) -> None:
    x = data()[torch.randperm(N, generator=rng(4))]
    agree(
        fit(started(data(), 3, covariance_type, device=device), x.to(device), **FIXED),
        reference(covariance_type, device),
    )


def test_order_of_batches(device: torch.device) -> None:
    batches = [torchem.Batch(piece) for piece in data().split(20)]

    class Backwards:
        def __iter__(self) -> Any:
            return iter(batches[::-1])

    agree(fit(started(data(), 3, device=device), Backwards(), **FIXED), reference(device=device))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_labels_of_components(order: list[int], device: torch.device) -> None:
    expected = reference(device=device)
    model = started(data(), 3, device=device)
    means = model.means.detach()[order].clone()
    model.means = means
    result = fit(model, data().to(device), **FIXED)
    assert result.history == pytest.approx(expected.history, rel=TOLERANCE)
    torch.testing.assert_close(model.means, expected.model.means[order], rtol=TOLERANCE, atol=TOLERANCE)  # pyright: ignore


# ---- sequences ----------------------------------------------------------------------------------------------------

LENGTHS = [1 + 7 * i % 11 for i in range(N)]


def sequences() -> list[torch.Tensor]:
    return [3.0 * ((torch.arange(n) // 3 + i) % 2).unsqueeze(-1) + rand(n, 2, seed=i) for i, n in enumerate(LENGTHS)]


def chain(device: Any = "cpu", initial: str = "free") -> torchem.HMM:
    first = torchem.factors.Categorical(2) if initial == "free" else "stationary"
    model = torchem.HMM(first, torchem.factors.Categorical(2, 2), torchem.factors.Gaussian(2, 2))  # pyright: ignore
    model = model.double().to(device)
    model.emission.means = [[0.0, 1.0], [2.0, 2.0]]  # pyright: ignore
    return model


def padded(fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.full((N, max(LENGTHS), 2), fill, dtype=torch.float64)
    for row, one in zip(x, sequences(), strict=True):
        row[: len(one)] = one
    return x, torch.tensor(LENGTHS)


FORMS: dict[str, Any] = {
    "list": lambda: (sequences(), {}),
    "lists of numbers": lambda: ([one.tolist() for one in sequences()], {}),
    "arrays": lambda: ([one.numpy() for one in sequences()], {}),
    "padded": lambda: (padded()[0], {"lengths": padded()[1]}),
    "padded with nonsense": lambda: (padded(-1e9)[0], {"lengths": padded()[1]}),
    "padded with NaN": lambda: (padded(float("nan"))[0], {"lengths": padded()[1]}),
    "concatenated": lambda: (torch.cat(sequences()), {"lengths": LENGTHS}),
    "batch": lambda: (torchem.Batch(padded()[0], lengths=padded()[1]), {}),
    "batches": lambda: ([torchem.Batch(padded()[0][i::4], lengths=padded()[1][i::4]) for i in range(4)], {}),
    "loader": lambda: (DataLoader(sequences(), batch_size=7, collate_fn=list), {}),  # pyright: ignore
    "loader of padded": lambda: (DataLoader(TensorDataset(*padded()), batch_size=9), {}),
}


@pytest.mark.parametrize("initial", ["free", "stationary"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_sequences(form: str, initial: str, device: torch.device) -> None:
    expected = fit(chain(device, initial), sequences(), **FIXED)
    data, fields = FORMS[form]()
    agree(fit(chain(device, initial), data, **FIXED, **fields), expected)


@pytest.mark.parametrize("rows", [1, 10, 101])
def test_batches_of_sequences(rows: int, device: torch.device) -> None:
    agree(fit(chain(device), sequences(), batch_size=rows, **FIXED), fit(chain(device), sequences(), **FIXED))


def test_order_of_sequences(device: torch.device) -> None:
    order = torch.randperm(N, generator=rng(4)).tolist()
    shuffled = [sequences()[i] for i in order]
    agree(fit(chain(device), shuffled, **FIXED), fit(chain(device), sequences(), **FIXED))


def test_pieces_and_buckets_of_sequences(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages in small pieces, and sequences of similar length padded together: nothing changes."""
    expected = fit(chain(device), sequences(), **FIXED)
    model = chain(device)
    model.memory_budget = 4096
    agree(fit(model, sequences(), **FIXED), expected)
    long = [*sequences(), 3 * rand(400, 2, seed=1)]
    expected = fit(chain(device), long, **FIXED)
    monkeypatch.setattr("torchem.sequences._PADDING", 0)
    cut = fit(chain(device), long, **FIXED)
    agree(cut, expected)


# ---- several processes --------------------------------------------------------------------------------------------

#: Where each rank's rows end, as shares of all; by the number of ranks.
LAYOUTS: dict[int, dict[str, list[int]]] = {
    1: {"whole": [N]},
    2: {"even": [50, N], "uneven": [3, N], "first empty": [0, N], "last empty": [N, N]},
    4: {"even": [25, 50, 75, N], "uneven": [1, 60, 63, N], "empty": [40, 40, N, N], "three empty": [0, 0, N, N]},
}


def _summary(result: torchem.Result) -> dict[str, Any]:
    state = {name: value.tolist() for name, value in parameters(result.model).items()}
    return {
        "history": result.history,
        "bound": result.bound,
        "state": state,
        "status": result.status,
        "n": result.n_iter,
    }


def _shard(ends: list[int], rank: int) -> slice:
    return slice(ends[rank - 1] if rank else 0, ends[rank])


def _given_start(ends: list[int], rank: int, world: int) -> dict[str, Any]:
    model = started(data(), 3)
    if rank:
        # Ranks other than the first begin elsewhere: the first one's parameters must win.
        model.means = model.means.detach() + rank
    return _summary(fit(model, data()[_shard(ends, rank)], **FIXED))


def _own_start(ends: list[int], rank: int, world: int) -> dict[str, Any]:
    rows = _shard(ends, rank)
    return _summary(fit(mixture(3, 3, "tied"), data()[rows], weights=rand(N, seed=6)[rows], tol=1e-6, batch_size=None))


def _restarts(ends: list[int], rank: int, world: int) -> dict[str, Any]:
    return _summary(fit(mixture(4, 3), data()[_shard(ends, rank)], restarts=3, tol=0.0, max_iter=6, init="random"))


def _loader(ends: list[int], rank: int, world: int) -> dict[str, Any]:
    rows = data()[_shard(ends, rank)]
    return _summary(fit(started(data(), 3), DataLoader(TensorDataset(rows), batch_size=9), **FIXED))


def _chain_given(ends: list[int], rank: int, world: int) -> dict[str, Any]:
    model = chain()
    if rank:
        model.emission.means = [[5.0, 5.0], [1.0, 1.0]]  # pyright: ignore
    return _summary(fit(model, sequences()[_shard(ends, rank)], **FIXED))


def _chain_own(ends: list[int], rank: int, world: int) -> dict[str, Any]:
    """Padded data: each rank pads to its own longest."""
    rows = _shard(ends, rank)
    x, lengths = padded()
    weights = rand(N, seed=6)[rows]
    options = {"weights": weights, "lengths": lengths[rows], "tol": 1e-6}
    return _summary(fit(chain(initial="stationary"), x[rows], **options))


CASES = {
    "given start": _given_start, "own start": _own_start, "restarts": _restarts, "loader": _loader,
    "chain": _chain_given, "chain's own start": _chain_own,
}  # fmt: skip


@pytest.mark.parametrize(
    "world", [pytest.param(world, marks=pytest.mark.slow if world > 2 else ()) for world in LAYOUTS]
)
def test_ranks(world: int) -> None:
    # One test for all cases of a world: processes are slow to start.
    keys = [(layout, case) for layout in LAYOUTS[world] for case in CASES]
    table = ranks.run(world, [functools.partial(CASES[case], LAYOUTS[world][layout]) for layout, case in keys])
    alone = {case: function([N], 0, 1) for case, function in CASES.items()}
    wrong = {key: _difference(found, alone[key[1]]) for key, found in zip(keys, table, strict=True)}
    assert {key: text for key, text in wrong.items() if text} == {}


def _difference(outcomes: list[ranks.Outcome], expected: dict[str, Any]) -> str:
    """What distinguishes a fit by several ranks from one by a single process; nothing, it is hoped."""
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None:
            return f"rank {rank} raised {outcome.error}: {outcome.message}"
    found = outcomes[0].value
    if any(outcome.value != found for outcome in outcomes):
        return "ranks differ from each other"
    if (found["status"], found["n"]) != (expected["status"], expected["n"]):
        return f"{found['status']} after {found['n']}, not {expected['status']} after {expected['n']}"
    if found["history"] != pytest.approx(expected["history"], rel=TOLERANCE):
        return f"history {found['history']}, not {expected['history']}"
    for name, value in expected["state"].items():
        one, other = (torch.tensor(v, dtype=torch.float64) for v in (found["state"][name], value))
        if not torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE):
            return f"{name} differs by {float((one - other).abs().max()):.3g}"
    return ""
