"""Pictures: that each kind is drawn, in the right axes, for every shape of data and model."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import torchem
from torchem import images
from torchem.errors import InvalidArgument, InvalidFile
from torchem.factors import Categorical

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

from torchem import plot  # noqa: E402


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def mixture(k: int, d: int, covariance_type: str = "full") -> tuple[torchem.GaussianMixture, torch.Tensor]:
    model = torchem.GaussianMixture(k, d, covariance_type).double()
    model.means = torch.arange(k).unsqueeze(-1) * 4.0 + torch.randn(k, d)
    return model, model.sample(60)


def draw(ax) -> None:
    np.ravel(ax)[0].figure.canvas.draw()


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("d", [1, 2, 3, 9])
def test_clusters_of_every_shape(d, covariance_type):
    ax = plot.clusters(*mixture(3, d, covariance_type))
    draw(ax)
    assert ax.get_xlabel()
    assert ax.get_legend() is not None
    if d > 1:
        assert len(ax.lines) >= 9  # two ellipses and a mean for each component


def test_colours_blend_by_posterior():
    model = torchem.GaussianMixture(2, 2).double()
    model.means = [[-1.0, 0.0], [1.0, 0.0]]
    ax = plot.clusters(model, [[-9.0, 0.0], [0.0, 0.0], [9.0, 0.0]], ["a", "b"])
    first, middle, last = ax.collections[0].get_facecolors()[:, :3]
    one, other = plot.palette(2)
    np.testing.assert_allclose([first, middle, last], [one, (one + other) / 2, other], atol=1e-6)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("a", "b")


def test_ellipses_lie_at_one_and_two_standard_deviations():
    model = torchem.GaussianMixture(1, 2).double()
    model.covariances = [[[4.0, 0.0], [0.0, 1.0]]]
    ax = plot.clusters(model, model.sample(20))
    widths = sorted(np.ptp(line.get_xdata()) for line in ax.lines if len(line.get_xdata()) > 9)
    np.testing.assert_allclose(widths, [4.0, 8.0], rtol=1e-3)


def test_the_plane_separates_what_the_first_columns_hide():
    model = torchem.GaussianMixture(2, 4).double()
    model.means = [[0.0, 0.0, 0.0, -3.0], [0.0, 0.0, 0.0, 3.0]]
    x, z = model.sample(400, latents=True)
    points = np.asarray(plot.clusters(model, x).collections[0].get_offsets())
    gap = abs(points[z == 0, 0].mean() - points[z == 1, 0].mean())
    assert gap > 4 * points[z == 0, 0].std()


def test_the_given_axes_are_used():
    ax = plt.subplots()[1]
    assert plot.clusters(*mixture(2, 2), ax=ax) is ax
    assert plot.bound([-2.0, -1.0], ax=ax) is ax


def test_many_observations_are_thinned_and_others_than_gaussians_drawn():
    model, _ = mixture(2, 2)
    ax = plot.clusters(model, model.sample(30_000))
    assert len(ax.collections[0].get_offsets()) == 20_000
    plot.clusters(torchem.Mixture(Categorical(2), Categorical(2, 3)), torch.tensor([[0], [1], [2]]))


def test_degenerate_data_are_drawn():
    model = torchem.GaussianMixture(1, 2)
    draw(plot.clusters(model, torch.zeros(3, 2)))
    draw(plot.clusters(torchem.GaussianMixture(1, 1), torch.zeros(3, 1)))
    draw(plot.clusters(torchem.GaussianMixture(1, 3), torch.zeros(3, 3)))


def test_pairs():
    axes = plot.pairs(*mixture(2, 3), columns=["a", "b", "c"])
    draw(axes)
    assert axes.shape == (3, 3)
    assert not axes[0, 1].axison
    assert [ax.get_xlabel() for ax in axes[-1]] == ["a", "b", "c"]
    with pytest.raises(InvalidArgument, match="2 to 8 columns"):
        plot.pairs(*mixture(2, 1))


def test_bad_input_is_described():
    model, x = mixture(2, 2)
    with pytest.raises(InvalidArgument, match="2 names"):
        plot.clusters(model, x, ["a"])
    with pytest.raises(InvalidArgument, match="table"):
        plot.clusters(model, torch.zeros(0, 2))
    for nothing in ([], [float("nan")], None):
        with pytest.raises(InvalidArgument, match="result"):
            plot.bound(nothing)


def test_bound_shows_all_restarts_and_the_best():
    model, x = mixture(2, 2)
    result = torchem.fit(model, x, restarts=3, seed=0, progress=False)
    ax = plot.bound(result)
    draw(ax)
    long = [line for line in ax.lines if len(line.get_ydata()) > 1]
    assert len(long) == 3
    best = next(line for line in long if line.get_linewidth() == 2.0)
    assert list(best.get_ydata()) == result.history
    draw(plot.bound([[-3.0, -2.0, None], [-4.0, -1.0]]))  # as a report holds it


def test_segmentation():
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, 3:] = 255
    labels = (image[..., 0] > 0).astype(int)
    ax = plot.segmentation(image, labels)
    draw(ax)
    sheet = ax.images[0].get_array()
    np.testing.assert_array_equal(sheet[:, :6], image / 255)
    np.testing.assert_array_equal(sheet[:, -6:], image / 255)
    for bad in ({"labels": labels[:2]}, {"colours": np.zeros((1, 3))}, {"image": image[..., 0]}):
        with pytest.raises(InvalidArgument, match=next(iter(bad))):
            plot.segmentation(**{"image": image, "labels": labels, **bad})


@pytest.mark.parametrize("n", [1, 2, 8, 20])
def test_palettes_have_distinct_colours(n):
    colours = plot.palette(n)
    assert colours.shape == (n, 3)
    assert len({tuple(colour.round(3)) for colour in colours}) == n
    assert ((colours >= 0) & (colours <= 1)).all()


def test_colours_survive_the_way_through_lab():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    for colour in ("rgb", "lab"):
        again = images.to_rgb(images.to_pixels(image, colour), colour)
        np.testing.assert_allclose(again, image.reshape(-1, 3) / 255, atol=1e-6)
    red = np.array([[[255, 0, 0]]], np.uint8)
    np.testing.assert_allclose(images.to_pixels(red, "lab")[0], [53.24, 80.09, 67.20], atol=0.05)


def test_what_is_no_image(tmp_path):
    pytest.importorskip("PIL")
    (tmp_path / "a.jpg").write_bytes(b"junk")
    for name in ("a.jpg", "none.png"):
        with pytest.raises(InvalidFile, match=name):
            images.read_image(tmp_path / name)


def test_importing_torchem_loads_neither_pictures_nor_the_command_line():
    code = (
        "import sys, torchem\n"
        "heavy = {'matplotlib', 'jsonargparse', 'PIL', 'pyarrow', 'sklearn', 'yaml', 'numba', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
