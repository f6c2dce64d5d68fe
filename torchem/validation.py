"""Held-out data: what a fit may judge itself by instead of its own objective."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchem import distributed
from torchem.batch import Batch
from torchem.data import Source
from torchem.errors import TorchemError, invalid
from torchem.model import LatentModel, weighted
from torchem.stats import Stats

#: What `Validation` reads from a dictionary: arguments of `torchem.fit`, and what `Source` calls them.
_FIELDS = {
    "data": "data", "weights": "weight", "inputs": "u", "lengths": "lengths", "labels": "labels",
    "observed": "observed", "offset": "offset", "trials": "trials",
}  # fmt: skip


class Validation:
    """Data that were not learnt from, and how well a model explains them.

    Args:
        model: Reads the data.
        data: Whatever `torchem.fit` takes as data; or a dictionary of them and of what belongs to them, by the names of
            fit's arguments: ``{"data": x, "weights": w, "inputs": u, "lengths": n, "labels": z}``, and ``"observed"``.

    Raises:
        InvalidArgument: Where `torchem.fit` would raise it for its own data; the message names ``validation``.

    Example:
        >>> import torchem
        >>> held_out = Validation(torchem.GaussianMixture(2, 1), {"data": [[0.0], [1.0]], "weights": [1.0, 2.0]})
        >>> held_out.sums(torchem.GaussianMixture(2, 1))["count"]
        tensor(3., dtype=torch.float64)
    """

    def __init__(self, model: LatentModel, data: Any):
        given = dict(data) if isinstance(data, Mapping) else {"data": data}
        if "data" not in given or not given.keys() <= _FIELDS.keys():
            raise invalid(
                "validation", f"data, or a dictionary of {', '.join(_FIELDS)}", f"the keys {list(given)}",
                "name them as the arguments of fit",
            )  # fmt: skip
        with _named():
            self.source = Source(model, **{_FIELDS[name]: value for name, value in given.items()})
            # A loader is read once, so that what is wrong with it comes to light before the fit.
            for _ in self.source:
                pass

    def sums(self, model: LatentModel) -> Stats:
        """Weighted log-likelihood ``score [*r]`` and weight ``count []`` of the data of this process."""
        score: Tensor = torch.zeros(model.replicas, dtype=torch.float64, device=model.device)
        count: Tensor = torch.zeros((), dtype=torch.float64, device=model.device)
        for batch in self.batches():
            weight = None if batch.weight is None else batch.weight.to(model.device)
            score = score + weighted(model.log_score(batch), Batch(batch.x, weight=weight))
            count = count + model.count(batch).to(count)
        return Stats(score=score, count=count)

    def occupancy(self, model: LatentModel) -> Stats:
        """Mass of each component ``mass [*r, K]`` in the data of this process, and their weight ``count []``."""
        mass: Tensor = torch.zeros((), dtype=torch.float64, device=model.device)
        count: Tensor = torch.zeros((), dtype=torch.float64, device=model.device)
        for batch in self.batches():
            found = model.occupancy(model.e_step(batch))
            assert found is not None
            mass, count = mass + found, count + model.count(batch).to(count)
        return Stats(mass=mass, count=count)

    def batches(self) -> Iterator[Batch]:
        """A pass over the data; batches without rows, of a process that has none, are left out."""
        yield from (batch for _, batch in self.source if len(batch))


@contextmanager
def _named() -> Iterator[None]:
    """Let complaints about data name ``validation``."""
    try:
        yield
    except TorchemError as error:
        message = re.sub(r"^(data|([\w, ]+))(?=: )", lambda m: f"validation {m[2] or ''}".rstrip(), str(error))
        raise type(error)(message) from error


def mean_scores(sums: Stats) -> list[float]:
    """Held-out log-likelihood per observation of each replica, from the sums of all processes.

    Raises:
        InvalidArgument: If the data have no weight at all.
    """
    count = float(sums["count"])
    if count == 0:
        raise invalid("validation", "at least one observation", "none on any process", "check the shards")
    return (sums["score"] / count).reshape(-1).tolist()


def agree_on(validation: Any) -> None:
    """Refuse held-out data that only some processes have: the others would wait for ever."""
    if distributed.active() and len(set(distributed.gather(validation is None))) > 1:
        raise invalid(
            "validation", "held-out data on each process, or on none", "some without", "give the others an empty shard"
        )  # fmt: skip


class Leader:
    """The parameters of the best held-out score so far, of each replica by itself.

    Args:
        validation: What they are judged by.
        replicas: How many there are.
    """

    def __init__(self, validation: Validation, replicas: int):
        self.validation = validation
        #: Whether nothing was scored yet; and whether the model has been put back to the best.
        self.fresh, self.settled = True, False
        self.known: Tensor = torch.zeros(replicas, dtype=torch.bool)
        self.values: dict[str, Tensor] = {}
        self.mass: Tensor | None = None

    def follow(self, better: Tensor, model: LatentModel, mass: Tensor | None) -> None:
        """Take over the parameters, and the mass of the components, of the replicas that are ``better [R]``."""
        now = model.snapshot()
        single = not model.replicas
        self.values = {n: _chosen(better, v, self.values.get(n, v), single) for n, v in now.items()}
        if mass is not None:
            self.mass = _chosen(better, mass, mass if self.mass is None else self.mass, single)
        self.known = self.known.to(better.device) | better

    def best(self, model: LatentModel) -> dict[str, Tensor]:
        """The best parameters; for replicas that have none, the model's own."""
        single = not model.replicas
        return {n: _chosen(self.known, self.values.get(n, v), v, single) for n, v in model.snapshot().items()}

    def keep(self, index: Tensor) -> None:
        """Drop all replicas but some."""
        self.values = {name: value[index] for name, value in self.values.items()}
        self.mass = None if self.mass is None else self.mass[index]
        self.known = self.known.to(index.device)[index]


def _chosen(which: Tensor, one: Tensor, other: Tensor, single: bool) -> Tensor:
    """``one`` for the replicas ``which [R]``, ``other`` for the rest."""
    if single:
        return one if bool(which[0]) else other
    return torch.where(which.reshape(-1, *[1] * (one.dim() - 1)), one, other)
