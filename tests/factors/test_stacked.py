"""Components of several families, and noise."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import torchem
from tests.laws.cases import close, gaussian, rand, randn, rng, soft
from torchem.batch import Batch
from torchem.data import Moments
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Gaussian, Poisson, Product, Stacked, StudentT, Uniform

OUTLIERS = Path(torchem.__file__).parent / "datasets" / "outliers.csv"


def noisy(n: int = 400) -> tuple[Tensor, Tensor]:
    """Three clusters, and a sixth of the rows anywhere."""
    centers = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    z = torch.arange(n) % 6 // 2
    x = centers[z] + 0.5 * randn(n, 2, seed=1)
    noise = torch.arange(n) % 6 == 5
    x[noise] = 24 * rand(int(noise.sum()), 2, seed=2) - 12
    return x, torch.where(noise, 3, z)


def test_states_are_those_of_the_parts_in_turn() -> None:
    normal, t, box = gaussian(2, 2, "full"), StudentT(1, 2).double(), Uniform(1, 2, -9.0, 9.0).double()
    s, batch, expected = Stacked([normal, t, box]), Batch(randn(20, 2)), soft(20, 4)
    close(s.log_prob(batch), torch.cat([part.log_prob(batch) for part in (normal, t, box)], -1))
    stats = s.stats(batch, expected)
    for path, part, own in (("factors.0", normal, slice(0, 2)), ("factors.1", t, slice(2, 3))):
        for name, value in part.maximize(part.stats(batch, expected[:, own])).items():
            close(s.maximize(stats)[f"{path}.{name}"], value)
    mean, variance = s.moments(batch)
    close(mean[0, 3], torch.zeros(2))
    close(variance[0, 3], torch.full((2,), 27.0))
    x = s.sample(torch.tensor([3, 0, 3, 2]), generator=rng(0))
    assert x.shape == (4, 2)
    assert x.isfinite().all()
    small = s.select(torch.tensor([0, 3]))
    close(small.log_prob(batch), s.log_prob(batch)[:, [0, 3]])


def test_noise_is_told_from_clusters() -> None:
    x, z = noisy()
    model = torchem.Mixture(Categorical(4), Stacked([Gaussian(3, 2), Uniform(1, 2)])).double()
    result = torchem.fit(model, x, seed=0, restarts=4, max_iter=200, tol=1e-8, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    found = model.most_likely(x)
    # Noise inside a cluster cannot be told from it.
    assert float(((found == 3) == (z == 3)).double().mean()) > 0.97
    close(model.weights[3], torch.tensor(1 / 6), rtol=0.15)
    plain = torchem.GaussianMixture(4, 2).double()
    torchem.fit(plain, x, seed=0, restarts=4, max_iter=200, progress=False)
    assert torchem.criteria(model, x).n_parameters == 3 + 3 * 5
    assert torchem.criteria(model, x).bic < torchem.criteria(plain, x).bic - 50


def test_noise_is_that_of_mclust() -> None:
    """mclust 6.0.0, R 4.2.2, on the same points, from the same start and with the same volume, that of the box:

    x <- as.matrix(read.csv("outliers.csv")[, 1:2]); z <- unmap(read.csv("outliers.csv")$origin)
    me(x, modelName="VVV", z=z, Vinv=1/hypvol(x), control=emControl(tol=c(1e-14, 1e-12), itmax=c(5000, 5000)))

    The volume is no parameter here, where mclust counts it as one.
    """
    table = torch.from_numpy(np.loadtxt(OUTLIERS, delimiter=",", skiprows=1))
    x, origin = table[:, :2], table[:, 2].long()
    model = torchem.Mixture(Categorical(4), Stacked([Gaussian(3, 2), Uniform(1, 2)])).double()
    torchem.fit(model, x, labels=origin, max_iter=1, tol=0, progress=False)  # the M-step of the same start
    result = torchem.fit(model, x, init=None, tol=1e-12, max_iter=3000, progress=False)
    box = model.component.factors[1]
    close((box.sides[1] - box.sides[0]).prod(), torch.tensor(876.78485801, dtype=torch.float64), rtol=1e-9)
    assert result.bound == pytest.approx(-1145.79890042, abs=1e-6)
    weights = torch.tensor([0.36400844, 0.28368886, 0.21555554, 0.13674716], dtype=torch.float64)
    close(model.weights, weights, rtol=1e-5)
    means = [[-0.175607233, -0.078982897], [5.97528009, 0.86480214], [2.0705205, 6.0334867]]
    close(model.component.factors[0].means, torch.tensor(means, dtype=torch.float64), rtol=1e-5)
    assert torchem.criteria(model, x).n_parameters == 19 - 1


def test_the_box_is_that_of_all_rows_with_a_weight() -> None:
    x = randn(5000, 2, seed=3)
    x[17], x[18, 0] = 99.0, torch.nan
    weight = torch.ones(5000, dtype=torch.float64)
    weight[17] = 0.0
    box = Uniform(1, 2)
    torchem.fit(torchem.Mixture(Categorical(1), box).double(), x, weights=weight, seed=0, max_iter=1, progress=False)
    seen = x[torch.arange(5000) != 17]
    close(box.sides, torch.stack([seen.nan_to_num(nan=0.0).amin(0), seen.nan_to_num(nan=0.0).amax(0)]))
    parts = []
    for piece in (x[:1000], x[1000:]):
        parts.append(Moments())
        parts[-1].add(Batch(piece))
    merged = Moments.merged(parts)
    assert merged.high.tolist() == [99.0, 99.0]


def test_sides_that_are_given_stay() -> None:
    box = Uniform(1, 2, low=-50.0)
    torchem.fit(torchem.Mixture(Categorical(1), box).double(), randn(50, 2), seed=0, max_iter=1, progress=False)
    assert box.sides[0].tolist() == [-50.0, -50.0]
    assert float(box.sides[1].max()) < 5


def test_beside_other_columns_and_in_a_chain() -> None:
    """A product reads its columns through a stack, and a chain has a state of noise."""
    x = torch.cat([noisy(60)[0], torch.poisson(torch.full((60, 1), 3.0), generator=rng(4)).double()], -1)
    emission = Product([Stacked([Gaussian(1, 2), Uniform(1, 2)]), Poisson(2, 1)])
    model = torchem.HMM(Categorical(2), Categorical(2, 2), emission).double()
    result = torchem.fit(model, x.view(3, 20, 3), seed=0, max_iter=20, tol=0, progress=False)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))


def test_outside_of_the_box_there_is_nothing() -> None:
    value = Uniform(2, 1, 0.0, 4.0).log_prob(Batch(torch.tensor([[-0.1], [0.0], [4.0], [4.1], [torch.nan]])))
    assert value.exp()[:, 0].tolist() == [0.0, 0.25, 0.25, 0.0, 1.0]


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda: Uniform(0, 2), "n_components"),
        (lambda: Uniform(1, 2, low=[0.0, 1.0, 2.0]), "low"),
        (lambda: Uniform(1, 2, low=1.0, high=[2.0, 0.5]), "high"),
        (lambda: Uniform(1, 2, high=torch.inf), "high"),
        (lambda: Stacked([]), "factors"),
        (lambda: Stacked([Gaussian(2, 2), Gaussian(2, 3)]), "factors"),
        (lambda: Stacked([Gaussian(2, 2), Categorical(3)]), "factors"),
        (lambda: Stacked([same := Gaussian(2, 2), same]), "factors"),
    ],
)
def test_bad_input(act, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name}: "):
        act()


def test_noise_beyond_its_box_takes_new_outliers(tmp_path) -> None:
    x = torch.cat([randn(60, 2), 12 * rand(12, 2, seed=3) - 6])
    far = torch.tensor([[40.0, 40.0], [0.0, 0.0]]).double()
    found = []
    for beyond in (False, True):
        noise = Uniform(1, 2, beyond=beyond)
        model = torchem.Mixture(Categorical(2), Stacked([Gaussian(1, 2), noise])).double()
        result = torchem.fit(model, x, seed=0, max_iter=20, progress=False)
        found.append((result.history, model.most_likely(far).tolist()))
        assert bool((noise.sample(torch.zeros(50, dtype=torch.long)).abs() <= 6).all())
        torchem.save(model, tmp_path / "m.safetensors")
        again = torchem.load(tmp_path / "m.safetensors")
        assert torch.equal(again.log_prob(far), model.log_prob(far))
        model.prune(torch.tensor([False, True]))
        assert bool(model.log_prob(far)[0].isfinite()) is beyond
    # In the box, where all data are, nothing changes.
    assert found[0][0] == found[1][0]
    assert (found[0][1], found[1][1]) == ([0, 0], [1, 0])
