"""Priors over the coefficients of regressions whose M-steps are quadratics."""

from typing import Any

import torch
from torch import Tensor

from torchem.batch import as_tensor
from torchem.errors import invalid
from torchem.factor import Factor, Prior
from torchem.stats import Stats


class Normal(Prior):
    """Independent normal coefficients about zero: a ridge. It keeps them finite where a plane separates classes.

    log p(w) = −½ Σ_m λ_m w_m² + const for each output of each state of a `PoissonRegression` or `BinomialRegression`;
    of the classes of a `SoftmaxRegression`, of which only differences matter, −¼ Σ_j Σ_m λ_m (w_jm − w̄_m)², the same
    whichever class is pinned.

    Args:
        precision: λ, a number or one for each input ``[M]``; zero for an input, such as the intercept, that is to be
            free. The prior is then improper, and its log-density leaves that input out.

    Raises:
        InvalidArgument: For a negative number, or one that is not finite.

    Source: A. E. Hoerl, R. W. Kennard (1970).

    Example:
        >>> from torchem.factors import BinomialRegression
        >>> odds = BinomialRegression(1, 2)
        >>> odds.prior = Normal([0.0, 1.0])
        >>> odds.log_prior()
        tensor(-0.9189, dtype=torch.float64, grad_fn=<...>)
    """

    def __init__(self, precision: Any = 1.0):
        value = as_tensor(precision, "precision").to(torch.float64)
        if value.dim() > 1 or not bool((value.isfinite() & (value >= 0)).all()):
            raise invalid("precision", "a number of at least zero, or one for each input", precision, "correct it")
        self.precision = value

    def config(self) -> dict[str, Any]:
        return {"precision": self.precision.tolist()}

    def check(self, factor: Factor) -> None:
        if not hasattr(factor, "normal_stats"):
            raise invalid(
                "prior", "a generalised linear regression or a softmax gate to stand over", type(factor).__name__,
                "use its own prior",
            )  # fmt: skip
        size = factor.n_inputs  # pyright: ignore[reportAttributeAccessIssue]
        if self.precision.dim() and len(self.precision) != size:
            raise invalid("precision", f"{size} numbers, one for each input", len(self.precision), "correct them")

    def mode_stats(self, factor: Factor) -> Stats:
        family: Any = factor
        return family.normal_stats(self.precision.to(factor.device).expand(family.n_inputs))

    def posterior_stats(self, factor: Factor) -> Stats:
        return self.mode_stats(factor)

    def log_prob(self, factor: Factor) -> Tensor:
        # The log-density is a quadratic as those that the statistics hold.
        return factor.expected_log_prob(self.mode_stats(factor))
