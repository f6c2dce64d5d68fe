"""Seeding and clustering for starts, for many replicas at once. Not differentiable; samples of moderate size."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _distances(x: Float[Tensor, "n d"], centers: Float[Tensor, "r k d"]) -> Float[Tensor, "r k n"]:
    """Squared distances ``[R, K, n]`` of centres ``[R, K, D]`` from points ``[n, D]``."""
    cross = centers @ x.mT
    return (centers.square().sum(-1, keepdim=True) - 2 * cross + x.square().sum(-1)).clamp(min=0)


def _uniform(generators: Sequence[torch.Generator], *shape: int) -> Tensor:
    return torch.stack([torch.rand(shape, generator=g, dtype=torch.float64) for g in generators])


def _pick(mass: Tensor, u: Tensor) -> Tensor:
    """Indices ``[R, T]`` drawn in proportion to ``mass [R, n]``; evenly where all of it is zero."""
    total = mass.sum(-1, keepdim=True)
    mass = torch.where(total > 0, mass, 1.0)
    cumulative = mass.cumsum(-1)
    index = torch.searchsorted(cumulative, u.to(mass.device) * cumulative[..., -1:], right=True)
    return index.clamp(max=mass.shape[-1] - 1)


def seed(
    x: Float[Tensor, "n d"], k: int, generators: Sequence[torch.Generator], weight: Float[Tensor, "n"] | None = None
) -> Int[Tensor, "r k"]:
    """k-means++ with local trials: indices ``[R, k]`` of seeds, one row per generator.

    Each seed is the best of 2 + log k candidates drawn in proportion to their squared distance from the seeds so far.

    Source: D. Arthur, S. Vassilvitskii (2007).
    """
    n = len(x)
    base = torch.ones(n, dtype=x.dtype, device=x.device) if weight is None else weight.to(x)
    trials = 2 + int(torch.tensor(float(k)).log())
    chosen = _pick(base.expand(len(generators), n), _uniform(generators, 1))
    nearest = _distances(x, x[chosen])[:, 0]
    seeds = [chosen[:, 0]]
    for _ in range(1, k):
        candidates = _pick(nearest * base, _uniform(generators, trials))
        reduced = torch.minimum(_distances(x, x[candidates]), nearest.unsqueeze(1))
        best = (reduced @ base).argmin(-1)
        rows = torch.arange(len(generators), device=x.device)
        nearest = reduced[rows, best]
        seeds.append(candidates[rows, best])
    return torch.stack(seeds, -1)


def lloyd(
    x: Float[Tensor, "n d"],
    centers: Float[Tensor, "r k d"],
    iterations: int,
    weight: Float[Tensor, "n"] | None = None,
) -> Int[Tensor, "r n"]:
    """Labels ``[R, n]`` after at most ``iterations`` of Lloyd's algorithm from ``centers [R, K, D]``."""
    base = torch.ones(len(x), dtype=x.dtype, device=x.device) if weight is None else weight.to(x)
    labels = _distances(x, centers).argmin(-2)
    for _ in range(iterations):
        r, k, d = centers.shape
        count = x.new_zeros(r, k).scatter_add(-1, labels, base.expand(r, -1))
        rows = labels.unsqueeze(-1).expand(r, len(x), d)
        total = x.new_zeros(r, k, d).scatter_add(1, rows, (x * base.unsqueeze(-1)).expand(r, -1, d))
        centers = torch.where((count > 0).unsqueeze(-1), total / count.clamp(min=1e-300).unsqueeze(-1), centers)
        new = _distances(x, centers).argmin(-2)
        if bool((new == labels).all()):
            break
        labels = new
    return labels


def ward(x: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n"]:
    """Labels ``[n]`` of Ward's agglomerative clustering cut at ``k`` clusters, in O(n²) memory.

    The nearest-neighbour chain merges reciprocal neighbours, with the Lance–Williams update of the distances; merges
    are then replayed in the order of their heights.

    Source: F. Murtagh (1983); G. N. Lance, W. T. Williams (1967).
    """
    n = len(x)
    gap = torch.cdist(x, x).square()
    gap.fill_diagonal_(torch.inf)
    size = torch.ones(n, dtype=x.dtype, device=x.device)
    alive = torch.ones(n, dtype=torch.bool, device=x.device)
    merges: list[tuple[float, int, int]] = []
    chain: list[int] = []
    while len(merges) < n - 1:
        if not chain:
            chain = [int(alive.nonzero()[0])]
        while True:
            tip = chain[-1]
            row = gap[tip]
            nearest = int(row.argmin())
            # On a tie the predecessor wins, else the chain could walk in circles.
            if len(chain) > 1 and float(row[chain[-2]]) <= float(row[nearest]):
                nearest = chain[-2]
            if len(chain) > 1 and nearest == chain[-2]:
                break
            chain.append(nearest)
        a, b = sorted((chain.pop(), chain.pop()))
        merges.append((float(gap[a, b]), a, b))
        joint = (size[a] + size) * gap[a] + (size[b] + size) * gap[b] - size * gap[a, b]
        joint = torch.where(alive, joint / (size[a] + size[b] + size), torch.inf)
        alive[b] = False
        size[a] += size[b]
        joint[a], joint[b] = torch.inf, torch.inf
        gap[a], gap[:, a] = joint, joint
        gap[b], gap[:, b] = torch.inf, torch.inf
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for _, a, b in sorted(merges, key=lambda m: m[0])[: max(0, n - k)]:
        parent[root(b)] = root(a)
    return torch.tensor([root(i) for i in range(n)], device=x.device).unique(return_inverse=True)[1]
