"""Walks uphill: any optimiser of torch, made monotone by halving its steps, for each replica by itself.

After each step the objective is looked at. Where it would have fallen the step is halved until it does not; so a walk
never ends lower than it began, whatever the optimiser and its learning rate.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchem.errors import invalid, whole_number, wrong_type
from torchem.factor import Factor
from torchem.stats import Stats

Optimizer = torch.optim.Optimizer
#: What a walk climbs: gives the objective ``[*r]`` and leaves minus its gradient with the parameters.
Evaluate = Callable[[], Tensor]

#: Optimisers that treat each number by itself: these move all replicas at once, the others one after the other.
_ELEMENTWISE = {
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
}
#: Optimisers by the names that files hold.
BY_NAME = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
}
#: Times that a step along a gradient is halved, and one along what an optimiser remembers, which need not lead up.
_HALVINGS, _PATIENCE = 40, 6


class Climber:
    """An optimiser by its class and options, and how many steps it takes.

    Args:
        optimizer: A class of ``torch.optim``; its instances are made here, over the parameters that are to move.
        steps: Steps in a walk.
        options: What the class is called with, besides parameters. L-BFGS searches along lines unless they say how.

    Raises:
        InvalidType: If it is no class of optimisers.
        InvalidArgument: For options that it does not take, or fewer steps than one.
    """

    def __init__(self, optimizer: Any, steps: Any, options: dict[str, Any]):
        if isinstance(optimizer, Optimizer):
            name = type(optimizer).__name__
            raise wrong_type(
                "optimizer", "a class of torch.optim, to be made over the parameters that it shall move", optimizer,
                f"pass torch.optim.{name} itself, and lr=… beside it",
            )  # fmt: skip
        if not isinstance(optimizer, type) or not issubclass(optimizer, Optimizer):
            raise wrong_type("optimizer", "a class of torch.optim", optimizer, "pass for example torch.optim.Adam")
        whole_number("steps", steps, 1, "the default is 10")
        if options.get("maximize"):
            raise invalid("maximize", "nothing, for the objective is turned where it must be", True, "leave it out")
        self.optimizer, self.steps, self.options = optimizer, steps, dict(options)
        try:
            self.build([nn.Parameter(torch.zeros(1, 1))])
        except (TypeError, ValueError) as error:
            raise invalid("optimizer", f"options that {optimizer.__name__} takes", error, "correct them") from error

    @property
    def elementwise(self) -> bool:
        """Whether it treats each number by itself."""
        return self.optimizer in _ELEMENTWISE

    @property
    def lasting(self) -> bool:
        """Whether what it learnt on one objective serves on the next: curvature does not."""
        return not issubclass(self.optimizer, torch.optim.LBFGS)

    def build(self, tensors: Sequence[Tensor]) -> Optimizer:
        """An optimiser of tensors."""
        options = dict(self.options)
        if issubclass(self.optimizer, torch.optim.LBFGS):
            options.setdefault("line_search_fn", "strong_wolfe")
        return self.optimizer(list(tensors), **options)

    def config(self) -> dict[str, Any]:
        """What files hold: the optimiser by its name, if it is one of torch's."""
        name = self.optimizer.__name__
        known = BY_NAME.get(name) is self.optimizer
        return {"optimizer": name if known else self.optimizer, "steps": self.steps, **self.options}


class Walk:
    """An optimiser under way, and the length of its steps: what may last from one M-step to the next."""

    def __init__(self, climber: Climber, tensors: Sequence[Tensor]):
        self.climber, self.tensors = climber, list(tensors)
        self.optimizer = climber.build(self.tensors)
        self.share: Tensor | None = None
        self.fresh: Tensor | None = None
        # Whether not even the bare gradient led up.
        self.spent = False

    def run(self, evaluate: Evaluate, settle: Callable[[], None], guarded: bool = True) -> None:
        """Take the steps, in place.

        Args:
            evaluate: The objective.
            settle: Brings the parameters back to where they may be, in place.
            guarded: Whether a step after which the objective fell is halved.
        """
        for tensor in self.tensors:
            tensor.data = tensor.detach().clone()  # who holds the old values keeps them
        value, self.spent = evaluate(), False
        if self.share is None or self.share.shape != value.shape:
            self.share = torch.ones_like(value)
            self.fresh = torch.ones_like(value, dtype=torch.bool)
        for left in reversed(range(self.climber.steps)):
            before = [tensor.detach().clone() for tensor in self.tensors]
            self._step(evaluate)
            settle()
            if all(map(torch.equal, before, self.tensors)):
                break
            if guarded:
                value = self._shortened(before, value, evaluate, settle)
            elif left:
                value = evaluate()
            if self.spent:
                break
        for tensor in self.tensors:
            tensor.grad = None

    def _step(self, evaluate: Evaluate) -> None:
        if self.climber.elementwise:
            self.optimizer.step()  # the gradient is there already
        else:
            self.optimizer.step(lambda: -float(evaluate().sum()))

    def _shortened(self, before: list[Tensor], value: Tensor, evaluate: Evaluate, settle: Callable[[], None]) -> Tensor:
        """Halve a step until the objective does not fall, for each replica; returns the objective there."""
        assert self.share is not None and self.fresh is not None
        moves = [tensor.detach() - old for tensor, old in zip(self.tensors, before, strict=True)]
        # A step that was too long is tried shorter the next time.
        start = share = (2 * self.share).clamp(max=1.0)
        limit = torch.where(self.fresh, _HALVINGS, _PATIENCE)
        new, lost = value, torch.zeros_like(self.fresh)
        for halvings in range(_HALVINGS + 1):
            self._place(before, moves, share)
            settle()
            new = evaluate()
            bad = ~(new >= value) & ~lost
            lost = lost | (bad & (limit <= halvings))
            bad = bad & ~lost
            if not bool(bad.any()):
                break
            share = torch.where(bad, share / 2, share)
            if not self.climber.lasting:
                self.optimizer.state.clear()  # curvature is learnt from whole steps
        if bool(lost.any()):
            # Momentum leads down, or this is the top. The next step begins with the bare gradient.
            for tensor, old in zip(self.tensors, before, strict=True):
                tensor.data = torch.where(_leading(lost, old), old, tensor)
            self._forget(lost)
            new = torch.where(lost, value, evaluate())
        self.share = torch.where(lost & ~self.fresh, start, share)
        self.spent, self.fresh = bool((lost & self.fresh).all()), lost
        return new

    def _place(self, before: list[Tensor], moves: list[Tensor], share: Tensor) -> None:
        for tensor, old, move in zip(self.tensors, before, moves, strict=True):
            tensor.data = old + _leading(share, move).to(move) * move

    def _forget(self, which: Tensor) -> None:
        """Reset what the optimiser remembers of some replicas."""
        if not self.climber.elementwise:
            self.optimizer.state.clear()
            return
        # Counts of steps go on, as they do for the other replicas.
        for tensor in self.tensors:
            for kept in self.optimizer.state.get(tensor, {}).values():
                if isinstance(kept, Tensor) and kept.shape == tensor.shape:
                    kept[which] = 0


def _leading(value: Tensor, like: Tensor) -> Tensor:
    """Values of replicas against the leading axis of a tensor."""
    return value.reshape(*value.shape, *[1] * (like.dim() - value.dim()))


def learn(tensors: Sequence[Tensor], value: Tensor, scale: float = 1.0) -> None:
    """Leave minus the gradient of an objective with the tensors."""
    slopes = torch.autograd.grad(-value.sum() * scale, list(tensors), allow_unused=True)
    for tensor, slope in zip(tensors, slopes, strict=True):
        tensor.grad = torch.zeros_like(tensor) if slope is None else slope


def summed(
    tensors: Sequence[Tensor],
    terms: Iterable[tuple[Tensor, Tensor]],
    prior: Callable[[], Tensor | float | None],
    reduce: Callable[[Stats], Stats],
    whole: float | None = None,
) -> Tensor:
    """Σ terms + log prior over all processes; minus its gradient, per unit of weight, is left with the tensors.

    Each term is differentiated before the next is made, so that memory does not grow with the data.

    Args:
        tensors: What the objective is differentiated by.
        terms: Parts of the objective, each with the weight of its observations.
        prior: The log prior.
        reduce: Sums over processes.
        whole: Weight of all data where the terms are of a part of them, and the prior counts for as much.
    """
    value = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    weight = value.clone()
    slopes = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors]
    for term, mass in terms:
        value, weight = value + term.detach(), weight + mass.to(weight)
        if term.requires_grad:
            found = torch.autograd.grad(term.sum(), list(tensors), allow_unused=True)
            slopes = [a if b is None else a + b for a, b in zip(slopes, found, strict=True)]
    sums = {"value": value, "weight": weight} | {f"slope{i}": slope for i, slope in enumerate(slopes)}
    total = reduce(Stats(sums))
    value, weight = total["value"], float(total["weight"])
    slopes = [total[f"slope{i}"] for i in range(len(tensors))]
    log_prior = prior()
    if isinstance(log_prior, Tensor) and log_prior.requires_grad:
        log_prior = log_prior if whole is None else log_prior * (weight / whole)
        value = value + log_prior.detach()
        found = torch.autograd.grad(log_prior.sum(), list(tensors), allow_unused=True)
        slopes = [a if b is None else a + b for a, b in zip(slopes, found, strict=True)]
    scale = 1.0 / max(weight, torch.finfo(torch.float64).tiny)
    for tensor, slope in zip(tensors, slopes, strict=True):
        tensor.grad = (-scale * slope).to(tensor)
    return value


def settle(factor: Factor, before: Factor) -> None:
    """Put what is frozen back, and the rest into the feasible set, in place."""
    with torch.no_grad():
        for name, value in before.kept(dict(factor.named_parameters())).items():
            factor.get_parameter(name).data = value.detach()
        factor.project()


def movable(module: nn.Module) -> list[str]:
    """Names of the parameters that walks over the data may move: not those of a network that is kept."""
    fixed = [part for part in module.modules() if isinstance(part, Factor) and getattr(part, "fixed", False)]
    kept = {id(value) for part in fixed for value in part.parameters()}
    return [name for name, value in module.named_parameters() if value.requires_grad and id(value) not in kept]
