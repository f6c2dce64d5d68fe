"""What families of directions have in common: their concentrations."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchem.batch import as_tensor
from torchem.errors import invalid, whole_number
from torchem.factor import Factor

#: The least concentration: a uniform law, but that its logarithm is finite.
LEAST = 1e-6

F = TypeVar("F", bound=Factor)


def check_sizes(n_components: Any, n_features: Any, cap: Any, least: int) -> None:
    """Refuse sizes and caps that cannot be.

    Raises:
        InvalidArgument: Then.
    """
    for name, size, low in (("n_components", n_components, 1), ("n_features", n_features, least)):
        whole_number(name, size, low, f"give at least {low}")
    if isinstance(cap, bool) or not isinstance(cap, (int, float)) or not 1 < cap <= 1e12:
        raise invalid("concentration_cap", "a number above 1, up to 1e12", repr(cap), "the default is 1e6")


def assign_concentrations(parameter: Tensor, value: Any, cap: float) -> None:
    """Set the logarithms of concentrations on behalf of a view.

    Raises:
        InvalidArgument: For a wrong shape, or entries outside the bounds.
    """
    kappa = as_tensor(value, "concentrations").to(parameter.device, torch.float64)
    if kappa.shape != parameter.shape:
        raise invalid("concentrations", f"shape {list(parameter.shape)}", list(kappa.shape), "give one per component")
    if not bool(((kappa >= LEAST) & (kappa <= cap)).all()):
        raise invalid(
            "concentrations", f"numbers from {LEAST:g} to {cap:g}", "one outside, or NaN",
            "raise concentration_cap if it must be larger",
        )  # fmt: skip
    with torch.no_grad():
        parameter.copy_(kappa.log())


def movable(alive: Tensor, kappa: Tensor, old: Tensor) -> Tensor:
    """New logarithms of concentrations where anything was seen."""
    return torch.where(alive, kappa.log().to(old.dtype), old)


def selected(family: F, keep: Tensor, build: Callable[[int], F]) -> F:
    """A family with the components ``keep`` of another: all parameters have these first."""
    index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
    small = build(len(index)).to(family.device, family.dtype)
    for name, value in family.named_parameters():
        small.get_parameter(name).data = value.detach()[index].clone()
        if (mask := family.frozen(name)) is not None:
            small.register_buffer(f"frozen_{name}", mask[index] if mask.dim() else mask)
    return small
