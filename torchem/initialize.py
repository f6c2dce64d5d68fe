"""Starts: from a sample of the data to the first parameters, for all replicas at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid, one_of
from torchem.model import LatentModel
from torchem.ops import kmeans

#: What `start` knows, besides "auto".
METHODS = ("kmeans++", "kmeans", "random", "random_from_data", "hierarchical")

#: Share of every observation that is spread at random, so that no component starts empty or equal to another.
_BLUR = 0.01
#: Iterations of k-means: a start, not an answer.
_LLOYD = 20
#: Observations that hierarchical clustering looks at.
_WARD = 1024


def sample_size(n_states: int, replicas: int) -> int:
    """Rows that a start looks at: enough for every component, bounded in memory over all replicas."""
    return min(1 << 16, max(1024, 64 * n_states, (1 << 22) // (replicas * n_states)))


def start(model: LatentModel, sample: Batch, n_states: int, method: str, generators: Sequence[torch.Generator]) -> None:
    """Initialise a model, or all of its replicas, from a sample of the data, in place.

    Args:
        model: With a replica axis if there are several generators.
        sample: Rows to start from, on the model's device.
        n_states: K.
        method: One of `METHODS`, or ``"auto"`` for the family's own.
        generators: One per replica; nothing else is drawn from.

    Raises:
        InvalidArgument: For an unknown method, or fewer observations than components.
    """
    one_of("init", method, ("auto", *METHODS))
    method = model.default_init if method == "auto" else method
    if len(sample) < n_states:
        raise invalid(
            "data", f"at least as many observations as components ({n_states})", len(sample), "lower n_components"
        )
    batch = model.cast(sample)
    if method == "random_from_data":
        index = torch.stack([_distinct(sample, n_states, g) for g in generators]).to(sample.x.device)
        model.initialize_at(batch, index if model.replicas else index[0])
        return
    if method == "random":
        shares = torch.stack([_shares(len(sample), n_states, g) for g in generators])
    else:
        labels = _labels(sample, n_states, method, generators)
        hard = torch.nn.functional.one_hot(labels, n_states)
        blur = torch.stack([_shares(len(sample), n_states, g) for g in generators]).to(hard.device)
        shares = (1 - _BLUR) * hard + _BLUR * blur
    shares = shares.to(batch.x.device, model.dtype)
    model.initialize(batch, shares if model.replicas else shares[0])


def _shares(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Rows drawn uniformly from the simplex: normalised exponentials."""
    draws = -torch.rand(n, k, generator=generator, dtype=torch.float64).clamp(min=1e-300).log()
    return draws / draws.sum(-1, keepdim=True)


def _distinct(sample: Batch, k: int, generator: torch.Generator) -> Tensor:
    weight = torch.ones(len(sample), dtype=torch.float64) if sample.weight is None else sample.weight.cpu()
    replacement = int((weight > 0).sum()) < k
    return torch.multinomial(weight, k, replacement=replacement, generator=generator)


def _standardized(sample: Batch) -> Tensor:
    # Clustering must not depend on the units of the columns.
    x = sample.x.to(torch.float64)
    x = x - x.mean(0)
    scale = x.std(0, correction=0)
    return x / torch.where(scale > 0, scale, 1.0)


def _labels(sample: Batch, k: int, method: str, generators: Sequence[torch.Generator]) -> Tensor:
    x = _standardized(sample)
    if method == "hierarchical":
        return torch.stack([_hierarchical(x, sample, k, g) for g in generators])
    seeds = kmeans.seed(x, k, generators, sample.weight)
    if method == "kmeans++":
        return kmeans.lloyd(x, x[seeds], 0, sample.weight)
    return torch.cat([kmeans.lloyd(x, x[row].unsqueeze(0), _LLOYD, sample.weight) for row in seeds])


def _hierarchical(x: Tensor, sample: Batch, k: int, generator: torch.Generator) -> Tensor:
    """Ward's clusters of a random subset, extended to all rows by the nearest cluster mean."""
    subset = _distinct(sample, min(_WARD, len(x)), generator).to(x.device)
    labels = kmeans.ward(x[subset], k)
    centers = torch.stack([x[subset][labels == c].mean(0) for c in range(int(labels.max()) + 1)])
    return torch.cdist(x, centers).argmin(-1)
