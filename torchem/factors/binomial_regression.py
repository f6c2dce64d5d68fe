"""Successes among trials whose log-odds are linear in covariates: logistic and binomial regressions."""

from typing import ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch, refuse_entries, values_known
from torchem.factor import Factor
from torchem.factors._glm import Expansion, GeneralizedLinear

#: Log-odds below which a series stands for tanh(η/2) / 2η.
_FLAT = 1e-3


class BinomialRegression(GeneralizedLinear):
    """Numbers of successes in each state, with log-odds linear in covariates; a logistic regression without trials.

    log p(x | u, k) = Σ_d x_d η_kd − t log(1 + exp η_kd) + log C(t, x_d),   η_kd = offset + w_kd · u.

    ``Batch.trials`` is t, the same for all columns of a row; it is one where it is left out. There is no intercept
    unless u has a column of ones. Entries of x that are NaN are missing.

    The quadratics of the M-step (see `GeneralizedLinear`) have the curvature

        c = t tanh(η/2) / 2η ≤ t/4,

    the least for which a quadratic that touches the log-density at η lies below it everywhere. So no M-step lowers Q in
    any way to run EM, and where classes are separated coefficients grow, but by less and less. A prior
    (`torchem.priors.Normal`) keeps them finite.

    Args:
        n_components: K, the number of states.
        n_inputs: M, the number of columns of u that it reads.
        n_outputs: D, the number of columns of x.
        shared: Inputs whose coefficients all states have in common, or ``"all"``.
        columns: Which columns of u are the inputs; all of them when None.

    Raises:
        InvalidArgument: For sizes below one, or a column that u has not.

    Source: T. S. Jaakkola, M. I. Jordan (2000), section 3; J. de Leeuw, K. Lange (2009), that no quadratic is sharper;
        D. Böhning, B. G. Lindsay (1988) for t/4.

    Example:
        >>> odds = BinomialRegression(1, 2)
        >>> odds.weight = [[[0.0, 1.0]]]
        >>> odds.log_prob(Batch(torch.ones(2, 1), u=torch.tensor([[1.0, 0.0], [1.0, 2.0]]))).exp()[:, 0]
        tensor([0.5000, 0.8808], grad_fn=<...>)
    """

    reads: ClassVar = frozenset({"u", "offset", "trials"})

    def check(self, batch: Batch) -> None:
        super().check(batch)
        if not values_known():
            return
        trials = torch.ones(()) if batch.trials is None else batch.trials.unsqueeze(-1)
        beyond = batch.x.detach() > trials.to(batch.x.device)
        if bool(beyond.any()):
            most = f"{trials.expand_as(batch.x)[beyond][0].item():g}"
            expected = f"at most as many successes as trials ({most})"
            refuse_entries(batch, beyond, expected, "correct it, or pass trials to fit")

    def expand(self, eta: Tensor, y: Tensor, trials: Tensor) -> Expansion:
        flat = eta.abs() < _FLAT
        safe = torch.where(flat, 1.0, eta)
        bend = torch.where(flat, 0.25 - eta.square() / 48, (safe / 2).tanh() / (2 * safe))
        value = y * eta - trials * torch.nn.functional.softplus(eta)
        return Expansion(value, y - trials * eta.sigmoid(), trials * bend)

    def base_measure(self, y: Tensor, trials: Tensor) -> Tensor:
        # Entries that are missing stand as zero; those that cannot be are refused at the edge, or impossible.
        failures = trials - y
        value = (trials + 1).lgamma() - (y + 1).lgamma() - (failures.clamp(min=0.0) + 1).lgamma()
        return torch.where(failures < 0, -torch.inf, value)

    def mean_variance(self, eta: Tensor, trials: Tensor) -> tuple[Tensor, Tensor]:
        p = eta.sigmoid()
        return trials * p, trials * p * (1 - p)

    def draw(self, eta: Tensor, trials: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.binomial(trials.expand_as(eta).contiguous(), eta.sigmoid(), generator=generator)

    def distribution(self, y: Tensor, eta: Tensor, trials: Tensor) -> Tensor:
        y, total = y.floor(), torch.zeros_like(eta)
        # A sum over all outcomes: torch has no incomplete beta function.
        for outcome in range(int(trials.max()) + 1 if trials.numel() else 0):
            at = torch.full_like(y, outcome)
            log_prob = self.expand(eta, at, trials).value + self.base_measure(at, trials)
            total = total + torch.where((at <= y) & (at <= trials), log_prob.exp(), 0.0)
        return total.clamp(max=1.0)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        """Numbers of successes among trials, with missing entries."""
        generator = torch.Generator().manual_seed(0)
        family = cls(3, 2, 2).double()
        family.weight = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
        u = torch.randn(30, 2, generator=generator, dtype=torch.float64)
        u[:, 0] = 1.0
        trials = torch.randint(1, 6, (30,), generator=generator).double()
        x = (torch.rand(30, 2, generator=generator, dtype=torch.float64) * (trials + 1).unsqueeze(-1)).floor()
        x[0, 0], x[::7, 1] = trials[0], torch.nan
        return family, Batch(x, u=u, trials=trials)
