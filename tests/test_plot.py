"""Pictures: that each kind is drawn, in the right axes, for every shape of data and model."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import torchem
from tests.regressions.common import as_users_run_it
from torchem import images
from torchem.errors import InvalidArgument, InvalidFile
from torchem.factors import Categorical
from torchem.graphs import layered

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


def test_missing_entries_are_left_out_of_histograms():
    model, x = mixture(2, 2)
    holes = x.clone()
    holes[::3, 0] = torch.nan
    for data in (x, holes):
        bars = plot.pairs(model, data, ["a", "b"])[0, 0].patches
        assert sum(bar.get_height() * bar.get_width() for bar in bars) == pytest.approx(1.0)


def test_what_is_missing_is_drawn_where_it_is_expected():
    model, x = mixture(2, 3)
    x = torch.as_tensor(x).clone()
    x[::4, 0] = torch.nan
    draw(plot.clusters(model, x))
    axes = plot.pairs(model, x)
    draw(axes)
    seen, filled = axes[1, 0].collections[:2]
    assert len(filled.get_offsets()) == len(x[::4])
    assert len(seen.get_offsets()) == len(x) - len(x[::4])
    assert len(axes[2, 1].collections) == 1  # nothing is missing of these two


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


# ---- sequences ----------------------------------------------------------------------------------------------------


def heights(ax) -> list[float]:
    return [bar.get_height() for bar in ax.patches]


def test_counts_are_bars_in_the_colours_of_their_states():
    ax = plot.states([2, 0, 9, 8], [0, 0, 1, 1], [[1.5], [8.0]], index=[1990, 1991, 1992, 1993], columns=["events"])
    draw(ax)
    assert heights(ax) == [2, 0, 9, 8]
    first, last = (np.array(ax.patches[i].get_facecolor()[:3]) for i in (0, 3))
    for colour, own in zip((first, last), plot.palette(2), strict=True):
        np.testing.assert_allclose(colour, own + 0.55 * (1 - own))
    assert ax.get_xlim() == (1989.5, 1993.5)
    lines = ax.collections[-1].get_segments()  # from where each state begins to where it ends, at its level
    np.testing.assert_allclose(lines, [[[1989.5, 1.5], [1991.5, 1.5]], [[1991.5, 8], [1993.5, 8]]])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["state", "0", "1"]


def test_levels_are_means_of_the_frames_when_none_are_given():
    ax = plot.states([[1.5, 5.0], [2.5, 7.0], [float("nan"), 9.0]], [0, 0, 0])
    draw(ax[0])
    levels = [panel.collections[-1].get_segments()[0][0, 1] for panel in ax]
    assert levels == [2.0, 7.0]


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("frames", [1, 2, 700, 5000])
@pytest.mark.parametrize("d", [1, 3, 9])
def test_sequences_of_every_shape(frames, d, k):
    x = torch.randn(frames, d, dtype=torch.float64)
    x[frames // 2] = torch.nan
    path = torch.randint(-1, k, (frames,))
    path[0] = k - 1
    axes = np.ravel(plot.states(x, path))
    draw(axes)
    assert len(axes) == min(d, 4)
    draw(plot.posterior(torch.rand(frames, k).softmax(-1)))


def test_several_sequences_are_drawn_one_above_the_other():
    model = torchem.GaussianHMM(2, 1).double()
    lengths = torch.tensor([5, 3, 2, 4, 1, 2, 2])
    x = model.sample(7, 5)
    path, posterior = model.most_likely(x, lengths=lengths), model.posterior(x, lengths=lengths)
    names = list("abcdefg")
    axes = plot.states(x, path, lengths=lengths, names=names)
    draw(axes)
    assert [ax.get_title(loc="left") for ax in axes] == names[:6]
    assert [len(ax.lines[0].get_xdata()) for ax in axes] == lengths[:6].tolist()
    axes = plot.posterior(posterior, lengths=lengths)
    draw(axes)
    assert [round(ax.get_xlim()[1] + 0.5) for ax in axes] == lengths[:6].tolist()
    listed = [row[:n] for row, n in zip(x, lengths.tolist(), strict=True)]
    for paths in ([row[:n] for row, n in zip(path, lengths, strict=True)], torch.cat([p[p >= 0] for p in path])):
        assert len(plot.states(listed, paths)) == 6
    assert len(plot.states(torch.cat(listed), path, lengths=lengths)) == 6


def test_dates_stand_on_the_axis():
    dates = ["2020-01-31", "2020-02-29", "2020-03-31"]
    ax = plot.states([0.5, 1.5, 2.5], [0, 1, 1], index=dates)
    draw(ax)
    assert any("Feb" in text.get_text() for text in ax.get_xticklabels())
    again = plot.states([0.5, 1.5, 2.5], [0, 1, 1], index=np.array(dates, "datetime64[D]"))
    assert again.get_xlim() == ax.get_xlim()


def test_a_long_series_is_drawn_in_stretches():
    x = np.random.default_rng(0).normal(size=100_000)
    path = np.arange(100_000) // 100 % 3
    began = time.perf_counter()
    ax = plot.states(x, path)
    draw(ax)
    draw(plot.posterior(np.eye(3)[path]))
    assert time.perf_counter() - began < 20
    assert sum(len(c.get_paths()) for c in ax.collections) <= 4_000
    assert not ax.lines


def test_bands_fill_the_height():
    ax = plot.posterior([[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    draw(ax)
    low, high = (band.get_paths()[0].get_extents() for band in ax.collections)
    assert (low.y0, low.y1, high.y1) == (0.0, 0.75, 1.0)
    assert ax.get_xlim() == (-0.5, 2.5)


def test_durations_and_loadings() -> None:
    ax = plot.durations(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.2, 0.8]]))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "state 0: 1.5 on average", "state 1: 2.8 on average"
    ]  # fmt: skip
    ax = plot.loadings([[1.0, -2.0]], columns=["height"])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["height"]
    assert len(plot.loadings(torch.randn(60, 5)).texts) == 0
    for bad in (torch.zeros(3), torch.zeros(0, 2)):
        for draw in (plot.durations, plot.loadings):
            with pytest.raises(InvalidArgument, match="shape"):
                draw(bad)


def test_the_transition_matrix_has_its_numbers():
    ax = plot.transitions(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.9999, 0.0001], [0.0, 0.0, 1.0]]))
    draw(ax)
    assert [text.get_text() for text in ax.texts] == ["0.500", "0.500", "1.000", "< .001", "1.000"]
    for tick, colour in zip(ax.get_xticklabels(), plot.palette(3), strict=True):
        np.testing.assert_allclose(tick.get_color(), colour * 0.85)
    many = plot.transitions(torch.rand(30, 30).softmax(-1))
    draw(many)
    assert not many.texts


@pytest.mark.parametrize("d", [1, 2, 6])
def test_a_chain_at_a_glance(d):
    model = torchem.GaussianHMM(3, d).double()
    x = model.sample(1, 40)[0]
    parts = (model.most_likely(x), model.posterior(x), model.transition_matrix)
    axes = plot.chain(x, *parts, columns=[f"c{i}" for i in range(d)])
    draw(axes)
    assert [ax.get_ylabel() for ax in axes] == [*[f"c{i}" for i in range(min(d, 4))], "probability", "from state"]
    assert sum(ax.get_legend() is not None for ax in axes) == 1
    with pytest.raises(InvalidArgument, match="one sequence"):
        plot.chain(x.reshape(2, 20, d), *parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": [0, 1]}, "path: expected a state for each of 3 frames"),
        ({"means": [[1.0]]}, r"means: expected shape \[2, 1\]"),
        ({"columns": ["a", "b"]}, "columns: expected 1 names"),
        ({"index": [1, 2]}, "index: expected a place for each"),
        ({"index": [1, 1, 2]}, "index: expected places that rise"),
        ({"index": ["a", "b", "c"]}, "index: expected numbers or dates"),
        ({"x": []}, "data: expected at least one sequence"),
    ],
)
def test_sequences_that_disagree(arguments, message):
    with pytest.raises(InvalidArgument, match=message):
        plot.states(**{"x": [1.0, 2.0, 3.0], "path": [0, 1, 1], **arguments})


def test_sequences_by_cluster():
    x = [torch.randn(length, 2) for length in (5, 3, 1)]
    x[1][0, 0] = torch.nan
    axes = plot.sequences(x, torch.tensor([2, 0, 2]), columns=["speed", "turn"], most=1)
    assert [len(ax.lines) for ax in axes] == [1, 0, 1]
    assert [ax.get_title() for ax in axes] == [
        f"cluster {k}: {n} sequence{s}" for k, n, s in ((0, 1, ""), (1, 0, "s"), (2, 2, "s"))
    ]
    assert axes[0].get_ylabel() == "speed"
    assert len(plot.sequences(torch.zeros(2, 4, 1), [0, 0], lengths=[4, 2])) == 1
    with pytest.raises(InvalidArgument, match="one for each of 3 sequences"):
        plot.sequences(x, [0, 1])
    with pytest.raises(InvalidArgument, match="most"):
        plot.sequences(x, [0, 1, 0], most=0)


def test_matrices_that_are_none():
    for bad in ([[0.5, 0.5]], [1.0], torch.zeros(0, 0)):
        with pytest.raises(InvalidArgument, match="matrix"):
            plot.transitions(bad)
    with pytest.raises(InvalidArgument, match="ax: expected one column of one sequence"):
        plot.states([[1.0, 2.0]], [0], ax=plt.subplots()[1])


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


def test_networks():
    """Boxes with tables in layers, no two on each other; edges that pass a layer go round its boxes."""
    edges = [("A", "B"), ("B", "C"), ("A", "C"), ("C", "D"), ("A", "D"), ("E", "D")]
    leaves = {"X": (("D", "B"), torchem.factors.Gaussian(4, 1)), "Y": ((), torchem.factors.Poisson(1, 2))}
    net = torchem.BayesianNetwork(dict.fromkeys("ABCDE", 2), edges, ("B",), leaves, states={"A": ["off", "on"]})
    net.tables["B"] = [[0.25, 0.75], [1.0, 0.0]]
    ax = plot.network(net)
    draw(ax)
    said = [text.get_text() for text in ax.texts]
    for word in ("off", "0.250", "0.750", "C, A, E", "0 ± 1"):
        assert word in said
    boxes = [patch.get_window_extent() for patch in ax.patches if type(patch).__name__ == "FancyBboxPatch"]
    assert len(boxes) == 7
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not a.overlaps(b)
    assert sum(type(patch).__name__ == "FancyArrowPatch" for patch in ax.patches) == len(edges) + 2
    bare = plot.network(net, tables=False)
    draw(bare)
    assert [text.get_text() for text in bare.texts] == ["A", "B", "C", "D", "E", "X", "Y"]


def test_layers_of_a_graph():
    parents = {"a": [], "b": ["a"], "c": ["b"], "d": ["a", "c"], "e": []}
    found = layered(parents, dict.fromkeys(parents, (1.0, 0.5)), down=1.0)
    assert [found.centers[name][1] for name in "abcd"] == [0.25, 1.75, 3.25, 4.75]
    # The edge from a to d passes two layers, beside what stands there.
    line = found.lines["a", "d"]
    assert len(line) == 4
    for (x, _), name in zip(line[1:3], "bc", strict=True):
        assert abs(x - found.centers[name][0]) >= 0.5
    assert line[-1][1] == pytest.approx(4.5)


def test_a_level_lies_within_its_band():
    """The line is the mean, the band holds its share, observations are points; columns and sequences have panels."""
    model = torchem.LinearGaussianStateSpace(1, 2)
    model.loadings = [[1.0], [2.0]]
    x = [torch.randn(9, 2), torch.randn(5, 2)]
    law = model.smooth(x)
    axes = plot.level(law, x, share=0.6827, columns=["a", "b"], names=["first", "second"])
    assert [panel.get_ylabel() for panel in axes] == ["a", "b", "a", "b"]
    dots, line = axes[3].lines
    np.testing.assert_allclose(dots.get_ydata(), x[1][:, 1])
    np.testing.assert_allclose(line.get_ydata(), law.mean[1, :5, 1].detach(), rtol=1e-6)
    edges = axes[3].collections[0].get_paths()[0].vertices[:, 1]
    top = (law.mean + law.stddev)[1, :5, 1].detach()
    assert np.isclose(edges[:, None], top.numpy(), rtol=1e-3, atol=1e-3).any(0).all()
    for share in (0, 1.0, "x"):
        with pytest.raises(InvalidArgument, match=r"^share: "), as_users_run_it():
            plot.level(law, x, share=share)
    with pytest.raises(InvalidArgument, match=r"^x: expected sequences that fill"):
        plot.level(law, [row[:4] for row in x])
