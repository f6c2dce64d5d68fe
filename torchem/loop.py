"""The loop of a fit: passes over data, M-steps, replicas that stop on their own, components that are put elsewhere."""

import contextlib
import copy
import math
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchem import distributed, gradient, initialize, stopping
from torchem.accelerate import accelerator
from torchem.accumulate import FullBatch, Incremental
from torchem.anneal import Annealing
from torchem.batch import Batch
from torchem.data import Source, Survey
from torchem.direct import Ascent
from torchem.errors import DegenerateComponent, SymmetryWarning, invalid, warn
from torchem.model import DiscreteModel, EStep, LatentModel
from torchem.result import DEAD, Progress, Run
from torchem.stats import Stats
from torchem.stopping import Status
from torchem.validation import Leader, Validation, mean_scores

if TYPE_CHECKING:
    from torchem.trainer import Trainer

#: Relative fall of the objective that rounding explains.
_SLACK = {torch.float64: 1e-9, torch.float32: 1e-4}
#: Statistics of stochastic EM that are kept at most.
_TAIL = 1000
#: Times that a run may reseed components, per component.
_RESPAWNS = 3


def n_states(model: LatentModel) -> int:
    """Number of states that a start tells apart."""
    return getattr(model, "n_components", 1)


class Loop:
    """Some restarts of one fit, run together along a replica axis (or one, without)."""

    def __init__(
        self,
        options: "Trainer",
        model: LatentModel,
        source: Source,
        survey: Survey,
        generators: list[torch.Generator],
        first: int,
        held_out: Validation | None = None,
    ):
        self.options, self.source, self.survey, self.generators = options, source, survey, generators
        self.first = first
        self.n_states = n_states(model)
        # Weight of the observations that passes went over so far, and of all data (known where there is a budget).
        self.seen, self.weight = 0.0, math.inf
        # At which pass the next restarts are dropped.
        self.cut = options.race
        self.leader = None if held_out is None else Leader(held_out, len(generators))
        self.rule = options.accumulate
        self.rule.reset()
        self.runs = [Run() for _ in generators]
        self.going = list(range(len(generators)))
        self.climbs = options.direct is None and not model.sufficient
        self.ascent = None if options.direct is None else Ascent(options.direct)
        self.accelerator = None if options.accelerate is None else accelerator(options.accelerate)
        # What the E-steps of the pass, and of the last batch, took for the posterior: kind, temperature, generators.
        self.taken: tuple[EStep, float, list[Tensor]] = ("soft", 1.0, [])
        self.latest = self.taken
        # Where to go back to if the objective falls: what the last M-step gave, where a jump from there was tried
        # instead; or half of the way that it went, where it need not have led up.
        self.fallback: dict[str, Tensor] | None = None
        self.jumped = False
        self.guarded = options.direct is None and not model.minorizes
        # Parameters before the last M-step, and whether those after it have been judged.
        self.before: dict[str, Tensor] | None = None
        self.judged = False
        # Whether the other ranks know of what stopped this one.
        self.agreed = False
        # Whether to stop at the next pass, together with the other ranks.
        self.stopping = False
        # Whether the last pass is to be made again at the same parameters.
        self.retake = False
        self.annealing = Annealing(options.anneal, options.max_iter)
        # Entries of the histories that belong to temperatures before the present one.
        self.since = 0
        # Whether a pass draws configurations, so that components that merged at one temperature can part at the next.
        self.stirred = False
        self.sampled = options.e_step == "sample"
        self.noisy = bool(getattr(self.rule, "noisy", False)) or self.sampled
        # Whether M-steps within a pass leave the parameters that it began with: what they score is measured before it.
        self.eager = not isinstance(self.rule, FullBatch)
        # Whether restarts come to rest together, and are then measured.
        self.together = self.noisy or (self.eager and held_out is not None)
        # Statistics of the passes of stochastic EM, whose later half ends it.
        self.tail: deque[Stats] = deque(maxlen=_TAIL)
        # Whether the passes of a rule that is noisy have come to rest: one more pass measures where.
        self.closing = False
        self.rest: dict[int, Status] = {}
        if isinstance(self.rule, Incremental) and source.shuffled:
            raise invalid(
                "data", "batches that are the same in every pass", "a loader that draws them",
                "set shuffle=False: incremental EM keeps the statistics of each batch",
            )  # fmt: skip
        # The loop works on a twin, so that an exception leaves the user's model as it was.
        self.twin = model.replicate(len(generators)) if len(generators) > 1 else copy.deepcopy(model)

    def run(self) -> list[Run]:
        """The records of the restarts, all of them ended."""
        self._start()
        try:
            with _Bar(self.options) as bar:
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
        elif self.options.kick is not None:
            dtype = twin.dtype
            self.options.kick(twin.double(), survey.sample, self.generators)
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
        if self.options.budget is not None:
            whole = distributed.all_reduce(Stats(weight=torch.tensor([survey.weight], dtype=torch.float64)))
            self.weight = float(whole["weight"])
        if hasattr(self.rule, "begin"):
            self.rule.begin(survey.weight, self._e_step(twin.cast(survey.glance)))  # pyright: ignore[reportAttributeAccessIssue]

    def _iterate(self, iteration: int, bar: Any) -> bool:
        """One E-step over the data, the verdict on it, and the M-step; False when nothing is left to do."""
        last = self.closing or iteration >= self.options.max_iter or self._spent()
        seen, scores = self.seen, self._scores(last)
        stats, objective, total = self._pass(not last)
        self.seen += total
        values = objective.reshape(-1).tolist()
        if self._taken_back(values):
            return True
        self._refuse_impossible(values, "data", self.source)
        ended = self._judge(values, total, last, seen, scores)
        if self.leader is not None and not self.eager:
            sound = [status not in ("diverged", "nonfinite") for status in map(ended.get, range(len(values)))]
            self._follow(scores or [], sound, self._share(stats))
        if not last and not self.closing:
            self._race(iteration, scores or values, ended)
        if bar is not None:
            bar.update(1)
            bar.set_postfix(bound=f"{max(values):.6g}", refresh=False)
        now = Progress(iteration, values, self.twin, list(self.going), scores)
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
        if self.sampled and not getattr(self.rule, "noisy", False):
            self.tail.append(stats)
            if self.closing or iteration == self.options.max_iter - 1 or self._spent():
                stats = _mean([*self.tail][len(self.tail) // 2 :])
        self._improve(stats, total)
        self._tune(iteration, retake=not self.noisy)
        if not self.retake:
            self._heal(stats, total)
            self._jump()
            self._guard()
        return True

    # ---- M-steps ----------------------------------------------------------------------------------------------

    def _improve(self, stats: Stats, total: float) -> None:
        """The M-step that ends a pass over data of some weight."""

        def again() -> Iterator[Batch]:
            return self._again(total)

        if self.ascent is not None:
            self.twin.assign(self._together(lambda ascent=self.ascent: ascent.run(self.twin, again, self._reduce)))
            return
        moving = self.climbs and not getattr(self.rule, "noisy", False)
        renewing = moving and isinstance(self.rule, Incremental)
        before = copy.deepcopy(self.twin) if moving and not renewing else None
        self.twin.improve(stats, again)
        if not moving:
            return
        # Kept statistics belong to posteriors that cannot be made again: networks climb under those of now.
        taken = (self.taken[0], self.annealing.beta, self._states()) if renewing else self.taken
        self._climb(copy.deepcopy(self.twin) if before is None else before, again, taken)
        if renewing:
            self.seen += total
            for key, _, own in self._statistics():
                self.rule.push(key, own)
            self.rule.flush()

    def _climb(
        self,
        old: LatentModel,
        batches: Callable[[], Iterable[Batch]],
        taken: tuple[EStep, float, list[Tensor]],
        whole: float | None = None,
    ) -> None:
        """Let networks climb, under the posteriors of a model of the same kind, temperature and draws."""
        twin = self.twin
        assert isinstance(old, DiscreteModel) and isinstance(twin, DiscreteModel)
        kind, beta, states = taken

        def passes() -> Iterator[gradient.Expected]:
            uniforms = self._drawn_again(states)
            for batch in batches():
                yield from old.expectations(batch, kind, beta, uniforms)

        replay = gradient.Replay(passes)
        self._together(lambda: gradient.climb(twin, replay, self._reduce, whole))

    def _together(self, work: Callable[[], Any]) -> Any:
        """Do what sums over ranks on the way; a failure here is the failure of all."""
        try:
            return work()
        except (Exception, KeyboardInterrupt) as error:
            if not self.agreed:
                self.agreed = True
                distributed.agree(error)
            raise

    def _again(self, total: float) -> Iterator[Batch]:
        """One more pass over the data, within an M-step."""
        self.seen += total
        return (batch for _, batch in self.source)

    def _states(self) -> list[Tensor]:
        return [self.generators[r].get_state() for r in self.going] if self.climbs else []

    def _drawn_again(self, states: list[Tensor]) -> Callable[[torch.Size], Tensor]:
        """Uniform numbers as they were drawn once, for a model without replicas."""
        generator = torch.Generator()
        generator.set_state(states[0])
        return lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64)

    def _spent(self) -> bool:
        """Whether the budget of observations is used up."""
        return self.options.budget is not None and self.seen >= self.options.budget

    def _race(self, iteration: int, values: list[float], ended: dict[int, Status]) -> None:
        """Drop the worse half of the replicas that go on, where it is time for that; ties to the first.

        Source: K. Jamieson, A. Talwalkar (2016): successive halving.
        """
        if self.cut is None or iteration < self.cut:
            return
        assert self.options.race is not None
        self.cut = iteration + self.options.race
        running = [place for place in range(len(values)) if place not in ended]
        # NaN is worse than all else.
        running.sort(key=lambda place: (math.isnan(values[place]), -values[place], place))
        ended |= dict.fromkeys(running[(len(running) + 1) // 2 :], "dropped")

    # ---- held-out data ----------------------------------------------------------------------------------------

    def _scores(self, last: bool) -> list[float] | None:
        """Held-out scores of the parameters that a pass begins with; before the last one the best take their place."""
        leader = self.leader
        if leader is None:
            return None
        sums = self._together(lambda: leader.validation.sums(self.twin))
        scores = mean_scores(self._reduce(sums))
        if leader.fresh and not any(score > -math.inf or math.isnan(score) for score in scores):
            self._refuse_impossible(scores[:1], "validation", leader.validation.source)
        leader.fresh = False
        if self.eager:
            self._follow(scores, [True] * len(scores), None)
            if last:
                # Passes of eager rules are measured on the way: this one measures what is returned.
                leader.settled = True
                self.twin.assign(leader.best(self.twin))
        return scores

    def _follow(self, scores: list[float], sound: list[bool], mass: Tensor | None) -> None:
        """Record held-out scores, and keep the parameters of each replica's best one."""
        better = []
        for r, score, good in zip(self.going, scores, sound, strict=True):
            run = self.runs[r]
            # A pass made again has its score already.
            run.scores = [*run.scores[: len(run.history) - (self.retake or not self.eager)], score]
            better.append(good and self.annealing.done and score > run.score)
            if better[-1]:
                run.score, run.best = score, len(run.scores) - 1
        assert self.leader is not None
        self.leader.follow(torch.tensor(better, device=self.twin.device), self.twin, mass)

    def _share(self, stats: Stats) -> Tensor | None:
        """Mass of each component ``[*r, K]``, in average observations."""
        mass = self.twin.occupancy(stats)
        return None if mass is None else mass * self.survey.rows / stats["count"].unsqueeze(-1)

    # ---- acceleration -----------------------------------------------------------------------------------------

    def _jump(self) -> None:
        """Go beyond the M-step, if that is wanted and the next objective can be compared with the last."""
        if self.accelerator is None or self.before is None:
            return
        if any(self.runs[r].rested for r in self.going) or self.since == len(self.runs[self.going[0]].history):
            self.accelerator = accelerator(self.options.accelerate)  # pyright: ignore[reportArgumentType]
            return
        image = self.twin.snapshot()
        moved = self.accelerator.propose(self._flat(self.before), flat := self._flat(image))
        if not torch.equal(moved, flat):
            self.twin.assign(self._unflat(moved, image))
            self.twin.project()
            self.fallback, self.jumped = image, True

    def _guard(self) -> None:
        """Be ready to halve the last M-step, if it may have lowered the objective and the next one will tell."""
        if not self.guarded or self.noisy or self.eager or self.fallback is not None or self.before is None:
            return
        if any(self.runs[r].rested for r in self.going) or self.since == len(self.runs[self.going[0]].history):
            return
        before, now = self.before, self.twin.snapshot()
        # To the end of what the type can tell apart: there the objective is what it was.
        if any(not torch.equal(before[name], now[name]) for name in now):
            self.fallback = {name: (before[name] + now[name]) / 2 for name in now}

    def _taken_back(self, values: list[float]) -> bool:
        """Whether a step lowered the objective of a replica: that one is put back."""
        fallback, self.fallback = self.fallback, None
        jumped, self.jumped = self.jumped, False
        if fallback is None:
            return False
        slack = _SLACK.get(self.twin.dtype, 1e-3)
        bad = []
        for r, value in zip(self.going, values, strict=True):
            last = self.runs[r].history[-1]
            bad.append(not math.isfinite(value) or value < last - 1e-3 * slack * max(1.0, abs(last)))
        if not any(bad):
            return False
        which = torch.tensor(bad, device=self.twin.device)
        if jumped:
            assert self.accelerator is not None
            self.accelerator.refuse(which)
        now = self.twin.snapshot()
        mask = which if self.twin.replicas else which[0]
        self.twin.assign({
            name: torch.where(mask.reshape((*mask.shape, *[1] * (value.dim() - mask.dim()))), fallback[name], value)
            for name, value in now.items()
        })  # fmt: skip
        self._guard()
        return True

    def _flat(self, values: dict[str, Tensor]) -> Tensor:
        """Parameters as a vector for each replica, ``[R, P]`` in float64."""
        rows = len(self.going)
        return torch.cat([value.to(torch.float64).reshape(rows, -1) for value in values.values()], -1)

    def _unflat(self, flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
        sizes = [value.numel() // len(flat) for value in like.values()]
        parts = zip(like.items(), flat.split(sizes, -1), strict=True)
        return {name: part.reshape(value.shape).to(value) for (name, value), part in parts}

    def _tune(self, iteration: int, retake: bool = True) -> None:
        """Let numerics follow the parameters; where statistics were too coarse for what they gave, take them again."""
        adjustment = self.twin.tune(self.survey.rows, iteration)
        self.retake = retake and adjustment is not None and adjustment.retake and not self.retake
        if self.retake and self.before is not None:
            self.twin.assign(self.before)
            self.judged = True
            self.rule.reset()
        elif adjustment is not None and adjustment.move is not None:
            self._carry(adjustment.move)

    def _carry(self, move: Callable[[Stats], Stats]) -> None:
        """Take all statistics that are kept along."""
        self.rule.translate(move)
        self.tail = deque(map(move, self.tail), maxlen=_TAIL)

    def _judge(
        self, values: list[float], total: float, last: bool, seen: float, scores: list[float] | None
    ) -> dict[int, Status]:
        """Record the objectives; returns the replicas that ended, by their place on the axis, and why."""
        ended: dict[int, Status] = {}
        for place, (r, value) in enumerate(zip(self.going, values, strict=True)):
            run = self.runs[r]
            if self.retake:
                run.history.pop()
                run.seen.pop()
            run.history.append(value)
            run.seen.append(seen)
            # When components were reseeded or taken out the objective may fall: that step is not judged, nor is the
            # same pass when it is made again.
            run.unjudged = run.rested or (run.unjudged and self.retake)
            run.rested = False
            own = run.history[self.since :]
            recent = own[-1:] if run.unjudged else own[-3:]
            if scores is not None:
                # An objective that is sound says no more; the first place of the scores is that of the history.
                known = [*run.scores[: len(run.history) - 1], scores[place]]
                status = None if self.noisy else stopping.verdict(recent, 0.0, _SLACK.get(self.twin.dtype, 1e-3))
                status = status if math.isfinite(value) else "nonfinite"
                status = status or stopping.stalled(known[self.since :], self.options.tol, self.noisy)
            elif self.noisy:
                status = stopping.settled(own, self.options.tol * total)
            else:
                status = stopping.verdict(recent, self.options.tol * total, _SLACK.get(self.twin.dtype, 1e-3))
            if status != "nonfinite" and not self.annealing.done:
                status = None  # the objective is still to change
            if status is not None or last:
                ended[place] = status or "max_iter"
        self.judged = True
        rested: dict[int, Status] = {
            place: status for place, status in ended.items() if status in ("converged", "diverged")
        }
        if self.together and not last and len(rested) == len(self.going):
            # What the history holds was measured on the way: the pass to come measures at rest.
            self.rest = {self.going[place]: status for place, status in rested.items()}
            self.closing, ended = True, {}
        elif self.together and not last:
            ended = {place: status for place, status in ended.items() if place not in rested}
        elif self.closing:
            ended = {p: "nonfinite" if s == "nonfinite" else self.rest[self.going[p]] for p, s in ended.items()}
        if self.retake:
            return ended
        if self.stirred:  # what follows may fall by chance
            self.stirred, self.since = False, len(run.history)
        elif self.annealing.advance():
            self.stirred, self.since = True, len(run.history)
        return ended

    def _pass(self, update: bool) -> tuple[Stats, Tensor, float]:
        """E-steps over all batches: statistics to maximise, the objective, and the weight of the data.

        Rules that are eager maximise on the way.
        """
        twin, eager, enough = self.twin, False, False
        self.within = 0.0
        last: Stats | None = None
        score: Tensor | float = 0.0
        total: Tensor | float = 0.0
        try:
            if self.stopping:
                raise KeyboardInterrupt
            self.taken = ("sample" if self.stirred else self.options.e_step, self.annealing.beta, self._states())
            for key, batch, stats in self._statistics():
                ready = self.rule.push(key, stats)
                score, total = score + stats["log_likelihood"], total + stats["count"]
                enough = update and self._enough(stats)
                if ready is not None:
                    last, eager = self._reduce(ready), True
                    # Where an M-step is no map of statistics it makes one for the batch, or waits for the whole pass.
                    if update and (self.noisy or twin.accelerates):
                        self._step(last, batch)
                        self._tune_within()
                if enough:
                    break
            ready = self.rule.flush()
            waits = getattr(self.rule, "burn_in", 0)
            if ready is None and last is None and isinstance(total, Tensor) and waits:
                raise invalid(
                    "burn_in", f"fewer batches than the {self.source.batches} of a pass", waits,
                    "lower it, or cut the data into smaller batches",
                )  # fmt: skip
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
        if not eager and not self.noisy:
            # Statistics that were all taken at one θ make the bound tight: it is the log-likelihood, and the prior.
            return last, last["log_likelihood"] + twin.log_prior(), float(last["count"].reshape(-1)[0])
        seen = distributed.all_reduce(Stats(score=score, total=total))
        if enough:  # as it would be for all data
            seen["score"] = seen["score"] * (self.weight / seen["total"])
        objective = seen["score"] + twin.log_prior() if self.noisy or not update else twin.bound(last)
        return last, objective, float(seen["total"].reshape(-1)[0])

    def _step(self, stats: Stats, batch: Batch | None) -> None:
        """The M-step after a batch: networks take theirs on that batch, if the rule is one that may lose."""
        twin = self.twin
        if not self.climbs:
            twin.learn(stats, batch)
            return
        noisy = getattr(self.rule, "noisy", False)
        before = copy.deepcopy(twin) if noisy else twin
        twin.assign(twin.maximize(stats))
        if noisy:
            self._climb(before, lambda: [] if batch is None else [batch], self.latest, float(stats["count"]))

    def _enough(self, stats: Stats) -> bool:
        """Whether the budget ends within this pass, at this batch: a matter for rules that forget the last pass."""
        if self.options.budget is None or not getattr(self.rule, "noisy", False):
            return False
        here = self._reduce(Stats(total=stats["count"].reshape(-1)[:1]))
        self.within += float(here["total"])
        return self.seen + self.within >= self.options.budget

    def _statistics(self) -> Iterator[tuple[Hashable, Batch | None, Stats]]:
        """Those of each batch, as many on each process: one with fewer batches ends on empty ones."""
        given, stats = 0, None
        for key, batch in self.source:
            self.twin.visit(None if self.source.held is not None or self.source.shuffled else key)
            self.latest = *self.taken[:2], self._states()
            stats, given = self._e_step(batch), given + 1
            yield key, batch, stats
        for missing in range(given, self.source.batches):
            assert stats is not None
            self.latest = self.taken
            yield ("missing", missing), None, stats * 0.0

    def _tune_within(self) -> None:
        """Let numerics follow the parameters between two batches of a pass."""
        if self.noisy and not due(getattr(self.rule, "pushed", 0)):
            return
        adjustment = self.twin.tune(self.survey.rows, 0)
        if adjustment is not None and adjustment.move is not None:
            self._carry(adjustment.move)

    def _e_step(self, batch: Batch) -> Stats:
        kind: EStep = "sample" if self.stirred else self.options.e_step
        beta = self.annealing.beta
        # A model of one's own need not know of kinds and temperatures.
        if beta == 1 and kind != "sample":
            return self.twin.e_step(batch) if kind == "soft" else self.twin.e_step(batch, kind)
        e_step: Any = self.twin.e_step
        return e_step(batch, kind, beta, self._uniforms)

    def _uniforms(self, shape: torch.Size) -> Tensor:
        """Uniform numbers of a shape, each restart's from its own generator."""
        if not self.twin.replicas:
            return torch.rand(shape, generator=self.generators[self.going[0]], dtype=torch.float64)
        return torch.stack(
            [torch.rand(shape[1:], generator=self.generators[r], dtype=torch.float64) for r in self.going]
        )

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
            self._carry(lambda kept: pytree.tree_map(lambda leaf: leaf[index], kept))
            if self.accelerator is not None:
                self.accelerator.keep(index)
            if self.leader is not None:
                self.leader.keep(index)
            stats = pytree.tree_map(lambda leaf: leaf[index], stats)
        return stats

    def _retire(self, ids: Sequence[int], status: Status, stats: Stats | None = None) -> None:
        """Record how restarts ended, at the last parameters whose objective is known and sound."""
        mass = None if stats is None else self._share(stats)
        for r in list(ids):
            run = self.runs[r]
            run.status = status
            if mass is not None:
                run.mass = (mass[self.going.index(r)] if self.twin.replicas else mass).clone()
            twin = copy.deepcopy(self.twin)
            if self.leader is not None and run.best is not None:
                self._retire_best(run, self.going.index(r), twin)
                continue
            if self.before is not None and (status in ("diverged", "nonfinite") or not self.judged):
                twin.assign(self.before)
            run.model = twin.take_replicas(self.going.index(r)) if twin.replicas else twin
            sound = run.history[:-1] if status in ("diverged", "nonfinite") else run.history
            run.bound = sound[-1] if sound else -math.inf
            run.n_iter = max(0, len(sound) - 1)

    def _retire_best(self, run: Run, place: int, twin: LatentModel) -> None:
        """Record the parameters of the best held-out score, and the objective there."""
        leader = self.leader
        assert leader is not None and run.best is not None
        twin.assign(leader.best(twin))
        run.model = twin.take_replicas(place) if twin.replicas else twin
        if leader.mass is not None:
            run.mass = (leader.mass[place] if twin.replicas else leader.mass).clone()
        finite = [value for value in run.history if math.isfinite(value)]
        found = run.history[-1 if leader.settled else min(run.best, len(run.history) - 1)] if finite else -math.inf
        run.bound = found if math.isfinite(found) else finite[-1] if finite else -math.inf
        run.n_iter = run.best

    # ---- components that die ----------------------------------------------------------------------------------

    def _sick(self, stats: Stats, total: float) -> tuple[Tensor | None, Tensor | None]:
        """``[*r, K]`` Booleans: components without mass, and components at the floor."""
        mass = self.twin.occupancy(stats)
        dead = None if mass is None else mass < DEAD * total / max(1, self.survey.rows)
        if dead is not None and self.noisy and self.leader is not None and bool(dead.any()):
            # Running statistics may have missed a component by chance.
            found = self._reduce(self.leader.validation.occupancy(self.twin))
            dead = dead & (found["mass"] * self.survey.rows < DEAD * found["count"])
        return dead, self.twin.degenerate()

    def _heal(self, stats: Stats, total: float) -> None:
        """Apply the policy for dead and collapsed components after an M-step."""
        if self.options.dead == "floor":
            return
        dead, floored = self._sick(stats, total)
        if dead is None:
            return
        if floored is not None and floored.shape != dead.shape and self.options.dead != "raise":
            floored = None  # what all states have in common is mended in none of them
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
                    # Parameters from before have a component that the model will not have.
                    run.score, run.best = -math.inf, None
                    if self.leader is not None:
                        self.leader.known[place] = False
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
        # Where nobody counts the data there are none to explain.
        heard = torch.ones_like(surprise[0], dtype=torch.bool)
        if sample.weight is not None and sample.weight.shape == heard.shape:
            heard = sample.weight > 0
        size = min(max(rows.shape[-1], len(sample) // 20), max(1, int(heard.sum())))
        pool = torch.where(heard.to(surprise.device), surprise, -torch.inf).topk(size, -1).indices
        each = torch.arange(rows.shape[-1]) % size
        picks = torch.stack([torch.randperm(size, generator=self.generators[r])[each] for r in self.going])
        picks = picks.to(pool.device)
        index = pool.gather(-1, picks).reshape(shape)
        self.twin.respawn(self.twin.cast(sample), rows.reshape(shape), index)  # pyright: ignore[reportCallIssue]

    # ---- the end ----------------------------------------------------------------------------------------------

    def _refuse_impossible(self, values: list[float], argument: str, source: Source) -> None:
        """−inf is the truth about data, not about a fit: name the first observation of probability zero."""
        if -math.inf not in values:
            return
        place = values.index(-math.inf)
        one = self.twin.take_replicas(place) if self.twin.replicas else self.twin
        # Every rank must come to the same end, or the others would wait for ever.
        found = distributed.gather(self._impossible_row(one, source))
        for rank, row in enumerate(found):
            if row is not None:
                unit = "sequence" if self.twin.sequential else "row"
                where = f"{unit} {row}" + (f" of rank {rank}" if len(found) > 1 else "")
                labelled = any(batch.evidence is not None for _, batch in source)
                remedy = "remove the outlier, or the structural zero that forbids it"
                if labelled:
                    remedy = "remove the outlier, or the structural zero or the label that contradicts it"
                raise invalid(
                    argument, "observations of positive probability", f"probability zero at {where}", remedy
                )  # fmt: skip

    def _impossible_row(self, model: LatentModel, source: Source) -> int | None:
        start = 0
        for _, batch in source:
            if not len(batch):
                continue
            bad = model.log_score(batch) == -math.inf
            if batch.weight is not None:
                bad = bad & (batch.weight > 0).to(bad.device)
            if bool(bad.any()):
                return source.original(start + int(bad.nonzero()[0, 0]))
            start += len(batch)
        return None


def due(step: int) -> bool:
    """Whether numerics are checked after this step of online EM: it moves little, and a check costs a third of one."""
    return step % 8 == 0 or step & (step - 1) == 0


def _mean(parts: list[Stats]) -> Stats:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total * (1 / len(parts))


class _Bar:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, options: "Trainer"):
        self.bar = None
        if options.progress and distributed.rank() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=options.max_iter, desc="EM", unit="pass", leave=False)

    def __enter__(self) -> Any:
        return self.bar

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
