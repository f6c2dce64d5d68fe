"""Models as the components of a mixture: sequences, or rows, clustered by the model that made them."""

import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Adjustment, Factor, Kernel, Moments
from torchem.factors._composite import Composite
from torchem.model import DiscreteModel, EStep, LatentModel, Uniforms
from torchem.models.imputation import Completing
from torchem.models.unseen import Unseen
from torchem.ops import kmeans
from torchem.stats import Stats

#: EM steps, under the responsibilities that a start has chosen, that tell the components apart.
_STEPS = 5
#: Iterations of k-means that tell the states of the components apart at the start.
_LLOYD = 20
#: How far the halves of sequences must agree about a feature, beside the one they agree about most.
_RELIABLE = 0.5
#: Rows that clusters of states are found in, at most.
_ROWS = 4096
#: Share of the rows that states begin with beyond their own.
_BLUR = 0.01
#: Categories of a column up to which its indicators describe a sequence.
_CATEGORIES = 16


@dataclass(frozen=True)
class Taken:
    """What an E-step takes for the posterior of all latents, those of the components among them."""

    kind: EStep = "soft"
    beta: float = 1.0
    uniforms: Uniforms | None = None


class Models(Composite):
    """Models as the components of a mixture: log p(x | k) is the log-likelihood of model k.

    To the mixture it is a factor: its potentials are the log Z_k of each row or sequence, and its statistics are those
    of each model's own E-step under the responsibilities γ_nk that the mixture found for it. All else that a component
    needs (priors, posteriors of parameters, frozen parts, starts) is that of the factors of the models.

    Source: P. Smyth (1997), for hidden Markov models.
    """

    sequential: bool

    @property
    @abstractmethod
    def _models(self) -> list[LatentModel]:
        """The models: all K of them, or one that stands for K."""

    @abstractmethod
    def __getitem__(self, k: int) -> LatentModel:
        """The model of component k."""

    @abstractmethod
    def kernel(self, score: bool = False, taken: Taken = Taken()) -> Kernel:
        """One pass over the data, for what an E-step takes; with ``score`` of densities."""

    def __len__(self) -> int:
        k = self.n_components
        assert k is not None
        return k

    def __iter__(self) -> Iterator[LatentModel]:
        return (self[k] for k in range(len(self)))

    # ---- what the models have in common -----------------------------------------------------------------------

    @property
    def n_features(self) -> int | None:
        return None

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all models do."""
        return all(model.handles_missing for model in self._models)

    @property
    def default_init(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """By clusters of rows, or of what describes sequences."""
        return "kmeans"

    @property
    def averages(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a part of a model is fed to inference as an expectation under a posterior."""
        return any(part.averages for part in self.parts().values())

    def check(self, batch: Batch) -> None:
        for model in self._models:
            model.check(inside(batch))

    def cast(self, x: Tensor) -> Tensor:
        """As they are: each model casts them for itself."""
        return x

    def rows(self, batch: Batch) -> Batch:
        """The rows or frames that moments are taken of: of models that look at several frames at once the first."""
        rows = [model.rows(inside(batch)) for model in {type(model): model for model in self._models}.values()]
        return min(rows, key=lambda found: found.x.shape[-1])

    def stream(self, batch: Batch, budget: int | None) -> Iterator[Batch]:
        """Sequences in pieces that fit a budget of bytes: those of the model that needs most."""
        widest = max(self._models, key=lambda model: model.row_size())
        if budget is not None:
            widest = copy.copy(widest)
            widest.memory_budget = budget
        yield from widest.stream(batch)

    def log_prob(self, batch: Batch) -> Tensor:
        return self.kernel(score=True).log_potential(batch)

    def log_potential(self, batch: Batch) -> Tensor:
        return self.kernel().log_potential(batch)

    def scorer(self) -> Kernel:
        return self.kernel(score=True)

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """Statistics of the models by their names."""
        kernel = self.kernel()
        kernel.log_potential(batch)
        kernel.collect(batch, expected)
        return kernel.stats()

    def penalized(self, stats: Stats) -> Stats:
        """Statistics alone: the M-steps of the models add their priors."""
        return stats

    def prepare(self, moments: Moments) -> None:
        """Tell every model the scale of the data: what scale its factors have is known to the model alone."""
        for model in self._models:
            model.prepare(moments)

    def replace_components(self, which: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        merged = {}
        for name, new in values.items():
            old, mask = self.get_parameter(name), self._chosen(name, which)
            merged[name] = torch.where(mask.reshape(*mask.shape, *[1] * (old.dim() - mask.dim())), new, old)
        return merged

    @abstractmethod
    def _chosen(self, name: str, which: Tensor) -> Tensor:
        """Where the components ``which [*r, K]`` have a parameter, a Boolean over its leading axes."""

    # ---- starts -----------------------------------------------------------------------------------------------

    def landmarks(self, batch: Batch) -> Tensor:
        """Columns ``[n, F]`` by which starts cluster: rows, or of sequences what `described` says of each."""
        return described(batch, self.nominal_columns(batch)) if batch.x.dim() == 3 else batch.x

    def nominal_columns(self, batch: Batch) -> list[bool]:
        """For each column whether its values are names."""
        emission = getattr(self._models[0], "emission", None)
        known = emission.nominal if isinstance(emission, Factor) else []
        return known if len(known) == batch.x.shape[-1] else [False] * batch.x.shape[-1]

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """Parameters after a few steps of EM of each model, under responsibilities ``[*r, n, K]`` that stay."""
        twin = copy.deepcopy(self)
        twin._begin(batch, expected)
        for _ in range(_STEPS):
            for name, value in twin.maximize(twin.stats(batch, expected)).items():
                twin.get_parameter(name).data = value.detach()
        return {name: value.data for name, value in twin.named_parameters()}

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """Parameters with component k at observation ``index[…, k]``, and with the same weight at all together."""
        return self.initialize(batch, self.near(batch, index))

    @abstractmethod
    def _begin(self, batch: Batch, expected: Tensor) -> None:
        """Start the models, in place, each with the shares that responsibilities give it."""

    # ---- use --------------------------------------------------------------------------------------------------

    @abstractmethod
    def unseen(self, batch: Batch, index: Tensor) -> list[Unseen] | Unseen:
        """What each model knows of what is missing, as `torchem.models.unseen.Blend` takes it."""

    def column_kinds(self) -> list[tuple[bool, bool]]:
        """For each column whether its values are single numbers, and whether they are names, to all models."""
        each = [completing(model).column_kinds() for model in self._models]
        return [(all(own[0] for own in column), column[0][1]) for column in zip(*each, strict=True)]

    def draw(
        self, z: Tensor, length: int | None, inputs: Tensor | None, generator: torch.Generator | None
    ) -> Tensor | list[Tensor]:
        """A row ``[n, D]`` or sequence ``[n, T, D]`` of each model in ``z [n]``; a list where lengths are random."""
        found: list[Tensor | None] = [None] * len(z)
        for k in range(len(self)):
            own = (z == k).nonzero()[:, 0]
            if not len(own):
                continue
            options: dict[str, Any] = {"generator": generator}
            if self.sequential:
                options["length"] = length
            if inputs is not None:
                options["inputs"] = inputs if self.sequential and inputs.dim() == 2 else inputs[own]
            for n, x in zip(own.tolist(), self[k].sample(len(own), **options), strict=True):
                found[n] = x
        drawn = [x for x in found if x is not None]
        if self.sequential and length is None:
            return drawn
        return torch.stack(drawn) if drawn else torch.empty(0, *([length] if length else []), 0)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        raise NotImplementedError(f"{cls.__name__} stands inside a mixture: torchem.Mixture has the example")


def models_of(factor: Factor) -> Models | None:
    """The models that a component is made of, if it is."""
    found = factor.unwrapped
    return found if isinstance(found, Models) else None


def completing(model: LatentModel) -> Completing:
    """A model that knows what was not seen.

    Raises:
        InvalidArgument: If it does not.
    """
    if not isinstance(model, Completing):
        raise invalid("model", "components that complete observations", type(model).__name__, "use torchem's own")
    return model


def inside(batch: Batch) -> Batch:
    """What the models read: weights and labels are the mixture's."""
    if batch.weight is None and batch.evidence is None:
        return batch
    return batch.remember("inside", lambda: replace(batch, weight=None, evidence=None))


def nested(component: Any, size: int) -> Models:
    """Models as a component: copies of one, or a list of them.

    Raises:
        InvalidType: If there is something else among them.
        InvalidArgument: If they are not as many as classes, or differ in what they read, or approximate.
    """
    given = [component] if isinstance(component, LatentModel) else list(component)
    for i, model in enumerate(given):
        if not isinstance(model, LatentModel):
            raise wrong_type(f"component[{i}]", "a torchem model", model, "pass for example torchem.GaussianHMM(2, 1)")
        if not model.exact:
            raise invalid(
                "component", "models with exact posteriors", f"a {type(model).__name__} that bounds its likelihood",
                "a mixture weighs its components by their likelihoods: use exact inference, or say exact = True of a "
                "class of your own whose E-step takes the posterior itself",
            )  # fmt: skip
        if model.replicas:
            raise invalid(
                "component", "models without replicas", f"{model.replicas[0]} of them", "use take_replicas(0)"
            )
    if isinstance(component, LatentModel):
        if isinstance(component, DiscreteModel) and component.replicates:
            return Copies(component, size)
        return Several([copy.deepcopy(component) for _ in range(size)])
    if len(given) != size:
        raise invalid("component", f"{size} models, as many as mixing has classes", len(given), "give one for each")
    return Several(given)


def _columns(model: LatentModel) -> int | None:
    """Columns of what a model reads, where it is built for a number of them."""
    owners = (getattr(model, name, None) for name in ("emission", "component"))
    known = (getattr(owner, "n_features", None) for owner in (model, *owners))
    return next((width for width in known if isinstance(width, int)), None)


# ---- passes -------------------------------------------------------------------------------------------------------


class _Pass(Kernel):
    """The pass of a model of discrete latents, alone or with an axis of copies: ``[*r, (K,) n]``.

    Its potentials are the log-normalisers of the rows; its statistics take the posterior of the same potentials again,
    under the weights that the rows then have.
    """

    def __init__(self, model: DiscreteModel, score: bool, taken: Taken):
        self.model, self.taken = model, taken
        self.infer = model._inference(taken.kind, taken.beta, taken.uniforms)
        self.kernels = model._kernels(True) if score else model._passes(self.infer)

    def log_potential(self, batch: Batch) -> Tensor:
        model, taken = self.model, self.taken
        self.piece = model.cast(inside(batch))
        self.potentials = {slot: kernel.log_potential(self.piece) for slot, kernel in self.kernels.items()}
        if taken.kind == "hard":
            return model.infer_hard(self.potentials, self.piece)[0]
        if taken.beta == 1:
            return model.log_normalizer(self.potentials, self.piece)
        # The joint density to the power β, summed: the mixture raises what it is given to β again.
        tempered = {slot: value * taken.beta for slot, value in self.potentials.items()}
        return model.log_normalizer(tempered, self.piece) / taken.beta

    def collect(self, batch: Batch, expected: Tensor) -> None:
        piece = replace(self.piece, weight=expected)
        found = self.infer(self.potentials, piece)[1]
        for slot, kernel in self.kernels.items():
            kernel.collect(piece, found[slot])

    def stats(self) -> Stats:
        return Stats({slot: kernel.stats() for slot, kernel in self.kernels.items()})

    def inner(self) -> Tensor:
        return torch.stack([kernel.inner() for kernel in self.kernels.values()]).sum(0)


class _CopiesPass(Kernel):
    """The pass of all copies at once."""

    def __init__(self, model: DiscreteModel, score: bool, taken: Taken):
        self.all = _Pass(model, score, taken)

    def log_potential(self, batch: Batch) -> Tensor:
        return self.all.log_potential(batch).mT

    def collect(self, batch: Batch, expected: Tensor) -> None:
        self.all.collect(batch, expected.mT)

    def stats(self) -> Stats:
        return self.all.stats()

    def inner(self) -> Tensor:
        return self.all.inner().sum(-1)


class _Whole(Kernel):
    """The pass of a model by its own E-step, which gives no posteriors to weigh: latents that are continuous.

    Hard and sampled E-steps choose the component; inside it the posterior is the model's own.
    """

    def __init__(self, model: LatentModel, score: bool):
        self.model, self.score = model, score
        self.total: Stats | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        return self.model.log_prob(inside(batch)) if self.score else self.model.log_bound(inside(batch))

    def collect(self, batch: Batch, expected: Tensor) -> None:
        if expected.dim() == 1:
            stats = self.model.e_step(replace(inside(batch), weight=expected))
        else:  # weights differ between replicas, one by one
            parts = [
                self.model.take_replicas(r).e_step(replace(inside(batch), weight=own)) for r, own in enumerate(expected)
            ]
            stats = parts[0].map(lambda *leaves: torch.stack(leaves), *parts[1:])
        self.total = stats if self.total is None else self.total + stats

    def stats(self) -> Stats:
        assert self.total is not None
        return self.total

    def inner(self) -> Tensor:
        return self.model.expected_log_prob(self.stats())


class _SeveralPass(Kernel):
    """The passes of the models, one after the other."""

    def __init__(self, models: "Several", score: bool, taken: Taken):
        self.models = models
        self.kernels = [
            _Pass(model, score, taken) if isinstance(model, DiscreteModel) else _Whole(model, score)
            for model in models._models
        ]

    def log_potential(self, batch: Batch) -> Tensor:
        return torch.stack([kernel.log_potential(batch).to(self.models.dtype) for kernel in self.kernels], -1)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        for kernel, own in zip(self.kernels, expected.unbind(-1), strict=True):
            kernel.collect(batch, own)

    def stats(self) -> Stats:
        return Stats({f"models.{k}": kernel.stats() for k, kernel in enumerate(self.kernels)})

    def inner(self) -> Tensor:
        return torch.stack([kernel.inner() for kernel in self.kernels]).sum(0)


# ---- copies of one model ------------------------------------------------------------------------------------------


class Copies(Models):
    """K copies of one model, with parameters of their own, as one: the axis of components leads them, ``[*r, K, …]``.

    One batched E-step serves all of them, as it does all restarts. ``copies.model`` is the model with that axis: its
    views (``copies.model.transition_matrix [K, S, S]``) are those of all components; ``copies[k]`` is a model by
    itself, with the values of component k, which can be assigned likewise.

    Args:
        model: One of discrete latents. It is copied.
        n_components: K.

    Example:
        >>> import torchem
        >>> m = torchem.Mixture(torchem.factors.Categorical(3), torchem.GaussianHMM(2, 1))
        >>> m.component.model.transition_matrix.shape
        torch.Size([3, 2, 2])
        >>> m.component[0].transition_matrix.shape
        torch.Size([2, 2])
    """

    model: DiscreteModel

    def __init__(self, model: DiscreteModel, n_components: int):
        super().__init__()
        self.model = model.replicate(n_components)  # pyright: ignore[reportAttributeAccessIssue]
        self._k = n_components

    @classmethod
    def rebuild(cls, model: DiscreteModel, n_components: int) -> "Copies":
        """The copies of a saved configuration: the model itself gets the axis, as files know it."""
        found = cls.__new__(cls)
        Factor.__init__(found)
        found.model, found._k = model, n_components
        for module in model.modules():
            if isinstance(module, Factor):
                module.replicate(n_components)
        return found

    def config(self) -> dict[str, Any]:
        return {"model": self.model, "n_components": self._k}

    def parts(self) -> dict[str, Factor]:
        return {f"model.{slots[0]}": factor for factor, slots in self.model.factors().items()}

    @property
    def _models(self) -> list[LatentModel]:
        return [self.model]

    @property
    def sequential(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the model reads sequences."""
        return self.model.sequential

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.model.replicas[:-1]

    def __getitem__(self, k: int) -> LatentModel:
        self._check_one(k)
        return self.model.take_replicas(k)

    def __setitem__(self, k: int, model: LatentModel) -> None:
        self._check_one(k)
        theirs = dict(model.named_parameters())
        mine = dict(self.model.named_parameters())
        shapes = {name: list(value.shape[1:]) for name, value in mine.items()}
        if {name: list(value.shape) for name, value in theirs.items()} != shapes:
            raise invalid("component", "a model of the same structure", type(model).__name__, "build it alike")
        for name, value in theirs.items():
            mine[name].data[k] = value.detach().to(mine[name])
        mine_all, theirs_all = (dict(m.named_modules()) for m in (self.model, model))
        for path, factor in theirs_all.items():
            for name in getattr(factor, "_rank", {}):
                if (
                    name in factor._buffers
                    and (own := getattr(mine_all[path], name)).dim() > getattr(factor, name).dim()
                ):
                    own[k] = getattr(factor, name).to(own)
            if isinstance(factor, Factor):
                mine_all[path].refresh()  # pyright: ignore[reportCallIssue]

    def _check_one(self, k: int) -> None:
        if self.replicas:
            raise invalid("component", "a mixture without replicas", f"{self.replicas[0]} of them", "take one of them")
        if not -self._k <= k < self._k:
            raise IndexError(f"component: expected one of {self._k} components, got {k}; count from 0")

    def kernel(self, score: bool = False, taken: Taken = Taken()) -> Kernel:
        return _CopiesPass(self.model, score, taken)

    def row_size(self) -> int:
        return self.model.row_size() // math.prod(self.replicas)

    def unseen(self, batch: Batch, index: Tensor) -> Unseen:
        return completing(self.model).unseen(inside(batch), index)

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        return {f"model.{name}": value for name, value in self.model.maximize(stats).items()}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        return self.model.expected_log_prob(stats).sum(-1)

    def log_prior(self) -> Tensor | None:
        found = [value for part in self.parts().values() if (value := part.log_prior()) is not None]
        return torch.stack(found).sum(0).sum(-1) if found else None

    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        return self.model.tune(rows, iteration)

    def degenerate(self) -> Tensor | None:
        found = self.model.degenerate()
        return None if found is None else found.flatten(len(self.replicas) + 1).any(-1)

    def _chosen(self, name: str, which: Tensor) -> Tensor:
        return which

    def _begin(self, batch: Batch, expected: Tensor) -> None:
        begin(self.model, batch, expected.mT)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        one = self.model
        for _ in self.replicas:
            one = one.take_replicas(0)
        # One by one: some of their zeros may be structural.
        return sum(one.take_replicas(k).n_parameters() for k in range(self._k))

    def select(self, keep: Tensor) -> "Copies":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        found = Copies.__new__(Copies)
        Factor.__init__(found)
        found.model, found._k = self.model.take_replicas(index), len(index)  # pyright: ignore[reportAttributeAccessIssue]
        return found


# ---- models of their own kinds ------------------------------------------------------------------------------------


class Several(Models):
    """Models of any kinds that read the same data, one for each component; a factor may stand in several of them.

    A factor that models have in common is one parameter: its statistics are summed, it is maximised once. Hidden Markov
    models with one emission differ in their dynamics alone.

    Args:
        models: One for each component; they become part of this one.

    Example:
        >>> import torchem
        >>> from torchem.factors import Categorical, Gaussian
        >>> frames = torchem.HMM(Categorical(1), Categorical(1, 1), Gaussian(1, 1))
        >>> m = torchem.Mixture(Categorical(2), [torchem.GaussianHMM(2, 1), frames])
        >>> m.component[1] is frames
        True
    """

    models: nn.ModuleList

    def __init__(self, models: Sequence[LatentModel]):
        super().__init__()
        given = list(models)
        if len({model.sequential for model in given}) > 1:
            names = [type(model).__name__ for model in given]
            raise invalid(
                "component", "models that all read sequences, or all rows", names,
                "of rows as frames make HMMs of one state",
            )  # fmt: skip
        if len(set(given)) < len(given):
            raise invalid("component", "each model once", "one of them twice", "pass copy.deepcopy(model)")
        kinds = {(model.dtype, model.device) for model in given}
        if len(kinds) > 1:
            raise invalid("component", "models of one dtype on one device", sorted(map(str, kinds)), "convert them")
        widths = {k: width for k, model in enumerate(given) if (width := _columns(model)) is not None}
        if len(set(widths.values())) > 1:
            raise invalid(
                "component",
                "models of the same columns",
                f"{[*widths.values()]} of them",
                "build them for the same data",
            )
        self.models = nn.ModuleList(given)
        stationary = {
            id(own) for model in given for own in [getattr(getattr(model, "initial", None), "transition", None)] if own
        }
        for factor, places in self._places().items():
            if len({k for k, _ in places}) > 1 and id(factor) in stationary:
                raise invalid(
                    "component", "a transition of its own beside each stationary initial law", "one that models share",
                    "use Categorical(K) for the initial laws",
                )  # fmt: skip

    @property
    def _models(self) -> list[LatentModel]:
        return list(self.models)  # pyright: ignore[reportReturnType]

    def _places(self) -> dict[Factor, list[tuple[int, str]]]:
        """Each distinct factor with the models and slots that it stands in."""
        found: dict[Factor, list[tuple[int, str]]] = {}
        for k, model in enumerate(self._models):
            for slot, factor in model.slots():
                found.setdefault(factor, []).append((k, slot))
        return found

    def parts(self) -> dict[str, Factor]:
        return {f"models.{places[0][0]}.{places[0][1]}": factor for factor, places in self._places().items()}

    @property
    def sequential(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the models read sequences."""
        return self._models[0].sequential

    @property
    def n_components(self) -> int:
        return len(self.models)

    @property
    def replicas(self) -> tuple[int, ...]:
        return self._models[0].replicas

    def __getitem__(self, k: int) -> LatentModel:
        return self._models[k]

    def __setitem__(self, k: int, model: LatentModel) -> None:
        if not -len(self) <= k < len(self):
            raise IndexError(f"component: expected one of {len(self)} components, got {k}; count from 0")
        others = self._models
        others[k] = model
        # What cannot be a component is refused as it is at the start.
        self.models = nested(others, len(self)).models  # pyright: ignore[reportAttributeAccessIssue]

    def kernel(self, score: bool = False, taken: Taken = Taken()) -> Kernel:
        return _SeveralPass(self, score, taken)

    def row_size(self) -> int:
        return sum(model.row_size() for model in self._models) // math.prod(self.replicas)

    def unseen(self, batch: Batch, index: Tensor) -> list[Unseen]:
        return [completing(model).unseen(inside(batch), index) for model in self._models]

    # ---- EM ---------------------------------------------------------------------------------------------------

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        # What a factor gathered in other models joins its first place; what these make of it there is left out.
        own = [Stats(stats[f"models.{k}"]) for k in range(len(self))]
        left_out: set[str] = set()
        for places in self._places().values():
            first, slot = places[0]
            for k, other in places[1:]:
                if k != first:
                    own[first][slot] = own[first][slot] + own[k][other]
                    left_out.add(f"models.{k}.{other}.")
        found: dict[str, Tensor] = {}
        for k, model in enumerate(self._models):
            found |= {f"models.{k}.{name}": value for name, value in model.maximize(own[k]).items()}
        return {name: value for name, value in found.items() if not name.startswith(tuple(left_out))}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        values = [model.expected_log_prob(stats[f"models.{k}"]) for k, model in enumerate(self._models)]
        return torch.stack(values).sum(0)

    def tune(self, rows: int, iteration: int = 0) -> Adjustment | None:
        found = {k: change for k, model in enumerate(self._models) if (change := model.tune(rows, iteration))}
        moves = {f"models.{k}": change.move for k, change in found.items() if change.move is not None}
        if not found:
            return None

        def move(stats: Stats) -> Stats:
            return stats.like({name: moves[name](own) if name in moves else own for name, own in stats.items()})

        return Adjustment(move if moves else None, any(change.retake for change in found.values()))

    def degenerate(self) -> Tensor | None:
        marks = [model.degenerate() for model in self._models]
        if all(mark is None for mark in marks):
            return None
        lead = len(self.replicas)
        none = torch.zeros(self.replicas, dtype=torch.bool, device=self.device)
        return torch.stack([none if mark is None else mark.unsqueeze(-1).flatten(lead).any(-1) for mark in marks], -1)

    def _chosen(self, name: str, which: Tensor) -> Tensor:
        users = [
            torch.stack([which[..., k] for k, _ in places]).all(0)
            for factor, places in self._places().items()
            if name.startswith(f"models.{places[0][0]}.{places[0][1]}.")
        ]
        return users[0]

    def _begin(self, batch: Batch, expected: Tensor) -> None:
        for model, own in zip(self._models, expected.unbind(-1), strict=True):
            begin(model, batch, own)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        return sum(factor.n_parameters() for factor in self._places())

    def select(self, keep: Tensor) -> "Several":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        return Several([self._models[k] for k in index.tolist()])


# ---- starts -------------------------------------------------------------------------------------------------------


def begin(model: LatentModel, batch: Batch, weight: Tensor) -> None:
    """First parameters of a model from observations of some ``weight [*r, n]``, in place.

    The states of each replica begin at clusters of its own rows (frames).
    """
    units = inside(batch)
    # Numbers of the observations travel along with their rows, as weights, which every row keeps.
    numbered = replace(units, weight=torch.arange(len(units), dtype=torch.float64, device=units.x.device))
    rows = numbered if model.whole else model.rows(numbered)
    assert rows.weight is not None
    mass, rows = weight[..., rows.weight.long()], replace(rows, weight=None)
    size, landmarks = getattr(model, "n_components", 1), model.landmarks(rows)
    each = mass.reshape(-1, mass.shape[-1])
    shares = torch.stack([_shares(landmarks, own, size, model.default_init, r) for r, own in enumerate(each)])
    shares = shares.reshape(*mass.shape, size).to(mass)
    model.initialize(model.cast(rows), (mass.unsqueeze(-1) * shares).to(model.dtype))


def _shares(x: Tensor, weight: Tensor, size: int, method: str, seed: int) -> Tensor:
    """Shares ``[n, S]`` of states in rows of some weight: of clusters, or random ones."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(len(x), size, generator=generator, dtype=torch.float64).to(x.device)
    weight = weight.detach().to(torch.float64)
    known = (weight > 0).nonzero()[:, 0]
    if method == "kmeans" and 1 < size <= len(known):
        some = known[torch.randperm(len(known), generator=generator)[:_ROWS].to(known.device)]
        points, mass = _standardized(x), weight[some]
        seeds = kmeans.seed(points[some], size, [generator], mass)
        labels = kmeans.lloyd(points[some], points[some][seeds], _LLOYD, mass)[0]
        hot = nn.functional.one_hot(labels, size).to(points) * mass.unsqueeze(-1)
        total = hot.sum(0).unsqueeze(-1)
        centers = torch.where(total > 0, (hot.mT @ points[some]) / total.clamp(min=1e-300), points[some][seeds[0]])
        nearest = torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
        share = nn.functional.one_hot(nearest, size) + _BLUR * share
    return share / share.sum(-1, keepdim=True)


def described(batch: Batch, nominal: list[bool]) -> Tensor:
    """What starts compare sequences by, ``[N, F]``: mean, spread and lag-one correlation of each column.

    Those alone on which the first and second halves of the sequences agree. Columns of names are described by the
    indicators of their categories. Missing frames are left out.
    """
    x = batch.x.to(torch.float64)
    columns = []
    for d, names in enumerate(nominal):
        column = x[..., d]
        seen = column[~column.isnan()]
        top = int(seen.max()) + 1 if names and len(seen) else 0
        if 0 < top <= _CATEGORIES:
            hot = (column.unsqueeze(-1) == torch.arange(top, device=x.device)).to(torch.float64)
            columns.append(torch.where(column.isnan().unsqueeze(-1), torch.nan, hot))
        else:
            columns.append(column.unsqueeze(-1))
    x = torch.cat(columns, -1)
    mask = batch.frames_mask()
    seen = ~x.isnan() if mask is None else ~x.isnan() & mask.unsqueeze(-1)
    late = torch.arange(x.shape[1], device=x.device) >= (batch.frames() / 2).unsqueeze(-1)
    found = _features(x, seen)
    one, two = (_standardized(_features(x, seen & half.unsqueeze(-1))) for half in (late, ~late))
    agreement = (one * two).mean(0)
    # What the halves of a sequence do not agree about is noise.
    return found[:, agreement >= _RELIABLE * agreement.max()] if bool(agreement.max() > 0) else found


def _features(x: Tensor, seen: Tensor) -> Tensor:
    """Mean, spread and lag-one correlation of the columns of ``x [N, T, F]``, of the entries that were seen."""
    x = torch.where(seen, x, 0.0)
    count = seen.sum(1).clamp(min=1)
    mean = x.sum(1) / count
    delta = torch.where(seen, x - mean.unsqueeze(1), 0.0)
    variance = delta.square().sum(1) / count
    pairs = (seen[:, 1:] & seen[:, :-1]).sum(1).clamp(min=1)
    lagged = (delta[:, 1:] * delta[:, :-1]).sum(1) / pairs
    return torch.cat([mean, variance.sqrt(), lagged / torch.where(variance > 0, variance, 1.0)], -1)


def _standardized(x: Tensor) -> Tensor:
    x = x.detach().to(torch.float64)
    x = (x - x.nanmean(0)).nan_to_num(nan=0.0)
    scale = x.square().mean(0).sqrt()
    return x / torch.where(scale > 0, scale, 1.0)
