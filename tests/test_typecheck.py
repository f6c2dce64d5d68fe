"""The checker of annotations: what it has found right it does not look at again, and all else it does."""

from typing import Any, Literal

import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import tests.typecheck


class Scales:
    """Its results depend on more than arguments say."""

    def __init__(self, n: int):
        self.result, self.calls = torch.zeros(n), 0

    def __call__(
        self, x: Float[Tensor, "n d"], by: Float[Tensor, " n"], way: Literal["up", "down"] = "up"
    ) -> tuple[Float[Tensor, " n"], int]:
        self.calls += 1
        return self.result, 1


check = jaxtyping.jaxtyped(typechecker=tests.typecheck.checked)(Scales.__call__)
x, by = torch.zeros(3, 2), torch.zeros(3)


@pytest.mark.parametrize(
    "wrong",
    [(x, by[:2]), (x[0], by), (x.long(), by), (x, by, "sideways"), (x, None), (x, by, "up", 1), (x[:2], by[:2])],
)
def test_what_is_wrong_is_found_whatever_was_right_before(wrong: Any) -> None:
    scales = Scales(3)
    for _ in range(3):
        check(scales, x, by)
    check(scales, x, by=by, way="down")
    with pytest.raises((TypeCheckError, TypeError)):
        check(scales, *wrong)


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3).long(), 3.0])
def test_results_are_checked_and_nothing_runs_twice(wrong: Any) -> None:
    scales = Scales(3)
    for calls in range(1, 4):
        assert check(scales, x, by)[0] is scales.result
        assert scales.calls == calls
    scales.result = wrong
    with pytest.raises((TypeCheckError, TypeError)):
        check(scales, x, by)
    assert scales.calls == 4
    scales.result = torch.zeros(3, dtype=torch.float64)
    assert check(scales, x, by)[0] is scales.result
    assert scales.calls == 5


def test_lists_are_looked_at_every_time() -> None:
    def total(parts: list[Tensor], size: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return size

    strict = jaxtyping.jaxtyped(typechecker=tests.typecheck.checked)(total)
    strict([by], by)
    with pytest.raises((TypeCheckError, TypeError)):
        strict([1.0], by)  # pyright: ignore
