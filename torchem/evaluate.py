"""Judging a fitted model: information criteria."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from torchem.batch import Batch
from torchem.model import LatentModel


@dataclass(frozen=True)
class Criteria:
    """Log-likelihood and what is made of it; lower `aic`, `bic` and `icl` are better.

    Attributes:
        loglik: Total (weighted) log-likelihood, in nats.
        n_parameters: Free parameters.
        n: Total weight: the number of observations when there are no weights.
        aic: −2 loglik + 2 n_parameters.
        bic: −2 loglik + n_parameters · log n.
        icl: BIC plus twice the entropy of the posteriors: prefers components that do not overlap.
    """

    loglik: float
    n_parameters: int
    n: float
    aic: float
    bic: float
    icl: float


@torch.no_grad()
def criteria(model: LatentModel, data: Any, weights: Any = None) -> Criteria:
    """Information criteria of a model on data.

    Source: H. Akaike (1974); G. Schwarz (1978); C. Biernacki, G. Celeux, G. Govaert (2000).

    Example:
        >>> import torchem
        >>> torchem.criteria(torchem.GaussianMixture(1, 1), [[0.0], [1.0]]).n_parameters
        2
    """
    batch = data if isinstance(data, Batch) and weights is None else model.batch(data, weight=weights)
    loglik, entropy = 0.0, 0.0
    for piece in model.stream(batch):
        weight = 1.0 if piece.weight is None else piece.weight
        log_prob = model.log_prob(piece)
        if piece.weight is not None:
            log_prob = torch.where(piece.weight > 0, log_prob, 0.0)
        posterior = model.posterior(piece)
        loglik += float((log_prob * weight).sum(dtype=torch.float64))
        entropy += float((torch.special.entr(posterior).sum(-1) * weight).sum(dtype=torch.float64))
    count, k = float(batch.total_weight()), model.n_parameters()
    bic = -2 * loglik + k * math.log(count)
    return Criteria(loglik, k, count, -2 * loglik + 2 * k, bic, bic + 2 * entropy)
