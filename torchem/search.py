"""Searches for better optima: from where EM came to rest, a kick or a move, and EM again from there.

EM climbs to the nearest optimum. Both searches here start from one that `fit` found, change it in several ways at once,
side by side along the replica axis, let EM climb from each, and go on from the best if that is better. So the objective
of the solution never falls.
"""

import copy
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchem import initialize
from torchem.batch import Batch
from torchem.errors import invalid, whole_number
from torchem.loop import n_states
from torchem.model import DiscreteModel, LatentModel
from torchem.ops import reduce
from torchem.result import Result
from torchem.trainer import Trainer

Kick = Callable[[Any, Batch, Sequence[torch.Generator]], None]

#: Arguments of `fit` that are no options of a `Trainer`.
_FIELDS = ("weights", "inputs", "lengths", "labels", "observed", "offset", "trials", "validation")
#: Steps of EM on the three components of a move before all are freed.
_PARTIAL = 10
#: Share of a divided component's mass that goes to the other half, so that neither starts empty.
_BLUR = 0.05


def perturb(
    model: DiscreteModel, data: Any, *, rounds: int = 10, kicks: int = 8, strength: int | None = None, **options: Any
) -> Result:
    """Fit, then kick and continue: iterated local search by random swaps, in place.

    A kick moves ``strength`` components, chosen at random, to random observations; EM goes on from there. Each round
    tries several kicks side by side and keeps the best solution so far.

    Args:
        model: A mixture or a hidden Markov model.
        data: As for `torchem.fit`.
        rounds: How often to kick.
        kicks: How many kicks to try in each round.
        strength: Components that a kick moves; a third of all of them when None.
        **options: Of `torchem.fit`, for the first fit and for those that follow, which have no use for ``init``,
            ``restarts``, ``race`` and ``anneal``. With ``init=None`` the search goes on from the model as it is.

    Returns:
        The result of the fit that found the solution; ``rounds`` holds the objective (the held-out score, if there are
        held-out data) after the first fit and after each round: it never falls.

    Raises:
        InvalidArgument: For a model without components to move, or options out of range.

    Source: H. R. Lourenço, O. C. Martin, T. Stützle (2003); Q. Zhao, V. Hautamäki, I. Kärkkäinen, P. Fränti (2012):
        random swap EM.

    Example:
        >>> import torchem
        >>> x = torch.tensor([[-5.0], [-4.8], [0.0], [0.1], [5.0], [5.3]])
        >>> result = perturb(torchem.GaussianMixture(3, 1), x, rounds=2, seed=0)
        >>> result.rounds[0] <= result.rounds[1] <= result.rounds[2]
        True
    """
    given = {} if strength is None else {"strength": strength}
    k = _checked("perturb", model, "respawn", 2, rounds=rounds, kicks=kicks, **given)
    strength = max(1, k // 3) if strength is None else strength
    if strength > k:
        raise invalid("strength", f"at most {k}, the number of components", strength, "lower it")
    return _search(model, data, rounds, kicks, functools.partial(_swap, strength), False, options)


def split_merge(model: LatentModel, data: Any, *, rounds: int = 10, candidates: int = 16, **options: Any) -> Result:
    """Fit a mixture, then merge two components and divide a third one while that raises the objective, in place.

    With responsibilities γ two components are worth merging where γ_i · γ_j is large: they share observations; and one
    is worth dividing where its density fits its own observations badly, by the divergence

        J_k = Σ_n f_k(x_n) log (f_k(x_n) / p_k(x_n)),    f_k(x_n) = γ_nk / Σ_m γ_mk.

    The three are fitted to the observations that were theirs, then all by EM. Each round tries several such moves side
    by side, those that rank highest by both criteria together, and also to divide the union of two anew; the search
    ends where none of them is better by more than ``tol`` per observation.

    Args:
        model: A mixture of at least three components, of any family.
        data: As for `torchem.fit`.
        rounds: Most moves to make.
        candidates: How many moves to try in each round.
        **options: Of `torchem.fit`, as for `perturb`.

    Returns:
        As `perturb`.

    Raises:
        InvalidArgument: For a model that is no mixture of at least three components, or options out of range.

    Source: N. Ueda, R. Nakano, Z. Ghahramani, G. E. Hinton (2000): SMEM.

    Example:
        >>> import torchem
        >>> x = torch.tensor([[-5.0], [-4.8], [0.0], [0.1], [5.0], [5.3]])
        >>> result = split_merge(torchem.GaussianMixture(3, 1), x, seed=0)
        >>> result.rounds == sorted(result.rounds)
        True
    """
    k = _checked("split_merge", model, "regroup", 3, rounds=rounds, candidates=candidates)
    width = min(candidates, k * (k - 1) // 2 * (k - 1))
    return _search(model, data, rounds, width, _move, True, options)


def _checked(name: str, model: Any, method: str, least: int, **counts: Any) -> int:
    """The number of components of a model that a search can be made with."""
    for argument, value in counts.items():
        whole_number(argument, value, 1)
    kind = "a mixture" if method == "regroup" else "a mixture or a hidden Markov model"
    if not isinstance(model, LatentModel) or not hasattr(model, method):
        got = type(model).__name__
        raise invalid("model", f"{kind}, for {name}", got, "use restarts: it has no components to move")
    k = n_states(model)
    if k < least:
        raise invalid("model", f"at least {least} components, for {name}", k, "raise n_components, or use fit")
    return k


def _search(
    model: LatentModel, data: Any, rounds: int, width: int, kick: Kick, greedy: bool, options: dict[str, Any]
) -> Result:
    """Climb, kick and climb again; a ``greedy`` search ends at the first round that finds nothing better."""
    began = time.perf_counter()
    if options.get("dead") == "prune":
        raise invalid("dead", "'floor', 'respawn' or 'raise'", "'prune'", "prune by a fit of its own, afterwards")
    fields = {name: options.pop(name, None) for name in _FIELDS}
    first = Trainer(**options)
    best = first.climb(model, data, **fields)
    found = [_value(best)]
    for number in range(rounds):
        if best.status == "interrupted":
            break
        again = Trainer(**options | {"init": None, "restarts": 1, "race": None, "anneal": None, "seed": None})
        again.seed = None if first.seed is None else _seed(int(first.seed), number)
        again.restarts, again.kick = width, kick
        trial = again.climb(copy.deepcopy(model), data, **fields)
        if _value(trial) > found[-1]:
            model.load_from(trial.model)
            best = replace(trial, model=model)
        found.append(max(found[-1], _value(trial)))
        if trial.status == "interrupted" or (greedy and found[-1] - found[-2] <= _noise(trial, first.tol)):
            break
    first.tell(best)
    return replace(best, rounds=found, seconds=time.perf_counter() - began)


def _value(result: Result) -> float:
    """What a search climbs: the held-out score, where there is one, else the objective."""
    return result.bound if result.validation is None else result.validation[result.n_iter]


def _noise(result: Result, tol: float) -> float:
    """What fits to the same optimum may differ by, as each of them stops at a gain of ``tol`` per observation."""
    weight = result.seen[1] if len(result.seen) > 1 else 0.0
    return tol if result.scores is not None else tol * weight


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence(seed, spawn_key=(number, 0)).generate_state(1, np.uint64)[0] >> 1)


# ---- kicks --------------------------------------------------------------------------------------------------------


def _swap(strength: int, model: Any, sample: Batch, generators: Sequence[torch.Generator]) -> None:
    """Put random components at random observations, in each replica others."""
    k = n_states(model)
    which = torch.stack([torch.randperm(k, generator=g) < strength for g in generators]).to(sample.x.device)
    index = initialize.observations(sample, k, generators)
    single = not model.replicas
    model.respawn(model.cast(sample), which[0] if single else which, index[0] if single else index)


def _move(model: Any, sample: Batch, generators: Sequence[torch.Generator]) -> None:
    """Merge two components and divide a third, in each replica others; all replicas are equal before."""
    one = model.take_replicas(0) if model.replicas else model
    log_joint = one.joint(sample)
    shares = reduce.responsibilities(log_joint)[1].to(torch.float64)
    weight = torch.ones(len(sample), dtype=torch.float64) if sample.weight is None else sample.weight
    weight = weight.to(shares).unsqueeze(-1)
    moves = ranked(shares, one.component.log_prob(one.cast(sample)), weight)[: len(generators)]
    k, device = shares.shape[-1], shares.device
    which = torch.zeros(len(generators), k, dtype=torch.bool, device=device)
    expected = shares.expand(len(generators), -1, -1).clone()
    for place, generator in enumerate(generators):
        i, j, split = moves[place % len(moves)]
        which[place, [i, j, split]] = True
        expected[place, :, i] += expected[place, :, j]
        whole = expected[place, :, split].clone()
        half = initialize.halves(sample, weight[:, 0] * whole, generator).to(device) == 1
        expected[place, :, j] = torch.where(half, 1 - _BLUR, _BLUR) * whole
        expected[place, :, split] -= expected[place, :, j]
    mass = torch.where(which.unsqueeze(-2), shares, 0.0).sum(-1, keepdim=True)
    if not model.replicas:
        which, expected, mass = which[0], expected[0], mass[0]
    for _ in range(_PARTIAL):
        model.regroup(sample, which, expected.to(model.dtype))
        among = model.joint(sample).to(torch.float64).masked_fill(~which.unsqueeze(-2), -torch.inf)
        among = reduce.responsibilities(among)[1] * mass
        expected = torch.where(which.unsqueeze(-2), among, expected)
    model.regroup(sample, which, expected.to(model.dtype))


def ranked(shares: Tensor, log_prob: Tensor, weight: Tensor) -> list[tuple[int, int, int]]:
    """Moves (i, j, k), merge i with j and divide k, the most promising first; (i, j, i) divides the two anew.

    The paper takes the divisions of the best merger first, of three different components; here the ranks of a merger
    and of a division are added, so that a few candidates differ in both.

    Args:
        shares: Responsibilities ``[N, K]``.
        log_prob: Log-densities of the components ``[N, K]``.
        weight: Of the rows, ``[N, 1]``.

    Example:
        >>> shares = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).double()
        >>> fit = torch.tensor([0.0, 0.0, -9.0]).double().expand(4, 3)
        >>> ranked(shares, fit, torch.ones(4, 1).double())[0]
        (0, 1, 2)
    """
    together = (shares * weight).mT @ shares
    own = shares / (shares * weight).sum(0).clamp(min=1e-300)
    gap = torch.where(own > 0, own * (own.clamp(min=1e-300).log() - log_prob.to(own)), 0.0)
    badly = (weight * gap).sum(0).nan_to_num(nan=-torch.inf)
    pairs = list(itertools.combinations(range(shares.shape[-1]), 2))
    merge = {pair: rank for rank, pair in enumerate(sorted(pairs, key=lambda p: (-float(together[p]), p)))}
    divide = {k: rank for rank, k in enumerate(badly.argsort(descending=True, stable=True).tolist())}
    moves = [(*pair, k) for pair in pairs for k in divide if k != pair[1]]
    # Dividing the union of the two is as promising as dividing the worse of them.
    worse = {(i, j, k): min(divide[i], divide[j]) if k == i else divide[k] for i, j, k in moves}
    return sorted(moves, key=lambda move: (merge[move[:2]] + worse[move], merge[move[:2]]))
