"""A fit: its options, what it refuses, its runs and an honest account of how they ended."""

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from torchem import distributed, gradient, initialize
from torchem.accelerate import Acceleration
from torchem.accumulate import Accumulator, FullBatch, Stochastic
from torchem.anneal import Annealing
from torchem.batch import Batch
from torchem.data import Source, Survey
from torchem.direct import Direct
from torchem.errors import CollinearWarning, invalid, one_of, warn, whole_number, wrong_type
from torchem.loop import Loop, due, n_states
from torchem.model import DiscreteModel, EStep, LatentModel
from torchem.ops.dispatch import declared_precision, fitting_threads, keep_freed_memory
from torchem.result import Progress, Result, Run, report, report_end
from torchem.validation import Validation, agree_on

Dead = Literal["floor", "respawn", "prune", "raise"]


class Trainer:
    """EM with options fixed: what `fit` builds. Its `fit` may be called for many models, one after the other.

    Args:
        accumulate: How batch statistics reach the M-step; `FullBatch` is classic EM.
        init: ``"auto"`` suits the family; ``"kmeans++"``, ``"kmeans"``, ``"random"`` (responsibilities),
            ``"random_from_data"`` (K observations, the data's covariance), ``"hierarchical"`` (Ward); None keeps the
            model's current parameters.
        restarts: Independent starts, run together along a replica axis; the best is returned.
        race: Let restarts compete: after every so many passes the worse half of those that still run is dropped, by the
            objective or the held-out score, until one is left. Its own path is as it would be without the others.
        max_iter: Most EM maps (passes over the data) per restart.
        budget: Stop once so many observations (weight; frames, for sequences) were seen: `Stochastic` at that batch,
            all else at the end of that pass. The pass that measures the end comes on top.
        tol: A restart has converged when the objective rises by less than this per observation (weight) and, by
            Aitken's estimate, less than that is left in all. 0 runs all of ``max_iter``.
        batch_size: Rows per batch; invisible to full-batch EM except in memory.
        seed: Seeds the fit's own generators; the global one is never touched. None draws a fresh seed.
        device: Where to compute; the model moves there. Data move too, or are streamed if they live on the host.
        e_step: ``"soft"`` takes the posterior of the latents (EM), ``"hard"`` the most likely configuration alone
            (classification EM, Viterbi training), whose own objective is the joint log-density, ``"sample"`` one drawn
            from the posterior (stochastic EM in the sense of Celeux and Diebolt; the last M-step takes the mean of the
            later half of the statistics; under `Stochastic` it is SAEM).
        anneal: Rising inverse temperatures, each held for some passes, or a function of the pass; see
            `torchem.anneal.Annealing`. ``history`` holds free energies until 1 is reached.
        accelerate: ``"squarem"`` or ``"anderson"`` jump ahead on the path of EM, and go back to the plain step where
            that lowers the objective; see `torchem.accelerate`. A pass that is refused so counts, but leaves no entry
            in ``history``.
        direct: True climbs the whole objective by an optimiser, L-BFGS, instead of EM, as a comparison; see
            `torchem.Direct` for others.
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
        race: int | None = None,
        max_iter: int = 100,
        budget: float | None = None,
        tol: float = 1e-3,
        batch_size: int | None = None,
        seed: int | np.integer | None = None,
        device: torch.device | str | None = None,
        e_step: EStep = "soft",
        anneal: Iterable[float] | Callable[[int], float] | None = None,
        accelerate: Acceleration | None = None,
        direct: bool | Direct = False,
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
            whole_number(name, value, least)
        if not isinstance(tol, (int, float)) or not 0 <= tol < math.inf:
            raise invalid("tol", "a finite number of at least 0", repr(tol), "the default is 1e-3 nats per observation")
        if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
            raise invalid("seed", "a whole number of at least 0, or None", repr(seed), "give for example seed=0")
        one_of("dead", dead, ("floor", "respawn", "prune", "raise"))
        one_of("e_step", e_step, ("soft", "hard", "sample"))
        schedule = Annealing(anneal := anneal if callable(anneal) or anneal is None else tuple(anneal), max_iter)
        if max_iter and (last := schedule.at(max_iter)) != 1:
            raise invalid(
                "anneal", f"a schedule that comes to 1 within max_iter={max_iter} passes (of a list each value "
                "takes one at least)", last, "raise max_iter, or shorten it",
            )  # fmt: skip
        if anneal is not None and e_step == "hard":
            raise invalid(
                "anneal", "None when e_step='hard'", anneal,
                "leave one out: the most likely configuration is the same at all temperatures",
            )  # fmt: skip
        if init is None and restarts > 1:
            raise invalid("restarts", "1 when init=None", restarts, "set init: equal starts end equal")
        if race is not None and (not isinstance(race, int) or isinstance(race, bool) or race < 1):
            raise invalid("race", "a whole number of passes of at least 1, or None", repr(race), "give for example 5")
        if race is not None and restarts == 1:
            raise invalid("race", "None for a single start", race, "give restarts to choose from")
        number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
        if budget is not None and not (number and 0 < budget < math.inf):
            raise invalid("budget", "a positive number of observations, or None", repr(budget), "correct it")
        self.init, self.restarts, self.max_iter, self.tol = init, restarts, max_iter, float(tol)
        self.race, self.budget = race, budget
        # Of a search: what is done to each replica of the current parameters before a fit goes on from them.
        self.kick: Callable[[LatentModel, Batch, Sequence[torch.Generator]], None] | None = None
        self.batch_size, self.seed, self.dead, self.progress = batch_size, seed, dead, progress
        if accelerate is not None:
            one_of("accelerate", accelerate, ("squarem", "anderson"))
            if e_step == "sample" or not isinstance(self.accumulate, FullBatch):
                raise invalid(
                    "accelerate", "None unless every step is that of full-batch EM", repr(accelerate),
                    "leave it out: it extrapolates the EM map, which stochastic and incremental steps are not",
                )  # fmt: skip
        if not isinstance(direct, (bool, Direct)):
            raise wrong_type("direct", "True, False or a torchem.Direct", direct, "pass for example torchem.Direct()")
        self.direct = (Direct() if direct else None) if isinstance(direct, bool) else direct
        if self.direct is not None:
            others = {
                "accumulate": not isinstance(self.accumulate, FullBatch), "e_step": e_step != "soft",
                "anneal": anneal is not None, "accelerate": accelerate is not None,
            }  # fmt: skip
            if any(others.values()):
                raise invalid(
                    "direct", "none of the ways to run EM beside it", [name for name, given in others.items() if given],
                    "leave one out: it climbs log p(x) itself, over all the data",
                )  # fmt: skip
        self.device, self.callbacks, self.anneal = _device(device), callbacks, anneal
        self.e_step: EStep = e_step
        self.accelerate: Acceleration | None = accelerate

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
        observed: Any = None,
        offset: Any = None,
        trials: Any = None,
        validation: Any = None,
    ) -> Result:
        """Fit a model in place.

        Args:
            model: Changed only when the fit ends well or is interrupted; an exception leaves it as it was.
            data: See `torchem.fit`.
            weights: Non-negative weight per observation or sequence.
            inputs: Covariates per observation or frame.
            lengths: Frames of each sequence.
            labels: What is known of the latent states.
            observed: False where an entry is missing.
            offset: Known terms of linear predictors.
            trials: Numbers of trials.
            validation: Held-out data to judge the fit by, see `torchem.fit`.
        """
        began = time.perf_counter()
        result = self.climb(model, data, weights, inputs, lengths, labels, observed, offset, trials, validation)
        self.tell(result)
        result.seconds = time.perf_counter() - began
        return result

    def tell(self, result: Result) -> None:
        """Warn where a fit did not end well."""
        limit = "max_iter" if self.budget is None or result.n_iter >= self.max_iter else "the budget"
        report_end(result, self.tol, self.init in (None, "random", "random_from_data"), limit)

    def climb(
        self,
        model: LatentModel,
        data: Any,
        weights: Any = None,
        inputs: Any = None,
        lengths: Any = None,
        labels: Any = None,
        observed: Any = None,
        offset: Any = None,
        trials: Any = None,
        validation: Any = None,
    ) -> Result:
        """As `fit`, without a word on how it ended."""
        with _reserved(self.accumulate):
            fields = (weights, inputs, lengths, labels, observed, offset, trials)
            return self._climb(model, data, fields, validation)

    def _climb(self, model: LatentModel, data: Any, fields: tuple[Any, ...], validation: Any) -> Result:
        if not isinstance(model, LatentModel):
            raise invalid("model", "a torchem model", type(model).__name__, "pass for example torchem.GaussianMixture")
        name = type(model).__name__
        if self.e_step not in model.e_steps:
            raise invalid(
                "e_step", f"one of {', '.join(model.e_steps)} for {name}", repr(self.e_step),
                "leave it out: the latents of this model have no such configurations",
            )  # fmt: skip
        if self.anneal is not None and not model.anneals:
            raise invalid(
                "anneal", f"None for {name}", repr(self.anneal),
                "leave it out: posteriors of this model have no temperature",
            )  # fmt: skip
        if self.direct is not None:
            self.direct.check(model)
        else:
            gradient.check(model)
        if self.accelerate is not None and not (model.accelerates and model.sufficient):
            raise invalid(
                "accelerate", f"None for {name}", repr(self.accelerate),
                "leave it out: its M-step is a walk of an optimiser, not a map to extrapolate",
            )  # fmt: skip
        if getattr(self.accumulate, "average", False) and not model.accelerates:
            raise invalid(
                "average", f"False for {name}", True,
                "leave it out: its M-step is a walk of an optimiser, which no statistics that could be averaged decide",
            )  # fmt: skip
        if self.dead in ("respawn", "prune") and not hasattr(model, self.dead):
            raise invalid(
                "dead", f"'floor' or 'raise' for {name}", repr(self.dead),
                "leave it out: this model has no components that could be put elsewhere or taken out",
            )  # fmt: skip
        if self.race is not None and not model.replicates:
            raise invalid("race", f"None for {name}", self.race, "leave it out: its restarts run one after the other")
        if self.device is not None:
            model.to(self.device)
        try:
            source = Source(model, data, self.batch_size, *fields)
            held_out = None if validation is None else Validation(model, validation)
        except Exception as error:
            distributed.agree(error)
            raise
        distributed.agree()
        agree_on(validation)
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
            _refuse_absent(survey, model.absentable)
            _name_redundant(model, survey.sample.u)
            runs: list[Run] = []
            with fitting_threads(survey.rows * model.row_size() * len(groups[0]), model.device):
                for group in groups:
                    runs += Loop(self, model, source, survey, group, len(runs), held_out).run()
                    if runs[-1].status == "interrupted":
                        break
                return report(model, runs, survey, k)


#: Rules that a fit is using.
_SERVING: set[int] = set()


@contextlib.contextmanager
def _reserved(rule: Accumulator) -> Iterator[None]:
    """Keep a rule to one fit at a time: it holds the statistics of one."""
    if id(rule) in _SERVING:
        raise invalid(
            "accumulate", "a rule of this fit alone", f"a {type(rule).__name__} that another fit is using",
            "make one for each fit",
        )  # fmt: skip
    _SERVING.add(id(rule))
    try:
        yield
    finally:
        _SERVING.discard(id(rule))


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


def _refuse_absent(survey: Survey, absentable: int) -> None:
    """Refuse data with a column of which nothing was seen, but for the first that may be absent.

    Raises:
        InvalidArgument: Then.
    """
    absent = (survey.moments.weight == 0).reshape(-1)[absentable:]
    if bool(absent.any()):
        column = absentable + int(absent.nonzero()[0])
        raise invalid("data", "an observed entry in each column", f"none in column {column}", "drop that column")


#: Share of a covariate's length that must stand out of those before it: less is rounding.
_APART = 1e-9


def _name_redundant(model: LatentModel, u: torch.Tensor | None) -> None:
    """Warn of covariates that are linear combinations of those before them, judged by a sample ``[n, M]``."""
    if u is None or model.whole:
        return
    for slot, factor in model.slots():
        factor = factor.unwrapped
        own = u if (columns := getattr(factor, "columns", None)) is None else u[..., columns]
        if "u" not in factor.reads or not len(own) >= own.shape[-1] == getattr(factor, "n_inputs", None):
            continue
        own = own.detach().to("cpu", torch.float64)
        length = own.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
        apart = torch.linalg.qr(own / length)[1].diagonal().abs() > _APART
        if not bool(apart.all()):
            dropped = [j if columns is None else columns[j] for j in (~apart).nonzero()[:, 0].tolist()]
            warn(
                f"inputs: columns {dropped} are linear combinations of those before them, so that their coefficients "
                f"in {slot} ({type(factor).__name__}) are not determined; drop them.",
                CollinearWarning,
            )


def _generator(entropy: Any, key: int) -> torch.Generator:
    seed = np.random.SeedSequence(entropy, spawn_key=(key,)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def fit(
    model: LatentModel,
    data: Any,
    *,
    accumulate: Accumulator | None = None,
    init: str | None = "auto",
    restarts: int = 1,
    race: int | None = None,
    max_iter: int = 100,
    budget: float | None = None,
    tol: float = 1e-3,
    batch_size: int | None = None,
    seed: int | np.integer | None = None,
    device: torch.device | str | None = None,
    weights: Any = None,
    inputs: Any = None,
    lengths: Any = None,
    labels: Any = None,
    observed: Any = None,
    offset: Any = None,
    trials: Any = None,
    validation: Any = None,
    e_step: EStep = "soft",
    anneal: Iterable[float] | Callable[[int], float] | None = None,
    accelerate: Acceleration | None = None,
    direct: bool | Direct = False,
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
        race: Drop the worse half of the restarts after every so many passes.
        max_iter: Most passes over the data.
        budget: Stop once so many observations were seen.
        tol: Rise per observation below which to stop: that of an iteration, and that of all which are left.
        batch_size: Rows per batch.
        seed: Makes the fit repeatable, bit for bit on CPU.
        device: Where to compute.
        weights: Non-negative weight per observation or sequence, ``[N]``.
        inputs: Covariates per observation, ``[N, M]``, or per frame.
        lengths: Frames of each sequence, ``[N]``.
        labels: What is known of the latent states, per observation or frame: whole numbers with −1 for unknown, Boolean
            ``[N, K]`` for sets of states, or non-negative ``[N, K]`` for soft evidence.
        observed: In the shape of the data, False where an entry is missing: the same as NaN there.
        offset: Known term of the linear predictor of each observation or frame, for generalised linear models.
        trials: Number of trials of each, for binomial counts.
        validation: Held-out data, in any form that ``data`` takes; with weights, inputs, labels and so on a dictionary
            by these names, as ``{"data": x, "weights": w}``. The fit then ends when their mean log-likelihood has not
            risen by ``tol`` for five passes, and returns the parameters, and the restart, that explain them best.
        e_step: ``"soft"``, ``"hard"`` or ``"sample"``.
        anneal: Inverse temperatures of deterministic annealing, or a function of the pass.
        accelerate: ``"squarem"``, ``"anderson"`` or None.
        direct: True, or a `torchem.Direct`, for ascent of the whole objective by an optimiser instead of EM.
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
        accumulate=accumulate, init=init, restarts=restarts, race=race, max_iter=max_iter, budget=budget, tol=tol,
        batch_size=batch_size, seed=seed, device=device, e_step=e_step, anneal=anneal, accelerate=accelerate,
        direct=direct, dead=dead,
        callbacks=callbacks, progress=progress,
    )  # fmt: skip
    return trainer.fit(
        model, data, weights=weights, inputs=inputs, lengths=lengths, labels=labels, observed=observed, offset=offset,
        trials=trials,
        validation=validation,
    )  # fmt: skip


def partial_fit(
    model: LatentModel,
    data: Any,
    rule: Stochastic,
    *,
    weights: Any = None,
    inputs: Any = None,
    lengths: Any = None,
    labels: Any = None,
    observed: Any = None,
    offset: Any = None,
    trials: Any = None,
) -> float:
    """One step of online EM on the next batch of a stream, in place.

    The model starts from the parameters that it has: fit it to a first sample. What was learnt so far is in ``rule``,
    one for each stream; its statistics are weighed by what was seen.

    Args:
        model: Any torchem model.
        data: A batch, in any form that `torchem.fit` takes.
        rule: Keeps the running statistics; see `torchem.Stochastic`.
        weights: Of the observations or sequences, as are all that follow.
        inputs: Covariates.
        lengths: Frames of each sequence.
        labels: What is known of the latent states.
        observed: False where an entry is missing.
        offset: Known terms of linear predictors.
        trials: Numbers of trials.

    Returns:
        The mean log-likelihood of the batch, per observation or frame, before it was learnt: an honest score.

    Example:
        >>> import torchem
        >>> model, rule = torchem.GaussianMixture(2, 1), torchem.Stochastic()
        >>> model.means = [[-1.0], [1.0]]
        >>> for _ in range(5):
        ...     score = torchem.partial_fit(model, torch.randn(100, 1), rule)
        >>> rule.seen
        500.0
    """
    if not isinstance(rule, Stochastic):
        raise wrong_type("rule", "a torchem.Stochastic", rule, "make one for the stream and pass it every time")
    gradient.check(model)
    if rule.weight is not None:
        raise invalid("rule", "one that began with this stream", "one that a fit has used", "make a new one for it")
    source = Source(model, data, None, weights, inputs, lengths, labels, observed, offset, trials)
    score = total = 0.0
    read = False
    with torch.no_grad(), declared_precision(model.device):
        if rule.pushed == 0:
            survey = source.survey(1, torch.Generator())
            model.prepare(survey.moments)
            model.project()
            model.tune(survey.rows)
        for key, batch in source:
            read = True
            stats = model.e_step(batch)
            found = float(stats["log_likelihood"])
            if not math.isfinite(found):
                raise invalid(
                    "data", "observations of positive probability", f"a log-likelihood of {found}",
                    "remove the outlier, or lower the floor",
                )  # fmt: skip
            score, total = score + found, total + float(stats["count"])
            ready = rule.push(key, stats)
            if ready is not None:
                if model.sufficient or not isinstance(model, DiscreteModel):
                    model.learn(ready, batch)
                else:
                    replay = gradient.Replay(functools.partial(copy.deepcopy(model).expectations, batch))
                    model.assign(model.maximize(ready))
                    gradient.climb(model, replay, lambda sums: sums, rule.seen)
                adjustment = model.tune(int(rule.seen)) if due(rule.pushed) else None
                if adjustment is not None and adjustment.move is not None:
                    rule.translate(adjustment.move)
    if not read:
        raise invalid("data", "at least one batch", "an empty loader", "check the sampler")
    return score / total if total > 0 else math.nan
