"""The whole objective by gradient ascent: what EM is compared with."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from torchem.ascent import Climber, Optimizer, Walk, movable, settle, summed
from torchem.batch import Batch
from torchem.errors import invalid
from torchem.model import DiscreteModel, LatentModel, placed, weighted
from torchem.stats import Stats


class Direct(Climber):
    """Ascent of the whole objective, log p(x) + log prior, by an optimiser: what EM is compared with.

    It shares starts, restarts, history and stopping with EM, and by the same backtracking its objective never falls.
    Gradients are taken over all the data, in pieces. An iteration is ``steps`` steps of the optimiser, of which one of
    L-BFGS takes up to 20 passes over the data and more.

    Args:
        optimizer: A class of ``torch.optim``.
        steps: Steps between two entries of the history.
        **options: Of the optimiser, such as ``lr``; the gradient is that of the objective per unit of weight.

    Raises:
        InvalidType: If it is no class of optimisers.
        InvalidArgument: For options that the optimiser does not take, or fewer steps than one.

    Source: R. Salakhutdinov, S. Roweis, Z. Ghahramani (2003) compare the two.

    Example:
        >>> import torchem
        >>> x = torch.tensor([[-1.1], [-0.9], [0.9], [1.1]])
        >>> torchem.fit(torchem.GaussianMixture(2, 1), x, direct=Direct(), seed=0, progress=False).converged
        True
    """

    def __init__(self, optimizer: type[Optimizer] = torch.optim.LBFGS, steps: int = 1, **options: Any):
        super().__init__(optimizer, steps, options)

    def check(self, model: LatentModel) -> None:
        """Refuse a model whose objective is not log p(x).

        Raises:
            InvalidArgument: Then.
        """
        if not isinstance(model, DiscreteModel) or not model.exact:
            raise invalid(
                "direct", "a model whose objective is log p(x) (and the log prior)",
                f"{type(model).__name__}, whose objective is a bound on it", "leave it out",
            )  # fmt: skip


class _LogProb(nn.Module):
    """The objective of a piece, or the log prior, as a forward pass."""

    def __init__(self, model: LatentModel):
        super().__init__()
        self.model = model

    def forward(self, piece: Batch | None) -> Tensor | float:
        return self.model.log_prior() if piece is None else weighted(self.model.log_prob(piece), piece)


class Ascent:
    """Direct ascent in a fit: keeps its optimiser from one iteration to the next, for the objective is the same."""

    def __init__(self, climber: Direct):
        self.climber = climber
        self.walk: Walk | None = None

    def run(
        self, model: LatentModel, batches: Callable[[], Iterable[Batch]], reduce: Callable[[Stats], Stats]
    ) -> dict[str, Tensor]:
        """Take the steps of an iteration; returns new values of the parameters."""
        if not model.replicas or self.climber.elementwise:
            self._run(model, batches, reduce)
            return model.snapshot()
        singles = [model.take_replicas(r) for r in range(model.replicas[0])]
        for single in singles:
            self._run(single, batches, reduce)
        found = [single.snapshot() for single in singles]
        return {name: torch.stack([values[name] for values in found]) for name in found[0]}

    def _run(
        self, model: LatentModel, batches: Callable[[], Iterable[Batch]], reduce: Callable[[Stats], Stats]
    ) -> None:
        for factor in model.factors():
            if factor.sufficient:  # freezing governs fits, requires_grad what users differentiate
                factor.requires_grad_(True)
        names = movable(model)
        tensors = [model.get_parameter(name) for name in names]
        if not tensors:
            return
        before = copy.deepcopy(model)
        pairs = list(zip(model.factors().items(), before.factors(), strict=True))
        shell = _LogProb(model)

        def call(piece: Batch | None) -> Any:
            values: dict[str, Tensor] = {}
            for (factor, slots), old in pairs:
                kept = old.kept(dict(factor.named_parameters()))
                values |= {f"{slots[0]}.{name}": value for name, value in kept.items()}
            return torch.func.functional_call(shell, placed(shell, values), (piece,), tie_weights=False)

        def evaluate() -> Tensor:
            pieces = (piece for batch in batches() for piece in model.stream(batch))
            terms = ((call(piece), model.count(piece)) for piece in pieces)
            return summed(tensors, terms, lambda: call(None), reduce)

        def back() -> None:
            for (factor, _), old in pairs:
                settle(factor, old)

        walk = self.walk
        if walk is None or any(a is not b for a, b in zip(walk.tensors, tensors, strict=False)):
            walk = self.walk = Walk(self.climber, tensors)
        with torch.enable_grad():
            walk.run(evaluate, back)
