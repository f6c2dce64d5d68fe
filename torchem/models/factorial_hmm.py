"""Factorial hidden Markov models: several chains of states behind one sequence, by variational inference."""

import math
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchem.batch import Batch, as_tensor, values_known
from torchem.errors import invalid, one_of, whole_number, wrong_type
from torchem.factor import Factor
from torchem.factors import Categorical, LinearGaussian
from torchem.factors.linear_gaussian import CovarianceType
from torchem.model import EStep, LatentModel, Uniforms, global_uniforms, weighted
from torchem.models.imputation import Completing, Gaps, floating, in_turn, places
from torchem.models.unseen import Moments as Given
from torchem.ops import chain, linalg, observed, reduce
from torchem.ops.dispatch import declared_precision
from torchem.ops.missing import any_missing
from torchem.stats import Stats

#: How the posterior of the chains is approximated, if it is.
Approximation = Literal["structured", "mean_field", "exact"]

#: States of all chains together up to which inference may run on their product.
_EXACT = 1024
#: Bytes that the messages of one piece of sequences may take.
_MESSAGES = {"cpu": 64 << 20, "cuda": 2 << 30}
#: Numbers held per frame and state while messages run both ways.
_PER_STATE = 6

#: q(z_t^m) of each chain, ``[*r, N, T, K_m]``; zeros in the padding.
Marginals = tuple[Tensor, ...]


class FactorialHMM(Completing):
    """p(x, z) = Π_m p(z_1^m) Π_t p(z_{t+1}^m | z_t^m) · Π_t N(x_t | Σ_m W^m_{z_t^m}, Σ): M chains, one observation.

    The chains are independent until x is seen and all dependent after; exact inference takes Π_m K_m states. Instead
    a posterior of a simpler form is fitted by coordinate ascent, which climbs the evidence lower bound
    E_q[log p(x, z)] + H(q): the objective of EM. M-step: each table under its expected counts, and the regression of x
    on the indicators of all states.

    - ``"structured"``: q = Π_m q(z^m), each chain kept exact: forward–backward under the evidence that the residuals of
      the other chains leave.
    - ``"mean_field"``: q = Π_m Π_t q(z_t^m).
    - ``"exact"``: the posterior itself, on the product of all chains; for small ones.

    So that the bound never falls, an E-step in a fit sets out from where the last one on the same data ended: on the
    same `Batch`, as long as it lives, or on the batch that a loader gives in the same place of each pass. Where a
    loader shuffles, ascents set out anew, and the bound may fall where one ends elsewhere.

    At the inverse temperature β q climbs E_q[log p(x, z)] + H(q) / β: all potentials times β. A sampled E-step draws a
    path of each chain: from the posterior itself under ``"exact"``, else from the q that was found, chain by chain or
    for a mean field frame by frame; the objective stays the bound of that q.

    NaN entries and whole frames of x are missing at random: potentials are those of what was observed of a frame, and
    moments are completed by what the states and the rest of the frame say of it.

    Labels are of chains: whole numbers ``[N, T, M]``, −1 where a chain's state is unknown; or Booleans or soft evidence
    ``[N, T, ΣK_m]``, the states of all chains in turn.

    Args:
        initials: ``Categorical(K_m)`` of each chain.
        transitions: ``Categorical(K_m, K_m)`` of each chain; zeros assigned to it stay zero.
        emission: ``LinearGaussian(1, ΣK_m, D)``: a regression on the indicators of the states of all chains in turn.
        q: Form of the posterior.
        tolerance: Rise of the bound per frame, in nats, below which the ascent on a sequence is over.
        max_sweeps: Most updates of all chains in an E-step.

    Raises:
        InvalidArgument: If they disagree about the chains, for an option out of range, or for ``"exact"`` with more
            than 1024 states in all.

    Source: Z. Ghahramani, M. I. Jordan (1997), equations 8–12 and appendix A.

    Example:
        >>> m = FactorialHMM.gaussian([2, 3], 1)
        >>> [p.shape for p in m.posterior(torch.zeros(5, 1))]
        [torch.Size([1, 5, 2]), torch.Size([1, 5, 3])]
    """

    sequential: ClassVar[bool] = True
    e_steps: ClassVar[tuple[EStep, ...]] = ("soft", "hard", "sample")
    anneals: ClassVar[bool] = True

    # Lists of modules, told to type checkers by what is in them.
    initials: Sequence[Categorical]
    transitions: Sequence[Categorical]
    emission: LinearGaussian

    def __init__(
        self,
        initials: Iterable[Factor],
        transitions: Iterable[Factor],
        emission: Factor,
        q: Approximation = "structured",
        tolerance: float = 1e-6,
        max_sweeps: int = 50,
    ):
        super().__init__()
        firsts, moves = list(initials), list(transitions)
        _check_chains(firsts, moves, emission)
        assert isinstance(emission, LinearGaussian)
        one_of("q", q, ("structured", "mean_field", "exact"))
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
            raise invalid("tolerance", "a finite number of at least 0", repr(tolerance), "the default is 1e-6 nats")
        whole_number("max_sweeps", max_sweeps, 1)
        self.initials = cast(Sequence[Categorical], nn.ModuleList(firsts))
        self.transitions = cast(Sequence[Categorical], nn.ModuleList(moves))
        self.emission = emission
        self.q: Approximation = q
        self.tolerance, self.max_sweeps = float(tolerance), max_sweeps
        # Where ascents ended, on batches that live on and on those of places in a fit's passes.
        self._met = weakref.WeakKeyDictionary[Batch, _Ascent]()
        self._places: dict[Hashable, _Ascent] = {}
        self._place: Hashable = None
        if q == "exact":
            self._check_size("q", "use 'structured'")

    @classmethod
    def gaussian(
        cls,
        n_states: Sequence[int],
        n_features: int,
        covariance_type: CovarianceType = "full",
        **options: Any,
    ) -> "FactorialHMM":
        """Chains of ``n_states`` each and a common Gaussian noise.

        Args:
            n_states: K_m of each chain.
            n_features: D.
            covariance_type: ``"full"``, ``"diag"`` or ``"spherical"``.
            **options: As for the class: ``q``, ``tolerance``, ``max_sweeps``.

        Example:
            >>> FactorialHMM.gaussian([2, 2, 2], 4, q="mean_field").n_states
            (2, 2, 2)
        """
        sizes = list(n_states)
        if not sizes:
            raise invalid("n_states", "the number of states of each chain", "none", "give for example [2, 3]")
        emission = LinearGaussian(1, sum(sizes), n_features, covariance_type)
        return cls([Categorical(k) for k in sizes], [Categorical(k, k) for k in sizes], emission, **options)

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        parts = {"initials": self.initials, "transitions": self.transitions}
        chains = [(f"{name}.{m}", table) for name, tables in parts.items() for m, table in enumerate(tables)]
        return *chains, ("emission", self.emission)

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether q is the posterior itself."""
        return self.q == "exact"

    # ---- views ------------------------------------------------------------------------------------------------

    @property
    def n_states(self) -> tuple[int, ...]:
        """K_m of each chain."""
        return tuple(table.shape[-1] for table in self.initials)

    @property
    def n_components(self) -> int:
        """ΣK_m, the rows of all chains' contributions: what a start tells apart."""
        return sum(self.n_states)

    @property
    def labelled(self) -> tuple[int, ...]:
        return self.n_states

    @property
    def dtype(self) -> torch.dtype:
        return self.emission.dtype

    @property
    def device(self) -> torch.device:
        return self.emission.device

    @property
    def replicas(self) -> tuple[int, ...]:
        return self.emission.replicas

    @property
    def initial_probs(self) -> tuple[Tensor, ...]:
        """Probabilities ``[*r, K_m]`` of the first state of each chain; assign them to ``initials[m].probs``."""
        return tuple(table.probs for table in self.initials)

    @property
    def transition_matrices(self) -> tuple[Tensor, ...]:
        """Probabilities ``[*r, K_m, K_m]`` of the steps of each chain; assign them to ``transitions[m].probs``."""
        return tuple(table.probs for table in self.transitions)

    @property
    def contributions(self) -> tuple[Tensor, ...]:
        """W^m ``[*r, K_m, D]``: what each state of each chain adds to the mean; assignable.

        They are defined up to constants that the chains exchange: what one of them adds to all of its states another
        may take off.
        """
        return self.emission.weight.squeeze(-3).mT.split(self.n_states, -2)

    @contributions.setter
    def contributions(self, value: Any) -> None:
        parts = [as_tensor(part, f"contributions[{m}]").to(self.device, torch.float64) for m, part in enumerate(value)]
        shapes = [[*self.replicas, k, self.emission.n_outputs] for k in self.n_states]
        if [list(part.shape) for part in parts] != shapes:
            got = [list(part.shape) for part in parts]
            raise invalid("contributions", f"tensors of shapes {shapes}", got, "give one per chain")
        self.emission.weight = torch.cat(parts, -2).mT.unsqueeze(-3)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the noise: ``[*r, D, D]``, ``[*r, D]`` when diagonal, ``[*r]`` when spherical; assignable."""
        value = self.emission.covariances
        return value if self.emission.structure.shared else value.select(len(self.replicas), 0)

    @covariance.setter
    def covariance(self, value: Any) -> None:
        own = as_tensor(value, "covariance")
        self.emission.covariances = own if self.emission.structure.shared else own.unsqueeze(len(self.replicas))

    # ---- inference --------------------------------------------------------------------------------------------

    def e_step(self, batch: Batch, kind: EStep = "soft", beta: float = 1.0, uniforms: Uniforms | None = None) -> Stats:
        """Expected statistics under q; ``log_likelihood`` is the evidence lower bound, exact under ``q="exact"``.

        Args:
            batch: Sequences.
            kind: ``"hard"``: q is a single path of each chain, found by coordinate ascent with the Viterbi algorithm
                unless ``q="exact"``. ``"sample"``: paths are drawn from q.
            beta: Inverse temperature; ``log_likelihood`` is then E_q[log p(x, z)] + H(q) / β.
            uniforms: Gives the uniform numbers of the draws; those of torch's global generator when left out.
        """
        source = global_uniforms if uniforms is None else uniforms
        draws = source if kind == "sample" else None
        with declared_precision(self.device):
            start, row = self._start(batch, kind), 0
            total: Stats | None = None
            found: list[Marginals] = []
            for piece in self.stream(batch):
                warm = None if start is None else tuple(g.narrow(-3, row, len(piece)) for g in start)
                row += len(piece)
                posterior = self._infer(piece, kind, warm, piece.weight, beta, draws)
                found.append(posterior.marginals)
                stats = self._stats(piece, posterior)
                total = stats if total is None else total + stats
            assert total is not None
            self._remember(batch, kind, found)
            total["entropy"] = total["log_likelihood"] - self.expected_log_prob(total)
            total["count"] = self.count(batch).to(total["entropy"]).expand_as(total["entropy"])
        return total

    def visit(self, key: Hashable) -> None:
        self._place = key

    def _start(self, batch: Batch, kind: EStep) -> Marginals | None:
        """Where the last ascent on these data ended, in a fit: derivatives and transforms see none of it."""
        if not self._remembers():
            return None
        known = self._met.get(batch)
        if known is None and self._place in self._places:
            known = self._places[self._place]
            # A loader may give other data in the same place than before.
            known = known if known.print == _print(batch) else None
        if known is None or known.form != self._form(kind):
            return None
        if known.q[0].shape[:-1] != (*self.replicas, *batch.x.shape[:2]):
            return None
        return tuple(g.to(self.device, self.dtype) for g in known.q)

    def _remember(self, batch: Batch, kind: EStep, found: list[Marginals]) -> None:
        if not self._remembers():
            return
        whole = found[0] if len(found) == 1 else tuple(torch.cat(g, -3) for g in zip(*found, strict=True))
        here = self._place is not None
        ended = _Ascent(self._form(kind), whole, _print(batch) if here else None)
        if here:
            self._places[self._place] = ended
        else:
            self._met[batch] = ended

    def _form(self, kind: EStep) -> str:
        return "paths" if kind == "hard" else self.q

    def _remembers(self) -> bool:
        return self.q != "exact" and not torch.is_grad_enabled() and _plain()

    def _infer(
        self,
        batch: Batch,
        kind: EStep,
        start: Marginals | None = None,
        weight: Tensor | None = None,
        beta: float = 1.0,
        uniforms: Uniforms | None = None,
    ) -> "_Posterior":
        """q of a piece, at the inverse temperature β; with ``uniforms`` paths that are drawn from it as well."""
        problem = self._problem(batch)
        problem = problem if beta == 1 else problem.tempered(beta)
        if self.q == "exact":
            found = problem.product(kind, weight, uniforms)
        else:
            update = problem.viterbi if kind == "hard" else problem.smooth if self.q == "structured" else problem.relax
            start = problem.start(update) if start is None else start
            found = self._ascend(problem, update, start, weight, self.tolerance * beta)
            if uniforms is not None:
                found = problem.drawn(update, found, weight, uniforms)
        return found if beta == 1 else replace(found, value=found.value / beta)

    def _ascend(
        self, problem: "_Problem", update: "_Update", q: Marginals, weight: Tensor | None, tolerance: float
    ) -> "_Posterior":
        """Coordinate ascent; a sequence that has come to its end waits for the others, so batches do not matter."""
        best: Tensor | None = None
        going: Tensor | None = None
        frames = problem.frames()
        # The last sweep, which all sequences take part in, is that of the statistics.
        for _ in range(self.max_sweeps - 1):
            new, value, _ = problem.sweep(update, q)
            if best is None or going is None:
                q, best, going = new, value, torch.ones_like(value, dtype=torch.bool)
                continue
            going = going & (value - best > tolerance * frames)
            # A step that fell short of the tolerance is the last; it is made again in the sweep of the statistics.
            q = tuple(torch.where(going[..., None, None], a, b) for a, b in zip(new, q, strict=True))
            best = torch.where(going, value, best)
            if _plain() and not bool(going.any()):
                break
        marginals, value, counts = problem.sweep(update, q, weight, count=True)
        first, steps = (tuple(table) for table in zip(*counts, strict=True))
        return _Posterior(value, marginals, first, steps)

    def _stats(self, batch: Batch, posterior: "_Posterior") -> Stats:
        stats = Stats()
        for name, tables, counts in (
            ("initials", self.initials, posterior.first), ("transitions", self.transitions, posterior.steps),
        ):  # fmt: skip
            for m, (table, expected) in enumerate(zip(tables, counts, strict=True)):
                stats[f"{name}.{m}"] = table.table_stats(batch, expected)
        x = batch.x.to(torch.float64).flatten(0, 1)
        seen = self._seen(batch)
        mass = torch.ones_like(x[:, 0]) if seen is None else seen.flatten().to(x)
        if batch.weight is not None:
            mass = mass * batch.weight.to(x).repeat_interleave(batch.x.shape[1])
        states = posterior.marginals if posterior.paths is None else posterior.paths
        g = torch.cat(states, -1).flatten(-3, -2).to(torch.float64)
        heavy = (g * mass.unsqueeze(-1)).mT
        joint = None if posterior.joint is None else posterior.joint.flatten(-3, -2).to(x)
        holes, open_ = self._holes(batch), None
        if holes is not None:
            law = observed.Observed(self._root(torch.float64), holes)
            x, open_ = self._completed(law, x, g, joint, mass)
        x = x.nan_to_num(nan=0.0)
        if joint is None:
            # States of one chain exclude each other.
            uu = torch.where(self._own(), torch.diag_embed(heavy.sum(-1)), heavy @ g)
        else:
            design = _design(self.n_states, x)
            share = (joint * mass.unsqueeze(-1)).sum(-2)
            uu = (design.mT * share.unsqueeze(-2)) @ design
        ux, spread = heavy @ x, None
        if open_ is not None:
            ux, spread = ux + open_[0], open_[1]
        stats["emission"] = self.emission.latent_stats(x, mass.expand(*self.replicas, -1), ux, uu, spread)
        stats["log_likelihood"] = weighted(posterior.value, batch)
        return stats

    def _completed(
        self, law: "observed.Observed", x: Tensor, g: Tensor, joint: Tensor | None, mass: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Frames ``[*r, F, D]`` completed by their expectations under q, and what moments these do not have.

        Given the states u ``[ΣK_m]`` what is missing is expected at a + M u, with a covariance S of its own. So beside
        the moments of the frames completed at E[u] there are Cov(u) Mᵀ of states and frames, and M Cov(u) Mᵀ + S of
        frames, all summed by the patterns of missing entries.
        """
        holes, weight = law.holes, self.emission.weight.squeeze(-3).to(torch.float64)
        part, own = holes.take(g, -2), holes.take(mass, 0)
        found = law.completed(holes.take(x, 0), part @ weight.mT)
        filled = holes.put(x.expand(*found.shape[:-2], *x.shape), found, -2)
        each = self._covariance(part, None if joint is None else holes.take(joint, -2))
        cov = holes.total(each * own[:, None, None], 2)
        pull = law.follows @ weight.unsqueeze(-3)
        cross = cov @ pull.mT
        left = holes.total(own, 0)[:, None, None] * law.covariance
        return filled, (cross.sum(-3), (pull @ cross + left).sum(-3))

    def _covariance(self, g: Tensor, joint: Tensor | None) -> Tensor:
        """Cov(u) ``[*r, F, ΣK_m, ΣK_m]`` of indicators of states, of independent chains if no ``joint`` is known."""
        outer = g.unsqueeze(-1) * g.unsqueeze(-2)
        if joint is None:
            return torch.where(self._own(), torch.diag_embed(g) - outer, 0.0)
        design = _design(self.n_states, joint)
        pairs = (design.unsqueeze(-1) * design.unsqueeze(-2)).flatten(-2)
        return (joint @ pairs).unflatten(-1, outer.shape[-2:]) - outer

    def _own(self) -> Tensor:
        """``[ΣK_m, ΣK_m]`` Boolean, True for states of the same chain."""
        return torch.block_diag(*(torch.ones(k, k) for k in self.n_states)).to(self.device, torch.bool)

    def _root(self, dtype: torch.dtype | None = None) -> Tensor:
        """R ``[*r, D, D]`` with R Σ Rᵀ = I."""
        raw = self.emission.scale if dtype is None else self.emission.scale.to(dtype)
        return linalg.inverse_factor(self.emission.structure.dense(raw, 1, self.emission.n_outputs).squeeze(-3))

    def _seen(self, batch: Batch) -> Tensor | None:
        """``[N, T]`` Boolean, True where a frame is there and not missing; None where all are."""
        inside = batch.frames_mask()
        if not batch.x.is_floating_point():
            return inside
        seen = ~batch.x.isnan().all(-1)
        return seen if inside is None else seen & inside

    def _holes(self, batch: Batch) -> "observed.Holes | None":
        """Which frames, one below the other, miss some of their entries."""
        x = batch.x
        if not x.is_floating_point():
            return None
        mask = batch.frames_mask()

        find: Any = observed.Holes.of
        if torch.compiler.is_compiling():
            # Values decide what is computed: there is nothing to compile once for all.
            find = torch.compiler.disable(find)
        return batch.remember("holes", lambda: find(x.flatten(0, 1), None if mask is None else mask.flatten()))

    def _problem(self, batch: Batch) -> "_Problem":
        """Potentials of the chains, contributions and observations, whitened: the noise is then standard normal."""
        firsts, moves = ([t.log_table(batch) for t in part] for part in (self.initials, self.transitions))
        d, root = self.emission.n_outputs, self._root()
        parts = self.contributions
        level = [part.mean(-2, keepdim=True) for part in parts]
        # Chains that exchange constants stay the same, and what is centred loses no digits.
        means = [((part - center) @ root.mT).unsqueeze(-3) for part, center in zip(parts, level, strict=True)]
        seen = self._seen(batch)
        x = batch.x if batch.x.is_floating_point() else batch.x.to(self.dtype)
        x = x if seen is None else torch.where(seen.unsqueeze(-1), x, 0.0)
        center = torch.stack(level).sum(0).unsqueeze(-3)
        holes = self._holes(batch)
        # What stands in the place of a missing entry is projected out.
        gap = x - center.to(x) if holes is None else torch.where(x.isnan(), 0.0, x - center.to(x))
        y = gap.to(self.dtype) @ root.mT.unsqueeze(-3)
        constant = (root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * d * math.log(2 * math.pi))[..., None, None]
        law = None
        if holes is not None:
            law = observed.Observed(root, holes)
            y = _framed(law.project, y)
            constant = constant + law.constants(batch.x.shape[0] * batch.x.shape[1]).unflatten(-1, batch.x.shape[:2])
        restricted = [a.restricted or b.restricted for a, b in zip(self.initials, self.transitions, strict=True)]
        known = None if batch.evidence is None else batch.evidence.to(y).split(self.n_states, -1)
        return _Problem(firsts, moves, means, y, seen, batch, constant, restricted, known, law)

    # ---- use --------------------------------------------------------------------------------------------------

    def log_prob(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """log p(x) of each sequence, exact, on the product of all chains; see `elbo` for large ones.

        Raises:
            InvalidArgument: If the chains have more than 1024 states in all.
        """
        self._check_size("log_prob", "use elbo, a lower bound")
        return self._each(data, fields, lambda batch: self._problem(batch).log_normalizer())

    def _check_size(self, argument: str, remedy: str) -> None:
        size = math.prod(self.n_states)
        if size > _EXACT:
            sizes = " · ".join(map(str, self.n_states))
            raise invalid(
                argument, f"at most {_EXACT} states of all chains together, for exact inference",
                f"{sizes} = {size}", remedy,
            )  # fmt: skip

    def elbo(self, data: Any, **fields: Any) -> Float[Tensor, "*r n"]:
        """The evidence lower bound of each sequence, ``[N]``, below `log_prob` by the divergence of q.

        The ascent sets out anew; in a fit it goes on from where it was, and may end elsewhere.
        """
        return self._each(data, fields, lambda batch: self._infer(batch, "soft").value)

    def log_score(self, batch: Batch) -> Tensor:
        """`log_prob` where the chains have few enough states for it, else `elbo`."""
        return self.elbo(batch) if self.scored_by_bound(batch) else self.log_prob(batch)

    def scored_by_bound(self, batch: Batch) -> bool:
        return math.prod(self.n_states) > _EXACT

    def entropy(self, batch: Batch) -> Tensor:
        """Weighted entropy of q over the paths of all chains, ``[*r]`` in nats."""
        total: Tensor | float = 0.0
        with declared_precision(self.device):
            for piece in self.stream(batch):
                found = self._infer(piece, "soft", weight=piece.weight)
                stats = self._stats(piece, found)
                total = total + stats["log_likelihood"] - self.expected_log_prob(stats)
                if piece.evidence is not None:
                    g = torch.cat(found.marginals, -1)
                    total = total - weighted(_expected(g, piece.evidence.to(g)).sum((-2, -1)), piece)
        assert isinstance(total, Tensor)
        return total

    def posterior(self, data: Any, **fields: Any) -> tuple[Tensor, ...]:
        """q(z_t^m) of each frame, ``[*r, N, T, K_m]`` for each chain; zeros in the padding.

        Args:
            data: Sequences, as for `torchem.fit`.
            **fields: ``lengths``, … as for `LatentModel.batch`.
        """
        return self._each(data, fields, lambda batch: self._infer(batch, "soft").marginals)

    def most_likely(self, data: Any, **fields: Any) -> Int[Tensor, "*r n t m"]:
        """A path of each chain, ``[N, T, M]``, that no other path of one chain improves; −1 in the padding.

        Coordinate ascent with the Viterbi algorithm from the posterior; under ``q="exact"`` the most likely paths.
        """

        def paths(batch: Batch) -> Tensor:
            soft = None if self.q == "exact" else self._infer(batch, "soft").marginals
            hard = self._infer(batch, "hard", soft).marginals
            path = torch.stack([g.argmax(-1) for g in hard], -1)
            inside = batch.frames_mask()
            return path if inside is None else torch.where(inside.unsqueeze(-1), path, -1)

        with torch.no_grad():
            return self._each(data, fields, paths)

    def column_kinds(self) -> list[tuple[bool, bool]]:
        return [(False, False)] * self.contributions[0].shape[-1]

    def unseen(self, batch: Batch, index: Tensor) -> Given:
        """See `Completing.unseen`: frames under q.

        A mean is exact if the marginals of q are; the variance is that of independent chains unless ``q="exact"``.
        """
        lead, place = len(self.replicas), places(batch, index, self.device)

        def missing(value: Tensor) -> Tensor:
            return value.flatten(lead, lead + 1).index_select(lead, place)

        def states(piece: Batch) -> Tensor:
            return torch.cat(self._infer(piece, "soft").marginals, -1)

        weight = self.emission.weight.squeeze(-3).mT.to(torch.float64)
        rows = floating(batch.rows()[index], self)
        law, x = self._completion(rows.x)
        expected = missing(self._each(batch, {}, states)).to(torch.float64)
        joint = missing(self._each(batch, {}, self._product)).to(expected) if self.q == "exact" else None
        pull = (law.follows @ weight.mT.unsqueeze(-3))[..., law.holes.which, :, :]
        spread = ((pull @ self._covariance(expected, joint)) * pull).sum(-1).clamp(min=0.0)
        noise = law.covariance.diagonal(dim1=-2, dim2=-1)[..., law.holes.which, :]
        best = [nn.functional.one_hot(g.argmax(-1), g.shape[-1]) for g in expected.split(self.n_states, -1)]
        likely = law.completed(x, torch.cat(best, -1).to(weight) @ weight)
        found = law.completed(x, expected @ weight), noise + spread, likely
        return Given(rows, *(value.to(self.dtype) for value in found))

    def _completion(self, rows: Tensor) -> tuple[observed.Observed, Tensor]:
        """How what is missing of some rows follows what was observed, given all states; and the rows in float64."""
        x = rows.to(self.device, torch.float64)
        return observed.Observed(self._root(torch.float64), observed.Holes.everywhere(x)), x

    def drawn(self, gaps: Gaps, draws: int, generator: torch.Generator | None) -> Tensor:
        """See `Completing.drawn`: paths of all chains, and the frames given these."""
        batch, place = gaps.batch, places(gaps.batch, gaps.index, self.device)

        def draw(shape: torch.Size) -> Tensor:
            return torch.rand(shape, dtype=torch.float64, generator=generator).to(self.device)

        def states(piece: Batch) -> Tensor:
            found = self._infer(piece, "sample", uniforms=draw)
            return torch.cat(found.marginals if found.paths is None else found.paths, -1)

        drawn, (law, x) = [], self._completion(gaps.rows[gaps.index])
        for times in in_turn(draws, batch.x.shape[:2].numel()):
            many = batch[torch.arange(len(batch)).repeat(times)]
            u = self._each(many, {}, states).unflatten(0, (times, len(batch))).flatten(1, 2)[:, place]
            z = torch.zeros(u.shape[:-1].numel(), dtype=torch.long, device=self.device)
            around = Batch(u.flatten(0, 1), u=u.flatten(0, 1))
            # A draw of all columns, moved by what was observed.
            free = self.emission.sample(z, around, generator).unflatten(0, u.shape[:-1])
            drawn.append(law.completed(x, free.to(torch.float64)))
        return torch.cat(drawn)

    def _product(self, piece: Batch) -> Tensor:
        joint = self._infer(piece, "soft").joint
        assert joint is not None
        return joint

    def _each(self, data: Any, fields: dict[str, Any], function: Callable[[Batch], Any]) -> Any:
        batch = self._read(data, fields)
        with declared_precision(self.device):
            parts = [function(piece) for piece in self.stream(batch)]
        return parts[0] if len(parts) == 1 else pytree.tree_map(lambda *p: torch.cat(p, len(self.replicas)), *parts)

    @torch.no_grad()
    def sample(
        self,
        n: int = 1,
        length: int | None = None,
        *,
        latents: bool = False,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Draw ``n`` sequences ``[n, length, D]``, and the states ``[n, length, M]`` when ``latents`` is True.

        Args:
            n: Number of sequences.
            length: Frames of each.
            latents: Whether to return the states as well.
            generator: Source of the draws.
        """
        for name, value, least in (("n", n, 0), ("length", length, 1)):
            whole_number(name, value, least)
        assert length is not None
        paths = []
        for first, step in zip(self.initial_probs, self.transition_matrices, strict=True):
            path = [_pick(first.expand(n, -1), generator)]
            for _ in range(1, length):
                path.append(_pick(step[path[-1]], generator))
            paths.append(torch.stack(path, 1))
        z = torch.stack(paths, -1)
        hot = [nn.functional.one_hot(z[..., m], k) for m, k in enumerate(self.n_states)]
        u = torch.cat(hot, -1).flatten(0, 1).to(self.device, self.dtype)
        blank = torch.zeros(len(u), dtype=torch.long, device=self.device)
        x = self.emission.sample(blank, Batch(u, u=u), generator).unflatten(0, (n, length))
        return (x, z) if latents else x

    # ---- starts and health ------------------------------------------------------------------------------------

    @property
    def default_init(self) -> str:
        return "random_from_data"

    def rows(self, batch: Batch) -> Batch:
        rows = batch.rows()
        seen = ~rows.x.isnan().all(-1) if rows.x.is_floating_point() else None
        return rows if seen is None or bool(seen.all()) else rows[seen]

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        share = expected.to(torch.float64)
        if batch.weight is not None:
            share = share * batch.weight.unsqueeze(-1).to(share)
        total = share.sum(-2).unsqueeze(-1).clamp(min=1e-300)
        batch = _filled(batch)
        self._begin(batch, (share.mT @ batch.x.to(torch.float64)) / total)

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        batch = _filled(batch)
        self._begin(batch, batch.x.to(torch.float64)[index])

    def _begin(self, batch: Batch, places: Tensor) -> None:
        """Contributions from a place ``[*r, ΣK_m, D]`` in the data for each state, noise as large as the data's.

        Each chain gets the same share of the variance; their sums lie about the mean of the data.
        """
        x, emission = batch.x.to(torch.float64), self.emission
        mass = torch.ones_like(x[:, 0]) if batch.weight is None else batch.weight.to(x)
        mean = (mass @ x) / mass.sum()
        unit = ((mass @ (x - mean).square()) / mass.sum()).sqrt()
        unit = torch.where(unit > 0, unit, 1.0)
        chains = len(self.n_states)
        parts = []
        for place in places.split(self.n_states, -2):
            away = place - place.mean(-2, keepdim=True)
            size = (away / unit).square().mean((-2, -1), keepdim=True).sqrt() * math.sqrt(chains)
            parts.append(mean / chains + away / torch.where(size > 0, size, 1.0))
        weight = torch.cat(parts, -2).mT.unsqueeze(-3)
        nothing = weight.new_zeros(*self.replicas, 1)
        ux = nothing.expand(*self.replicas, self.n_components * x.shape[-1]).unflatten(-1, (-1, x.shape[-1]))
        uu = nothing.expand(*self.replicas, self.n_components**2).unflatten(-1, (-1, self.n_components))
        # Where nothing is known of the regressors, all variance is noise.
        stats = emission.latent_stats(x - mean, mass.expand(*self.replicas, -1), ux, uu)
        values = emission.maximize(stats)
        values["coefficient"] = emission.keep_frozen("coefficient", weight.to(self.dtype))
        self.assign({f"emission.{name}": value for name, value in values.items()})

    def occupancy(self, stats: Stats) -> Tensor:
        """Expected number of frames in each state of each chain in turn, ``[*r, ΣK_m]``."""
        pairs = [(stats[f"initials.{m}"], stats[f"transitions.{m}"]) for m in range(len(self.n_states))]
        return torch.cat([first["counts"] + step["counts"].sum(-2) for first, step in pairs], -1)

    def _alone(self, rows: Batch) -> "_Posterior":
        """q of single frames ``[n, D]``, about whose states nothing else is known."""
        problem = self._problem(Batch(rows.x.unsqueeze(1)))
        problem = replace(problem, initial=[torch.zeros_like(first) for first in problem.initial])
        if self.q == "exact":
            return problem.product("soft", None, None)
        return self._ascend(problem, problem.smooth, problem.start(problem.smooth), None, self.tolerance)

    def surprise(self, rows: Batch) -> Tensor:
        return -self._alone(rows).value

    def respawn(self, batch: Batch, which: Tensor, index: Tensor) -> None:
        """Let the states ``which [*r, ΣK_m]`` add what the others leave of the frames at ``index [*r, ΣK_m]``.

        Each is then entered, and left, as often as the others.
        """
        marginals = self._alone(batch).marginals
        shares = [(g @ part.unsqueeze(-3)).squeeze(-2) for g, part in zip(marginals, self.contributions, strict=True)]
        total, parts = torch.stack(shares).sum(0), []
        for part, share, place in zip(self.contributions, shares, index.split(self.n_states, -1), strict=True):
            rest = (total - share).gather(-2, place.unsqueeze(-1).expand(*place.shape, total.shape[-1]))
            x = batch.x.to(rest)[place]
            # Where nothing was observed nothing is left.
            rest = torch.where(x.isnan(), 0.0, rest)
            parts.append(torch.where(x.isnan(), part, x - rest))
        old = self.emission.weight
        new = torch.where(which.unsqueeze(-1), torch.cat(parts, -2), old.squeeze(-3).mT).mT.unsqueeze(-3)
        values = {"emission.coefficient": self.emission.keep_frozen("coefficient", new.to(self.dtype))}
        for m, (k, part) in enumerate(zip(self.n_states, which.split(self.n_states, -1), strict=True)):
            entered = torch.where(part, 1 / k, self.initials[m].probs.to(torch.float64))
            stepped = torch.where(part.unsqueeze(-2), 1 / k, self.transitions[m].probs.to(torch.float64))
            stepped = torch.where(part.unsqueeze(-1), 1 / k, stepped)
            for name, table, share in (
                ("initials", self.initials[m], entered), ("transitions", self.transitions[m], stepped),
            ):  # fmt: skip
                values |= {f"{name}.{m}.{key}": new for key, new in table.maximize(Stats(counts=share)).items()}
        self.assign(values)

    def forbid(self, which: Tensor) -> None:
        """Take states ``which [*r, ΣK_m]`` out of their chains, in place; never the last successor of another."""
        if len(self.factors()) < len(self.slots()) or self.emission.prior is not None:
            raise invalid(
                "dead", "'floor', 'raise' or 'respawn' where chains share tables, or contributions have a prior",
                "'prune'", "give each chain tables of its own, and leave that prior out",
            )  # fmt: skip
        for first, step, part in zip(self.initials, self.transitions, which.split(self.n_states, -1), strict=True):
            first.forbid(part)
            step.forbid(part.unsqueeze(-2))

    def prune(self, keep: Tensor) -> None:
        """Keep only some states of each chain, by their number among all, in place; tables are renormalised."""
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        kept = torch.zeros(self.n_components, dtype=torch.bool, device=self.device)
        kept[index.to(self.device)] = True
        old, weight = self.emission, self.emission.weight.detach()
        firsts, moves = [], []
        for first, step, part in zip(self.initials, self.transitions, kept.split(self.n_states), strict=True):
            states = part.nonzero()[:, 0]
            for table, small, found in ((first, first.select(states), firsts), (step, step.among(states), moves)):
                small.prior = None if table.prior is None else table.prior.selected(table, states)
                found.append(small)
        new = type(old)(**{**old.config(), "n_inputs": int(kept.sum())}).to(self.device, self.dtype)
        new.weight, new.scale.data = weight[..., kept], old.scale.detach().clone()
        for name, value in old.named_buffers():
            new.register_buffer(name, value)
        self.initials = cast(Sequence[Categorical], nn.ModuleList(firsts))
        self.transitions = cast(Sequence[Categorical], nn.ModuleList(moves))
        self.emission = new

    def degenerate(self) -> Tensor | None:
        return self.emission.degenerate()

    def n_parameters(self) -> int:
        """Number of free parameters: the constants that chains may exchange are counted once."""
        free = self.emission.frozen("coefficient") is None
        return super().n_parameters() - free * (len(self.n_states) - 1) * self.emission.n_outputs

    # ---- data and state ---------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> Batch:
        if batch.x.shape[-1] != self.emission.n_outputs:
            raise invalid(
                "data", f"{self.emission.n_outputs} features", batch.x.shape[-1],
                "select the columns the model was built for",
            )  # fmt: skip
        if batch.u is not None:
            raise invalid("inputs", "none: the regressors are the states", "some", "leave them out")
        if batch.evidence is not None and batch.evidence.shape[-1] != self.n_components:
            raise invalid(
                "evidence", f"{self.n_components} columns, the states of all chains in turn", batch.evidence.shape[-1],
                "give a log-potential for each state of each chain",
            )  # fmt: skip
        return batch

    def stream(self, batch: Batch) -> Iterator[Batch]:
        """Sequences in pieces whose messages fit the budget, on the model's device."""
        states = math.prod(self.n_states) if self.q == "exact" else self.n_components
        holes = batch.x.is_floating_point() and any_missing(batch.x)
        each = _PER_STATE * states + holes * (2 * self.emission.n_outputs**2 + self.n_components**2)
        size = each * self.dtype.itemsize * math.prod(self.replicas) * max(1, batch.x.shape[1])
        budget = self.memory_budget or _MESSAGES.get(self.device.type, _MESSAGES["cuda"])
        for piece in batch.split(max(1, budget // size)):
            yield piece if piece.x.device == self.device else piece.to(self.device)

    def take_replicas(self, index: Tensor | int) -> "LatentModel":
        twin = super().take_replicas(index)
        assert isinstance(twin, FactorialHMM)
        if self.replicas:
            known: list[tuple[Any, Any]] = [(self._met, twin._met), (self._places, twin._places)]
            for mine, theirs in known:
                for where, ended in mine.items():
                    if ended.q[0].dim() == 4:
                        theirs[where] = replace(ended, q=tuple(g[index] for g in ended.q))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Where ascents ended belongs to batches of this process.
        return {**self.__dict__, "_met": None, "_places": {}, "_place": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_met": weakref.WeakKeyDictionary()})

    @classmethod
    def examples(cls) -> list[tuple["FactorialHMM", Batch]]:
        """One for each form of the posterior, all but the first with missing entries."""
        found = []
        forms: tuple[Approximation, ...] = ("structured", "mean_field", "exact")
        for q in forms:
            generator = torch.Generator().manual_seed(0)
            model = cls.gaussian([2, 3], 2, q=q).double()
            for table in (*model.initials, *model.transitions):
                table.probs = torch.randn(table.shape, generator=generator, dtype=torch.float64).softmax(-1)
            model.contributions = [torch.randn(k, 2, generator=generator, dtype=torch.float64) for k in (2, 3)]
            model.covariance = [[0.5, 0.1], [0.1, 0.3]]
            x = model.sample(6, 5, generator=generator)
            if found:
                x[::2, ::2, 0] = x[1, :, 1] = torch.nan
            found.append((model, Batch(x, lengths=torch.tensor([5, 3, 1, 5, 2, 4]))))
        return found


def _check_chains(initials: list[Any], transitions: list[Any], emission: Any) -> None:
    """Refuse parts that do not make a model."""
    for name, tables in (("initials", initials), ("transitions", transitions)):
        for m, table in enumerate(tables):
            if not isinstance(table, Categorical):
                raise wrong_type(f"{name}[{m}]", "a Categorical", table, "pass a table of probabilities per chain")
    if not initials or len(initials) != len(transitions):
        raise invalid(
            "transitions", f"{max(1, len(initials))} tables, one per chain", len(transitions), "give each chain both"
        )
    for m, (first, step) in enumerate(zip(initials, transitions, strict=True)):
        k = first.shape[-1]
        if first.shape != (k,) or step.shape != (k, k):
            raise invalid(
                f"transitions[{m}]", f"a table of shape {[k, k]}, after initials[{m}] of shape {[k]}",
                [list(first.shape), list(step.shape)], "build them with the same K",
            )  # fmt: skip
    if not isinstance(emission, LinearGaussian):
        raise wrong_type("emission", "a LinearGaussian", emission, "or use FactorialHMM.gaussian")
    total = sum(first.shape[-1] for first in initials)
    if emission.n_components != 1 or emission.n_inputs != total or emission.shared:
        got = f"{emission.n_components} components of {emission.n_inputs} inputs, shared {emission.shared}"
        raise invalid(
            "emission", f"1 component of {total} inputs, one per state of each chain, none shared", got,
            f"pass LinearGaussian(1, {total}, D)",
        )  # fmt: skip


def _filled(batch: Batch) -> Batch:
    """Rows with the means of their columns in the place of missing entries: what a start looks at."""
    x = batch.x
    if not x.is_floating_point() or not any_missing(x):
        return batch
    return batch.with_x(torch.where(x.isnan(), x.nanmean(0).nan_to_num(nan=0.0), x))


def _pick(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """A state for each row of probabilities ``[n, K]``."""
    if not len(probs):
        return torch.empty(0, dtype=torch.long, device=probs.device)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _plain() -> bool:
    """Whether Python may look at values: nothing is transformed or compiled."""
    return values_known() and not torch.compiler.is_compiling()


def _design(sizes: Sequence[int], like: Tensor) -> Tensor:
    """Indicators ``[ΠK_m, ΣK_m]`` of the states of each chain in each state of their product, the last one fastest."""
    axes = torch.meshgrid(*(torch.arange(k, device=like.device) for k in sizes), indexing="ij")
    return torch.cat([nn.functional.one_hot(a.flatten(), k) for a, k in zip(axes, sizes, strict=True)], -1).to(like)


@dataclass(frozen=True)
class _Ascent:
    """Where an ascent ended.

    Attributes:
        form: Of q: its approximation, or ``"paths"``.
        q: Marginals.
        print: What tells the data from others, where these may come as a new batch.
    """

    form: str
    q: Marginals
    print: tuple[float, ...] | None = None


def _print(batch: Batch) -> tuple[float, ...]:
    """Numbers that differ for other data of the same shape, or in another order."""
    x = batch.x.to(torch.float64).nan_to_num(nan=0.5).flatten(1)
    place = torch.arange(len(x), device=x.device, dtype=torch.float64)
    rows = x @ torch.linspace(1, 2, x.shape[1], device=x.device, dtype=torch.float64)
    return len(x), x.shape[1], float(rows.sum()), float((place + 1).log() @ rows), float(batch.frames().sum())


@dataclass(frozen=True)
class _Posterior:
    """q of a piece.

    Attributes:
        value: Evidence lower bound of each sequence, ``[*r, N]``.
        marginals: q(z_t^m).
        first: Weighted expectations of first states, ``[*r, 1, K_m]``.
        steps: Weighted expectations of steps, ``[*r, 1, K_m, K_m]``.
        joint: Posterior ``[*r, N, T, ΠK_m]`` of the product, where it is known; a draw from it under draws.
        paths: States drawn from q, as 0 and 1, where the statistics are theirs.
    """

    value: Tensor
    marginals: Marginals
    first: tuple[Tensor, ...]
    steps: tuple[Tensor, ...]
    joint: Tensor | None = None
    paths: Marginals | None = None


#: From the number of a chain, the potentials of its frames, its present marginals, weights, and whether to count: new
#: marginals, E log p(z^m) + H(q^m) of each sequence, and weighted expectations of first states and steps.
_Counts = tuple[Tensor, Tensor]
_Update = Callable[[int, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor, _Counts | None]]


@dataclass(frozen=True)
class _Problem:
    """A piece of data in whitened coordinates, and the chains behind it.

    Attributes:
        initial: log p(z_1^m), ``[*r, 1, K_m]``.
        transition: log p(z_{t+1}^m | z_t^m), ``[*r, 1, K_m, K_m]``.
        means: Contributions V^m ``[*r, 1, K_m, D]``.
        y: Observations ``[*r, N, T, D]``, zero where there are none.
        seen: Where there are some, ``[N, T]``; None for everywhere.
        batch: The piece itself.
        constant: log-density of an observation at its mean, ``[*r, 1, 1]``.
        restricted: Whether steps of each chain are forbidden.
        known: Log-potentials ``[N, T, K_m]`` on the states of each chain, of labels.
        law: What frames show of which entries are missing; None if there are no such frames.
    """

    initial: list[Tensor]
    transition: list[Tensor]
    means: list[Tensor]
    y: Tensor
    seen: Tensor | None
    batch: Batch
    constant: Tensor
    restricted: list[bool]
    known: Sequence[Tensor] | None = None
    law: "observed.Observed | None" = None

    def tempered(self, beta: float) -> "_Problem":
        """All potentials times β: an evidence of normal law with β times the precision, whitened."""
        root = math.sqrt(beta)
        return replace(
            self,
            initial=[value * beta for value in self.initial],
            transition=[value * beta for value in self.transition],
            means=[value * root for value in self.means],
            y=self.y * root,
            constant=self.constant * beta,
            known=None if self.known is None else [value * beta for value in self.known],
        )

    def informed(self, m: int, potential: Tensor) -> Tensor:
        """Potentials of a chain's frames, and what labels say of its states."""
        return potential if self.known is None else potential + self.known[m]

    def frames(self) -> Tensor:
        """Frames of each sequence, ``[N]``."""
        return self.batch.frames().to(self.y)

    def start(self, update: _Update) -> Marginals:
        """Even marginals; where steps are forbidden, those of a path, which is possible for certain."""
        inside = self.batch.frames_mask()
        q = []
        for mean, first in zip(self.means, self.initial, strict=True):
            even = (self.y[..., :1] * 0 + first.unsqueeze(-2) * 0).nan_to_num(nan=0.0) + 1 / mean.shape[-2]
            q.append(even if inside is None else torch.where(inside.unsqueeze(-1), even, 0.0))
        if update == self.relax and any(self.restricted):
            found = self.sweep(self.viterbi, tuple(q))[0]
            q = [path if held else even for path, even, held in zip(found, q, self.restricted, strict=True)]
        return tuple(q)

    def sweep(
        self, update: _Update, q: Marginals, weight: Tensor | None = None, count: bool = False
    ) -> tuple[Marginals, Tensor, list[Any]]:
        """Update the chains one after the other, each given the others; the bound of each sequence ``[*r, N]``."""
        shares = [self._share(g, mean) for g, mean in zip(q, self.means, strict=True)]
        total = torch.stack(shares).sum(0)
        marginals, counts = list(q), []
        value: Tensor | float = 0.0
        for m, mean in enumerate(self.means):
            rest = total - shares[m]
            potential = (self.y - rest) @ mean.mT - self._half(mean)
            marginals[m], own, counted = update(m, self._where_seen(potential), marginals[m], weight, count)
            counts.append(counted)
            value = value + own
            shares[m] = self._share(marginals[m], mean)
            total = rest + shares[m]
        return tuple(marginals), value + self._fit(marginals, shares), counts

    def _share(self, g: Tensor, mean: Tensor) -> Tensor:
        """What a chain is expected to add to each frame ``[*r, N, T, D]``, of what was observed of it."""
        share = g @ mean
        return share if self.law is None else _framed(self.law.project, share)

    def _half(self, mean: Tensor) -> Tensor:
        """½ |V|² of each state, ``[*r, 1, 1, K]``; of what was observed, ``[*r, N, T, K]``."""
        if self.law is None:
            return 0.5 * mean.square().sum(-1).unsqueeze(-2)
        shape = self.y.shape[-3:-1]
        return self.law.half(mean.squeeze(-3), shape.numel()).unflatten(-2, shape)

    def _where_seen(self, value: Tensor) -> Tensor:
        return value if self.seen is None else torch.where(self.seen.unsqueeze(-1), value, 0.0)

    def _fit(self, marginals: Sequence[Tensor], shares: Sequence[Tensor]) -> Tensor:
        """E_q log p(x | z) of each sequence: the distance to the mean, and the variance of each chain's share."""
        gap = self.y - torch.stack(list(shares)).sum(0)
        each = self.constant - 0.5 * gap.square().sum(-1)
        for g, share, mean in zip(marginals, shares, self.means, strict=True):
            each = each - (g * self._half(mean)).sum(-1) + 0.5 * share.square().sum(-1)
        return self._where_seen(each.unsqueeze(-1)).squeeze(-1).sum(-1)

    # ---- updates of one chain ---------------------------------------------------------------------------------

    def smooth(
        self, m: int, potential: Tensor, old: Tensor, weight: Tensor | None, count: bool
    ) -> tuple[Tensor, Tensor, _Counts | None]:
        """The exact posterior of a chain under variational evidence: log Z − E[evidence] = E log p(z) + H(q).

        What labels say counts with log p(z).
        """
        parts = self.initial[m], self.transition[m], self.informed(m, potential), self.batch.lengths
        log_z, first, steps, g = chain.expectations(*parts)
        if count and weight is not None:
            mass = weight.to(g).expand(log_z.shape)
            first, steps = chain.expectations(*parts, mass)[1:3]
        return g, log_z - (g * potential).sum((-2, -1)), (first, steps)

    def viterbi(
        self, m: int, potential: Tensor, old: Tensor, weight: Tensor | None, count: bool
    ) -> tuple[Tensor, Tensor, _Counts | None]:
        """The best path of a chain."""
        given = self.informed(m, potential)
        score, path = chain.viterbi(self.initial[m], self.transition[m], given, self.batch.lengths)
        g = _along(path, potential)
        return g, score - (g * potential).sum((-2, -1)), _counted(g, weight) if count else None

    def relax(
        self, m: int, potential: Tensor, old: Tensor, weight: Tensor | None, count: bool
    ) -> tuple[Tensor, Tensor, _Counts | None]:
        """Each frame of a chain by itself: given its neighbours even frames are independent, and so are odd ones."""
        first, step = self.initial[m], self.transition[m]
        g, place = old, torch.arange(potential.shape[-2], device=potential.device).unsqueeze(-1)
        inside = self.batch.frames_mask()
        opening, strict = torch.where(place == 0, first.unsqueeze(-2), 0.0), self.restricted[m]
        given = self.informed(m, potential)
        lost = torch.zeros_like(given[..., 0, 0], dtype=torch.bool)
        for parity in (0, 1):
            # In the padding nothing is expected, so a last frame has no neighbour there.
            before = nn.functional.pad(g[..., :-1, :], (0, 0, 1, 0))
            after = nn.functional.pad(g[..., 1:, :], (0, 0, 0, 1))
            logits = given + opening + _log_mix(before, step, strict) + _log_mix(after, step.mT, strict)
            # Where neighbours and labels leave no state there is none, and the bound is that of the impossible.
            none = (logits == -torch.inf).all(-1, keepdim=True)
            none = none if inside is None else none & inside.unsqueeze(-1)
            lost = lost | none.squeeze(-1).any(-1)
            new = torch.where(none, 0.0, torch.where(none, 0.0, logits).softmax(-1))
            new = new if inside is None else torch.where(inside.unsqueeze(-1), new, 0.0)
            g = torch.where(place % 2 == parity, new, g)
        entropy = -torch.where(g > 0, g * g.clamp(min=torch.finfo(g.dtype).tiny).log(), 0.0).sum((-2, -1))
        start, pairs = g[..., 0, :], g[..., :-1, :].mT @ g[..., 1:, :]
        own = entropy + _expected(start, first).sum(-1) + _expected(pairs, step).sum((-2, -1))
        if self.known is not None:
            own = own + _expected(g, self.known[m]).sum((-2, -1))
        return g, torch.where(lost, -torch.inf, own), _counted(g, weight) if count else None

    # ---- draws ------------------------------------------------------------------------------------------------

    def drawn(self, update: "_Update", found: "_Posterior", weight: Tensor | None, uniforms: Uniforms) -> "_Posterior":
        """Statistics of states drawn from the marginals of a mean field, or of paths from the law of each chain.

        Source: C. K. Carter, R. Kohn (1994) for the paths.
        """
        paths: list[Tensor] = []

        def note(
            m: int, potential: Tensor, old: Tensor, weight: Tensor | None, count: bool
        ) -> tuple[Tensor, Tensor, _Counts | None]:
            g, own, _ = update(m, potential, old, None, False)
            each = uniforms(g.shape[:-1]).to(g.device)
            if update == self.relax:
                path = torch.where(g.sum(-1) > 0, reduce.draw(g, each.to(g)), -1)
            else:
                parts = self.initial[m], self.transition[m], self.informed(m, potential), self.batch.lengths
                path = chain.sample(*parts, uniforms=each)
            paths.append(_along(path, g))
            return g, own, _counted(paths[-1], weight)

        marginals, value, counts = self.sweep(note, found.marginals, weight, count=True)
        first, steps = (tuple(table) for table in zip(*counts, strict=True))
        return _Posterior(value, marginals, first, steps, paths=tuple(paths))

    # ---- the product of all chains ----------------------------------------------------------------------------

    def _expanded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Potentials of the product, whose states are those of all chains together, the last one fastest."""
        initial, step, mean = self.initial[0], self.transition[0], self.means[0]
        for first, move, share in zip(self.initial[1:], self.transition[1:], self.means[1:], strict=True):
            initial = (initial.unsqueeze(-1) + first.unsqueeze(-2)).flatten(-2)
            step = (step[..., :, None, :, None] + move[..., None, :, None, :]).flatten(-4, -3).flatten(-2)
            mean = (mean.unsqueeze(-2) + share.unsqueeze(-3)).flatten(-3, -2)
        potential = self._where_seen(self.y @ mean.mT - self._half(mean))
        if self.known is not None:
            joint = self.known[0]
            for each in self.known[1:]:
                joint = (joint.unsqueeze(-1) + each.unsqueeze(-2)).flatten(-2)
            potential = potential + joint
        return initial, step, potential

    def _offset(self) -> Tensor:
        """What the density of each sequence has besides the evidence, ``[*r, N]``."""
        each = self.constant - 0.5 * self.y.square().sum(-1)
        return self._where_seen(each.unsqueeze(-1)).squeeze(-1).sum(-1)

    def log_normalizer(self) -> Tensor:
        """log p(x) of each sequence."""
        return chain.log_normalizer(*self._expanded(), self.batch.lengths) + self._offset()

    def product(self, kind: EStep, weight: Tensor | None, uniforms: Uniforms | None) -> _Posterior:
        """The posterior, the most likely path, or one that is drawn, of all chains together."""
        initial, step, potential = self._expanded()
        lengths = self.batch.lengths
        if kind != "soft":
            if uniforms is None:
                score, path = chain.viterbi(initial, step, potential, lengths)
            else:
                score = chain.log_normalizer(initial, step, potential, lengths)
                each = uniforms(potential.shape[:-1]).to(potential.device)
                path = chain.sample(initial, step, potential, lengths, uniforms=each)
            g = _along(path, potential)
            first, steps = _counted(g, weight)
        else:
            score, first, steps, g = chain.expectations(initial, step, potential, lengths)
            if weight is not None:
                mass = weight.to(g).expand(score.shape)
                first, steps = chain.expectations(initial, step, potential, lengths, mass)[1:3]
        sizes = [mean.shape[-2] for mean in self.means]
        designs = _design(sizes, g).split(sizes, -1)
        marginals = tuple(g @ design for design in designs)
        firsts = tuple(first @ design.to(first) for design in designs)
        moves = tuple(design.to(steps).mT @ steps @ design.to(steps) for design in designs)
        return _Posterior(score + self._offset(), marginals, firsts, moves, g)


def _framed(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """A function of rows ``[*r, F, D]``, of frames ``[*r, N, T, D]``."""
    return function(value.flatten(-3, -2)).unflatten(-2, value.shape[-3:-1])


def _along(path: Tensor, like: Tensor) -> Tensor:
    """Paths ``[…, T]`` as 0 and 1, ``[…, T, K]``; zeros where a path is −1."""
    g = nn.functional.one_hot(path.clamp(min=0), like.shape[-1]).to(like)
    return torch.where((path >= 0).unsqueeze(-1), g, 0.0)


def _log_mix(g: Tensor, table: Tensor, strict: bool) -> Tensor:
    """Σ_j g_j table_jk ``[…, T, K]``; −inf where some j with mass forbids k, if any is forbidden (``strict``)."""
    if not strict:
        return g @ table
    forbidden = table == -torch.inf
    mixed = g @ torch.where(forbidden, 0.0, table)
    return torch.where((g > 0).to(g) @ forbidden.to(g) > 0, -torch.inf, mixed)


def _expected(mass: Tensor, log_probs: Tensor) -> Tensor:
    """mass · log p, zero where there is no mass."""
    # Infinities that nothing expects have no part in derivatives either.
    return torch.where(mass > 0, mass * torch.where(mass > 0, log_probs, 0.0), 0.0)


def _counted(g: Tensor, weight: Tensor | None) -> _Counts:
    """Expected first states ``[*r, 1, K]`` and steps ``[*r, 1, K, K]`` where frames are independent."""
    heavy = (g if weight is None else g * weight.to(g)[:, None, None]).to(torch.float64)
    first = heavy[..., 0, :].sum(-2, keepdim=True)
    steps = (heavy[..., :-1, :].mT @ g[..., 1:, :].to(torch.float64)).sum(-3, keepdim=True)
    return first, steps
