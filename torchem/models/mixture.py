"""Finite mixtures: one discrete latent per observation."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchem.batch import Batch, as_batch, as_tensor
from torchem.errors import check_generator, invalid, whole_number, wrong_type
from torchem.factor import Factor, Kernel
from torchem.factors import Categorical, Gaussian, LowRankGaussian
from torchem.factors.gaussian import CovarianceType, FloorType
from torchem.model import DiscreteModel, LatentModel, Reduction, Tempered, Uniforms
from torchem.models.imputation import (
    Completing,
    Conditional,
    Gaps,
    at_once,
    check_possible,
    complete,
    floating,
    kinds_of,
    places,
)
from torchem.models.nested import Models, Taken, inside, models_of, nested
from torchem.models.prediction import Prediction
from torchem.models.unseen import Among, Blend, Components, Unseen
from torchem.ops import reduce
from torchem.stats import Stats


class Mixture(Completing, DiscreteModel):
    """p(x) = Σ_k p(z = k | u) p(x | z = k): any factor in either slot.

    E-step: γ_nk ∝ p(z = k) p(x_n | z = k), the responsibilities. M-step: each factor under them. A gate that reads
    covariates in ``mixing`` makes a mixture of experts.

    A component may be a model: rows are then what it reads, whole sequences where it is a hidden Markov model, and
    p(x | z = k) its likelihood, its own latents summed out. Sequences are clustered so by their dynamics. ``hard``,
    ``sample`` and annealed E-steps take the latents inside likewise: the most likely z and path together. A gate reads
    the covariates of a sequence's first frame; labels are of sequences, ``[N]``.

    Args:
        mixing: A latent child over K classes, such as ``Categorical(K)``.
        component: An observed child with K components; a model, of which each component is a copy; or a list of K
            models of any kinds that read the same data.

    Raises:
        InvalidArgument: If the two disagree about K, or a model only bounds its likelihood.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 4.3; P. Smyth (1997) for models.

    Example:
        >>> m = Mixture(Categorical(3), Gaussian(3, 2, "diag"))
        >>> m.posterior(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    mixing: Factor
    component: Any  # a factor

    def __init__(self, mixing: Factor, component: Factor | LatentModel | Sequence[LatentModel]):
        super().__init__()
        if not isinstance(component, Factor) and isinstance(component, (LatentModel, Sequence)):
            component = nested(component, _classes(mixing))
        if not isinstance(mixing, Factor):
            raise wrong_type("mixing", "a torchem factor", mixing, "pass for example factors.Categorical(K)")
        if not isinstance(component, Factor):
            raise wrong_type("component", "a torchem factor or model", component, "pass for example Gaussian(K, D)")
        if type(mixing.unwrapped).log_table is Factor.log_table:
            raise invalid(
                "mixing", "a law of the classes", f"{type(mixing.unwrapped).__name__}, a family of observations",
                "give the two in this order: Mixture(Categorical(K), Gaussian(K, D))",
            )  # fmt: skip
        shape = tuple(getattr(mixing, "shape", (component.n_components,)))
        if len(shape) != 1:
            raise invalid("mixing", "one law of K classes", f"a table {list(shape)}", "pass Categorical(K)")
        classes = shape[0]
        if type(component.unwrapped).log_prob is Factor.log_prob or component.n_components is None:
            raise invalid(
                "component", f"a family of observations with {classes} components",
                f"{type(component.unwrapped).__name__}, which has none as it is built",
                "give their number first: Gaussian(K, D), Categorical(K, M)",
            )  # fmt: skip
        if classes != component.n_components:
            raise invalid(
                "component", f"{classes} components, as many as mixing has classes", component.n_components,
                "build both with the same K",
            )  # fmt: skip
        self.mixing = mixing
        self.component = component

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        return ("mixing", self.mixing), ("component", self.component)

    def table_slots(self) -> frozenset[str]:
        return frozenset({"mixing"})

    @property
    def n_components(self) -> int:
        """K, the number of components."""
        k = self.component.n_components
        assert k is not None
        return k

    @property
    def weights(self) -> Float[Tensor, "*r k"]:
        """Mixing weights ``[*r, K]``; assignable, must sum to one."""
        return self._table().probs

    @weights.setter
    def weights(self, value: Any) -> None:
        self._table().assign_probs(value, "weights")

    def _table(self) -> Any:
        if not isinstance(self.mixing.unwrapped, Categorical):
            raise invalid("weights", "mixing weights free of covariates", "a gate", "read model.mixing instead")
        # A wrapper reads and assigns as what it wraps.
        return self.mixing

    # ---- models as components ---------------------------------------------------------------------------------

    @property
    def models(self) -> Models | None:
        """The models that are the components, where they are models."""
        return models_of(self.component)

    @property
    def sequential(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether an observation is a sequence."""
        return self.whole

    @property
    def whole(self) -> bool:
        models = self.models
        return models is not None and models.sequential

    def rows(self, batch: Batch) -> Batch:
        return self.models.rows(batch) if self.whole and self.models is not None else batch

    def stream(self, batch: Batch) -> Iterator[Batch]:
        if self.whole and self.models is not None:
            yield from self.models.stream(batch, self.memory_budget)
        else:
            yield from super().stream(batch)

    def _kernels(self, score: bool = False) -> dict[str, Kernel]:
        kernels = super()._kernels(score)
        return {**kernels, "mixing": _FirstFrames(kernels["mixing"])} if self.whole else kernels

    def _passes(self, infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Kernel]:
        kernels, models = self._kernels(), self.models
        if models is None:
            return kernels
        plain, beta = (infer.infer, infer.beta) if isinstance(infer, Tempered) else (infer, 1.0)
        uniforms = plain.keywords["uniforms"] if isinstance(plain, functools.partial) else None
        kind = "sample" if uniforms is not None else "hard" if plain == self.infer_hard else "soft"
        return {**kernels, "component": models.kernel(taken=Taken(kind, beta, uniforms))}

    # ---- inference --------------------------------------------------------------------------------------------

    def _e_step(self, batch: Batch, infer: Callable[..., tuple[Tensor, dict[str, Tensor]]]) -> Stats:
        plain = infer == self.infer and batch.evidence is None and isinstance(self.mixing.unwrapped, Categorical)
        if plain and self.models is None and batch.x.device == self.device and len(batch):
            kernels = self._kernels()
            found = kernels["component"].mixed(batch, kernels["mixing"].log_potential(batch))
            if found is not None:
                kernels["mixing"].collect(batch, found[1])
                return self._assembled(kernels, found[0], batch)
        return super()._e_step(batch, infer)

    def log_partition(self, potentials: dict[str, Tensor], batch: Batch, plus: Reduction = reduce.logsumexp) -> Tensor:
        return plus(self._joint(potentials, batch), -1)

    def infer(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        log_z, posterior = reduce.responsibilities(self._joint(potentials, batch), consume=True)
        if batch.weight is not None:
            posterior = posterior * batch.weight.to(posterior.dtype).unsqueeze(-1)
        mixing = posterior
        if potentials["mixing"].shape[-2] == 1:
            mixing = posterior.sum(-2, keepdim=True, dtype=torch.float64)
        return log_z, {"mixing": mixing, "component": posterior}

    @staticmethod
    def _joint(potentials: dict[str, Tensor], batch: Batch) -> Tensor:
        # The component's layout, states first as a rule, is that of the sum.
        joint = potentials["component"] + potentials["mixing"]
        known = _evidence(batch)
        return joint if known is None else reduce.plus(joint, known.to(joint))

    def infer_hard(self, potentials: dict[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        joint = self._joint(potentials, batch)
        best = reduce.first_max(joint.detach())
        score = joint.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        return score, self._assigned(best, score, potentials, batch)

    def infer_sample(
        self, potentials: dict[str, Tensor], batch: Batch, uniforms: Uniforms
    ) -> tuple[Tensor, dict[str, Tensor]]:
        log_z, posterior = reduce.responsibilities(self._joint(potentials, batch), consume=True)
        drawn = reduce.draw(posterior, uniforms(log_z.shape).to(posterior))
        return log_z, self._assigned(drawn, log_z, potentials, batch)

    @staticmethod
    def _assigned(label: Tensor, score: Tensor, potentials: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Expectations that are one component for each observation, ``label [*r, N]``."""
        component = potentials["component"]
        chosen = torch.nn.functional.one_hot(label, component.shape[-1]).to(component.dtype)
        # An impossible observation has no component.
        mass = torch.where(score == -torch.inf, 0.0, 1.0 if batch.weight is None else batch.weight).to(chosen.dtype)
        chosen = chosen * mass.unsqueeze(-1)
        mixing = chosen
        if potentials["mixing"].shape[-2] == 1:
            mixing = chosen.sum(-2, keepdim=True, dtype=torch.float64)
        return {"mixing": mixing, "component": chosen}

    def _known(self, expected: dict[str, Tensor], batch: Batch) -> Tensor:
        posterior, evidence = expected["component"], _evidence(batch)
        assert evidence is not None
        known = torch.where(posterior > 0, posterior * evidence.to(posterior), 0.0)
        return known.sum((-2, -1), dtype=torch.float64)

    def posterior(self, data: Any, **fields: Any) -> Float[Tensor, "*r n k"]:
        """Responsibilities ``[N, K]``; rows sum to one, or to zero where an observation is impossible.

        Args:
            data: As for `torchem.fit`.
            **fields: ``inputs``, ``labels`` (what is known of the components), … as for `LatentModel.batch`.
        """
        return self._each(
            self._read(data, fields), lambda p, b: reduce.responsibilities(self._joint(p, b), consume=True)[1]
        )

    def most_likely(self, data: Any, **fields: Any) -> Int[Tensor, "*r n"]:
        """The most probable component of each observation, ``[N]``; ties go to the lowest index."""
        return self._each(self._read(data, fields), lambda p, b: reduce.first_max(self._joint(p, b).detach()))

    def predict(self, inputs: Any, *, offset: Any = None, trials: Any = None) -> Prediction | Conditional:
        """The law of x given covariates: its mean, variance, quantiles and density, and what the gate says.

        Args:
            inputs: Covariates ``[N, M]``; of sequences ``[N, T, M]``, or ``[T, M]`` of one.
            offset: Known terms of linear predictors, ``[N]``.
            trials: Numbers of trials, ``[N]``.

        Returns:
            A `torchem.models.prediction.Prediction` of N rows; of frames of sequences a
            `torchem.models.imputation.Conditional`, as `condition` gives it where nothing of them is known.

        Example:
            >>> from torchem.factors import PoissonRegression
            >>> m = Mixture(Categorical(1), PoissonRegression(1, 1))
            >>> m.component.weight = [[[1.0]]]
            >>> m.predict([[0.0], [2.0]]).quantile(0.5).tolist()
            [[1.0], [7.0]]
        """
        u = as_tensor(inputs, "inputs")
        if not u.dim():
            raise invalid("inputs", "covariates [N, M]", "a single number", "give a row of them for each prediction")
        if self.reads is not None and "u" not in self.reads:
            raise invalid(
                "inputs", "a model of x given covariates", f"{type(self).__name__}, which reads none",
                "for the component of each row ask most_likely(X), for their probabilities posterior(X)",
            )  # fmt: skip
        models = self.models
        if self.whole:
            blank = torch.full((*u.shape[:-1], len(self.column_kinds())), torch.nan, dtype=self.dtype)
            return self.condition(blank, inputs=u, offset=offset, trials=trials)
        if models is not None:
            blank = torch.full((len(u), len(self.column_kinds())), torch.nan, dtype=self.dtype)
            batch = floating(self.batch(blank, u=u, offset=offset, trials=trials), self)
            law = self.unseen(batch, torch.arange(len(batch)))
            assert isinstance(law, Blend)
            return Prediction(Components(law), batch, law.share)
        # Nothing is known of x: no value would be one that every family can read.
        blank = torch.full((len(u), self.component.n_features or 1), torch.nan, dtype=self.dtype)
        batch = as_batch(blank, u=u, offset=offset, trials=trials, allow_missing=True, allow_empty=True).to(self.device)
        self.refuse_unread(batch)
        self.check(batch)
        weights = self.mixing.log_table(batch).exp()
        return Prediction(self.component, batch, weights.expand(len(u), -1))

    def column_kinds(self) -> list[tuple[bool, bool]]:
        return kinds_of(self.component) if self.models is None else self.models.column_kinds()

    def unseen(self, batch: Batch, index: Tensor) -> Unseen:
        """See `Completing.unseen`: under models as components the mixture of their laws, by responsibilities."""
        if self.models is None:
            rows = floating(batch[index], self)
            return Among(self.component, rows, self.posterior(rows))
        share = self.posterior(replace(batch, weight=None))
        owner = places(batch, index, self.device) // batch.x.shape[1] if self.whole else index.to(self.device)
        return Blend(share[..., owner, :], self.models.unseen(batch, index))

    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """See `Completing.drawn`: a component by responsibilities, then what that draws."""
        if self.models is None:
            rows = floating(gaps.batch[gaps.index], self)
            share = self.posterior(rows)
            check_possible(share.sum(-1) > 0, gaps)
            states = share.new_zeros(draws, 0, dtype=torch.long)
            if len(rows):
                states = torch.multinomial(share, draws, replacement=True, generator=generator).mT
            return complete(self.component, rows, states, generator)
        batch = replace(gaps.batch, weight=None)
        size = batch.x.shape[1] if self.whole else 1
        owner = (places(batch, gaps.index, self.device) if self.whole else gaps.index.to(self.device)) // size
        share = self.posterior(batch)
        check_possible(share[owner].sum(-1) > 0, gaps)
        gone, count = owner.unique(return_counts=True)
        found = share.new_zeros(draws, len(owner), batch.x.shape[-1])
        if not len(gone):
            return found
        first = count.cumsum(0) - count
        z = torch.multinomial(share[gone], draws, replacement=True, generator=generator).mT
        for k, model in enumerate(self.models):
            turn, which = (z == k).nonzero().unbind(-1)
            step = at_once(size)
            for many, own in zip(turn.split(step), which.split(step), strict=True):
                if not len(own):
                    continue
                some = inside(batch)[gone[own].to(batch.x.device)]
                filled = Gaps.of(some, some, self.whole)
                value = filled.batch.with_x(model.impute(some, draws=1, generator=generator)[0])
                place = torch.arange(int(count[own].sum()), device=owner.device)
                begin = count[own].cumsum(0) - count[own]
                column = place + (first[own] - begin).repeat_interleave(count[own])
                found[many.repeat_interleave(count[own]), column] = value.rows().x[filled.index].to(found)
        return found

    @torch.no_grad()
    def sample(
        self,
        n: int,
        length: int | None = None,
        *,
        latents: bool = False,
        inputs: Any = None,
        offset: Any = None,
        trials: Any = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Draw ``n`` observations ``[n, D]``, and their components ``[n]`` when ``latents`` is True.

        Args:
            n: Number of draws.
            length: Frames of each, where they are sequences ``[n, length, D]``; see `HMM.sample`.
            latents: Whether to return the components as well.
            inputs: Covariates ``[n, M]``, where a gate or the components read them; of sequences ``[n, length, M]``.
            offset: Known terms of linear predictors, ``[n]``.
            trials: Numbers of trials, ``[n]``.
            generator: Source of the draws.
        """
        whole_number("n", n, 0, "give the number of draws")
        check_generator(generator)
        u, offset, trials = (
            None if value is None else as_tensor(value, name).to(self.device, self.dtype)
            for name, value in (("inputs", inputs), ("offset", offset), ("trials", trials))
        )
        if length is not None and not self.whole:
            raise invalid("length", "none: an observation is a row", length, "leave it out")
        heads = (
            u[:, 0] if u is not None and u.dim() == 3 else u[:1].expand(n, -1) if u is not None and self.whole else u
        )
        blank = Batch(torch.empty(n, 0, device=self.device), u=heads, offset=offset, trials=trials)
        self.refuse_unread(blank)
        table = self.mixing.log_table(blank).exp()
        if table.shape[0] == 1:
            z = torch.multinomial(table[0], n, replacement=True, generator=generator) if n else torch.empty(0).long()
        else:
            z = torch.multinomial(table, 1, generator=generator)[:, 0]
        z = z.to(self.device)
        models = self.models
        x = self.component.sample(z, blank, generator) if models is None else models.draw(z, length, u, generator)
        return (x, z) if latents else x

    # ---- starts and health ------------------------------------------------------------------------------------

    @property
    def default_init(self) -> str:
        return "kmeans" if self._gated else self.component.default_init

    @property
    def _gated(self) -> bool:
        return not isinstance(self.mixing.unwrapped, Categorical)

    def landmarks(self, batch: Batch) -> Tensor:
        if self.models is not None:
            return self.models.landmarks(batch)
        # A gate can only tell apart what covariates do.
        if not self._gated or batch.u is None:
            return batch.x
        return torch.cat([batch.x.to(torch.float64), batch.u.to(torch.float64)], -1)

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        self._assign(*self._from_responsibilities(batch, expected))

    def _from_responsibilities(self, batch: Batch, expected: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if batch.weight is not None:
            expected = expected * batch.weight.unsqueeze(-1).to(expected)
        tables = self.mixing.initialize_table(_first_frames(batch) if self.whole else batch, expected)
        return tables, self.component.initialize(batch, expected)

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        self._assign({}, self.component.initialize_at(batch, index))

    def _assign(self, mixing: dict[str, Tensor], component: dict[str, Tensor]) -> None:
        values = {f"mixing.{k}": v for k, v in mixing.items()}
        self.assign(values | {f"component.{k}": v for k, v in component.items()})

    def joint(self, batch: Batch) -> Tensor:
        """Log-potential of each row with each component, ``[*r, N, K]``: its softmax is the responsibilities."""
        batch = self.cast(batch)
        return self._joint({slot: k.log_potential(batch) for slot, k in self._kernels().items()}, batch)

    def regroup(self, batch: Batch, which: Tensor, expected: Tensor) -> None:
        """Fit the components ``which [*r, K]`` to responsibilities ``[*r, N, K]`` of a sample, and all weights.

        Args:
            batch: The sample.
            which: The components to fit; the others stay as they are.
            expected: Responsibilities, without the weights of the rows.
        """
        mixing, component = self._from_responsibilities(self.cast(batch), expected)
        self._assign(mixing, self.component.replace_components(which, component))

    def occupancy(self, stats: Stats) -> Tensor | None:
        return self.mixing.unwrapped.occupancy(stats["mixing"])

    def degenerate(self) -> Tensor | None:
        return self.component.degenerate()

    def twins(self, batch: Batch, tolerance: float = 0.0) -> list[tuple[int, int]]:
        if self.replicas or self.n_components > 128:
            return []
        joint = self.component.log_potential(self.cast(batch)).to(torch.float64)
        gap = (joint.unsqueeze(-1) - joint.unsqueeze(-2)).abs()
        matters = torch.ones_like(gap, dtype=torch.bool)
        if tolerance > 0 or self.component.averages:
            # Only where one of the two is responsible does it matter whether they differ.
            mixing = self._kernels()["mixing"].log_potential(batch)
            share = reduce.responsibilities(self._joint({"mixing": mixing, "component": joint}, batch))[1]
            matters = (share.unsqueeze(-1) + share.unsqueeze(-2)) > 0.01
        # Components that no observation needs agree about nothing: a prior makes them equal for good.
        same = ~(matters & (gap > tolerance)).any(0) & matters.any(0) & joint.isfinite().all(0)
        return [(j, i) for i, j in same.tril(-1).nonzero().tolist()]

    def surprise(self, rows: Batch) -> Tensor:
        # Long sequences are less likely than short ones.
        return super().surprise(rows) / rows.frames() if self.whole else super().surprise(rows)

    def respawn(self, batch: Batch, which: Tensor, index: Tensor) -> None:
        """Put the components ``which [*r, K]`` at observations ``index [*r, K]``, with an even share of the mass."""
        component = self.component.initialize_at(batch, index)
        mixing: dict[str, Tensor] = {}
        if isinstance(self.mixing.unwrapped, Categorical):  # a gate learns of them in the next M-step
            share = torch.where(which, 1.0 / self.n_components, self._table().probs.to(torch.float64))
            mixing = self.mixing.maximize(Stats(counts=share))
        self._assign(mixing, self.component.replace_components(which, component))

    # ---- data and numerics ------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> Batch:
        self.component.check(batch)
        if batch.evidence is not None and batch.evidence.shape[-1] != self.n_components:
            raise invalid(
                "evidence", f"{self.n_components} columns, one per component", batch.evidence.shape[-1],
                "give a log-potential for each component",
            )  # fmt: skip
        return batch

    def cast(self, batch: Batch) -> Batch:
        x = self.component.cast(batch.x)
        return batch if x is batch.x else batch.with_x(x)

    def forbid(self, which: Tensor) -> None:
        """Take components ``which [*r, K]`` out of the support of the weights, in place; never the last one."""
        self.mixing.forbid(which)

    def prune(self, keep: Tensor) -> None:
        """Keep only some components, in place; weights are renormalised."""
        self.mixing = self.mixing.pruned(keep)
        self.component = self.component.pruned(keep)


def _classes(mixing: Any) -> int:
    """How many classes a law of them has."""
    shape = getattr(mixing, "shape", None)
    if not isinstance(mixing, Factor) or not shape:
        raise wrong_type("mixing", "a torchem factor over classes", mixing, "pass for example factors.Categorical(K)")
    return shape[-1]


def _evidence(batch: Batch) -> Tensor | None:
    """What is known of the components, ``[N, K]``: of sequences, all that stands at their frames."""
    evidence = batch.evidence
    return evidence.sum(1) if evidence is not None and evidence.dim() == 3 else evidence


def _first_frames(batch: Batch) -> Batch:
    """The first frames of sequences, as rows: what gates read of them."""
    given = {name: None if (own := getattr(batch, name)) is None else own[:, 0] for name in ("x", "u", "offset")}
    return replace(batch, **given, trials=None, lengths=None, evidence=None)  # pyright: ignore[reportArgumentType]


class _FirstFrames(Kernel):
    """A pass of mixing weights over sequences."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def log_potential(self, batch: Batch) -> Tensor:
        return self.kernel.log_potential(_first_frames(batch))

    def collect(self, batch: Batch, expected: Tensor) -> None:
        self.kernel.collect(_first_frames(batch), expected)

    def stats(self) -> Stats:
        return self.kernel.stats()

    def inner(self) -> Tensor:
        return self.kernel.inner()


class GaussianMixture(Mixture):
    """A mixture of Gaussians, as scikit-learn's but on PyTorch.

    p(x) = Σ_k w_k N(x | μ_k, Σ_k).

    Args:
        n_components: K.
        n_features: D.
        covariance_type: ``"full"``, ``"tied"``, ``"diag"``, ``"spherical"``, or one of mclust's; see `Gaussian`.
            ``"low_rank"``: W_k W_kᵀ + Ψ_k; see `LowRankGaussian`, whose loadings are ``m.component.loadings``.
        rank: Columns of W_k; for ``"low_rank"`` alone.
        covariance_floor: Smallest variance, relative to the data's (see `Gaussian`).
        floor_type: ``"relative"``, ``"absolute"`` or ``"additive"``.

    Raises:
        InvalidArgument: For sizes below one or an unknown option.

    Source: C. M. Bishop (2006), section 9.2.

    Example:
        >>> m = GaussianMixture(2, 1)
        >>> m.weights, m.means, m.covariances = [0.5, 0.5], [[-1.0], [1.0]], [[[1.0]], [[1.0]]]
        >>> m.posterior([[0.0]])
        tensor([[0.5000, 0.5000]], grad_fn=<DivBackward0>)
    """

    mixing: Categorical
    component: Any  # Gaussian or LowRankGaussian

    def __init__(
        self,
        n_components: int,
        n_features: int,
        covariance_type: CovarianceType | Literal["low_rank"] = "full",
        rank: int | None = None,
        *,
        covariance_floor: float = 1e-6,
        floor_type: FloorType = "relative",
    ):
        if (covariance_type == "low_rank") != (rank is not None):
            raise invalid(
                "rank", "a number of scores for covariance_type='low_rank', and none for others",
                f"rank={rank} and covariance_type={covariance_type!r}", "give both or neither",
            )  # fmt: skip
        floor = {"covariance_floor": covariance_floor, "floor_type": floor_type}
        if covariance_type == "low_rank":
            assert rank is not None
            component = LowRankGaussian(n_components, n_features, rank, **floor)
        else:
            component = Gaussian(n_components, n_features, covariance_type, **floor)
        super().__init__(Categorical(n_components), component)
        self.n_features = n_features
        self.rank = rank
        self.covariance_type = covariance_type
        self.covariance_floor = covariance_floor
        self.floor_type = floor_type

    @property
    def means(self) -> Float[Tensor, "*r k d"]:
        """Means ``[*r, K, D]``; assignable."""
        return self.component.means

    @means.setter
    def means(self, value: Any) -> None:
        self.component.means = value

    @property
    def covariances(self) -> Float[Tensor, "*shape"]:
        """Covariances in scikit-learn's shapes; assignable, but for those of low rank."""
        return self.component.covariances

    @covariances.setter
    def covariances(self, value: Any) -> None:
        if isinstance(getattr(self.component, "unwrapped", None), LowRankGaussian):
            raise invalid(
                "covariances", "component.loadings and component.noise_variances", "covariances of low rank",
                "assign those",
            )  # fmt: skip
        self.component.covariances = value

    def config(self) -> dict[str, Any]:
        return {**super().config(), "n_components": self.n_components}
