"""What factors made of other factors have in common: everything but the density goes to the parts."""

from abc import abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from torchem.errors import invalid, one_of
from torchem.factor import Adjustment, Factor, Moments
from torchem.stats import Stats


class Composite(Factor):
    """A factor made of factors, its parts.

    Parameters, views and statistics of a part stand under its path: ``"component.mean"`` is parameter ``mean`` of part
    ``component``, and the statistics are nested. A replica axis is given to each factor of the tree on its own, as
    models do.
    """

    @abstractmethod
    def parts(self) -> dict[str, Factor]:
        """The factors that it is made of, by their paths in the tree of modules."""

    def opened(self, stats: Stats) -> dict[str, Stats]:
        """The statistics of each part, in its own shapes."""
        return {path: stats[path] for path in self.parts()}

    def closed(self, parts: dict[str, Stats]) -> Stats:
        """Statistics of the whole from those of the parts, the inverse of `opened`."""
        return Stats(parts)

    def components_of(self, path: str, states: Tensor) -> Tensor:
        """``[*r, K]`` values of states as values of a part's own components."""
        return states

    def states_of(self, path: str, components: Tensor) -> Tensor:
        """Where a state has a marked component among those of a part: Boolean ``[*r, K]``."""
        return components

    # ---- what parts have in common ----------------------------------------------------------------------------

    def _first(self) -> Tensor:
        return next(iter(self.parts().values()))._first()

    @property
    def replicas(self) -> tuple[int, ...]:
        return next(iter(self.parts().values())).replicas

    @property
    def sufficient(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the expected log-density of every part is a function of statistics."""
        return all(part.sufficient for part in self.parts().values())

    @property
    def averages(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a part is fed to inference as an expectation under a posterior."""
        return any(part.averages for part in self.parts().values())

    @property
    def replicates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all parts may carry a replica axis."""
        return all(part.replicates for part in self.parts().values())

    @property
    def minorizes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether no M-step lowers Q of any part."""
        return all(part.minorizes for part in self.parts().values())

    @property
    def default_init(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Clusters, if any part starts from them."""
        starts = {part.default_init for part in self.parts().values()}
        return "kmeans" if "kmeans" in starts else min(starts)

    @property
    def shared_parameters(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Parameters that all components of a part share."""
        return frozenset(f"{path}.{name}" for path, part in self.parts().items() for name in part.shared_parameters)

    @property
    def lags(self) -> int:
        """How many frames before the present one the density depends on."""
        return max(getattr(part, "lags", 0) for part in self.parts().values())

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        parts = self.parts()
        return self.joined({path: parts[path].maximize(own) for path, own in self.opened(stats).items()})

    @staticmethod
    def joined(values: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Values of the parts' parameters, by their names in the whole."""
        return {f"{path}.{name}": value for path, own in values.items() for name, value in own.items()}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        parts = self.parts()
        values = [parts[path].expected_log_prob(own) for path, own in self.opened(stats).items()]
        return torch.stack(values).sum(0)

    def penalized(self, stats: Stats) -> Stats:
        parts = self.parts()
        return self.closed({path: parts[path].penalized(own) for path, own in self.opened(stats).items()})

    def log_prior(self) -> Tensor | None:
        values = [value for part in self.parts().values() if (value := part.log_prior()) is not None]
        return torch.stack(values).sum(0) if values else None

    # ---- numerics ---------------------------------------------------------------------------------------------

    def prepare(self, moments: Moments) -> None:
        for part in self.parts().values():
            part.prepare(moments)

    def project(self) -> None:
        for part in self.parts().values():
            part.project()

    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        parts = self.parts()
        found = {path: change for path, part in parts.items() if (change := part.tune(rows, iteration)) is not None}
        if not found:
            return None
        moves = {path: change.move for path, change in found.items() if change.move is not None}

        def move(stats: Stats) -> Stats:
            return self.closed({p: moves[p](own) if p in moves else own for p, own in self.opened(stats).items()})

        return Adjustment(move if moves else None, any(change.retake for change in found.values()))

    def replace_components(self, which: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        merged: dict[str, dict[str, Tensor]] = {}
        for path, part in self.parts().items():
            own = {name.removeprefix(f"{path}."): v for name, v in values.items() if name.startswith(f"{path}.")}
            merged[path] = part.replace_components(self.components_of(path, which), own)
        return self.joined(merged)

    def degenerate(self) -> Tensor | None:
        found = [
            self.states_of(path, marks)
            for path, part in self.parts().items()
            if (marks := part.degenerate()) is not None
        ]
        return torch.stack(found).any(0) if found else None

    # ---- freezing, bookkeeping --------------------------------------------------------------------------------

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Composite":
        """Keep parameters of parts through every M-step.

        Args:
            names: Views of parts under their paths (``"component.means"``); all of them when empty.
            mask: Boolean over the part's own components, for exactly one name.

        Raises:
            InvalidArgument: For a name that is no view of a part, or a mask that does not fit it.
        """
        if mask is not None and len(names) != 1:
            raise invalid("mask", "exactly one name to apply to", f"{len(names)} names", "freeze them one by one")
        for part, views in self._located("freeze", names):
            part.freeze(*views, mask=mask)
        return self

    def unfreeze(self, *names: str) -> "Composite":
        """Let the M-step move these views of parts (all of them when empty) again."""
        for part, views in self._located("unfreeze", names):
            part.unfreeze(*views)
        return self

    def kept(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        own: dict[str, dict[str, Tensor]] = {path: {} for path in self.parts()}
        mine = {name: self.keep_frozen(name, value) for name, value in values.items() if name in self._parameters}
        for name, value in values.items():
            if name in mine:
                continue
            path = next(path for path in own if name.startswith(f"{path}."))
            own[path][name.removeprefix(f"{path}.")] = value
        return mine | self.joined({path: part.kept(own[path]) for path, part in self.parts().items()})

    def paths(self) -> list[str]:
        """The views of all parts under their paths."""
        own = {path: part.paths() if isinstance(part, Composite) else part.views for path, part in self.parts().items()}
        return [f"{path}.{view}" for path, views in own.items() for view in views]

    def _located(self, argument: str, names: Iterable[str]) -> list[tuple[Factor, tuple[str, ...]]]:
        """The parts that names speak of, each with the view meant; every part with all of its views for no names."""
        if not names:
            return [(part, ()) for part in self.parts().values()]
        found: list[tuple[Factor, tuple[str, ...]]] = []
        for name in names:
            one_of(argument, name, self.paths())
            path = next(path for path in self.parts() if name.startswith(f"{path}."))
            found.append((self.parts()[path], (name.removeprefix(f"{path}."),)))
        return found

    def n_parameters(self) -> int:
        return sum(part.n_parameters() for part in self.parts().values())


def reads_sequences(factor: Factor) -> bool:
    """Whether a factor, or a part of it, asks for whole sequences before they are cut into frames."""
    factor = factor.unwrapped
    if getattr(factor, "lags", 0):
        return True
    if isinstance(factor, Composite):
        return any(map(reads_sequences, factor.parts().values()))
    return type(factor).context is not Factor.context


def reshaped(stats: Stats, shape: Callable[[Tensor], Tensor]) -> Stats:
    """Statistics with the component axis of every leaf that has one in another shape."""
    return stats.like(
        {
            name: reshaped(leaf, shape) if isinstance(leaf, Stats) else leaf if name in stats.shared else shape(leaf)
            for name, leaf in stats.items()
        }
    )
