"""Comparing restarts: which components of two solutions correspond, and how far the solutions agree."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchem.batch import Batch
from torchem.model import LatentModel


def assignment(score: Float[Tensor, "k k"]) -> list[int]:
    """The one-to-one assignment of rows to columns of a square matrix with the greatest total score.

    Shortest augmenting paths with potentials, O(K³).

    Source: R. Jonker, A. Volgenant (1987).

    Example:
        >>> assignment(torch.tensor([[1.0, 5.0], [2.0, 3.0]]))
        [1, 0]
    """
    cost = (-score).tolist()
    n = len(cost)
    u, v = [0.0] * (n + 1), [0.0] * (n + 1)
    owner = [0] * (n + 1)
    for row in range(1, n + 1):
        owner[0], column = row, 0
        least, way, seen = [float("inf")] * (n + 1), [0] * (n + 1), [False] * (n + 1)
        while owner[column]:
            seen[column] = True
            current, step, following = owner[column], float("inf"), 0
            for j in range(1, n + 1):
                if seen[j]:
                    continue
                reduced = cost[current - 1][j - 1] - u[current] - v[j]
                if reduced < least[j]:
                    least[j], way[j] = reduced, column
                if least[j] < step:
                    step, following = least[j], j
            for j in range(n + 1):
                if seen[j]:
                    u[owner[j]] += step
                    v[j] -= step
                else:
                    least[j] -= step
            column = following
        while column:
            owner[column] = owner[way[column]]
            column = way[column]
    result = [0] * n
    for j in range(1, n + 1):
        result[owner[j] - 1] = j - 1
    return result


def align(best: Int[Tensor, "n"], other: Int[Tensor, "n"], n_states: int) -> tuple[list[int], float]:
    """Relabel ``other`` to ``best``.

    Args:
        best: ``[n]`` states under the solution to compare with.
        other: ``[n]`` states under another.
        n_states: K.

    Returns:
        For each state of ``best`` the state of ``other`` that corresponds to it, and the share of observations on which
        the two then agree.

    Example:
        >>> align(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), 2)
        ([1, 0], 1.0)
    """
    known = (best >= 0) & (other >= 0)  # not padding
    best, other = best[known], other[known]
    pairs = torch.bincount(best.cpu() * n_states + other.cpu(), minlength=n_states**2)
    table = pairs.reshape(n_states, n_states).to(torch.float64)
    order = assignment(table)
    agreed = table[torch.arange(n_states), torch.tensor(order)].sum() / max(1, len(best))
    return order, float(agreed)


def compare(models: list[LatentModel], best: int, sample: Batch, n_states: int) -> tuple[list[list[int]], list[float]]:
    """Alignment and agreement of every restart with the best, on a sample."""
    labels = [model.most_likely(sample).flatten() for model in models]
    pairs = [align(labels[best], label, n_states) for label in labels]
    return [order for order, _ in pairs], [share for _, share in pairs]
