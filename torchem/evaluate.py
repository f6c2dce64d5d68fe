"""Judging a fitted model: information criteria."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from torchem.data import Source
from torchem.model import LatentModel


@dataclass(frozen=True)
class Criteria:
    """Log-likelihood and what is made of it; lower `aic`, `bic` and `icl` are better.

    Attributes:
        loglik: Total (weighted) log-likelihood, in nats; a lower bound on it where `bound` is True.
        n_parameters: Free parameters.
        n: Total weight: the number of observations when there are no weights.
        aic: −2 loglik + 2 n_parameters.
        bic: −2 loglik + n_parameters · log n.
        icl: BIC plus twice the entropy of the posteriors: prefers components that do not overlap.
        bound: Whether the likelihood is too dear to compute and the model's bound stands for it: criteria are then too
            large, and compare models of one kind of posterior.
    """

    loglik: float
    n_parameters: int
    n: float
    aic: float
    bic: float
    icl: float
    bound: bool = False


@torch.no_grad()
def criteria(
    model: LatentModel,
    data: Any,
    weights: Any = None,
    *,
    inputs: Any = None,
    lengths: Any = None,
    labels: Any = None,
    observed: Any = None,
    offset: Any = None,
    trials: Any = None,
) -> Criteria:
    """Information criteria of a model on data, in one pass over what `torchem.fit` takes.

    Args:
        model: Any model that knows the entropy of its posteriors.
        data: As for `torchem.fit`, as are all that follow.
        weights: Weight per observation or sequence.
        inputs: Covariates.
        lengths: Frames of each sequence.
        labels: What is known of the latent states.
        observed: False where an entry is missing.
        offset: Known terms of linear predictors.
        trials: Numbers of trials.

    Source: H. Akaike (1974); G. Schwarz (1978); C. Biernacki, G. Celeux, G. Govaert (2000).

    Example:
        >>> import torchem
        >>> torchem.criteria(torchem.GaussianMixture(1, 1), [[0.0], [1.0]]).n_parameters
        2
    """
    loglik = entropy = count = 0.0
    bound = False
    for _, batch in Source(model, data, None, weights, inputs, lengths, labels, observed, offset, trials):
        log_prob, bound = model.log_score(batch), bound or model.scored_by_bound(batch)
        if batch.weight is not None:
            weight = batch.weight.to(log_prob.device)
            log_prob = torch.where(weight > 0, log_prob, 0.0) * weight
        loglik += float(log_prob.sum(dtype=torch.float64))
        entropy += float(model.entropy(batch))
        count += float(model.count(batch))
    k = model.n_parameters()
    bic = -2 * loglik + k * math.log(count)
    return Criteria(loglik, k, count, -2 * loglik + 2 * k, bic, bic + 2 * entropy, bound)
