"""Generalised EM: M-steps that climb by an optimiser of torch where there is no maximiser, or none that is wanted.

The bound rises as in EM (R. M. Neal, G. E. Hinton 1998, section 2): a walk never ends lower than it began.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchem.ascent import BY_NAME, Climber, Optimizer, Walk, learn, movable, settle, summed
from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor, Kernel, Prior
from torchem.model import DiscreteModel, LatentModel
from torchem.stats import Stats
from torchem.wrapper import Wrapper, outer

#: Pieces of data, each with the weighted expectations of the slots.
Expected = tuple[Batch, dict[str, Tensor]]
#: Numbers of data and expectations that are kept between the steps of one M-step; beyond, they are made anew.
_KEPT = 1 << 22


class Gradient(Wrapper):
    """A factor whose M-step climbs Q(θ; S) + log p(θ) by an optimiser, instead of maximising it: generalised EM.

    Any factor may be wrapped, beside others that keep their closed forms. The bound never falls in full batches: after
    each step of the optimiser a replica that lost is put back by halves. Where Q is a function of statistics a walk
    costs no pass over the data, starts anew in every M-step (`maximize` is pure) and computes in float64. ``lr`` is
    that of Q as it stands, a sum over observations, and no more than a first length to try.

    Where it is none (`torchem.factors.Neural`) each step passes over the data again, under posteriors of the latents at
    the parameters of the E-step; Q is then taken per unit of weight, and the optimiser lasts as long as the fit, with
    its momentum (but L-BFGS, whose curvature is of one objective, for an M-step). Under `torchem.Stochastic` the steps
    are taken on the batch at hand, and are not looked after: choose SGD or Adam, and few. Under `torchem.Incremental`
    networks move at the end of a pass, and the statistics of all batches are then renewed.

    ``passes=True`` asks for such steps where they are not needed: the statistics of a softmax gate or of a generalised
    linear regression are those of a quadratic beside Q, and one M-step of theirs is one step uphill. With L-BFGS and a
    few steps the M-step is then exact.

    Walks are not differentiated: ``em_map`` gives their ends, and takes no function transforms.

    Args:
        factor: The factor, which becomes part of this one. Its prior and what is frozen count.
        optimizer: A class of ``torch.optim``.
        steps: Steps in an M-step.
        passes: Whether to pass over the data for each step, even where Q is taken for a function of statistics.
        **options: Of the optimiser, such as ``lr``.

    Raises:
        InvalidType: If it is no factor, or no class of optimisers.
        InvalidArgument: If the factor is a posterior or has an optimiser already, for options that the optimiser does
            not take, or fewer steps than one.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 2; K. Lange (1995).

    Example:
        >>> import torchem
        >>> m = torchem.GaussianMixture(2, 1)
        >>> m.component = Gradient(m.component, torch.optim.Adam, steps=20, lr=0.1)
        >>> x = torch.tensor([[-1.1], [-0.9], [0.9], [1.1]])
        >>> torchem.fit(m, x, max_iter=300, seed=0, progress=False).converged
        True
    """

    def __init__(
        self,
        factor: Factor,
        optimizer: type[Optimizer] = torch.optim.LBFGS,
        steps: int = 10,
        passes: bool = False,
        **options: Any,
    ):
        super().__init__()
        if not isinstance(passes, bool):
            raise wrong_type("passes", "True or False", passes, "say whether each step passes over the data")
        if not isinstance(factor, Factor):
            raise wrong_type("factor", "a torchem factor", factor, "pass for example model.component")
        if factor.averages:
            raise invalid(
                "factor", "one with parameters of its own", "a posterior of them",
                "leave it: torchem.Variational maximises its bound in closed form",
            )  # fmt: skip
        if any(isinstance(module, Gradient) for module in factor.modules()):
            raise invalid("factor", "one without an optimiser", "a Gradient", "wrap what it wraps")
        if next(factor.parameters(), None) is None:
            raise invalid("factor", "one with parameters", type(factor).__name__, "leave it as it is")
        self._climber = Climber(optimizer, steps, options)
        self.passes = passes
        self._walk: Walk | None = None
        self.factor = factor

    def __getstate__(self) -> dict[str, Any]:
        # A walk belongs to the very parameters that it moves.
        return {**self.__dict__, "_walk": None}

    # ---- what is wrapped --------------------------------------------------------------------------------------

    @property
    def climber(self) -> Climber:
        """The optimiser by its class and options."""
        return self._climber

    @property
    def sufficient(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether Q is a function of statistics."""
        return self.factor.sufficient and not self.passes

    @property
    def replicates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether parameters may carry a replica axis: a walk over the data is that of one model."""
        return self.factor.replicates and not self.passes

    @property
    def memory(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How many earlier latent states the density depends on."""
        return self.factor.memory

    @property
    def prior(self) -> Prior | None:
        """The wrapped factor's prior; assignable."""
        return self.factor.prior

    @prior.setter
    def prior(self, value: Prior | None) -> None:
        self.factor.prior = value

    def penalized(self, stats: Stats) -> Stats:
        return self.factor.penalized(stats)

    def log_prior(self) -> Tensor | None:
        return self.factor.log_prior()

    def log_prob(self, batch: Batch) -> Tensor:
        return self.factor.log_prob(batch)

    def log_table(self, batch: Batch) -> Tensor:
        return self.factor.log_table(batch)

    def context(self, batch: Batch) -> Batch:
        return self.factor.context(batch)

    def kernel(self) -> Kernel:
        return self.factor.kernel()

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        return self.factor.sample(z, batch, generator)

    def project(self) -> None:
        self.factor.project()

    def degenerate(self) -> Tensor | None:
        return self.factor.degenerate()

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Gradient":
        """Keep parameters of the wrapped factor, by its own names, through every M-step."""
        self.factor.freeze(*names, mask=mask)
        return self

    def unfreeze(self, *names: str) -> "Gradient":
        """Let M-steps move these again."""
        self.factor.unfreeze(*names)
        return self

    def rewrap(self, pruned: Factor, keep: Tensor) -> "Gradient":
        own = self._climber
        return Gradient(self.factor.rewrap(pruned, keep), own.optimizer, own.steps, self.passes, **own.options)

    def config(self) -> dict[str, Any]:
        return {"factor": self.factor, "passes": self.passes, **self._climber.config()}

    @classmethod
    def rebuild(cls, factor: Factor, optimizer: str, steps: int, passes: bool = False, **options: Any) -> "Gradient":
        """The factor of a saved configuration, its optimiser named as in ``torch.optim``."""
        if optimizer not in BY_NAME:
            raise invalid("optimizer", "the name of a class of torch.optim", optimizer, "update torch")
        return cls(factor, BY_NAME[optimizer], steps, passes, **options)

    # ---- EM ---------------------------------------------------------------------------------------------------

    def expected_log_prob(self, stats: Stats) -> Tensor:
        return self.factor.expected_log_prob(stats)

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        """Where a walk from the current parameters ends; nothing where Q is no function of statistics. Pure.

        Raises:
            InvalidArgument: Under a function transform.
        """
        if not self.sufficient:
            return {}
        if torch._C._are_functorch_transforms_active():
            raise invalid(
                "Gradient", "a plain call of its M-step", "a function transform, such as vmap or grad",
                "use the factor itself there: optimisers of torch work in place",
            )  # fmt: skip
        stats = stats.map(Tensor.detach)
        origin = _freed(self.factor)
        if not origin.replicas or self._climber.elementwise:
            ends = self._climbed(origin, stats)
        else:
            parts = []
            for r in range(origin.replicas[0]):
                one = copy.deepcopy(origin)
                for module in one.modules():
                    if isinstance(module, Factor):
                        module.take_replicas(r)
                parts.append(self._climbed(one, pytree.tree_map(lambda leaf, r=r: leaf[r], stats)))
            ends = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return outer(self._better(origin, ends, stats))

    def _climbed(self, origin: Factor, stats: Stats) -> dict[str, Tensor]:
        """Where a walk from ``origin`` ends."""
        moving = copy.deepcopy(origin)
        objective = _Expected(moving, stats)
        names, tensors = zip(*moving.named_parameters(), strict=True)

        def evaluate() -> Tensor:
            values = origin.kept(dict(zip(names, tensors, strict=True)))
            named = {f"factor.{name}": value for name, value in values.items()}
            value = torch.func.functional_call(objective, named, ())
            learn(tensors, value)
            return value.detach()

        with torch.enable_grad():
            Walk(self._climber, tensors).run(evaluate, lambda: settle(moving, origin))
        return {name: value.detach() for name, value in moving.named_parameters()}

    def _better(self, origin: Factor, ends: dict[str, Tensor], stats: Stats) -> dict[str, Tensor]:
        """What a walk brought in the type of the parameters, where it is more than nothing, and more than rounding."""
        there = copy.deepcopy(origin)
        result = {}
        with torch.no_grad():
            for name, value in ends.items():
                there.get_parameter(name).data = value.to(self.dtype).to(torch.float64)
            rose = there.expected_log_prob(stats) > origin.expected_log_prob(stats)
            for name, old in self.factor.named_parameters():
                which = rose.reshape(*rose.shape, *[1] * (old.dim() - rose.dim()))
                result[name] = torch.where(which, ends[name].to(old.dtype), old.detach())
        return result

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """The wrapped factor's start; where Q is no function of statistics, a walk under the responsibilities."""
        if self.factor.sufficient:
            return outer(self.factor.initialize(batch, expected))
        return self._started(batch, expected, "log_prob")

    def initialize_table(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """As `initialize`, of a latent child."""
        if self.factor.sufficient:
            return outer(self.factor.initialize_table(batch, expected))
        return self._started(batch, expected, "log_table")

    def _started(self, batch: Batch, expected: Tensor, score: str) -> dict[str, Tensor]:
        moving = _freed(self.factor)
        for name, value in self.factor.guess(batch, expected).items():
            moving.get_parameter(name).data = value.detach().to(torch.float64)
        tensors = [moving.get_parameter(name) for name in movable(self.factor)]
        expected = expected.detach().to(torch.float64)
        batch = batch.map(lambda value: value.double() if value.dtype == torch.float32 else value)

        def evaluate() -> Tensor:
            value = _inner(getattr(moving, score)(batch), expected)
            learn(tensors, value, 1.0 / max(1.0, float(expected.sum())))
            return value.detach()

        if tensors:
            with torch.enable_grad():
                Walk(Climber(torch.optim.LBFGS, 1, {}), tensors).run(evaluate, moving.project)
        return outer({name: value.detach().to(self.dtype) for name, value in moving.named_parameters()})

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        if self.factor.sufficient:
            return outer(self.factor.initialize_at(batch, index))
        near = nn.functional.one_hot(index, len(batch)).mT.to(self.dtype)
        return self.initialize(batch, near + 1.0 / len(batch))

    # ---- networks ---------------------------------------------------------------------------------------------

    def walk(self) -> Walk | None:
        """An optimiser of the parameters that are here, with what it remembers; None where none may move."""
        if self._walk is None or not self._climber.lasting:
            tensors = [self.factor.get_parameter(name) for name in movable(self.factor)]
            self._walk = Walk(self._climber, tensors) if tensors else None
        return self._walk


class _Expected(nn.Module):
    """Q as a forward pass, so that `functional_call` can put other parameters in."""

    def __init__(self, factor: Factor, stats: Stats):
        super().__init__()
        self.factor, self.stats = factor, stats

    def forward(self) -> Tensor:
        return self.factor.expected_log_prob(self.stats)


def _freed(module: nn.Module) -> Any:
    """A copy whose parameters are leaves, in float64, whatever stands in their place."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to(torch.float64, copy=True)) for value in module.parameters()
    }
    return copy.deepcopy(module, memo).double()


# ---- networks: passes over the data -------------------------------------------------------------------------------


def climbing(factor: Factor) -> list[Gradient]:
    """The parts of a factor that climb by passes over the data.

    Raises:
        InvalidArgument: If there is a part whose Q is no function of statistics, and that has no optimiser.
    """
    if factor.sufficient:
        return []
    if isinstance(factor, Gradient):
        return [factor]
    parts: dict[str, Factor] = getattr(factor, "parts", dict)()
    if not parts:
        name = type(factor).__name__
        raise invalid(
            name, "an optimiser to climb Q with, which is no function of statistics", "the factor by itself",
            f"wrap it: torchem.Gradient({name}(…), torch.optim.Adam, steps=10, lr=1e-2)",
        )  # fmt: skip
    return [found for part in parts.values() for found in climbing(part)]


def check(model: LatentModel) -> None:
    """Refuse a model that has a network without an optimiser, or one that inference cannot feed.

    Raises:
        InvalidArgument: Then.
    """
    for factor in model.factors():
        if climbing(factor) and not isinstance(model, DiscreteModel):
            raise invalid(
                "model", "one of discrete latents, for a factor whose Q is no function of statistics",
                type(model).__name__, "use a Mixture or an HMM",
            )  # fmt: skip


def _inner(log_prob: Tensor, expected: Tensor) -> Tensor:
    """Σ expected · log p, latents that a factor hides summed out; what is impossible may be −inf."""
    return torch.where(expected > 0, expected * log_prob, 0.0).sum(dtype=torch.float64)


class Replay:
    """Passes over the same pieces and expectations: kept while they are few, made anew where they are many.

    Args:
        make: Begins a pass.
    """

    def __init__(self, make: Callable[[], Iterator[Expected]]):
        self.make = make
        self.kept: list[Expected] | None = None

    def __call__(self) -> Iterator[Expected]:
        if self.kept is not None:
            yield from self.kept
            return
        kept: list[Expected] = []
        size, found = 0, self.make()
        # Whoever consumes them differentiates; posteriors are constants.
        while (item := _constant(found)) is not None:
            piece, expected = item
            size += sum(value.numel() for value in (*piece.values(), *expected.values()) if value is not None)
            kept = [] if size > _KEPT else kept
            kept.append(item)
            yield item
        self.kept = kept if size <= _KEPT else None


def _constant(items: Iterator[Expected]) -> Expected | None:
    with torch.no_grad():
        return next(items, None)


def climb(
    model: DiscreteModel,
    passes: Callable[[], Iterable[Expected]],
    reduce: Callable[[Stats], Stats],
    whole: float | None = None,
) -> None:
    """Let the networks of a model climb their Q by passes over the data, in place.

    Args:
        model: The model at the parameters to start from.
        passes: Gives the pieces of the data and their expectations, the same in each pass.
        reduce: Sums over processes.
        whole: Weight of all data where the passes are over a part of them: Q of the whole may then fall, and steps are
            not halved.
    """
    for factor, slots in model.factors().items():
        for part in climbing(factor):
            walk = part.walk()
            if walk is None:
                continue
            before = copy.deepcopy(part.factor)

            def expected_log_prob(piece: Batch, expected: dict[str, Tensor], slots: list[str] = slots) -> Tensor:
                # A factor in two slots is one: its Q is the sum.
                return torch.stack([_inner(model.potential(slot, piece), expected[slot]) for slot in slots]).sum()

            def evaluate(walk: Walk = walk, part: Gradient = part, q: Any = expected_log_prob) -> Tensor:
                terms = ((q(piece, expected), model.count(piece)) for piece, expected in passes())
                return summed(walk.tensors, terms, part.log_prior, reduce, whole)

            with torch.enable_grad():
                walk.run(evaluate, lambda part=part, before=before: settle(part.factor, before), whole is None)
