"""The laws of a model, for mixtures over these factors, nested ones and missing entries included."""

from collections.abc import Callable

import pytest
import torch

import torchem
from tests.factors.common import with_holes
from tests.laws import test_model as laws
from tests.laws.cases import ModelCase, close, gaussian, rand, randn
from torchem.batch import Batch
from torchem.factor import Factor
from torchem.factors import Bernoulli, Categorical, Mixture, Poisson, Product

pytestmark = pytest.mark.usefixtures("_routes_by_rounding")


def model(component: Factor) -> torchem.Mixture:
    found = torchem.Mixture(Categorical(component.n_components or 1).double(), component)
    found.weights = rand(found.n_components, seed=9).softmax(-1)
    return found


def poisson(k: int = 3, d: int = 2) -> Poisson:
    p = Poisson(k, d).double()
    p.rates = 1 + 5 * rand(k, d, seed=1)
    return p


def bernoulli(k: int = 3, d: int = 2) -> Bernoulli:
    b = Bernoulli(k, d).double()
    b.probs = 0.1 + 0.8 * rand(k, d, seed=2)
    return b


def kinds(k: int = 3, m: int = 4) -> Categorical:
    c = Categorical(k, m).double()
    c.probs = randn(k, m, seed=3).softmax(-1)
    return c


def counts(n: int, d: int) -> torch.Tensor:
    return (7 * rand(n, d, seed=4)).floor()


def mixed(k: int) -> Product:
    return Product([gaussian(k, 2, "full"), poisson(k, 1), kinds(k), bernoulli(k, 1)])


def mixed_rows(n: int) -> torch.Tensor:
    columns = randn(n, 2, seed=5), counts(n, 1), (4 * rand(n, 1, seed=6)).floor(), (2 * rand(n, 1, seed=7)).floor()
    return torch.cat(columns, -1)


def large() -> ModelCase:
    p = poisson()
    p.rates = 2000 + 100 * randn(3, 2, seed=1)
    return ModelCase(model(p), Batch(2000 + (200 * rand(40, 2, seed=4)).floor()))


COMPLETE: dict[str, Callable[[], ModelCase]] = {
    "Poisson": lambda: ModelCase(model(poisson()), Batch(counts(40, 2))),
    "Poisson-large": large,
    "Bernoulli": lambda: ModelCase(model(bernoulli()), Batch((2 * rand(40, 2, seed=7)).floor())),
    "Mixture": lambda: ModelCase(model(Mixture(kinds(2, 2), gaussian(4, 2, "diag"))), Batch(2 * randn(40, 2))),
    "Mixture-tied": lambda: ModelCase(model(Mixture(kinds(2, 2), gaussian(4, 2, "tied"))), Batch(2 * randn(40, 2))),
    "Product": lambda: ModelCase(model(mixed(3)), Batch(mixed_rows(40))),
    "Mixture-of-Product": lambda: ModelCase(model(Mixture(kinds(2, 2), mixed(4))), Batch(mixed_rows(40))),
    "Product-of-Mixture": lambda: ModelCase(
        model(Product([Mixture(kinds(2, 2), gaussian(4, 2, "full")), poisson(2, 1)])),
        Batch(torch.cat([randn(40, 2, seed=5), counts(40, 1)], -1)),
    ),
    "Product-weights": lambda: ModelCase(model(mixed(3)), Batch(mixed_rows(40), weight=(3 * rand(40)).floor())),
}
MISSING: dict[str, Callable[[], ModelCase]] = {
    "Poisson-missing": lambda: ModelCase(model(poisson()), Batch(with_holes(counts(40, 2), 0.2))),
    "Bernoulli-missing": lambda: ModelCase(
        model(bernoulli()), Batch(with_holes((2 * rand(40, 2, seed=7)).floor(), 0.2))
    ),
    "Categorical-missing": lambda: ModelCase(model(kinds()), Batch(with_holes((4 * rand(40, 1, seed=6)).floor(), 0.2))),
    "Product-missing": lambda: ModelCase(
        model(Product([poisson(3, 1), bernoulli(3, 1), kinds(3, 4)])),
        Batch(with_holes(mixed_rows(40)[:, [2, 4, 3]], 0.2)),
    ),
    "Mixture-missing": lambda: ModelCase(
        model(Mixture(kinds(2, 2), poisson(4))), Batch(with_holes(counts(40, 2), 0.2))
    ),
}

every = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in (COMPLETE | MISSING).items()])
complete = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in COMPLETE.items()])
EVERY = [
    laws.test_bound_is_the_log_likelihood_where_it_was_computed,
    laws.test_bound_lies_below_the_log_likelihood_elsewhere,
    laws.test_fisher_identity,
    laws.test_infer_equals_the_autograd_default,
    laws.test_invariance_to_chunks_and_order,
    laws.test_statistics_of_parts_add_to_those_of_the_whole,
    laws.test_weights_are_repetitions,
    laws.test_data_may_live_on_the_host,
    laws.test_state_dict_round_trip,
    laws.test_float32_near_float64,
    laws.test_em_map_is_an_em_iteration,
    laws.test_em_map_under_vmap,
    laws.test_em_map_of_many_problems_at_once,
    laws.test_differentiating_the_e_step_gives_the_score,
]


@every
@pytest.mark.parametrize("law", EVERY, ids=lambda law: law.__name__.removeprefix("test_"))
def test_laws_of_a_model(law, build, device: torch.device) -> None:
    law(build, device)


@every
@pytest.mark.parametrize("law", [laws.test_bound_never_falls, laws.test_replicas_equal_each_alone])
@pytest.mark.parametrize("rows", [laws.FEW, laws.MANY])
def test_laws_of_a_model_by_either_route(law, build, rows: int, device: torch.device) -> None:
    law(build, rows, device)


@complete
def test_nothing_is_mutated(build, device: torch.device) -> None:
    laws.test_nothing_is_mutated(build, device)
    laws.test_m_step_leaves_old_tensors_alone(build)


SMOOTH = [name for name in COMPLETE if "large" not in name and "tied" not in name]


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives(name: str, device: torch.device) -> None:
    """In the parameters, and in the data where these are continuous, at first and second order."""
    build = COMPLETE[name]
    laws.test_em_map_is_differentiable_in_parameters_and_data(
        in_parameters(build) if "Product" in name else build, device
    )
    # What is no count is refused at the edge, a little more than one as well.
    laws.test_log_prob_gradcheck_twice(build if name == "Mixture" else in_parameters(build))


@every
def test_log_prob_under_vmap(build) -> None:
    case = build()
    x = case.batch.x.unflatten(0, (4, 10))
    batched = torch.func.vmap(case.model.log_prob)(x)
    close(batched.flatten(), case.model.log_prob(case.batch.x), rtol=1e-12)


def in_parameters(build: Callable[[], ModelCase]) -> Callable[[], ModelCase]:
    """The data as whole numbers, in which nobody asks for derivatives."""

    def rounded() -> ModelCase:
        case = build()
        return ModelCase(case.model, case.batch.with_x((3 * case.batch.x).abs().floor().clamp(max=1).long()))

    return rounded
