"""A new family in one file: mixtures of geometric distributions.

Everything else is inherited: streaming, batched restarts, weights, the bound, distribution over processes, saving.
"""

from typing import ClassVar

import torch
from torch import Tensor

import torchem
from torchem import Batch, ExponentialFamily, Factor, Stats


class Geometric(ExponentialFamily):
    """Independent counts of failures before a success: log p(x | k) = Σ_d x_d log(1 − p_kd) + log p_kd."""

    views: ClassVar = {"probs": "logits"}

    def __init__(self, n_components: int, n_features: int):
        super().__init__()
        self.size = (n_components, n_features)
        self.new_parameter("logits", torch.zeros(n_components, n_features))

    @property
    def n_components(self) -> int:
        return self.size[0]

    @property
    def n_features(self) -> int:
        return self.size[1]

    @property
    def probs(self) -> Tensor:
        return self.logits.sigmoid()

    def features(self, batch: Batch) -> Tensor:
        return batch.x

    def natural(self) -> tuple[Tensor, Tensor]:
        return (-self.logits).sigmoid().log(), -self.logits.sigmoid().log().sum(-1)

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        # p = n / (n + Σx), so logit p = log n − log Σx; the clamps keep an empty component finite.
        count = stats["count"].clamp(min=1e-30).unsqueeze(-1)
        logits = count.log() - stats["features"].clamp(min=1e-30).log()
        return {"logits": self.keep_frozen("logits", logits.to(self.dtype))}

    def n_parameters(self) -> int:
        return self.size[0] * self.size[1]

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        u = torch.rand(len(z), self.n_features, dtype=self.dtype, device=self.device, generator=generator)
        return (u.log() / (-self.logits).sigmoid().log()[z]).floor()

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        family = cls(2, 1).double()
        family.logits.data += torch.tensor([[1.0], [-2.0]])
        return family, Batch(torch.arange(8.0).double().unsqueeze(-1))


if __name__ == "__main__":
    truth = torchem.Mixture(torchem.factors.Categorical(2), Geometric(2, 1))
    truth.component.logits.data = torch.tensor([[1.0], [-2.0]])
    x = truth.sample(5000, generator=torch.Generator().manual_seed(0))
    model = torchem.Mixture(torchem.factors.Categorical(2), Geometric(2, 1))
    result = torchem.fit(model, x, restarts=8, seed=0, tol=1e-8, max_iter=2000)
    print(result.status, model.weights.tolist(), model.component.probs.flatten().tolist())
