"""Covariances with volume, shape and orientation in common: against R's mclust, brute force and the laws."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws import test_factor as laws
from tests.laws import test_model as model_laws
from tests.laws.cases import FactorCase, ModelCase, close, randn
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Gaussian, StudentT
from torchem.ops.geometry import GEOMETRIES

#: Parameters, log-likelihood, Σ_1[1, 1] and Σ_3[1, 2] after EM from the species of the irises (K = 3, D = 4); then
#: log-likelihood, Σ_3[1, 1] and Σ_1[1, 2] from Old Faithful cut at waiting times of 60 and 78 minutes. R 4.2.2, mclust
#: 6.0.0:  e <- me(x, modelName = m, z = z, control = emControl(tol = c(1e-13, 1e-13), itmax = c(20000, 20000)))
#: nMclustParams(m, 4, 3); e$loglik; e$parameters$variance$sigma  with  z <- unmap(iris$Species)  or
#: z <- unmap(ifelse(f[, 2] < 60, 1, ifelse(f[, 2] < 78, 2, 3))).
MCLUST = {
    "EII": (15, -401.802176, 0.1330936, 0.0000000, -1663.539600, 10.5032500, 0.000000),
    "VII": (17, -384.314095, 0.0757550, 0.0000000, -1637.434418, 7.0092640, 0.000000),
    "EEI": (18, -361.425522, 0.2357457, 0.0000000, -1133.455400, 0.0773705, 0.000000),
    "VEI": (20, -339.468727, 0.1190974, 0.0000000, -1132.666843, 0.0713776, 0.000000),
    "EVI": (24, -340.085581, 0.2703849, 0.0000000, -1132.422439, 0.0902632, 0.000000),
    "VVI": (26, -306.860461, 0.1217640, 0.0000000, -1127.007519, 0.1425794, 0.000000),
    "EEE": (24, -256.354043, 0.2639350, 0.0898513, -1126.315928, 0.0779755, 0.470158),
    "VEE": (26, -237.560163, 0.1551084, 0.1676906, -1124.528182, 0.0685403, 0.480661),
    "EVE": (30, -234.140235, 0.1397515, 0.0649841, -1124.831852, 0.0907783, 0.532653),
    "VVE": (32, -215.240870, 0.0894217, 0.1091840, -1122.796845, 0.1244953, 0.561229),
    "EEV": (36, -214.850379, 0.2441160, 0.0649145, -1132.808919, 0.1162570, 0.317621),
    "VEV": (38, -186.073283, 0.1332736, 0.1079715, -1122.549390, 0.0477697, 0.361743),
    "EVV": (42, -205.535881, 0.2231579, 0.0360038, -1125.660886, 0.1266154, 0.437785),
    "VVV": (44, -180.185477, 0.1217640, 0.0922079, -1119.213971, 0.1359319, 0.344045),
}

#: One of each rule and of each kind of axes; the others take the same steps in other pairs.
FAST = ("EVI", "VEV", "VEE", "EVE")
every_geometry = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FAST else [pytest.mark.slow]) for kind in GEOMETRIES]
)


def dense(g: Gaussian) -> Tensor:
    factor = g.structure.dense(g.scale.detach(), g.n_components, g.n_features)
    return factor @ factor.mT


def faithful() -> Tensor:
    return torch.from_numpy(
        np.loadtxt(Path(torchem.__file__).parent / "datasets/faithful.csv", delimiter=",", skiprows=1)
    )


def geometric(kind: str, k: int = 3, d: int = 3, n: int = 40) -> FactorCase:
    """Random covariances in the geometry, and data of another."""
    g = Gaussian(k, d, kind).double()  # pyright: ignore[reportArgumentType]
    g.means = 1.5 * randn(k, d) + 0.3
    scale = 0.3 * randn(*g.scale.shape, seed=1)
    g.scale.data = scale.tril() if scale.dim() == 3 else scale
    g.project()
    return FactorCase(g, Batch(randn(n, d, seed=5) @ randn(d, d, seed=6) + 0.5), cases.soft(n, k))


# ---- against others -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["iris", pytest.param("faithful", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MCLUST)
def test_em_from_the_same_responsibilities_ends_where_mclust_does(kind: str, data: str) -> None:
    if data == "iris":
        bunch: Any = load_iris()
        x, label = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target)
        wanted, places = MCLUST[kind][1:4], ((0, 0, 0), (2, 0, 1))
    else:
        x = faithful()
        label = (x[:, 1] >= 60).long() + (x[:, 1] >= 78)
        wanted, places = MCLUST[kind][4:], ((2, 0, 0), (0, 0, 1))
    model = torchem.GaussianMixture(3, x.shape[1], kind).double()  # pyright: ignore[reportArgumentType]
    model.initialize(model.batch(x), torch.nn.functional.one_hot(label, 3).double())
    result = torchem.fit(model, x, init=None, tol=1e-12, max_iter=5000, accelerate="squarem")
    if data == "iris":
        assert model.n_parameters() == MCLUST[kind][0]
    if kind == "VVE":  # a better optimum: begun at mclust's responsibilities as well
        assert result.bound > wanted[0]
        return
    assert result.bound == pytest.approx(wanted[0], abs=2e-6)
    found = [float(dense(model.component)[place]) for place in places]
    assert found == pytest.approx(wanted[1:], abs=2e-5)


@pytest.mark.parametrize("kind", ["EVE", "VVE"])
def test_common_axes_of_the_plane_are_those_of_a_search_over_angles(kind: str) -> None:
    case = geometric(kind, d=2)
    stats = case.factor.stats(case.batch, case.expected)
    best = laws.maximized(case.factor, stats)
    g: Any = best
    count = stats["count"]
    mean = (stats["first"] / count[:, None]).unsqueeze(-1)
    scatter = stats["second"] - count[:, None, None] * mean @ mean.mT
    angle = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    axes = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(-1, 1, 2, 2)
    along = (axes.mT @ scatter @ axes).diagonal(dim1=-2, dim2=-1)
    if kind == "VVE":
        variances = along / count[:, None]
    else:
        size = along.prod(-1, keepdim=True).sqrt()
        variances = along / size * size.sum(-2, keepdim=True) / count.sum()
    loss = (count[:, None] * variances.log() + along / variances).sum((-2, -1))
    top = -0.5 * (loss.min() + count.sum() * 2 * math.log(2 * math.pi))
    assert float(g.expected_log_prob(stats).detach()) == pytest.approx(float(top), abs=1e-6)


@every_geometry
def test_what_is_shared_is_shared(kind: str) -> None:
    case = geometric(kind)
    best: Any = laws.maximized(case.factor, case.factor.stats(case.batch, case.expected))
    values, axes = torch.linalg.eigh(dense(best))
    volume = values.log().mean(-1, keepdim=True)
    shape = values.log() - volume
    close(volume, volume[:1].expand_as(volume)) if kind[0] == "E" else None
    close(shape, shape[:1].expand_as(shape)) if kind[1] == "E" else None
    if kind[1] == "I":
        assert float(shape.abs().max()) < 1e-12
    if kind[2] == "I":
        assert torch.equal(dense(best), torch.diag_embed(dense(best).diagonal(dim1=-2, dim2=-1)))
    if kind[2] == "E":
        inner = axes[0].mT @ dense(best) @ axes[0]
        close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-9)
    again = best.scale.detach().clone()
    best.project()
    assert torch.equal(best.scale, again)


# ---- the laws -----------------------------------------------------------------------------------------------------


@every_geometry
def test_maximize_beats_perturbations_within_the_geometry(kind: str) -> None:
    case = geometric(kind)
    stats = case.factor.stats(case.batch, case.expected)
    best = laws.maximized(case.factor, stats)
    free = {name: torch.ones_like(p, dtype=torch.bool) for name, p in best.named_parameters()}
    laws.beats_perturbations(case, stats, best, free)
    # Stationary: along any direction that projection leaves, Q changes in the second order only.
    top = float(best.expected_log_prob(stats).detach())
    for seed in range(3):
        moved = laws.maximized(case.factor, stats)
        step = 1e-4 * randn(*moved.get_parameter("scale").shape, seed=seed)
        moved.get_parameter("scale").data += step.tril() if step.dim() == 3 else step
        moved.project()
        loss = top - float(moved.expected_log_prob(stats).detach())
        assert loss < 1e-6 * float(case.expected.sum())


@every_geometry
@pytest.mark.parametrize(
    "law",
    [
        laws.test_no_rows_are_no_statistics,
        laws.test_maximize_is_pure,
        laws.test_maximize_under_vmap_and_grad,
        laws.test_replicas_equal_each_alone,
        laws.test_float32_near_float64,
        laws.test_empty_components_keep_their_parameters,
    ],
)
def test_the_law(law: Any, kind: str, device: torch.device) -> None:
    law(lambda: geometric(kind), device)


@pytest.mark.parametrize("kind", ["VEV", "EVE", "VVE"])
@pytest.mark.parametrize(
    "law",
    [
        model_laws.test_em_map_under_vmap,
        model_laws.test_em_map_of_many_problems_at_once,
        model_laws.test_em_map_is_differentiable_in_parameters_and_data,
    ],
    ids=lambda law: law.__name__.removeprefix("test_"),
)
def test_the_em_map(law: Any, kind: str, device: torch.device) -> None:
    def build() -> ModelCase:
        model = torchem.GaussianMixture(2, 2, kind).double()  # pyright: ignore[reportArgumentType]
        model.component = geometric(kind, 2, 2).factor  # pyright: ignore[reportAttributeAccessIssue]
        return ModelCase(model, Batch(cases.blobs(24, 2, 2)))

    law(build, device)


@every_geometry
@pytest.mark.parametrize("what", ["duplicates", "line", "missing"])
def test_degenerate_data_are_floored_within_the_geometry(kind: str, what: str) -> None:
    x = cases.blobs(60, 3, 2, seed=4)
    if what == "line":
        x = x[:, :1] * torch.tensor([1.0, -2.0, 0.5]).double()
    elif what == "missing":
        x[cases.rand(60, 3) < 0.3] = torch.nan
    else:
        x[:20] = x[0]
    model = torchem.GaussianMixture(3, 3, kind).double()  # pyright: ignore[reportArgumentType]
    result = torchem.fit(model, x, seed=0, max_iter=12, tol=0)
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
    unit = model.component._unit()
    values = torch.linalg.eigvalsh(dense(model.component) / (unit.sqrt() * unit.sqrt().unsqueeze(-1)))
    assert float(values.min()) > 0.99e-6


def test_a_missing_entry_does_not_count() -> None:
    """Diagonal geometries count entries: a row without its second column is a row of the first."""
    case = geometric("EEI")
    holed = case.batch.x.clone()
    holed[::3, 1] = torch.nan
    best: Any = laws.maximized(case.factor, case.factor.stats(Batch(holed), case.expected))
    mask = (~holed.isnan()).double().unsqueeze(1) * case.expected.unsqueeze(-1)
    filled = holed.nan_to_num()
    mean = (mask * filled.unsqueeze(1)).sum(0) / mask.sum(0)
    variance = (mask * (filled.unsqueeze(1) - mean).square()).sum((0, 1)) / mask.sum((0, 1))
    close(best.covariances, variance.expand(3, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"accelerate": "anderson"},
        {"accumulate": "stochastic"},
        {"accumulate": "incremental"},
        {"direct": True},
        {"restarts": 3},
        {"dead": "prune"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["VEI", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("EEV", "VVE"))])
def test_modes_stay_in_the_geometry(kind: str, options: dict[str, Any]) -> None:
    rules = {"stochastic": torchem.Stochastic, "incremental": torchem.Incremental}
    given: dict[str, Any] = dict(options)
    if "accumulate" in given:
        given |= {"accumulate": rules[given["accumulate"]](), "batch_size": 30}
    x = cases.blobs(90, 2, 3, spread=1.5)
    model = torchem.GaussianMixture(3, 2, kind).double()  # pyright: ignore[reportArgumentType]
    result = torchem.fit(model, x, seed=0, max_iter=8, tol=0, **given)
    assert result.bound > result.history[0]
    before = model.component.scale.detach().clone()
    model.component.project()
    close(model.component.scale, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["VEI", pytest.param("EVE", marks=pytest.mark.slow)])
def test_scales_of_student_t_take_geometries(kind: str) -> None:
    model = torchem.Mixture(Categorical(2), StudentT(2, 2, kind)).double()  # pyright: ignore[reportArgumentType]
    result = torchem.fit(model, cases.blobs(60, 2, 2), seed=0, max_iter=20, tol=0)
    assert result.bound > result.history[0]
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))


def test_bic_chooses_among_geometries_as_mclust_does() -> None:
    """Mclust(iris[, 1:4]) prefers VEV, K = 2 and there BIC −561.7285 in its sign."""
    bunch: Any = load_iris()
    x = torch.from_numpy(bunch.data)
    scores = {}
    for kind in ("VVI", "EEE", "VEV", "VVV"):
        model = torchem.GaussianMixture(2, 4, kind).double()  # pyright: ignore[reportArgumentType]
        torchem.fit(model, x, seed=0, tol=1e-8, max_iter=500)
        scores[kind] = torchem.criteria(model, x).bic
    assert min(scores, key=lambda kind: scores[kind]) == "VEV"
    assert scores["VEV"] == pytest.approx(561.7285, abs=1e-3)


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_names_of_structures_are_those_structures() -> None:
    for name, structure in {"VII": "spherical", "VVI": "diag", "EEE": "tied", "VVV": "full"}.items():
        assert Gaussian(2, 3, name).structure is Gaussian(2, 3, structure).structure  # pyright: ignore


def test_no_conjugate_prior_and_no_mask() -> None:
    model = torchem.GaussianMixture(2, 2, "VEI")
    with pytest.raises(InvalidArgument, match="shared in part"):
        model.component.prior = priors.NormalInverseGamma(mean=0.0, scale=1.0)
    with pytest.raises(InvalidArgument, match="shared in part"):
        torchem.variational(model)
    with pytest.raises(InvalidArgument, match="in common"):
        model.component.freeze("covariances", mask=torch.tensor([True, False]))
