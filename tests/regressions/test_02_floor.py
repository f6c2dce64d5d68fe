"""Two points far apart with an additive or absolute floor of 0.1: the floor is the variance, not the rounding error."""

from typing import Literal

import pytest
import torch

from tests.regressions.common import COVARIANCE_TYPES, DTYPES, fit, healthy, mixture


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("floor_type", ["absolute", "additive"])
@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES)
def test_variance_is_the_floor(
    covariance_type: str, floor_type: Literal["absolute", "additive"], dtype: torch.dtype, device: torch.device
) -> None:
    model = mixture(2, 1, covariance_type, dtype, device, covariance_floor=0.1, floor_type=floor_type)
    result = fit(model, torch.tensor([[9999.0], [0.0]], dtype=dtype, device=device))

    healthy(model)
    covariances = model.covariances.detach().cpu()
    assert float(covariances.min()) >= 0.09
    assert float(covariances.max()) <= 0.11
    torch.testing.assert_close(
        model.means.detach().cpu().double().sort(0).values,
        torch.tensor([[0.0], [9999.0]]).double(),
        rtol=1e-6,
        atol=1e-2,
    )
    if floor_type == "absolute":
        assert result.floored == [0, 1]
