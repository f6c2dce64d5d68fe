"""Beside the modes: every model with weights, labels, loaders, missing entries, frozen parts and as a pure map."""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import torchem
from tests.laws.cases import close
from tests.test_modes import MODELS
from torchem.errors import ConvergenceWarning, SymmetryWarning, TorchemError


def quiet(model: Any, data: Any, **options: Any) -> torchem.Result:
    """From where the model stands, every pass that is asked for."""
    with warnings.catch_warnings():
        for category in (ConvergenceWarning, SymmetryWarning):
            warnings.simplefilter("ignore", category)
        return torchem.fit(
            model, data, **{"init": None, "tol": 0.0, "seed": 0, "progress": False, "max_iter": 2} | options
        )


def started(name: str) -> tuple[Any, dict[str, Any]]:
    """A model after a pass over its data, and the data."""
    return copy.deepcopy(_started(name))


@functools.cache
def _started(name: str) -> tuple[Any, dict[str, Any]]:
    build, data = MODELS[name]
    model, given = build().double(), data()
    quiet(model, init="auto", max_iter=1, **given)
    return model, given


def histories(model: Any, first: dict[str, Any], second: dict[str, Any], **options: Any) -> None:
    """Both lead the same way."""
    one, two = (quiet(copy.deepcopy(model), **given, **options) for given in (first, second))
    assert one.history == pytest.approx(two.history, rel=1e-9)


def weights(name: str) -> None:
    """An integer weight is repetition, zero is absence."""
    model, given = started(name)
    count = torch.arange(len(given["data"])) % 3
    repeated = {key: value.repeat_interleave(count, 0) for key, value in given.items()}
    # Optimisers of networks draw for each row: of an amortised model the objectives are compared.
    passes = 2 if model.accelerates else 0
    histories(model, given | {"weights": count.double()}, repeated, max_iter=passes)


def labels(name: str) -> None:
    """Labels that name the most likely states leave the joint density of data and states."""
    model, given = started(name)
    with torch.no_grad():
        batch = model.batch(given["data"], u=given.get("inputs"))
        continuous = model.labelled is None
        states = torch.zeros(len(batch)) if continuous else model.most_likely(batch)
        known = quiet(copy.deepcopy(model), labels=states.long(), max_iter=1, **given)
        if "hard" not in model.e_steps:  # labels name regimes, and leave the states beside them free
            first = float(model.log_prob(given["data"], labels=states.long()).sum() + model.log_prior())
        elif getattr(model, "models", None) is None:
            first = quiet(model, e_step="hard", max_iter=1, **given).history[0]
        else:  # labels name components, and leave the latents inside them free
            first = float(model.joint(batch).gather(-1, states.unsqueeze(-1)).sum() + model.log_prior())
    assert known.history[0] == pytest.approx(first, rel=1e-9)
    assert known.history[1] >= known.history[0]


def loader(name: str) -> None:
    """Batches of a loader are the data that they were cut from."""
    model, given = started(name)
    batch = model.batch(given["data"], u=given.get("inputs"))
    rows = len(batch) // 3 if model.accelerates else len(batch)
    cut = DataLoader(range(len(batch)), rows, collate_fn=lambda index: batch[index[0] : index[-1] + 1])  # pyright: ignore
    slack = 1e-6 if name in ("factorial HMM", "switching dynamics") else 1e-9  # its ascents end at their tolerance
    one, two = quiet(copy.deepcopy(model), cut), quiet(model, **given)
    assert one.history == pytest.approx(two.history, rel=slack)


def holes(name: str, part: tuple[Any, ...]) -> None:
    """What was not seen weighs nothing, and what was seen beside it counts: the objective never falls."""
    model, given = started(name)
    x = given["data"].double()
    x[part] = torch.nan
    result = quiet(model, **given | {"data": x}, max_iter=3)
    assert all(b >= a - 1e-6 for a, b in itertools.pairwise(result.history))
    nothing = {key: value[:1] for key, value in given.items()} | {"data": torch.full_like(x[:1], torch.nan)}
    batch = model.batch(nothing["data"], u=nothing.get("inputs"))
    with torch.no_grad():
        assert float(model.log_prob(batch)) == pytest.approx(0.0, abs=1e-12)


def missing_rows(name: str) -> None:
    """Rows, or frames of sequences."""
    holes(
        name,
        (slice(None, None, 4),) if "HMM" not in name and "space" not in name else (slice(None), slice(None, None, 4)),
    )


def missing_entries(name: str) -> None:
    """Single numbers of a row."""
    holes(name, (slice(1, None, 4), ..., 0))


def freezing(name: str) -> None:
    """A frozen part keeps its bits, the others move."""
    model, given = started(name)
    factors = dict(model.slots())
    if factors:
        slot, factor = next((slot, factor) for slot, factor in reversed(model.slots()) if factor.views)
        view, parameter = next(iter(factor.views.items()))
        factor.freeze(view)
        frozen = f"{slot}.{parameter}"
    else:  # a model of networks alone
        frozen, value = next(iter(model.named_parameters()))
        value.requires_grad_(False)
    before = {key: value.clone() for key, value in model.named_parameters()}
    quiet(model, **given)
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed
    assert frozen not in changed


def pure_map(name: str) -> None:
    """`torchem.em_map` is an iteration of a fit."""
    model, given = started(name)
    quiet(model, max_iter=0, **given)
    batch = model.batch(given["data"], u=given.get("inputs"))
    params = {key: value.detach().clone() for key, value in model.named_parameters()}
    with torch.no_grad():
        image = torchem.em_map(model)(params, batch)
        twin = copy.deepcopy(model)
        twin.assign(image)
        quiet(model, max_iter=1, **given)
        close(twin.log_prob(batch).sum() + twin.log_prior(), model.log_prob(batch).sum() + model.log_prior())


#: What a model can do beside running in every mode.
ASPECTS: dict[str, Callable[[str], None]] = {
    "weights": weights,
    "labels": labels,
    "`DataLoader`": loader,
    "missing rows": missing_rows,
    "missing entries": missing_entries,
    "freezing": freezing,
    "`em_map`": pure_map,
}

#: All that is refused, with a word of the sentence that says why.
REFUSED: dict[tuple[str, str], str] = {
    ("factor analysis", "labels"): "labels",
    ("variational factor analysis", "labels"): "labels",
    ("neural HMM", "`em_map`"): "function of statistics",
    ("Laplace mixture", "`em_map`"): "function of statistics",
    ("state space", "labels"): "labels",
    ("variational state space", "labels"): "labels",
    ("amortized model", "labels"): "labels",
    ("amortized model", "missing rows"): "missing",
    ("amortized model", "missing entries"): "missing",
    ("amortized model", "`em_map`"): "from statistics alone",
}


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("model", MODELS)
def test_aspects(model: str, aspect: str) -> None:
    if (model, aspect) in REFUSED:
        with pytest.raises(TorchemError, match=REFUSED[model, aspect]):
            ASPECTS[aspect](model)
        return
    ASPECTS[aspect](model)


def three_forms(states: torch.Tensor, sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels, −1 where there is none, as themselves, as sets of candidates and as soft labels."""
    parts = states.unsqueeze(-1) if len(sizes) == 1 else states
    columns = zip(parts.unbind(-1), sizes, strict=True)
    sets = torch.cat([(own.unsqueeze(-1) == torch.arange(k)) | (own.unsqueeze(-1) < 0) for own, k in columns], -1)
    return states, sets, 0.3 * sets.double()


@pytest.mark.parametrize("model", [name for name in MODELS if (name, "labels") not in REFUSED])
def test_labels_in_three_forms(model: str) -> None:
    """They say the same, are kept by the posterior, and are refused by their place where they cannot be."""
    twin, given = started(model)
    shape, counted = given["data"].shape[: 1 if twin.whole else -1], twin.labelled
    sizes = (counted,) if isinstance(counted, int) else counted
    states = torch.arange(shape.numel() * len(sizes)).view(*shape, -1) % torch.tensor([k + 1 for k in sizes]) - 1
    states = states[..., 0] if len(sizes) == 1 else states
    u = given.get("inputs")
    with torch.no_grad():
        batches = [twin.batch(given["data"], u=u, labels=form) for form in three_forms(states, sizes)]
        # What lasts of a soft label are ratios: a set is their limit.
        values = [twin.log_prob(batch) for batch in batches]
        for value in values[1:]:
            close(value, values[0])
        if len(sizes) == 1:
            found = twin.most_likely(batches[0])
            assert torch.equal(found[states >= 0], states[states >= 0])
    wrong = states.clone()
    wrong.view(-1)[-1] = 9
    with pytest.raises(TorchemError, match=r"^labels: expected states from 0 to .*, got 9 at "):
        twin.batch(given["data"], u=u, labels=wrong)
    nothing = three_forms(states, sizes)[1].clone()
    nothing.view(-1, sum(sizes))[5] = False
    with pytest.raises(TorchemError, match="at least one state that is possible, got none at "):
        twin.batch(given["data"], u=u, labels=nothing)
    with pytest.raises(TorchemError, match=r"^labels: "):
        twin.batch(given["data"], u=u, labels=torch.ones(*shape, sum(sizes) + 3))
