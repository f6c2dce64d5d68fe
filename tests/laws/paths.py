"""The joint law of tiny hidden Markov models, one path of states at a time: factors are asked, inference is not."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.models import HMM


@dataclass(frozen=True)
class Paths:
    """All paths of one sequence.

    Attributes:
        states: ``[P, L]`` of each path.
        log_joint: ``[P]`` log p(x, z), evidence included, differentiable.
        codes: ``[P, L]`` expanded states: the present one and those that the emission remembers.
    """

    states: Tensor
    log_joint: Tensor
    codes: Tensor

    @property
    def log_prob(self) -> Tensor:
        return self.log_joint.logsumexp(0) if bool(self.log_joint.max() > -torch.inf) else self.log_joint.max()

    @property
    def shares(self) -> Tensor:
        """Posterior of each path; zeros where none is possible."""
        joint = self.log_joint.detach()
        return joint.softmax(0) if bool(joint.max() > -torch.inf) else torch.zeros_like(joint)

    def expected(self, place: int, size: int, codes: bool = False) -> Tensor:
        """Posterior ``[size]`` of the state, or the expanded one, at a frame."""
        which = self.codes if codes else self.states
        return torch.zeros(size, dtype=self.shares.dtype).index_add(0, which[:, place], self.shares)

    def steps(self, place: int, k: int) -> Tensor:
        """Posterior ``[K, K]`` of the step into a frame."""
        cell = self.states[:, place - 1] * k + self.states[:, place]
        return torch.zeros(k * k, dtype=self.shares.dtype).index_add(0, cell, self.shares).view(k, k)

    @property
    def entropy(self) -> Tensor:
        share = self.shares
        return -torch.where(share > 0, share * share.log(), 0.0).sum()


def all_paths(model: HMM, batch: Batch) -> list[Paths]:
    """Every path of every sequence of a batch."""
    k, memory = model.n_components, model.emission.memory
    frames = batch.x.shape[1]
    known = model.emission.context(batch)
    initial, transition = model.initial.log_table(batch), model.transition.log_table(batch)
    ends = None if model.end is None else model.end.log_table(batch)[0]
    found = []
    for n, length in enumerate(batch.frames().tolist()):
        states = torch.tensor(list(itertools.product(range(k), repeat=length)))
        codes = torch.zeros_like(states)
        for back in range(memory + 1):
            before = states[:, (torch.arange(length) - back).clamp(min=0)]
            codes = codes + before * k ** (memory - back)
        score = (initial[0] if initial.dim() == 2 else initial[n, 0])[states[:, 0]]
        for t in range(length):
            score = score + _emitted(model, known, n, t)[codes[:, t]]
            if t:
                step = transition[0] if transition.dim() == 3 else transition[n, t]
                score = score + step[states[:, t - 1], states[:, t]]
            if batch.evidence is not None:
                score = score + batch.evidence[n, t][states[:, t]]
            if ends is not None:
                score = score + ends[states[:, t], int(t == length - 1)]
        found.append(Paths(states, score, codes))
    assert frames >= max(batch.frames().tolist(), default=0)
    return found


def _emitted(model: HMM, known: Batch, n: int, t: int) -> Tensor:
    """log p(x_t | states) ``[K^(L+1)]``; a frame that is missing altogether says nothing."""
    x = known.x[n, t].unsqueeze(0)
    size = model.n_components ** (model.emission.memory + 1)
    if x.is_floating_point() and bool(x.isnan().all()):
        return torch.zeros(size, dtype=model.dtype)
    given = {name: getattr(known, name) for name in ("u", "offset", "trials")}
    fields = {name: value[n, t].unsqueeze(0) for name, value in given.items() if value is not None}
    return model.emission.log_prob(Batch(model.emission.cast(x), **fields))[0]
