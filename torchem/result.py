"""What a fit returns, and how the records of its restarts become that."""

import math
from dataclasses import dataclass, field, replace

import torch

from torchem import restarts, stopping
from torchem.data import Survey
from torchem.errors import ConvergenceWarning, SymmetryWarning, warn
from torchem.model import DiscreteModel, LatentModel
from torchem.stopping import Status

#: A component is dead below this many average observations of mass.
DEAD = 1e-3
#: Components whose log-densities differ by less than this, in nats, wherever they matter are one and the same …
_ALIKE = 0.25
#: … on this many observations.
_GLANCE = 256


@dataclass
class Result:
    """What a fit returns.

    Attributes:
        model: The model that was fitted, in place: the best restart.
        status: Why the best restart ended: ``"converged"`` (the objective, or the held-out score where there is one,
            came to rest), ``"max_iter"`` (or the budget), ``"diverged"`` (the objective fell beyond rounding, or
            held-out scores of noisy passes rest below the first one), ``"nonfinite"`` or ``"interrupted"``.
        history: Total objective at each iterate θ_0, θ_1, … of the best restart.
        seen: Observations (weight; frames, for sequences) that the best restart had seen before each entry of
            ``history`` was measured: passes made again and jumps that were refused count, held-out data do not.
        bound: Total objective at the returned parameters.
        n_iter: Number of EM maps that led to the returned parameters.
        restarts: Objective of each restart at its end.
        histories: History of each restart.
        statuses: Status of each restart; ``"dropped"`` where it lost a race: its objective is that of its last pass.
        validation: Held-out mean log-likelihood per observation at each iterate of the best restart, if there are
            held-out data; ``validation[n_iter]``, of the returned parameters, is the greatest since annealing ended
            or a component was pruned.
        scores: The best held-out score of each restart: of those that were not dropped the best is returned.
        dead: Components with next to no mass, by index.
        floored: Components whose covariance stands at the floor, by index; of state spaces the covariances, by name.
        redundant: Pairs of components with mass that ended as nearly the same distribution: too many, or a saddle.
        pruned: Components that were taken out, by their index at the start.
        remaining: Aitken's estimate of the rise still to come, in nats; None where the tail is not linear.
        alignment: For each restart, its component that corresponds to each of the best one's.
        agreement: For each restart, the share of observations (of a sample) given to corresponding components.
        seconds: Wall time.
        rounds: Of a search: what it climbs after the first fit and after each round.
    """

    model: LatentModel
    status: Status
    history: list[float]
    bound: float
    n_iter: int
    restarts: list[float]
    histories: list[list[float]]
    statuses: list[Status]
    seen: list[float] = field(default_factory=list)
    validation: list[float] | None = None
    scores: list[float] | None = None
    dead: list[int] = field(default_factory=list)
    floored: list[int | str] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    redundant: list[tuple[int, int]] = field(default_factory=list)
    remaining: float | None = None
    alignment: list[list[int]] | None = None
    agreement: list[float] | None = None
    seconds: float = 0.0
    rounds: list[float] | None = None

    @property
    def converged(self) -> bool:
        """Whether the objective reached a plateau; nothing else counts."""
        return self.status == "converged"


@dataclass(frozen=True)
class Progress:
    """What a callback is given after each pass.

    Attributes:
        iteration: Number of EM maps so far.
        objective: Total objective of each replica that still runs.
        model: The model under way, with a replica axis when there are restarts; read it, do not change it.
        restarts: Index of each replica that still runs.
        scores: Held-out score of each of them, if there are held-out data.
    """

    iteration: int
    objective: list[float]
    model: LatentModel
    restarts: list[int]
    scores: list[float] | None = None


@dataclass
class Run:
    """One restart's record, while it runs and after."""

    history: list[float] = field(default_factory=list)
    #: Observations seen before each entry of the history.
    seen: list[float] = field(default_factory=list)
    #: Held-out scores; the best of them, and which it is, if there is one.
    scores: list[float] = field(default_factory=list)
    score: float = -math.inf
    best: int | None = None
    status: Status | None = None
    model: LatentModel | None = None
    n_iter: int = 0
    bound: float = -math.inf
    respawns: int = 0
    rested: bool = False
    #: Whether the last objective is that of such parameters.
    unjudged: bool = False
    #: Mass of each state at the end, in average observations.
    mass: torch.Tensor | None = None
    forbidden: set[int] = field(default_factory=set)


def report(model: LatentModel, runs: list[Run], survey: Survey, n_states: int) -> Result:
    """Pick the best restart, put it into ``model``, and say how all of them ended."""
    runs = [run for run in runs if run.model is not None]
    # Who lost a race may have been measured at another temperature.
    best = max(range(len(runs)), key=lambda r: (runs[r].status != "dropped", runs[r].score, runs[r].bound, -r))
    chosen = runs[best]
    judged = any(run.scores for run in runs)
    assert chosen.model is not None and chosen.status is not None
    alignment = agreement = None
    # Latents that are not one discrete state have no names to align.
    if len(runs) > 1 and isinstance(model, DiscreteModel) and isinstance(model.labelled, int):
        models = [run.model for run in runs if run.model is not None]
        alignment, agreement = restarts.compare(models, best, survey.glance, n_states)
    dead, floored = _health(chosen)
    pruned = sorted(chosen.forbidden)
    model.load_from(chosen.model)
    glance = survey.sample[:_GLANCE]
    if pruned:
        keep = [k for k in range(n_states) if k not in chosen.forbidden]
        model.prune(torch.tensor(keep, device=model.device))  # pyright: ignore[reportCallIssue]
        dead = [keep.index(k) for k in dead if k in keep]
        floored[:] = [keep.index(k) for k in floored if isinstance(k, int) and k in keep]
        if glance.evidence is not None:
            glance = replace(glance, evidence=glance.evidence[..., keep])
    # What has no mass is unused, and named as dead: it takes nothing from another.
    redundant = [pair for pair in model.twins(glance, _ALIKE) if not {*pair} & {*dead}]
    return Result(
        model=model, status=chosen.status, history=list(chosen.history), bound=chosen.bound, n_iter=chosen.n_iter,
        restarts=[run.bound for run in runs], histories=[run.history for run in runs],
        statuses=[run.status or "interrupted" for run in runs], seen=list(chosen.seen),
        validation=chosen.scores[: max(1, len(chosen.history))] if judged else None,
        scores=[run.score for run in runs] if judged else None,
        dead=dead, floored=floored, pruned=pruned, redundant=redundant,
        remaining=None if judged else stopping.aitken(chosen.history[: chosen.n_iter + 1]), alignment=alignment,
        agreement=agreement,
    )  # fmt: skip


def _health(run: Run) -> tuple[list[int], list[int | str]]:
    """Indices of components that had no mass at the end and of components at the floor."""
    dead: list[int] = []
    if run.mass is not None:
        dead = (run.mass < DEAD).nonzero()[:, 0].tolist()
    assert run.model is not None
    return dead, run.model.floored()


def report_end(result: Result, tol: float, blind: bool, limit: str = "max_iter") -> None:
    """Say plainly when a fit did not end on a plateau, or on one that a ``blind`` start (not clustered) explains.

    Args:
        result: How it ended.
        tol: What counts as a plateau.
        blind: Whether it started from anything but clusters.
        limit: What may have stopped it.
    """
    if blind and result.redundant and result.status == "converged":
        a, b = result.redundant[0]
        warn(
            f"fit: components {a} and {b} ended as nearly the same distribution, perhaps on a saddle of the objective; "
            "start from clusters (init='kmeans++'), use restarts, or lower n_components.",
            SymmetryWarning,
        )
    message = {
        "diverged": "the objective fell beyond rounding, so some M-step does not maximise; the parameters before the "
        "fall are kept",
        "nonfinite": "the objective became NaN or infinite; the last sound parameters are kept",
    }.get(result.status)
    if result.status == "diverged" and result.validation is not None:
        message = "the objective or the held-out score fell; the parameters of the best held-out score are kept"
    scores = result.validation
    if scores is not None and result.status == "max_iter" and tol > 0 and 0 < result.n_iter == len(scores) - 1:
        message = f"stopped after {result.n_iter} iterations while the held-out score was still rising; raise {limit}"
    if result.status == "max_iter" and len(result.history) > 1 and tol > 0 and scores is None:
        gain = result.history[-1] - result.history[-2]
        left = "" if result.remaining is None else f", about {result.remaining:.3g} in all are left"
        message = (
            f"stopped after {result.n_iter} iterations while still climbing (last gain {gain:.3g} nats{left}); "
            f"raise {limit}, or tol if that is near enough"
        )
    if message is not None:
        warn(f"fit: {message}.", ConvergenceWarning)
