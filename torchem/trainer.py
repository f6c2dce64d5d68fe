"""The loop: passes over data, M-steps, replicas that stop on their own, and an honest account of how it ended."""

import contextlib
import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchem import distributed, initialize, stopping
from torchem.accumulate import Accumulator, FullBatch
from torchem.batch import Batch
from torchem.data import Source, Survey
from torchem.errors import DegenerateComponent, SymmetryWarning, invalid, one_of, warn, wrong_type
from torchem.model import EStep, LatentModel
from torchem.ops.dispatch import declared_precision, fitting_threads, keep_freed_memory
from torchem.result import DEAD, Progress, Result, Run, report, report_end
from torchem.stats import Stats
from torchem.stopping import Status

Dead = Literal["floor", "respawn", "prune", "raise"]

#: Relative fall of the objective that rounding explains.
_SLACK = {torch.float64: 1e-9, torch.float32: 1e-4}
#: Times that a run may reseed components, per component.
_RESPAWNS = 3


class Trainer:
    """EM with options fixed: what `fit` builds. Its `fit` may be called for many models, one after the other.

    Args:
        accumulate: How batch statistics reach the M-step; `FullBatch` is classic EM.
        init: ``"auto"`` suits the family; ``"kmeans++"``, ``"kmeans"``, ``"random"`` (responsibilities),
            ``"random_from_data"`` (K observations, the data's covariance), ``"hierarchical"`` (Ward); None keeps the
            model's current parameters.
        restarts: Independent starts, run together along a replica axis; the best is returned.
        max_iter: Most EM maps (passes over the data) per restart.
        tol: A restart has converged when the objective rises by less than this per observation (weight). 0 runs all
            of ``max_iter``.
        batch_size: Rows per batch; invisible to full-batch EM except in memory.
        seed: Seeds the fit's own generators; the global one is never touched. None draws a fresh seed.
        device: Where to compute; the model moves there. Data move too, or are streamed if they live on the host.
        e_step: ``"soft"`` takes the posterior of the latents (EM), ``"hard"`` the most likely configuration alone
            (classification EM, Viterbi training), whose own objective is the joint log-density.
        dead: What to do with components that lose their mass or collapse to the floor: keep them at the floor,
            ``"respawn"`` them at badly explained observations, ``"prune"`` them or ``"raise"``.
        callbacks: Functions of a `Progress`, called after each pass; a true return value interrupts.
        progress: Show a progress bar when standard error is a terminal.

    Raises:
        InvalidArgument: For a value outside an option's range.

    Example:
        >>> import torchem
        >>> x = torch.tensor([[-1.1], [-0.9], [0.9], [1.1]])
        >>> trainer = Trainer(seed=0, progress=False)
        >>> trainer.fit(torchem.GaussianMixture(2, 1), x).converged
        True
    """

    def __init__(
        self,
        *,
        accumulate: Accumulator | None = None,
        init: str | None = "auto",
        restarts: int = 1,
        max_iter: int = 100,
        tol: float = 1e-3,
        batch_size: int | None = None,
        seed: int | np.integer | None = None,
        device: torch.device | str | None = None,
        e_step: EStep = "soft",
        dead: Dead = "floor",
        callbacks: Iterable[Callable[[Progress], Any]] = (),
        progress: bool = True,
    ):
        if accumulate is not None and not isinstance(accumulate, Accumulator):
            raise wrong_type(
                "accumulate",
                "an Accumulator (reset, push, flush, translate)",
                accumulate,
                "pass for example torchem.FullBatch()",
            )
        if not isinstance(callbacks, Iterable) or not all(map(callable, callbacks := tuple(callbacks))):
            raise wrong_type("callbacks", "an iterable of functions", callbacks, "pass for example [print]")
        self.accumulate = FullBatch() if accumulate is None else accumulate
        if init is not None:
            one_of("init", init, ("auto", *initialize.METHODS))
        for name, value, least in (("restarts", restarts, 1), ("max_iter", max_iter, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise invalid(name, f"a whole number of at least {least}", repr(value), "correct it")
        if not isinstance(tol, (int, float)) or not 0 <= tol < math.inf:
            raise invalid("tol", "a finite number of at least 0", repr(tol), "the default is 1e-3 nats per observation")
        if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
            raise invalid("seed", "a whole number of at least 0, or None", repr(seed), "give for example seed=0")
        one_of("dead", dead, ("floor", "respawn", "prune", "raise"))
        one_of("e_step", e_step, ("soft", "hard"))
        if init is None and restarts > 1:
            raise invalid("restarts", "1 when init=None", restarts, "set init: equal starts end equal")
        self.init, self.restarts, self.max_iter, self.tol = init, restarts, max_iter, float(tol)
        self.batch_size, self.seed, self.dead, self.progress = batch_size, seed, dead, progress
        self.device, self.callbacks, self.e_step = _device(device), callbacks, e_step

    # ---- the outside ------------------------------------------------------------------------------------------

    def fit(
        self,
        model: LatentModel,
        data: Any,
        *,
        weights: Any = None,
        inputs: Any = None,
        lengths: Any = None,
        labels: Any = None,
    ) -> Result:
        """Fit a model in place.

        Args:
            model: Changed only when the fit ends well or is interrupted; an exception leaves it as it was.
            data: See `torchem.fit`.
            weights: Non-negative weight per observation or sequence.
            inputs: Covariates per observation or frame.
            lengths: Frames of each sequence.
            labels: What is known of the latent states.
        """
        began = time.perf_counter()
        if not isinstance(model, LatentModel):
            raise invalid("model", "a torchem model", type(model).__name__, "pass for example torchem.GaussianMixture")
        if self.device is not None:
            model.to(self.device)
        try:
            source = Source(model, data, self.batch_size, weights, inputs, lengths, labels)
        except Exception as error:
            distributed.agree(error)
            raise
        distributed.agree()
        entropy = np.random.SeedSequence(self.seed).entropy
        if self.seed is None:
            entropy = distributed.gather(entropy)[0]
        generators = [_generator(entropy, r) for r in range(self.restarts)]
        # Families that cannot carry a replica axis (a user's network) run their restarts one after the other.
        groups = [generators] if model.replicates else [[generator] for generator in generators]
        k = n_states(model)
        keep_freed_memory()
        with torch.no_grad(), declared_precision(model.device):
            survey = source.survey(initialize.sample_size(k, len(groups[0])), _generator(entropy, 1 << 20))
            runs: list[Run] = []
            with fitting_threads(survey.rows * model.row_size() * len(groups[0]), model.device):
                for group in groups:
                    runs += _Loop(self, model, source, survey, group, len(runs)).run()
                    if runs[-1].status == "interrupted":
                        break
                result = report(model, runs, survey, k)
        report_end(result, self.tol, blind=self.init in (None, "random", "random_from_data"))
        result.seconds = time.perf_counter() - began
        return result


def _device(device: torch.device | str | None) -> torch.device | None:
    """The device meant, if it is there.

    Raises:
        InvalidArgument: If there is no such device.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise invalid("device", "a device such as 'cpu' or 'cuda'", repr(device), "correct its name") from error
    present = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= present:
        raise invalid(
            "device", f"one of {present} CUDA devices", repr(str(found)), "leave it out to stay where the model is"
        )
    return found


def n_states(model: LatentModel) -> int:
    """Number of states that a start tells apart."""
    return getattr(model, "n_components", 1)


class _Loop:
    """Some restarts of one fit, run together along a replica axis (or one, without)."""

    def __init__(
        self,
        options: Trainer,
        model: LatentModel,
        source: Source,
        survey: Survey,
        generators: list[torch.Generator],
        first: int,
    ):
        self.options, self.source, self.survey, self.generators = options, source, survey, generators
        self.first = first
        self.n_states = n_states(model)
        self.rule = options.accumulate
        self.rule.reset()
        self.runs = [Run() for _ in generators]
        self.going = list(range(len(generators)))
        # Parameters before the last M-step, and whether those after it have been judged.
        self.before: dict[str, Tensor] | None = None
        self.judged = False
        # Whether the other ranks know of what stopped this one.
        self.agreed = False
        # Whether to stop at the next pass, together with the other ranks.
        self.stopping = False
        # Whether the last pass is to be made again at the same parameters.
        self.retake = False
        # The loop works on a twin, so that an exception leaves the user's model as it was.
        self.twin = model.replicate(len(generators)) if len(generators) > 1 else copy.deepcopy(model)

    def run(self) -> list[Run]:
        """The records of the restarts, all of them ended."""
        self._start()
        try:
            with _bar(self.options) as bar:
                iteration = 0
                while self._iterate(iteration, bar):
                    iteration += not self.retake
        except KeyboardInterrupt as interrupt:
            if not self.agreed:
                with contextlib.suppress(KeyboardInterrupt):
                    distributed.agree(interrupt)
            self._retire(self.going, "interrupted")
        return self.runs

    # ---- stages -----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        twin, survey = self.twin, self.survey
        twin.prepare(survey.moments)
        twin.begin(self.generators, self.first)
        if self.options.init is not None:
            dtype = twin.dtype
            # Starts are made in float64: moments about one origin would cancel in float32.
            initialize.start(
                twin.double(), survey.sample, self.n_states, self.options.init, self.generators, self.first
            )
            twin.to(dtype)
        else:
            distributed.broadcast(twin)
            for a, b in twin.twins(survey.sample[:256]):
                warn(
                    f"init: components {a} and {b} start identical and would stay so; "
                    "change the parameters of one, or let init choose the start.",
                    SymmetryWarning,
                )
        twin.project()
        twin.tune(survey.rows, 0)

    def _iterate(self, iteration: int, bar: Any) -> bool:
        """One E-step over the data, the verdict on it, and the M-step; False when nothing is left to do."""
        stats, fresh = self._pass(iteration < self.options.max_iter)
        # Statistics that were all taken at the current θ make the bound tight: it is the log-likelihood, and the prior.
        objective = stats["log_likelihood"] + self.twin.log_prior() if fresh else self.twin.bound(stats)
        values = objective.reshape(-1).tolist()
        self._refuse_impossible(values)
        total = float(stats["count"].reshape(-1)[0])
        ended = self._judge(values, total, iteration == self.options.max_iter)
        if bar is not None:
            bar.update(1)
            bar.set_postfix(bound=f"{max(values):.6g}", refresh=False)
        now = Progress(iteration, values, self.twin, list(self.going))
        # A pass made again at the same parameters is told of once.
        answers = [] if self.retake else [callback(now) for callback in self.options.callbacks]
        # Ranks stop together: what one of them wants, the next pass tells the others.
        self.stopping = self.stopping or (any(answers) and distributed.active())
        if any(answers) and not distributed.active():
            for place in range(len(self.going)):
                ended.setdefault(place, "interrupted")
        stats = self._end(ended, stats)
        if not self.going:
            return False
        self.before, self.judged = self.twin.snapshot(), False
        self.twin.improve(stats, lambda: (batch for _, batch in self.source))
        self._tune(iteration)
        if not self.retake:
            self._heal(stats, total)
        return True

    def _tune(self, iteration: int) -> None:
        """Let numerics follow the parameters; where statistics were too coarse for what they gave, take them again."""
        adjustment = self.twin.tune(self.survey.rows, iteration)
        self.retake = adjustment is not None and adjustment.retake and not self.retake
        if self.retake and self.before is not None:
            self.twin.assign(self.before)
            self.judged = True
            self.rule.reset()
        elif adjustment is not None and adjustment.move is not None:
            self.rule.translate(adjustment.move)

    def _judge(self, values: list[float], total: float, last: bool) -> dict[int, Status]:
        """Record the objectives; returns the replicas that ended, by their place on the axis, and why."""
        ended: dict[int, Status] = {}
        for place, (r, value) in enumerate(zip(self.going, values, strict=True)):
            run = self.runs[r]
            if self.retake:
                run.history.pop()
            run.history.append(value)
            # When components were reseeded or taken out the objective may fall: that step is not judged.
            recent = run.history[-1:] if run.rested else run.history[-3:]
            run.rested = False
            status = stopping.verdict(recent, self.options.tol * total, _SLACK.get(self.twin.dtype, 1e-3))
            if status is not None or last:
                ended[place] = status or "max_iter"
        self.judged = True
        return ended

    def _pass(self, update: bool) -> tuple[Stats, bool]:
        """E-steps over all batches, and whether θ stood still meanwhile (some rules maximise on the way)."""
        twin, fresh = self.twin, True
        last: Stats | None = None
        try:
            if self.stopping:
                raise KeyboardInterrupt
            for key, batch in self.source:
                ready = self.rule.push(key, self._e_step(batch))
                if ready is not None:
                    last, fresh = self._reduce(ready), False
                    if update:
                        twin.m_step(last)
            ready = self.rule.flush()
            if ready is None and last is None:
                raise invalid("data", "at least one batch", "an empty pass", "check the loader's sampler")
            if ready is not None:
                last = self._reduce(ready)
        except (Exception, KeyboardInterrupt) as error:
            if not self.agreed:
                self.agreed = True
                distributed.agree(error)
            raise
        assert last is not None
        return last, fresh

    def _e_step(self, batch: Batch) -> Stats:
        # A model of one's own need not know of kinds.
        return self.twin.e_step(batch) if self.options.e_step == "soft" else self.twin.e_step(batch, "hard")

    def _reduce(self, stats: Stats) -> Stats:
        """The sum over ranks, after all have said that they come to it."""
        self.agreed = True
        distributed.agree()
        self.agreed = False
        return distributed.all_reduce(stats)

    def _end(self, ended: dict[int, Status], stats: Stats) -> Stats:
        """Retire replicas and drop them from the batch; returns the statistics of the others."""
        if not ended:
            return stats
        for place, status in ended.items():
            self._retire([self.going[place]], status, stats)
        keep = [place for place in range(len(self.going)) if place not in ended]
        self.going = [self.going[place] for place in keep]
        if keep:
            index = torch.tensor(keep, device=self.twin.device)
            self.twin = self.twin.take_replicas(index)
            stats = pytree.tree_map(lambda leaf: leaf[index], stats)
        return stats

    def _retire(self, ids: Sequence[int], status: Status, stats: Stats | None = None) -> None:
        """Record how restarts ended, at the last parameters whose objective is known and sound."""
        mass = None if stats is None else self.twin.occupancy(stats)
        for r in list(ids):
            run = self.runs[r]
            run.status = status
            if mass is not None:
                share = mass * self.survey.rows / stats["count"].unsqueeze(-1)  # pyright: ignore[reportOptionalSubscript]
                run.mass = (share[self.going.index(r)] if self.twin.replicas else share).clone()
            twin = copy.deepcopy(self.twin)
            if self.before is not None and (status in ("diverged", "nonfinite") or not self.judged):
                twin.assign(self.before)
            run.model = twin.take_replicas(self.going.index(r)) if twin.replicas else twin
            sound = run.history[:-1] if status in ("diverged", "nonfinite") else run.history
            run.bound = sound[-1] if sound else -math.inf
            run.n_iter = max(0, len(sound) - 1)

    # ---- components that die ----------------------------------------------------------------------------------

    def _sick(self, stats: Stats, total: float) -> tuple[Tensor | None, Tensor | None]:
        """``[*r, K]`` Booleans: components without mass, and components at the floor."""
        mass = self.twin.occupancy(stats)
        dead = None if mass is None else mass < DEAD * total / max(1, self.survey.rows)
        return dead, self.twin.degenerate()

    def _heal(self, stats: Stats, total: float) -> None:
        """Apply the policy for dead and collapsed components after an M-step."""
        if self.options.dead == "floor":
            return
        dead, floored = self._sick(stats, total)
        if dead is None:
            return
        sick = dead if floored is None else dead | floored
        if not bool(sick.any()):
            return
        rows = sick.reshape(-1, sick.shape[-1])
        if self.options.dead == "raise":
            place, component = rows.nonzero()[0].tolist()
            which = "has lost its mass" if bool(dead.reshape(rows.shape)[place, component]) else "has collapsed"
            raise DegenerateComponent(
                f"component {component} of restart {self.going[place]} {which}; lower n_components, raise the floor, "
                "or choose dead='floor', 'respawn' or 'prune'."
            )
        if self.options.dead == "prune":
            for place, component in rows.nonzero().tolist():
                run = self.runs[self.going[place]]
                if component not in run.forbidden and len(run.forbidden) < rows.shape[-1] - 1:
                    run.forbidden.add(component)
                    run.rested = True
            self.twin.forbid(sick)  # pyright: ignore[reportCallIssue]
        else:
            self._respawn(rows, sick.shape)

    def _respawn(self, rows: Tensor, shape: torch.Size) -> None:
        limit = _RESPAWNS * rows.shape[-1]
        able = torch.tensor([self.runs[r].respawns < limit for r in self.going], device=rows.device)
        rows = rows & able.unsqueeze(-1)
        if not bool(rows.any()):
            return
        for r, count in zip(self.going, rows.sum(-1).tolist(), strict=True):
            self.runs[r].respawns += count
            self.runs[r].rested = self.runs[r].rested or count > 0
        sample = self.survey.sample
        surprise = self.twin.surprise(sample).reshape(len(self.going), -1)
        pool = surprise.topk(max(rows.shape[-1], len(sample) // 20), -1).indices
        picks = torch.stack(
            [torch.randperm(pool.shape[-1], generator=self.generators[r])[: rows.shape[-1]] for r in self.going]
        ).to(pool.device)
        index = pool.gather(-1, picks).reshape(shape)
        self.twin.respawn(self.twin.cast(sample), rows.reshape(shape), index)  # pyright: ignore[reportCallIssue]

    # ---- the end ----------------------------------------------------------------------------------------------

    def _refuse_impossible(self, values: list[float]) -> None:
        """−inf is the truth about data, not about a fit: name the first observation of probability zero."""
        if -math.inf not in values:
            return
        place = values.index(-math.inf)
        one = self.twin.take_replicas(place) if self.twin.replicas else self.twin
        # Every rank must come to the same end, or the others would wait for ever.
        found = distributed.gather(self._impossible_row(one))
        for rank, row in enumerate(found):
            if row is not None:
                unit = "sequence" if self.twin.sequential else "row"
                where = f"{unit} {row}" + (f" of rank {rank}" if len(found) > 1 else "")
                raise invalid(
                    "data", "observations of positive probability", f"probability zero at {where}",
                    "remove the outlier or the structural zero that forbids it",
                )  # fmt: skip

    def _impossible_row(self, model: LatentModel) -> int | None:
        start = 0
        for _, batch in self.source:
            bad = model.log_prob(batch) == -math.inf
            if batch.weight is not None:
                bad = bad & (batch.weight > 0).to(bad.device)
            if bool(bad.any()):
                return self.source.original(start + int(bad.nonzero()[0, 0]))
            start += len(batch)
        return None


def _generator(entropy: Any, key: int) -> torch.Generator:
    seed = np.random.SeedSequence(entropy, spawn_key=(key,)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


class _bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, options: Trainer):
        self.bar = None
        if options.progress and distributed.rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=options.max_iter, desc="EM", unit="pass", leave=False)

    def __enter__(self) -> Any:
        return self.bar

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


def fit(
    model: LatentModel,
    data: Any,
    *,
    accumulate: Accumulator | None = None,
    init: str | None = "auto",
    restarts: int = 1,
    max_iter: int = 100,
    tol: float = 1e-3,
    batch_size: int | None = None,
    seed: int | np.integer | None = None,
    device: torch.device | str | None = None,
    weights: Any = None,
    inputs: Any = None,
    lengths: Any = None,
    labels: Any = None,
    e_step: EStep = "soft",
    dead: Dead = "floor",
    callbacks: Iterable[Callable[[Progress], Any]] = (),
    progress: bool = True,
) -> Result:
    """Fit a model to data by EM, in place.

    Args:
        model: Any torchem model; its dtype is the one computed in.
        data: A tensor ``[N, D]``, an array, nested lists, a `Batch`, a ``Dataset`` or ``DataLoader``, or a path. Models
            of sequences take one sequence ``[T, D]``, several ``[N, T, D]``, a list of them, or all one after the other
            with ``lengths``; see `torchem.sequences.as_sequences`.
        accumulate: See `Trainer`, as for all that follow.
        init: How to start.
        restarts: How many starts to run together.
        max_iter: Most passes over the data.
        tol: Rise per observation below which to stop.
        batch_size: Rows per batch.
        seed: Makes the fit repeatable, bit for bit on CPU.
        device: Where to compute.
        weights: Non-negative weight per observation or sequence, ``[N]``.
        inputs: Covariates per observation, ``[N, M]``, or per frame.
        lengths: Frames of each sequence, ``[N]``.
        labels: What is known of the latent states, per observation or frame: whole numbers with −1 for unknown, Boolean
            ``[N, K]`` for sets of states, or non-negative ``[N, K]`` for soft evidence.
        e_step: ``"soft"`` or ``"hard"``.
        dead: Policy for components that die or collapse.
        callbacks: Called after each pass.
        progress: Show a progress bar on a terminal.

    Returns:
        A `Result`; ``result.model is model``.

    Raises:
        InvalidArgument: For data, weights or options that cannot be used; the model is then unchanged.
        DegenerateComponent: If ``dead="raise"`` and a component dies or collapses.

    Example:
        >>> import torchem
        >>> x = torch.tensor([[-1.1], [-0.9], [0.9], [1.1]])
        >>> result = torchem.fit(torchem.GaussianMixture(2, 1), x, seed=0)
        >>> result.status
        'converged'
    """
    trainer = Trainer(
        accumulate=accumulate, init=init, restarts=restarts, max_iter=max_iter, tol=tol, batch_size=batch_size,
        seed=seed, device=device, e_step=e_step, dead=dead, callbacks=callbacks, progress=progress,
    )  # fmt: skip
    return trainer.fit(model, data, weights=weights, inputs=inputs, lengths=lengths, labels=labels)
