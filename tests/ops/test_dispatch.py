"""Sizes of pieces, and precision against the user's settings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchem.ops import dispatch

CPU = torch.device("cpu")


@given(st.integers(0, 1 << 40), st.one_of(st.none(), st.integers(0, 1 << 40)))
def test_rows_are_a_power_of_two_within_bounds_and_budget(row: int, budget: int | None) -> None:
    rows = dispatch.rows_per_piece(row, CPU, budget)
    assert rows & (rows - 1) == 0
    assert 128 <= rows <= 1 << 20
    allowed = dispatch.PIECE["cpu"] if budget is None else budget
    assert rows == 128 or rows * max(1, row) <= allowed
    assert rows == 1 << 20 or rows == 128 or 2 * rows * max(1, row) > allowed
    assert rows == dispatch.rows_per_piece(row, CPU, budget)


@given(st.integers(1, 1 << 30), st.integers(1, 1 << 30))
def test_wider_rows_never_make_longer_pieces(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert dispatch.rows_per_piece(high, CPU) <= dispatch.rows_per_piece(low, CPU)


def test_unknown_devices_count_as_accelerators() -> None:
    assert dispatch.rows_per_piece(1 << 10, torch.device("meta")) == dispatch.PIECE["cuda"] >> 10


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_declared_precision_holds_and_settings_are_left_as_found(setting: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with dispatch.declared_precision(CPU):
                assert torch.get_float32_matmul_precision() == "highest"
                assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        with pytest.raises(ZeroDivisionError), dispatch.declared_precision(CPU):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_tiny_passes_run_on_one_thread_and_leave_the_number_as_found():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with dispatch.fitting_threads(1000, torch.device("cpu")):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with dispatch.fitting_threads(1 << 30, torch.device("cpu")):
            assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), dispatch.fitting_threads(1000, torch.device("cpu")):
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
