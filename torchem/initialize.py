"""Starts: from a sample of the data to the first parameters, for all replicas at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchem import restarts
from torchem.batch import Batch
from torchem.errors import invalid, one_of
from torchem.model import LatentModel
from torchem.ops import kmeans, reduce

#: What `start` knows, besides "auto".
METHODS = ("kmeans++", "kmeans", "random", "random_from_data", "hierarchical")

#: Share of the observations that a cluster without members starts with.
_BLUR = 0.01
#: Iterations of k-means: a start, not an answer.
_LLOYD = 20
#: Observations that hierarchical clustering looks at.
_WARD = 1024


def sample_size(n_states: int, replicas: int) -> int:
    """Rows that a start looks at: enough for every component, bounded in memory over all replicas."""
    return min(1 << 16, max(1024, 64 * n_states, (1 << 22) // (replicas * n_states)))


def start(
    model: LatentModel,
    sample: Batch,
    n_states: int,
    method: str,
    generators: Sequence[torch.Generator],
    first: int = 0,
) -> None:
    """Initialise a model, or all of its replicas, from a sample of the data, in place.

    Args:
        model: With a replica axis if there are several generators.
        sample: Rows to start from, on the model's device.
        n_states: K.
        method: One of `METHODS`, or ``"auto"`` for the family's own.
        generators: One per replica; nothing else is drawn from.
        first: Number of the first replica among all restarts.

    Raises:
        InvalidArgument: For an unknown method, or fewer observations than components.
    """
    one_of("init", method, ("auto", *METHODS))
    method = model.default_init if method == "auto" else method
    least = model.least_rows(n_states) if method == "random" else n_states
    if len(sample) < least:
        raise invalid(
            "data", f"at least as many observations as components ({least})", len(sample), "lower n_components"
        )
    batch = model.cast(sample)
    if method == "random_from_data":
        index = observations(sample, n_states, generators)
        model.initialize_at(batch, index if model.replicas else index[0])
        return
    if method == "random":
        shares = torch.stack([_shares(len(sample), n_states, g) for g in generators])
    else:
        labels = _labels(sample.with_x(model.landmarks(sample)), n_states, method, generators, first)
        hard = torch.nn.functional.one_hot(labels, n_states).to(torch.float64)
        # Clusters without members (fewer distinct observations than components) take a random share of everything, so
        # that they start neither empty nor equal to one another.
        empty = hard.sum(-2, keepdim=True) == 0
        blur = torch.stack([_shares(len(sample), n_states, g) for g in generators]).to(hard.device)
        shares = torch.where(empty, _BLUR * blur, hard)
    evidence = known(sample, n_states)
    if evidence is not None:
        shares = _informed(shares, evidence)
    shares = shares.to(batch.x.device, model.dtype)
    model.initialize(batch, shares if model.replicas else shares[0])


def observations(sample: Batch, n_states: int, generators: Sequence[torch.Generator]) -> Tensor:
    """A random observation for each state, ``[R, K]``: different ones, with its label where there are labels."""
    index = torch.stack([_different(sample, n_states, g) for g in generators]).to(sample.x.device)
    evidence = known(sample, n_states)
    if evidence is None:
        return index
    return torch.stack([_labelled(row, evidence, g) for row, g in zip(index, generators, strict=True)])


def known(sample: Batch, n_states: int) -> Tensor | None:
    """What is known of the state of each observation, ``[n, K]``; of whole sequences all that their frames say.

    None where a model has labels of something else than what a start tells apart, and begins with them by itself.
    """
    evidence = sample.evidence
    if evidence is None or evidence.shape[-1] != n_states:
        return None
    return evidence if evidence.dim() == 2 else evidence.sum(1)


def halves(sample: Batch, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Two clusters of rows and their covariates, ``[n]`` zeros and ones: k-means of the rows of some ``weight [n]``."""
    x = _standardized(sample)
    if sample.u is not None:
        x = torch.cat([x, _standardized(sample.with_x(sample.u))], -1)
    weight = weight.to(x)
    return kmeans.lloyd(x, x[kmeans.seed(x, 2, [generator], weight)], _LLOYD, weight)[0]


def _telling(evidence: Tensor) -> tuple[Tensor, Tensor]:
    """What labels say of each row, as probabilities ``[n, K]``, and whether they say anything, ``[n]``."""
    known = evidence.to(torch.float64).softmax(-1).nan_to_num(0.0)
    return known, (known.amax(-1) - known.amin(-1)) > 1e-9


def _informed(shares: Tensor, evidence: Tensor) -> Tensor:
    """Responsibilities ``[R, n, K]`` renamed to agree with what is known of some rows, and bound by it there.

    Clusters have no names: those of the labels are given to the clusters that share most rows with them.
    """
    known, telling = _telling(evidence)
    if not bool(telling.any()):
        return shares
    overlap = shares[:, telling].mT @ known[telling]
    order = torch.tensor([restarts.assignment(table) for table in overlap], device=shares.device)
    place = order.argsort(-1).unsqueeze(-2).expand_as(shares)
    bound = shares.gather(-1, place) * (evidence - evidence.amax(-1, keepdim=True)).nan_to_num(0.0).exp()
    total = bound.sum(-1, keepdim=True)
    return torch.where(total > 0, bound / torch.where(total > 0, total, 1.0), known)


def _labelled(index: Tensor, evidence: Tensor, generator: torch.Generator) -> Tensor:
    """Rows for each state, drawn from those that are labelled with it where there are any."""
    known, telling = _telling(evidence)
    named = torch.where(telling, known.argmax(-1), -1).cpu()
    out = index.clone()
    for state in range(len(index)):
        rows = (named == state).nonzero()[:, 0]
        if len(rows):
            out[state] = rows[torch.randint(len(rows), (), generator=generator)]
    return out


def _shares(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Rows drawn uniformly from the simplex: normalised exponentials."""
    draws = -torch.rand(n, k, generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
    return draws / draws.sum(-1, keepdim=True)


def _different(sample: Batch, k: int, generator: torch.Generator) -> Tensor:
    """Random rows that differ in value, as far as there are as many: components that start equal stay equal."""
    weight = torch.ones(len(sample)) if sample.weight is None else sample.weight.cpu()
    draw = _distinct(sample, max(k, int((weight > 0).sum())), generator)
    size = 0
    while True:
        # Sorting rows is dear, and the first few drawn hold enough values as a rule.
        size = min(len(draw), max(4 * k, 8 * size))
        place = sample.x[draw[:size].to(sample.x.device)].unique(dim=0, return_inverse=True)[1].cpu()
        turn = torch.arange(size)
        first = torch.full((int(place.max()) + 1,), size).scatter_reduce(0, place, turn, "amin").sort().values
        if len(first) >= k:
            return draw[first[:k]]
        if size == len(draw):
            return draw[:k]


def _distinct(sample: Batch, k: int, generator: torch.Generator) -> Tensor:
    weight = torch.ones(len(sample), dtype=torch.float64) if sample.weight is None else sample.weight.cpu()
    replacement = int((weight > 0).sum()) < k
    return torch.multinomial(weight, k, replacement=replacement, generator=generator)


def _standardized(sample: Batch) -> Tensor:
    # Clustering must not depend on the units of the columns; missing entries count as the mean of theirs.
    x = sample.x.to(torch.float64)
    if bool(x.isnan().any()):
        x = torch.where(x.isnan(), x.nanmean(0).nan_to_num(), x)
    x = x - x.mean(0)
    scale = x.std(0, correction=0)
    return x / torch.where(scale > 0, scale, 1.0)


def _labels(sample: Batch, k: int, method: str, generators: Sequence[torch.Generator], first: int) -> Tensor:
    """Clusters ``[R, n]`` of the sample for each generator."""
    x = _standardized(sample)
    if method == "kmeans++":
        return kmeans.lloyd(x, x[kmeans.seed(x, k, generators, sample.weight)], 0, sample.weight)
    cluster = _ward if method == "hierarchical" else _kmeans
    return torch.stack([cluster(x, sample, k, g, r + first) for r, g in enumerate(generators)])


def _subset(sample: Batch, k: int, size: int, generator: torch.Generator, restart: int) -> Tensor:
    """Rows that a restart clusters: all that are allowed for the first, a random half of them for the others.

    Clustering finds the same optimum from many seeds; on other rows it finds another.
    """
    size = min(size, len(sample))
    if restart > 0:
        size = min(size, max(10 * k, len(sample) // 2))
    if size == len(sample):
        return torch.arange(size)
    return _distinct(sample, size, generator)


def _extended(x: Tensor, subset: Tensor, labels: Tensor) -> Tensor:
    """The labels of a subset carried to all rows, by the nearest cluster mean."""
    if len(subset) == len(x):
        return labels
    present = labels.unique()
    return present[_nearest(x, x[subset], labels, present)]


def _nearest(x: Tensor, members: Tensor, labels: Tensor, clusters: Tensor) -> Tensor:
    """Place in ``clusters`` of the one whose mean is nearest to each row of ``x``; ties to the first."""
    centers = torch.stack([members[labels == c].mean(0) for c in clusters])
    return reduce.first_max(-torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist"))


def _kmeans(x: Tensor, sample: Batch, k: int, generator: torch.Generator, restart: int) -> Tensor:
    rows = _subset(sample, k, len(x), generator, restart).to(x.device)
    weight = None if sample.weight is None else sample.weight[rows]
    seeds = kmeans.seed(x[rows], k, [generator], weight)
    return _extended(x, rows, kmeans.lloyd(x[rows], x[rows][seeds], _LLOYD, weight)[0])


def _ward(x: Tensor, sample: Batch, k: int, generator: torch.Generator, restart: int) -> Tensor:
    rows = _subset(sample, k, _WARD, generator, restart).to(x.device)
    labels = kmeans.ward(x[rows], k)
    # By the nearest mean, the lowest label first: of clusters that coincide all but one are left without members.
    return _nearest(x, x[rows], labels, torch.arange(k, device=x.device))
