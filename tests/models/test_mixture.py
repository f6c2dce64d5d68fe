"""Mixtures: views, sampling, starts, and changes of structure."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import COVARIANCE_TYPES, close, close_stats, latent_class, mixture, randn
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Gaussian
from torchem.models import GaussianMixture, Mixture

pytestmark = pytest.mark.usefixtures("_routes_by_rounding")
every_kind = pytest.mark.parametrize("kind", COVARIANCE_TYPES)
SHAPES = {"full": (3, 2, 2), "tied": (2, 2), "diag": (3, 2), "spherical": (3,)}


def eye(kind: str) -> Tensor:
    shape = SHAPES[kind]
    return torch.eye(2, dtype=torch.float64).expand(shape) if kind in ("full", "tied") else torch.ones(shape).double()


# ---- views --------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_are_read_as_they_were_assigned(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    m = GaussianMixture(3, 2, kind).to(device, dtype)  # pyright: ignore
    given = mixture(3, 2, kind)
    m.weights, m.means, m.covariances = given.weights.detach(), given.means.detach(), given.covariances.detach()
    for name in ("weights", "means", "covariances"):
        view = getattr(m, name)
        assert view.dtype == dtype
        assert view.device.type == device.type
        close(view.cpu().double(), getattr(given, name), rtol=1e-6, atol=1e-6)
    assert m.covariances.shape == SHAPES[kind]


@every_kind
def test_views_take_lists_and_arrays(kind: str) -> None:
    m = GaussianMixture(3, 2, kind)  # pyright: ignore
    m.weights = [0.2, 0.3, 0.5]
    m.means = [[0, 1], [2, 3], [4, 5]]
    m.covariances = (2 * eye(kind)).numpy()
    close(m.means, torch.arange(6.0).reshape(3, 2))
    close(m.covariances, 2 * eye(kind).float(), rtol=1e-6)


@every_kind
def test_a_new_model_is_uniform_and_standard(kind: str) -> None:
    m = GaussianMixture(3, 2, kind)  # pyright: ignore
    close(m.weights, torch.full((3,), 1 / 3), rtol=1e-6)
    close(m.covariances, eye(kind).float())
    close(m.log_prob([[0.0, 0.0]]), torch.tensor([-1.8378770664]), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weights", [0.5, 0.5], "shape"),
        ("weights", [0.5, 0.6, 0.5], "sum to one"),
        ("weights", [1.5, -0.5, 0.0], "negative"),
        ("weights", [torch.nan, 0.5, 0.5], "non-finite"),
        ("means", [[0.0, 0.0]], "shape"),
        ("means", [[0.0, torch.inf]] * 3, "infinity"),
        ("covariances", torch.ones(3, 2), "shape"),
        ("covariances", torch.zeros(3, 2, 2), "positive definite"),
        ("covariances", -torch.eye(2).expand(3, 2, 2), "positive definite"),
        ("covariances", torch.tensor([[1.0, 0.5], [0.0, 1.0]]).expand(3, 2, 2), "symmetric"),
        ("covariances", torch.full((3, 2, 2), torch.nan), "positive definite"),
    ],
)
def test_wrong_values_are_refused_and_change_nothing(name: str, value: object, words: str) -> None:
    m = mixture(3, 2, "full")
    before = cases.state(m)
    with pytest.raises(InvalidArgument, match=words) as caught:
        setattr(m, name, value)
    assert name in str(caught.value), "a message names the argument"
    assert "expected" in str(caught.value)
    cases.unchanged(m, before)


@pytest.mark.parametrize("kind", ["diag", "spherical"])
@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_variances_must_be_positive(kind: str, bad: float) -> None:
    m = GaussianMixture(3, 2, kind)  # pyright: ignore
    with pytest.raises(InvalidArgument, match="covariances"):
        m.covariances = torch.full(SHAPES[kind], bad)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((0, 2), {}, "n_components"),
        ((2, 0), {}, "n_features"),
        ((2.0, 2), {}, "n_components"),
        ((True, 2), {}, "n_components"),
        ((2, 2, "ful"), {}, "full"),
        ((2, 2), {"covariance_floor": -1.0}, "covariance_floor"),
        ((2, 2), {"covariance_floor": float("nan")}, "covariance_floor"),
        ((2, 2), {"floor_type": "relativ"}, "relative"),
    ],
)
def test_wrong_constructions(arguments: tuple, options: dict, words: str) -> None:
    # Annotations are checked here, which users' programs do not do: both refusals name the argument.
    with pytest.raises((InvalidArgument, TypeError), match=words):
        GaussianMixture(*arguments, **options)


def test_slots_must_agree_about_the_number_of_components() -> None:
    with pytest.raises(InvalidArgument, match="component"):
        Mixture(Categorical(3), Gaussian(2, 1))


def test_slots_may_be_replaced() -> None:
    m = mixture(3, 2, "full")
    m.component = mixture(3, 2, "full", seed=5).component
    close(m.means, mixture(3, 2, "full", seed=5).means)
    assert dict(m.slots())["component"] is m.component


def test_data_are_checked_against_the_model() -> None:
    with pytest.raises(InvalidArgument, match="2 features"):
        mixture(3, 2, "full").log_prob(torch.zeros(4, 3))
    with pytest.raises(InvalidArgument, match="whole numbers"):
        latent_class().log_prob(torch.tensor([[4]]))
    with pytest.raises(InvalidArgument, match="whole numbers"):
        latent_class().log_prob(torch.tensor([[0.5]]))
    m = mixture(3, 2, "full")
    with pytest.raises(InvalidArgument, match="evidence"):
        m.batch(torch.zeros(4, 2), evidence=torch.zeros(4, 2))


# ---- sampling -----------------------------------------------------------------------------------------------------


@every_kind
def test_samples_have_the_model_s_moments(kind: str, device: torch.device) -> None:
    m = mixture(3, 2, kind).to(device)
    g = torch.Generator(device).manual_seed(1)
    x, z = m.sample(60_000, latents=True, generator=g)
    assert x.shape == (60_000, 2)
    assert x.device.type == z.device.type == device.type
    close(torch.bincount(z, minlength=3) / len(z), m.weights, rtol=0.03, atol=0.01)
    variances = m.component.structure.variances(m.component.scale, 3, 2)
    for k in range(3):
        close(x[z == k].mean(0), m.means[k], rtol=0.03, atol=0.05)
        close(x[z == k].var(0), variances[k], rtol=0.08, atol=0.02)
    # The average log-density of samples is the negative entropy, estimated twice.
    close(m.log_prob(x[:30_000]).mean(), m.log_prob(x[30_000:]).mean(), rtol=0.02)


def test_samples_repeat_and_leave_the_global_generator_alone() -> None:
    m = mixture(3, 2, "full")
    before = torch.random.get_rng_state()
    one, two = (m.sample(10, generator=cases.rng(4)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert m.sample(0).shape == (0, 2)
    assert m.sample(0, latents=True)[1].shape == (0,)
    for n in (-1, 2.0):
        with pytest.raises((InvalidArgument, TypeError)):
            m.sample(n)


def test_samples_avoid_what_is_forbidden() -> None:
    m = latent_class()
    m.weights = [0.5, 0.0, 0.5]
    m.component.probs = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0.5, 0.5]]  # pyright: ignore
    x, z = m.sample(500, latents=True, generator=cases.rng(0))
    assert set(z.tolist()) == {0, 2}
    assert set(x.reshape(-1).tolist()) == {0, 2, 3}
    assert x.dtype == torch.long


# ---- starts -------------------------------------------------------------------------------------------------------


@every_kind
def test_initialize_from_hard_labels_is_the_fit_of_each_cluster(kind: str) -> None:
    x = cases.blobs(90, 2, 3)
    z = torch.arange(90) % 3
    m = GaussianMixture(3, 2, kind).double()  # pyright: ignore
    m.initialize(Batch(x), torch.nn.functional.one_hot(z, 3).double())
    close(m.weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    close(m.means, torch.stack([x[z == k].mean(0) for k in range(3)]))
    if kind == "full":
        close(m.covariances, torch.stack([torch.cov(x[z == k].mT, correction=0) for k in range(3)]))


@every_kind
def test_initialize_at_points_takes_them_as_means(kind: str) -> None:
    x = cases.blobs(90, 2, 3)
    m = GaussianMixture(3, 2, kind).double()  # pyright: ignore
    m.initialize_at(Batch(x), torch.tensor([4, 40, 7]))
    close(m.means, x[[4, 40, 7]])
    whole = torch.cov(x.mT, correction=0)
    variances = m.component.structure.variances(m.component.scale, 3, 2)
    # About the data's own mean: a tied or full covariance is that of the data.
    if kind in ("full", "tied", "diag"):
        close(variances, whole.diagonal().expand(3, 2), rtol=1e-6)
    else:
        close(variances, whole.diagonal().mean().expand(3, 2), rtol=1e-6)


def test_initialize_uses_weights() -> None:
    x, z = cases.blobs(60, 2, 2), torch.arange(60) % 2
    weight = torch.where(z == 0, 3.0, 1.0).double()
    weight[:10] = 0
    m = GaussianMixture(2, 2).double()
    m.initialize(Batch(x, weight=weight), torch.nn.functional.one_hot(z, 2).double())
    seen = weight > 0
    close(m.weights, torch.tensor([0.75, 0.25]))
    close(m.means[0], x[seen & (z == 0)].mean(0))


def test_replicas_start_from_their_own_points() -> None:
    x = cases.blobs(50, 2, 3)
    m = GaussianMixture(3, 2).double().replicate(2)
    index = torch.tensor([[0, 1, 2], [3, 4, 5]])
    m.initialize_at(Batch(x), index)
    close(m.means, x[index])


# ---- health -------------------------------------------------------------------------------------------------------


def test_twins_are_found() -> None:
    m = mixture(4, 2, "full")
    x = Batch(randn(6, 2))
    assert m.twins(x) == []
    m.means = m.means.detach()[[0, 1, 0, 2]]
    m.covariances = m.covariances.detach()[[0, 1, 0, 2]]
    assert m.twins(x) == [(0, 2)]


@every_kind
def test_degenerate_components_are_named(kind: str) -> None:
    x = torch.cat([cases.randn(30, 2), torch.full((10, 2), 8.0, dtype=torch.float64)])
    m = GaussianMixture(2, 2, kind).double()  # pyright: ignore
    m.component.unit = x.var(0, unbiased=False)
    z = (x[:, 0] == 8.0).long()
    m.initialize(Batch(x), torch.nn.functional.one_hot(z, 2).double())
    expected = [False, False] if kind == "tied" else [False, True]
    assert m.degenerate().tolist() == expected
    assert torch.isfinite(m.log_prob(x)).all()
    m.initialize(Batch(torch.full((5, 2), 2.0, dtype=torch.float64)), torch.full((5, 2), 0.5, dtype=torch.float64))
    assert m.degenerate().all()


def test_forbid_takes_components_out_but_never_the_last() -> None:
    m = mixture(3, 2, "full")
    m.forbid(torch.tensor([False, True, False]))
    assert m.weights[1] == 0
    close(m.weights.sum(), torch.tensor(1.0))
    m.m_step(m.e_step(Batch(randn(20, 2))))
    assert m.weights[1] == 0
    m.forbid(torch.tensor([True, True, True]))
    assert (m.weights > 0).any()
    assert torch.isfinite(m.log_prob(randn(5, 2))).all()


def test_forbidding_the_rest_after_some_keeps_one() -> None:
    """Masks that arrive one after the other must not empty the support between them either."""
    m = mixture(3, 2, "full")
    m.forbid(torch.tensor([False, True, True]))
    m.forbid(torch.tensor([True, False, False]))
    close(m.weights.sum(), torch.tensor(1.0))
    assert torch.isfinite(m.log_prob(randn(5, 2))).all()


def test_forbid_in_each_replica_apart() -> None:
    m = mixture(3, 2, "full").replicate(2)
    m.forbid(torch.tensor([[True, False, False], [False, False, True]]))
    assert (m.weights == 0).tolist() == [[True, False, False], [False, False, True]]


@every_kind
def test_prune_keeps_the_others(kind: str) -> None:
    m, x = mixture(4, 2, kind), randn(9, 2)
    small = copy.deepcopy(m)
    keep = torch.tensor([True, False, True, True])
    small.prune(keep)
    assert small.n_components == 3
    close(small.means, m.means[keep])
    close(small.weights, m.weights[keep] / m.weights[keep].sum())
    evidence = torch.tensor([0.0, -torch.inf, 0.0, 0.0], dtype=torch.float64).expand(9, 4)
    batch = Batch(x, evidence=evidence)
    close(small.log_prob(x), m.log_prob(batch) - m.weights[keep].sum().log())
    close(small.posterior(x), m.posterior(batch)[:, keep])
    before = small.log_prob(x).sum().detach()
    small.m_step(small.e_step(Batch(x)))
    assert small.log_prob(x).sum().detach() >= before - 1e-9
    assert small.config()["n_components"] == 3


@every_kind
def test_prune_keeps_options_zeros_and_what_is_frozen(kind: str) -> None:
    m = GaussianMixture(4, 2, kind, covariance_floor=1e-3, floor_type="absolute").double()  # pyright: ignore
    m.weights = [0.5, 0.0, 0.25, 0.25]
    m.component.freeze("means")
    m.prune(torch.tensor([True, True, False, True]))
    assert (m.component.covariance_floor, m.component.floor_type) == (1e-3, "absolute")
    assert m.weights[1] == 0
    before = m.means.detach().clone()
    m.m_step(m.e_step(Batch(randn(20, 2))))
    assert torch.equal(m.means, before), "a frozen view stays frozen"
    assert m.weights[1] == 0


@every_kind
def test_respawn_moves_only_the_chosen(kind: str) -> None:
    m, x = mixture(3, 2, kind), randn(30, 2, seed=3)
    m.weights = [0.4, 1e-12, 0.6 - 1e-12]
    before = {k: v.clone() for k, v in m.snapshot().items()}
    m.respawn(Batch(x), torch.tensor([False, True, False]), torch.tensor([0, 5, 0]))
    close(m.means[1], x[5])
    close(m.means[[0, 2]], before["component.mean"][[0, 2]])
    close(m.weights.sum(), torch.tensor(1.0))
    assert float(m.weights[1].detach()) == pytest.approx(1 / 4), "an even share beside the others"
    if kind == "tied":
        close(m.get_parameter("component.scale"), before["component.scale"])


def test_occupancy_is_the_mass_of_each_component() -> None:
    m, x = mixture(3, 2, "full"), randn(30, 2)
    close(m.occupancy(m.e_step(Batch(x))), m.posterior(x).sum(0))


# ---- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("replicas", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kind
def test_origins_far_away_then_back_on_the_fast_route(
    k: int, replicas: int | None, dtype: torch.dtype, kind: str
) -> None:
    """A mean 1e5 σ from its origin asks for a new one; after that every route and both shapes of origin still work."""
    x = (1e5 + randn(64, 2)).to(dtype)
    m = GaussianMixture(k, 2, kind).to(dtype)  # pyright: ignore
    m.means = x[:k] + 0.1
    m.component.origin = torch.zeros(1, 2, dtype=dtype)
    if replicas:
        m = m.replicate(replicas)
    batch = Batch(x)
    with torch.no_grad():
        for _ in range(4):
            stats = m.e_step(batch)
            m.m_step(stats)
            adjustment = m.tune(1 << 40)
            if adjustment is not None and adjustment.move is not None:
                assert all(leaf.isfinite().all() for leaf in adjustment.move(stats).leaves())
    mean = (m.weights.double().unsqueeze(-1) * m.means.double()).sum(-2)
    close(mean if replicas is None else mean[0], x.double().mean(0), rtol=1e-6)
    one = m if replicas is None else m.take_replicas(0)
    if k == 1:
        found = one.component.structure.variances(one.component.scale, 1, 2).double()[0]
        truth = torch.cov(x.double().mT, correction=0).diagonal()
        close(found, truth.mean().expand(2) if kind == "spherical" else truth, rtol=2e-2)


def test_state_dict_of_a_recentred_model_loads_into_a_new_one() -> None:
    x = cases.blobs(60, 2, 3, spread=1e5)
    m = GaussianMixture(3, 2).double()
    m.means = 1e5 * randn(3, 2)
    assert m.tune(1 << 40) is not None
    m.m_step(m.e_step(Batch(x)))
    fresh = GaussianMixture(3, 2).double()
    fresh.load_state_dict(m.state_dict())
    close(fresh.log_prob(x), m.log_prob(x))
    close(fresh.bound(fresh.e_step(Batch(x))), m.bound(m.e_step(Batch(x))))


def test_state_dict_of_a_frozen_model_loads_into_a_new_one() -> None:
    m = mixture(3, 2, "full")
    m.component.freeze("means")
    fresh = GaussianMixture(3, 2).double()
    fresh.load_state_dict(m.state_dict())
    close(fresh.means, m.means)


def test_zeros_travel_with_the_state() -> None:
    """Into a model that has none, out of it again, and through copies and replicas."""
    m, x = latent_class(), Batch(torch.randint(0, 4, (12, 1), generator=cases.rng(1)))
    plain = m.state_dict()
    plain = {name: value.clone() for name, value in plain.items()}
    m.weights = [0.5, 0.0, 0.5]
    m.component.probs = [[0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.1, 0.2, 0.3, 0.4]]  # pyright: ignore
    for arrive in (lambda t: t.load_state_dict(m.state_dict()), lambda t: t.load_from(m)):
        fresh = latent_class()
        arrive(fresh)
        assert torch.equal(fresh.weights == 0, m.weights == 0)
        assert torch.equal(fresh.log_prob(x), m.log_prob(x))
        fresh.m_step(fresh.e_step(x))
        assert fresh.weights[1] == 0
        assert (fresh.component.probs[0, 2:] == 0).all()  # pyright: ignore
        assert fresh.replicate(2).take_replicas(1).weights[1] == 0
        assert copy.deepcopy(fresh).weights[1] == 0
    other = latent_class()
    other.weights = [0.5, 0.0, 0.5]
    other.load_state_dict(plain)
    assert (other.weights > 0).all()
    other.weights = [0.5, 0.0, 0.5]
    other.weights = [0.2, 0.3, 0.5]
    close(other.weights, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))


@every_kind
def test_load_from_takes_everything_over(kind: str) -> None:
    one, x = mixture(3, 2, kind), cases.blobs(30, 2, 3, spread=1e5)
    one.means = 1e5 * randn(3, 2)
    one.tune(1 << 40)
    two = GaussianMixture(3, 2, kind).double()  # pyright: ignore
    two.load_from(one)
    assert torch.equal(two.log_prob(x), one.log_prob(x))
    close_stats(two.e_step(Batch(x)), one.e_step(Batch(x)), rtol=0)
    two.means = randn(3, 2)
    assert not torch.equal(one.means, two.means), "nothing is shared"


def test_float32_at_an_offset_agrees_with_float64() -> None:
    for offset in (0.0, 1e3, 1e4):
        x = offset + cases.blobs(400, 2, 2, spread=4.0)
        low = GaussianMixture(2, 2)
        high = GaussianMixture(2, 2).double()
        for m in (low, high):
            m.means = x[:2]
        with torch.no_grad():
            for _ in range(10):
                low.m_step(low.e_step(Batch(x.float())))
                high.m_step(high.e_step(Batch(x.float().double())))
                low.tune(1 << 40)
        close(low.covariances.double(), high.covariances, rtol=2e-2, atol=2e-2)


def test_one_factor_in_two_slots_is_one_parameter() -> None:
    """Statistics are summed, maximised once and counted once."""

    class Pair(Mixture):
        def slots(self):
            return (*super().slots(), ("again", self.component))

        def log_partition(self, potentials, batch, plus=torchem.ops.reduce.logsumexp):
            return plus(potentials["mixing"] + potentials["component"] + potentials["again"], -1)

        def infer(self, potentials, batch):
            return torchem.DiscreteModel.infer(self, potentials, batch)

    pair = Pair(Categorical(2).double(), Gaussian(2, 1).double())
    pair.component.means = [[-1.0], [1.0]]
    batch = Batch(randn(20, 1))
    stats = pair.e_step(batch)
    assert set(stats) == {"mixing", "component", "again", "entropy", "log_likelihood", "count"}
    assert set(pair.maximize(stats)) == {"mixing.logits", "component.mean", "component.scale"}
    other = pair.e_step(Batch(5 + randn(30, 1)))
    uneven = stats.like({**stats, "again": other["again"]})
    single = pair.component.maximize(stats["component"] + other["again"])
    close(pair.maximize(uneven)["component.mean"], single["mean"])
    assert pair.n_parameters() == 1 + 4
    values = [float(pair.bound(stats).detach())]
    for _ in range(10):
        pair.m_step(stats)
        stats = pair.e_step(batch)
        values.append(float(pair.bound(stats).detach()))
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("soft", [False, True])
def test_pruned_components_take_their_labels_along(soft: bool) -> None:
    """Labels speak of the components that the model began with: here no row may be of the second."""
    x = torch.cat([randn(20, 2), 6 + randn(20, 2, seed=1)])
    labels: Tensor = torch.arange(3).expand(40, 3) != 1
    model = GaussianMixture(3, 2).double()
    result = torchem.fit(model, x, labels=labels.double() if soft else labels, dead="prune", seed=0, progress=False)
    assert result.pruned == [1]
    assert model.n_components == 2
    assert model.log_prob(x, labels=labels[:, :2]).isfinite().all()
