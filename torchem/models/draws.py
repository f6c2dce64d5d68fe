"""Sequences drawn from a hidden Markov model, frame by frame."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid

if TYPE_CHECKING:
    from torchem.models.hmm import HMM


def reach(model: "HMM") -> int:
    """How many frames back the emission reads."""
    return max(getattr(model.emission, "lags", 0), model.emission.memory)


def follow(
    model: "HMM", x: Tensor, past: Tensor, states: Tensor, u: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """Frames ``[n, T, D]`` in given states, each drawn with those before it at hand.

    Args:
        model: Whose emission reads earlier frames or states.
        x: ``[n, lags, D]`` frames before the first.
        past: ``[n, memory]`` states before the first, in order of time.
        states: ``[n, T]``.
        u: ``[n, T, M]`` covariates.
        generator: Source of the draws.
    """
    k, lags, memory = model.n_components, x.shape[1], past.shape[1]
    states = torch.cat([past, states], 1)
    for t in range(memory, states.shape[1]):
        window = torch.cat([x[:, -lags:], torch.zeros_like(x[:, :1])], 1)
        own = None if u is None else u[:, t - memory, None].expand(-1, lags + 1, -1)
        frame = model.emission.context(Batch(window, u=own))
        code = states[:, t]
        for back in range(1, memory + 1):
            code = code * k + states[:, t - back]
        now = Batch(window[:, -1], u=None if frame.u is None else frame.u[:, -1])
        x = torch.cat([x, model.emission.sample(code, now, generator).unsqueeze(1)], 1)
    return x[:, lags:]


class Draw:
    """Sequences drawn frame by frame."""

    def __init__(self, model: "HMM", n: int, length: int | None, inputs: Any, generator: torch.Generator | None):
        self.model, self.n, self.length, self.generator = model, n, length, generator
        u = None if inputs is None else as_tensor(inputs, "inputs").to(model.device, model.dtype)
        self.u = u.expand(n, -1, -1) if u is not None and u.dim() == 2 else u
        if self.u is not None and self.u.shape[:2] != (n, length):
            raise invalid("inputs", f"[{n}, {length}, M]", list(self.u.shape), "give covariates for each frame")

    def run(self) -> tuple[Any, Any]:
        """Observations and states."""
        if self.length is None:
            return self._random_lengths()
        z = self._states(self.n, self.length, self.u)
        return self._observations(z, self.u), z

    def pick(self, probs: Tensor) -> Tensor:
        """One of the columns for each row of ``probs [n, K]``."""
        if not len(probs):
            return torch.empty(0, dtype=torch.long, device=probs.device)
        return torch.multinomial(probs, 1, generator=self.generator)[:, 0]

    def _first(self, blank: Batch) -> Tensor:
        """Probabilities ``[n or 1, K]`` of the first state."""
        law = self.model.initial.log_table(blank).exp()
        return law[:, 0] if law.dim() > 2 else law

    def _states(self, n: int, length: int, u: Tensor | None) -> Tensor:
        model = self.model
        blank = Batch(torch.zeros(n, length, 1, device=model.device), u=u)
        table = model.transition.log_table(blank).exp()
        z = self.pick(self._first(blank).expand(n, -1))
        path = [z]
        for t in range(1, length):
            matrix = table[:, t] if model.varying(table) else table
            z = self.pick(matrix.expand(n, -1, -1)[torch.arange(n), z])
            path.append(z)
        return torch.stack(path, 1)

    def _observations(self, z: Tensor, u: Tensor | None) -> Tensor:
        model, (n, length) = self.model, z.shape
        lags = reach(model)
        if lags:
            return self._fed_back(z, u, lags)
        batch = Batch(torch.zeros(n * length, 1, device=model.device), u=None if u is None else u.flatten(0, 1))
        return model.emission.sample(z.flatten(), batch, self.generator).unflatten(0, (n, length))

    def _fed_back(self, z: Tensor, u: Tensor | None, lags: int) -> Tensor:
        """Frames that depend on those before: one at a time, from zeros, with a run-up that is cut off."""
        model, (n, length) = self.model, z.shape
        runup = 50 * lags
        states = torch.cat([z[:, :1].expand(-1, runup), z], 1)
        covariates = None if u is None else torch.cat([u[:, :1].expand(-1, runup, -1), u], 1)
        features = model.emission.n_features or 1
        x = torch.zeros(n, lags, features, dtype=model.dtype, device=model.device)
        past = states[:, :1].expand(-1, model.emission.memory)
        return follow(model, x, past, states, covariates, self.generator)[:, -length:]

    def _random_lengths(self) -> tuple[list[Tensor], list[Tensor]]:
        model = self.model
        stop = model.end_probs
        xs, zs = [], []
        blank = Batch(torch.zeros(1, 1, 1, device=model.device))
        table = model.transition_matrix
        for _ in range(self.n):
            z = self.pick(self._first(blank))
            path = [z]
            # Bounded: a chain that never ends is cut after a million frames.
            while len(path) < 1_000_000 and not bool(
                torch.rand((), generator=self.generator).to(stop) < stop[path[-1]]
            ):
                path.append(self.pick(table[path[-1]]))
            zs.append(torch.cat(path))
            xs.append(self._observations(zs[-1].unsqueeze(0), None)[0])
        return xs, zs
