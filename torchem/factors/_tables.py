"""What families of probability tables have in common."""

import torch
from torch import Tensor

#: How far emissions start at least from the frequencies in all data: root mean square of their log-ratios ...
_SPREAD = 0.5
#: ... as far as differences below rounding need not be blown up for it.
_MOST = 1e4


def apart(counts: Tensor) -> Tensor:
    """Counts ``[*r, K, M]`` with the log-ratios of each row to all rows together scaled up where they are small.

    Random responsibilities of many observations give every state nearly the frequencies of all: a saddle, which EM
    leaves so slowly that it seems to have converged.
    """
    rows, overall = counts.sum(-1, keepdim=True), counts.sum(-2, keepdim=True)
    share = overall / overall.sum(-1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
    ratio = torch.where(counts > 0, counts / (rows * share), 1.0).log()
    size = (share * ratio.square()).sum(-1, keepdim=True).mean(-2, keepdim=True).sqrt()
    power = (_SPREAD / size.clamp(min=_SPREAD / _MOST)).clamp(min=1.0)
    return rows * share * (power * ratio).exp()
