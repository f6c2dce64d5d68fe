"""What regressions on covariates have in common: coefficients in each state, and some that all states share."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torchem.batch import Batch, as_tensor
from torchem.errors import invalid
from torchem.factor import Factor


def checked_columns(columns: Sequence[int] | None, n_inputs: int) -> tuple[int, ...] | None:
    """Which columns of u a factor reads; None for all of them, in order.

    Raises:
        InvalidArgument: Unless there is a different one for each input.

    Example:
        >>> checked_columns([0, 3], 2)
        (0, 3)
    """
    if columns is None:
        return None
    chosen = tuple(columns)
    whole = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in chosen)
    if not whole or len(set(chosen)) != len(chosen) or len(chosen) != n_inputs:
        raise invalid(
            "columns", f"{n_inputs} different columns of u (n_inputs), counted from 0", list(chosen), "correct them"
        )
    return chosen


def covariates(batch: Batch, n_inputs: int, columns: tuple[int, ...] | None = None) -> Tensor:
    """The covariates ``[*n, M]`` that a factor reads.

    Raises:
        InvalidArgument: If there are none, or not as many as it reads.
    """
    u = batch.u
    wide = u is not None and (u.shape[-1] == n_inputs if columns is None else u.shape[-1] > max(columns))
    if u is None or not wide:
        got = "none" if u is None else f"{u.shape[-1]} columns"
        width = n_inputs if columns is None else f"M > {max(columns)}"
        raise invalid("inputs", f"covariates [N, {width}]", got, "pass inputs=u to fit, or Batch(x, u=u)")
    return u if columns is None else u[..., list(columns)]


class Coefficients(Factor):
    """Regressions of D columns on M covariates in each of K states; chosen coefficients are common to all states.

    Parameters are ``coefficient [K, D, M − S]`` and ``common [D, S]``, either of them absent where it would be empty.

    Args:
        n_components: K, the number of states.
        n_inputs: M, the number of columns of u that it reads.
        n_outputs: D, the number of columns of x.
        shared: Inputs whose coefficients all states have in common, or ``"all"``.
        columns: Which columns of u are the inputs; all of them when None.

    Raises:
        InvalidArgument: For sizes below one, or a column that u has not.
    """

    views: ClassVar = {"weight": "coefficient"}
    reads: ClassVar = frozenset({"u"})
    # Lines through chosen observations: clusters of x say little of regressions, and random shares of much data give
    # components that hardly differ.
    default_init: ClassVar[str] = "random_from_data"

    coefficient: Tensor | None
    common: Tensor | None

    def __init__(
        self,
        n_components: int,
        n_inputs: int,
        n_outputs: int,
        shared: Sequence[int] | Literal["all"] = (),
        columns: Sequence[int] | None = None,
    ):
        super().__init__()
        for name, size in (("n_components", n_components), ("n_inputs", n_inputs), ("n_outputs", n_outputs)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        common = tuple(range(n_inputs)) if shared == "all" else tuple(shared)
        if len(set(common)) < len(common) or not set(common) <= set(range(n_inputs)):
            raise invalid("shared", f"different columns from 0 to {n_inputs - 1}", shared, "count columns of u from 0")
        self._k, self.n_inputs, self.n_outputs = n_components, n_inputs, n_outputs
        self.shared, self.columns = common, checked_columns(columns, n_inputs)
        self._own = [m for m in range(n_inputs) if m not in common]
        for name in ("coefficient", "common"):
            self.register_parameter(name, None)
        if self._own:
            self.new_parameter("coefficient", torch.zeros(n_components, n_outputs, len(self._own)))
        if common:
            self.new_parameter("common", torch.zeros(n_outputs, len(common)))
            self.shared_parameters = frozenset({"common"})

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self.n_outputs

    # ---- coefficients -----------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """Coefficients ``[*r, K, D, M]``; assignable."""
        weight = self._joined(self.coefficient, self.common)
        if not self.shared:
            return weight
        order = [*self._own, *self.shared]
        return weight[..., sorted(range(self.n_inputs), key=order.__getitem__)]

    @weight.setter
    def weight(self, value: Any) -> None:
        weight = as_tensor(value, "weight").to(self.device, torch.float64)
        shape = [*self.replicas, self._k, self.n_outputs, self.n_inputs]
        if list(weight.shape) != shape:
            raise invalid("weight", f"shape {shape}", list(weight.shape), "give a matrix [D, M] per component")
        if not bool(weight.isfinite().all()):
            raise invalid("weight", "finite numbers", "NaN or infinity", "correct that entry")
        common = weight[..., list(self.shared)]
        if bool((common != common[..., :1, :, :]).any()):
            raise invalid(
                "weight", f"equal coefficients of the shared inputs {list(self.shared)}", "coefficients that differ",
                "repeat them for every component",
            )  # fmt: skip
        with torch.no_grad():
            if self.coefficient is not None:
                self.coefficient.copy_(weight[..., self._own])
            if self.common is not None:
                self.common.copy_(common[..., 0, :, :])

    def _joined(self, coefficient: Tensor | None, common: Tensor | None) -> Tensor:
        """All coefficients ``[*r, K, D, M]``, those in common last."""
        if common is None:
            assert coefficient is not None
            return coefficient
        repeated = common.unsqueeze(-3).expand(*common.shape[:-2], self._k, *common.shape[-2:])
        return repeated if coefficient is None else torch.cat([coefficient, repeated], -1)

    # ---- data -------------------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        super().check(batch)
        self._inputs(batch)

    def _inputs(self, batch: Batch) -> Tensor:
        return covariates(batch, self.n_inputs, self.columns)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Coefficients":
        """Keep parameters, or the entries of one where ``mask`` is True, through every M-step."""
        super().freeze(*names, mask=mask)
        # A component whose coefficients are kept keeps those that it has in common with the others.
        held = self.frozen("coefficient")
        if held is not None and self.shared and bool(held.any()):
            self.register_buffer("frozen_common", held.any())
        return self

    def unfreeze(self, *names: str) -> "Coefficients":
        """Let the M-step move these views (all of them when empty) again."""
        super().unfreeze(*names)
        if self.frozen("coefficient") is None:
            self._buffers.pop("frozen_common", None)
        return self

    def sizes(self) -> dict[str, int]:
        """Free numbers of each parameter."""
        own, common = len(self._own), len(self.shared)
        return {"coefficient": self._k * self.n_outputs * own, "common": self.n_outputs * common}

    def n_parameters(self) -> int:
        masks = {name: self.frozen(name) for name in self.sizes()}
        kept = {name: 0.0 if mask is None else float(mask.double().mean()) for name, mask in masks.items()}
        return sum(round(size * (1 - kept[name])) for name, size in self.sizes().items())

    def select(self, keep: Tensor) -> "Coefficients":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = type(self)(**{**self.config(), "n_components": len(index)}).to(self.device, self.dtype)
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            whole = name in {*self.shared_parameters, "unit", "center", "extent", "frozen_common"} or value.dim() == 0
            kept = (value if whole else value[index]).detach().clone()
            if isinstance(value, torch.nn.Parameter):
                small.get_parameter(name).data = kept
            else:
                small.register_buffer(name, kept)
        return small
