"""Laws of what is to come, given covariates: against torch's mixtures, quadrature, sums and draws."""

from typing import Any

import pytest
import torch
from torch.distributions import Categorical as Choice
from torch.distributions import MixtureSameFamily
from torch.distributions import Normal as NormalLaw

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem.errors import InvalidArgument
from torchem.factors import BinomialRegression, Categorical, LinearGaussian, PoissonRegression, SoftmaxRegression


def experts(component: Any) -> Any:
    model = torchem.Mixture(SoftmaxRegression(3, 2), component).double()
    model.mixing.weight = cases.randn(3, 2)
    model.component.weight = 0.7 * cases.randn(3, component.n_outputs, 2, seed=1)
    return model


def inputs(n: int = 5) -> torch.Tensor:
    u = cases.randn(n, 2, seed=2)
    u[:, 0] = 1.0
    return u


def test_normal_experts_are_mixtures_of_normals() -> None:
    model = experts(LinearGaussian(3, 2, 1))
    model.component.covariances = 0.2 + cases.rand(3, 1, 1)
    p = model.predict(inputs())
    means, sd = p.component_means[..., 0], p.component_variances[..., 0].sqrt()
    law = MixtureSameFamily(Choice(p.weights), NormalLaw(means, sd))
    close(p.mean[:, 0], law.mean)
    close(p.variance[:, 0], law.variance)
    grid = torch.linspace(-3, 3, 7, dtype=torch.float64)
    close(p.log_density(grid), law.log_prob(grid.unsqueeze(-1)).mT)
    shares = torch.tensor([0.001, 0.05, 0.5, 0.95, 0.999], dtype=torch.float64)
    q = p.quantile(shares)
    assert q.shape == (5, 5, 1)
    close(law.cdf(q[..., 0]), shares.unsqueeze(-1).expand(5, 5), rtol=0, atol=1e-12)
    close(p.quantile(0.5), q[2], rtol=0)
    close(p.covariance_matrix[:, 0], p.variance)
    (slope,) = torch.autograd.grad(p.mean.sum(), [model.mixing.coefficient])
    assert float(slope.abs().sum()) > 0


@pytest.mark.parametrize("kind", [PoissonRegression, BinomialRegression])
def test_counts(kind: Any) -> None:
    model = experts(kind(3, 2, 1))
    fields: dict[str, Any] = {"offset": [0.5, 0.0, 1.0, -1.0, 0.2]}
    fields |= {} if kind is PoissonRegression else {"trials": [3, 7, 1, 12, 5]}
    p = model.predict(inputs(), **fields)
    outcomes = torch.arange(60.0, dtype=torch.float64)
    most = torch.tensor(fields.get("trials", [59.0] * 5)).double().unsqueeze(-1)
    probs = torch.where(outcomes <= most, p.density(outcomes), 0.0)
    close(probs.sum(-1), torch.ones(5), rtol=1e-7)
    close(p.mean[:, 0], probs @ outcomes, rtol=1e-6)
    close(p.variance[:, 0], probs @ outcomes.square() - (probs @ outcomes).square(), rtol=1e-5)
    for share in (0.05, 0.5, 0.9):
        least = (probs.cumsum(-1) < share - 1e-12).sum(-1)
        close(p.quantile(share)[:, 0], least.double(), rtol=0)
    x = model.sample(4000, inputs=inputs().repeat(800, 1), generator=cases.rng(3), **{
        name: torch.tensor(value).repeat(800) for name, value in fields.items()
    })  # fmt: skip
    close(x.view(800, 5).mean(0), p.mean[:, 0].detach(), rtol=0.1, atol=0.1)


def test_columns_are_predicted_each_by_itself_and_bad_input_is_named() -> None:
    model = experts(LinearGaussian(3, 2, 2))
    p = model.predict(inputs())
    assert p.mean.shape == p.variance.shape == p.quantile(0.1).shape == (5, 2)
    assert p.density(torch.zeros(4, 2)).shape == (5, 4)
    flat = torchem.Mixture(Categorical(3), LinearGaussian(3, 2, 2)).predict(inputs().float())
    close(flat.weights, torch.full((5, 3), 1 / 3), rtol=1e-6)
    for q in (0.0, 1.0, [0.5, 2.0], torch.nan):
        with pytest.raises(InvalidArgument, match="q: expected"):
            p.quantile(q)
    with pytest.raises(InvalidArgument, match="x: expected points"):
        p.density(torch.zeros(4, 3))
    with pytest.raises(InvalidArgument, match="inputs"):
        model.predict(torch.zeros(4, 5))
