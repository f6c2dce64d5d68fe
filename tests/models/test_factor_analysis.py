"""Factor analysis against scikit-learn, R's factanal, the closed form of principal components, and normal laws."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import torchem
from tests.laws import cases
from tests.laws.cases import close, close_stats, rand, randn
from tests.regressions.common import as_users_run_it
from torchem import FactorAnalysis
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.model import DiscreteModel

#: R's ability.cov as correlations: general, picture, blocks, maze, reading, vocab.
ABILITY = [
    [1.0, 0.466264932734, 0.551663190180, 0.340324989232, 0.576479925703, 0.514405790851],
    [0.466264932734, 1.0, 0.572436361494, 0.193099184201, 0.262922870511, 0.239276608468],
    [0.551663190180, 0.572436361494, 1.0, 0.445090137383, 0.354025184203, 0.356471505983],
    [0.340324989232, 0.193099184201, 0.445090137383, 1.0, 0.183964450481, 0.218836981560],
    [0.576479925703, 0.262922870511, 0.354025184203, 0.183964450481, 1.0, 0.791377858847],
    [0.514405790851, 0.239276608468, 0.356471505983, 0.218836981560, 0.791377858847, 1.0],
]
#: What R's factanal makes of them.
UNIQUENESSES = [0.4552241723342, 0.5893321648255, 0.2181795602288, 0.7694214448218, 0.0524517563729, 0.3335883353162]


def data(n: int = 400, d: int = 6, q: int = 2, seed: int = 0) -> Tensor:
    z, loading = randn(n, q, seed=seed), randn(d, q, seed=seed + 1)
    return 3 + z @ loading.mT + randn(n, d, seed=seed + 2) * (0.3 + rand(d, seed=seed + 3))


def fitted(x: Tensor, q: int = 2, **options: Any) -> FactorAnalysis:
    model = FactorAnalysis(x.shape[-1], q, options.pop("noise", "diag")).double()
    settings = {"tol": 1e-14, "max_iter": 3000, "accelerate": "squarem", "seed": 0, "progress": False}
    torchem.fit(model, x, **settings | options)
    return model


def test_uniquenesses_are_those_of_factanal() -> None:
    """R 4.2.2: factanal(factors = 2, covmat = ability.cov, rotation = "none",
    control = list(opt = list(factr = 10, pgtol = 0)))$uniquenesses, options(digits = 12)."""
    truth = torch.tensor(UNIQUENESSES, dtype=torch.float64)
    # Rows with these correlations exactly.
    white = torch.linalg.qr(torch.cat([torch.ones(112, 1).double(), randn(112, 6)], -1)).Q[:, 1:] * 112**0.5
    model = fitted(white @ torch.linalg.cholesky(torch.tensor(ABILITY, dtype=torch.float64)).mT)
    # Along a flat direction: factanal stops where its gradient is 6e-9, this model's is 1e-14.
    close(model.noise_variance, truth, atol=2e-5)
    close(model.covariance.diagonal(), torch.ones(6), rtol=1e-9)


def test_optimum_is_that_of_scikit_learn() -> None:
    from sklearn import decomposition

    x = data()
    theirs = decomposition.FactorAnalysis(2, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(x.numpy())
    model = fitted(x)
    close(model.log_prob(x).mean(), torch.tensor(theirs.score(x.numpy())), rtol=1e-9)
    close(model.noise_variance, torch.from_numpy(theirs.noise_variance_), rtol=1e-4)
    close(model.covariance, torch.from_numpy(theirs.get_covariance()), rtol=1e-5, atol=1e-5)
    # Scores agree up to a rotation: so do their distances.
    ours = torch.pdist(model.transform(x)[:50])
    close(ours, torch.pdist(torch.from_numpy(theirs.transform(x.numpy()))[:50]), rtol=1e-3)


def test_principal_components_are_the_closed_form() -> None:
    x = data()
    values, vectors = torch.linalg.eigh(torch.cov(x.mT, correction=0))
    noise, (top, axes) = values[:-2].mean(), (values[-2:], vectors[:, -2:])
    model = fitted(x, noise="spherical")
    close(model.noise_variance, noise, rtol=1e-8)
    close(model.loadings @ model.loadings.mT, axes @ torch.diag(top - noise) @ axes.mT, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("noise", ["diag", "spherical"])
@pytest.mark.parametrize("floor_type", ["relative", "additive"])
def test_moments_say_what_rows_do(noise: Any, floor_type: Any) -> None:
    """One pass over complete rows serves all E-steps, weights, replicas and pieces included."""
    x = data(700, 6)
    model = FactorAnalysis(6, 2, noise, floor_type=floor_type).double()
    model.mean, model.loadings = randn(6), randn(6, 2, seed=5)
    model.component.origin = x.mean(0)
    batch = model.batch(x, weights=rand(700, seed=6))
    model.memory_budget = 1
    many = model.replicate(3)
    for parameter in many.parameters():
        parameter.data = parameter.data + 0.1 * randn(*parameter.shape, seed=7)
    for each in (model, many):
        with torch.no_grad():
            assert isinstance(each, FactorAnalysis)
            close_stats(each.e_step(batch), DiscreteModel._e_step(each, batch, each.infer), rtol=1e-11)
    first, moved = batch.__dict__["_kept"].copy(), batch.x
    model.e_step(batch)
    assert batch.__dict__["_kept"].keys() == first.keys()
    moved[0] += 1  # what was remembered of other numbers is forgotten
    with torch.no_grad():
        close_stats(model.e_step(batch), DiscreteModel._e_step(model, batch, model.infer), rtol=1e-11)


def test_missing_entries_are_exact() -> None:
    model = fitted(data(200), tol=1e-3)
    x = data(30, seed=9)
    x[rand(30, 6, seed=10) < 0.3] = torch.nan
    x[4] = torch.nan
    with torch.no_grad():
        values, law = model.log_prob(x), model.posterior(x)
        filled, variance = model.impute(x, variance=True)
        mean, joint = model.mean, model.covariance
        for n in range(30):
            seen = ~x[n].isnan()
            gap, block = x[n, seen] - mean[seen], joint[seen][:, seen]
            gain = joint[:, seen] @ torch.linalg.inv(block) if bool(seen.any()) else joint[:, :0]
            pull = model.loadings[seen].mT @ torch.linalg.inv(block)
            close(filled[n], mean + gain @ gap if bool((~seen).any()) else x[n])
            close(variance[n], torch.where(seen, 0.0, (joint - gain @ joint[seen]).diagonal()))
            close(law.mean[n], pull @ gap)
            close(law.covariance_matrix[n], torch.eye(2).double() - pull @ model.loadings[seen])
            own = torch.distributions.MultivariateNormal(mean[seen], block).log_prob(x[n, seen]) if seen.any() else 0.0
            close(values[n], torch.as_tensor(own, dtype=torch.float64))
        assert model.impute(x, draws=3).shape == (3, 30, 6)
    result = torchem.fit(FactorAnalysis(6, 2).double(), x, max_iter=20, tol=0.0, seed=0, progress=False)
    assert all(b >= a - 1e-9 for a, b in zip(result.history, result.history[1:], strict=False))


def test_draws_have_the_covariance() -> None:
    model = FactorAnalysis(3, 1, "spherical").double()
    model.mean, model.loadings, model.noise_variance = [1.0, 0.0, -1.0], [[2.0], [1.0], [0.0]], 0.5
    x, z = model.sample(40_000, latents=True, generator=cases.rng(0))
    close(torch.cov(x.mT), model.covariance, rtol=0.05, atol=0.05)
    close((x - x.mean(0)).mT @ z / len(x), model.loadings, rtol=0.05, atol=0.05)
    with torch.no_grad():
        close(model.transform(x).mT @ z / len(x), model.transform(x).var(0, keepdim=True), rtol=0.03)


def test_number_of_factors_by_bic() -> None:
    x = data(500, 8, 2)
    scores = [torchem.criteria(fitted(x, q, tol=1e-6), x).bic for q in (1, 2, 3)]
    assert scores.index(min(scores)) == 1
    assert FactorAnalysis(8, 2).n_parameters() == 8 + 8 * 2 - 1 + 8


def test_acceleration_takes_fewer_maps_to_the_same_optimum() -> None:
    """Heavy noise beside many scores is what EM is slow for."""
    x = randn(300, 3) @ randn(3, 8, seed=1) + 1.5 * randn(300, 8, seed=2)
    runs = [
        torchem.fit(FactorAnalysis(8, 3).double(), x, accelerate=way, tol=1e-8, max_iter=3000, seed=0, progress=False)
        for way in (None, "squarem")
    ]
    assert all(run.converged for run in runs)
    assert runs[1].n_iter < 0.5 * runs[0].n_iter
    assert runs[1].bound >= runs[0].bound - 1e-3


def test_a_heywood_case_is_floored_and_named() -> None:
    x = data(100, 4, 1)
    x[:, 2] = 2 * x[:, 0]
    model = FactorAnalysis(4, 2).double()
    result = torchem.fit(model, x, max_iter=300, seed=0, progress=False)
    assert result.floored == [0]
    assert bool((model.noise_variance >= 0.999e-6 * x.var(0, correction=0)).all())
    assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))


def test_restarts_differ_and_agree_in_the_end() -> None:
    x = data()
    result = torchem.fit(FactorAnalysis(6, 2).double(), x, restarts=3, seed=0, tol=1e-8, max_iter=2000, progress=False)
    assert len(set(result.restarts)) > 1
    close(torch.tensor(result.restarts), torch.full((3,), result.bound), rtol=1e-6)


def test_save_and_load(tmp_path) -> None:
    model = fitted(data(), noise="spherical", tol=1e-2)
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    assert isinstance(again, FactorAnalysis)
    assert torch.equal(again.transform(data()), model.transform(data()))


def test_frozen_loadings_stay() -> None:
    model = FactorAnalysis(6, 2).double()
    model.loadings = randn(6, 2, seed=3)
    before = copy.deepcopy(model)
    model.component.freeze("loadings")
    torchem.fit(model, data(), init=None, max_iter=5, progress=False, tol=0.0)
    assert torch.equal(model.loadings, before.loadings)
    assert not torch.equal(model.noise_variance, before.noise_variance)


WRONG = [
    (lambda: FactorAnalysis(3, 3), "n_factors: expected a whole number from 1 to n_features − 1 = 2, got 3"),
    (lambda: FactorAnalysis(3, 0), "n_factors"),
    (lambda: FactorAnalysis(0, 1), "n_features"),
    (lambda: FactorAnalysis(3, 1, "full"), "noise"),  # pyright: ignore
    (lambda: setattr(FactorAnalysis(3, 1), "mean", [1.0]), "mean: expected shape \\[3\\]"),
    (lambda: setattr(FactorAnalysis(3, 1), "loadings", [[1.0], [2.0], [float("nan")]]), "loadings: expected finite"),
    (lambda: setattr(FactorAnalysis(3, 1), "noise_variance", [1.0, 2.0, -1.0]), "noise_variance: expected positive"),
    (lambda: setattr(FactorAnalysis(3, 1, "spherical"), "noise_variance", 0.0), "noise_variance: expected positive"),
    (lambda: FactorAnalysis(3, 1).log_prob([[1.0, 2.0]]), "3 features"),
    (lambda: torchem.fit(FactorAnalysis(8, 5), torch.ones(4, 8), progress=False), "data: expected more rows"),
    (lambda: FactorAnalysis(3, 1).batch([[1.0, 2.0, 3.0]], labels=[0]), "labels: expected none"),
    (lambda: FactorAnalysis(3, 1).check(Batch(torch.zeros(1, 3), evidence=torch.zeros(1, 1))), "labels"),
    (lambda: FactorAnalysis(3, 1).sample(-1), "n: expected"),
    (lambda: torchem.fit(FactorAnalysis(3, 1), torch.zeros(9, 3), e_step="hard", progress=False), "e_step"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "message"), WRONG, ids=[message for _, message in WRONG])
def test_bad_input(case, message: str) -> None:
    with as_users_run_it(), pytest.raises(InvalidArgument, match=message):
        case()
