"""The command line: the main job on real data, every command, and the mistakes that people make."""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import torchem
from torchem import cli, runs
from torchem.tables import read_table

ROOT = Path(__file__).parents[1]
DATASETS = Path(torchem.__file__).parent / "datasets"

BASE = """
model:
  class_path: torchem.GaussianMixture
  init_args:
    n_components: 2
data:
  path: {data}
  columns: [eruptions, waiting]
fit:
  seed: 0
  max_iter: 50
output: out
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a configuration."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    return tmp_path


def write_config(folder: Path, old: str = "", new: str = "") -> None:
    text = BASE.format(data=DATASETS / "faithful.csv")
    assert old in text
    (folder / "c.yaml").write_text(text.replace(old, new) if old else text)


def ok(capsys, *arguments) -> str:
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def fails(capsys, *arguments) -> str:
    """The one line on standard error."""
    code = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("torchem: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


# ---- the main jobs ------------------------------------------------------------------------------------------------


def test_regressions_on_the_command_line(capsys, tmp_path, monkeypatch):
    """The two lines of Old Faithful: fitted, predicted from covariates alone, drawn from."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    ok(capsys, "fit", "configs/regressions.yaml", "--fit.restarts", "2", "--fit.max_iter", "300", "--fit.tol", "1e-4",
       "--output", out)  # fmt: skip
    told = report(out)
    assert told["data"]["inputs"] == ["eruptions"]
    assert told["criteria"]["n_parameters"] == 1 + 2 * (2 + 1)
    assert (out / "prediction.png").exists()
    (tmp_path / "new.csv").write_text("eruptions\n2\n4.5\n")
    rows = list(csv.DictReader(io.StringIO(ok(capsys, "predict", out, tmp_path / "new.csv", "--output", "-"))))
    assert list(rows[0]) == ["mean_waiting", "q0.05_waiting", "q0.5_waiting", "q0.95_waiting"]
    for row, about in zip(rows, (55, 80), strict=True):
        low, middle, high = (float(row[f"q{share}_waiting"]) for share in ("0.05", "0.5", "0.95"))
        assert low < middle < high
        assert abs(float(row["mean_waiting"]) - about) < 6
    first = next(csv.DictReader(io.StringIO(ok(capsys, "predict", out, "--output", "-"))))
    assert {"label", "log_prob", "mean_waiting"} <= first.keys()
    drawn = ok(capsys, "sample", out, "--n", "5", "--latents", "true", "--output", "-")
    assert drawn.count("\n") == 6


def test_labels_and_covariates_that_do_not_fit(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = tmp_path / "t.csv"
    table.write_text("y,v,z\n" + "".join(f"{i % 3},{i / 10},{i % 2 if i < 20 else -1}\n" for i in range(40)))
    given = [
        "fit",
        "configs/regressions.yaml",
        "--data.path",
        table,
        "--data.columns",
        "[y]",
        "--output",
        tmp_path / "o",
    ]
    ok(capsys, *given, "--data.inputs", "[v]", "--data.labels", "z", "--fit.restarts", "1", "--fit.tol", "1")
    assert len((tmp_path / "o" / "labels.csv").read_text().splitlines()) == 41
    assert report(tmp_path / "o")["data"]["labels"] == "z"
    assert "n_inputs: expected 2" in fails(capsys, *given, "--data.inputs", "[v]", "--model.component.n_inputs", "3")
    assert "columns of covariates" in fails(capsys, *given, "--data.inputs", "null")


def test_faithful(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    out = ok(capsys, "fit", "configs/faithful.yaml", "--output", tmp_path / "faithful")
    assert re.search(r"[01] +0\.3559 +2\.036 ± 0\.263 +54\.48 ± 5\.80", out)
    assert re.search(r"[01] +0\.6441 +4\.290 ± 0\.412 +79\.97 ± 6\.00", out)
    for word in ("log-likelihood", "-1130.26", "AIC", "2282.53", "BIC", "2322.19", "ICL", "converged", "restarts"):
        assert word in out
    found = {path.name for path in (tmp_path / "faithful").iterdir()}
    assert {"model.safetensors", "report.json", "config.yaml", "clusters.png", "bound.png", "labels.csv"} == found
    made = report(tmp_path / "faithful")
    assert made["files"] == sorted(made["files"], key=made["files"].index)
    assert set(made["files"]) == found
    assert len(made["fit"]["restarts"]) == 10
    assert made["criteria"]["bic"] == pytest.approx(2322.192, abs=1e-2)
    assert made["data"]["columns"] == ["eruptions", "waiting"]
    for name in ("clusters.png", "bound.png"):
        assert (tmp_path / "faithful" / name).read_bytes().startswith(b"\x89PNG")


def test_outliers(capsys, tmp_path):
    """Three clusters and noise, whose box is that of the data: mclust's maximum on these points."""
    out = ok(capsys, "fit", ROOT / "configs" / "outliers.yaml", "--output", tmp_path / "run")
    for word in ("280 observations × 2 columns", "-1145.80", "18 parameters"):
        assert word in out


def test_sequences_are_clustered(capsys, tmp_path):
    """Walkers of three kinds, each found; rows of predictions are sequences, and draws say who they are."""
    folder = tmp_path / "run"
    options = ["--fit.restarts", "4", "--fit.tol", "1e-4"]
    out = ok(capsys, "fit", ROOT / "configs" / "gaits.yaml", "--output", folder, *options)
    for word in ("1,987 frames in 45 sequences", "component 2: weight 0.3", "-2483.1", "23 parameters", "labels.csv"):
        assert word in out
    truth = read_table(DATASETS / "gaits.csv", ["walker", "kind"]).values
    kinds = {int(walker): int(kind) for walker, kind in truth}
    found = read_table(folder / "labels.csv", ["walker", "label"]).values
    assert len(found) == 45
    assert len({(int(label), kinds[int(walker)]) for walker, label in found}) == 3
    report = json.loads((folder / "report.json").read_text())
    assert [len(part["states"]) for part in report["components"]] == [2, 2, 2]
    assert "45 sequences" in ok(capsys, "predict", folder)
    assert (folder / "predictions.csv").read_text() == (folder / "labels.csv").read_text()
    drawn = ok(
        capsys, "sample", folder, "--n", "4", "--sequences", "3", "--latents", "true", "--seed", "0", "--output", "-"
    )
    rows = [line.split(",") for line in drawn.splitlines()]
    assert rows[0] == ["walker", "label", "speed"]
    assert [row[0] for row in rows[1:]] == [str(n) for n in range(3) for _ in range(4)]
    assert "clusters.png" in ok(capsys, "plot", folder)
    error = fails(capsys, "fit", ROOT / "configs" / "gaits.yaml", "--output", tmp_path / "no", "--data.labels", "time")
    assert "data.labels: expected one label for each sequence" in error


RATES = """
model:
  class_path: torchem.Mixture
  init_args:
    mixing: torchem.factors.Categorical
    component: torchem.factors.{family}
states: 1
data: {{path: t.csv, columns: [y], inputs: [v], intercept: true, {extra}}}
fit: {{seed: 0, max_iter: 200, tol: 1.0e-9}}
output: out
"""


@pytest.mark.parametrize(
    ("family", "extra"), [("PoissonRegression", "offset"), ("BinomialRegression", "trials"), ("LinearGaussian", None)]
)
def test_regressions_with_exposures_trials_and_gaps(capsys, tmp_path, monkeypatch, family: str, extra: str) -> None:
    """Each command on the same columns: what a run reads beside its data it reads again, from any table."""
    monkeypatch.chdir(tmp_path)
    rng, n = np.random.default_rng(0), 300
    v, size = rng.normal(size=n), rng.integers(1, 30, n)
    draws = {
        "PoissonRegression": rng.poisson(size * np.exp(0.5 + 0.7 * v)),
        "BinomialRegression": rng.binomial(size, 1 / (1 + np.exp(-0.5 - 0.7 * v))),
        "LinearGaussian": 0.5 + 0.7 * v + 0.1 * rng.normal(size=n),
    }
    beside = np.log(size) if extra == "offset" else size
    y = [str(value) for value in draws[family]]
    y[5] = ""
    rows = [f"{a},{b},{c}" for a, b, c in zip(y, v.tolist(), beside.tolist(), strict=True)]
    Path("t.csv").write_text("\n".join(["y,v,size", *rows]))
    column = f"{extra}: size" if extra else "weights: null"
    Path("r.yaml").write_text(RATES.format(family=family, extra=column))
    ok(capsys, "fit", "r.yaml")
    weight = torchem.load("out/model.safetensors").component.weight.detach()  # pyright: ignore[reportAttributeAccessIssue]
    assert weight.reshape(-1).tolist() == pytest.approx([0.5, 0.7], abs=0.1)
    ok(capsys, "impute", "out", "--how", "mean")
    ok(capsys, "predict", "out")
    ok(capsys, "sample", "out", "--seed", 0)
    ok(capsys, "plot", "out")
    completed = read_table("out/imputed.csv", ["y"]).values[:, 0]
    mean = read_table("out/predictions.csv", ["mean_y"]).values[:, 0]
    assert np.isfinite(completed).all()
    assert completed[5] == pytest.approx(mean[5], rel=1e-9)
    assert np.delete(completed, 5).tolist() == np.delete(draws[family], 5).tolist()
    # Other data: without y they are predicted, without what is needed beside it the message says how to go on.
    Path("u.csv").write_text("v,size\n0.0,1\n1.0,20\n")
    ok(capsys, "predict", "out", "u.csv")
    Path("w.csv").write_text("y,size\n1,1\n1,20\n")
    assert "'v' that the model was fitted on" in fails(capsys, "impute", "out", "w.csv")
    if extra:
        Path("w.csv").write_text("y,v\n1,1\n1,1\n")
        assert "'size' that the model was fitted on" in fails(capsys, "predict", "out", "w.csv")


def test_a_table_that_lacks_a_column_of_the_model_is_told_of_empty_cells(capsys, work) -> None:
    ok(capsys, "fit", "c.yaml")
    (work / "one.csv").write_text("eruptions\n1.9\n4.1\n")
    for command in ("predict", "impute"):
        assert re.search("the column 'waiting' .*empty cells", fails(capsys, command, "out", "one.csv"))
    (work / "both.csv").write_text("eruptions,waiting\n1.9,\n4.1,\n")
    ok(capsys, "impute", "out", "both.csv")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [
    ("regimes", ["135 frames in 1 sequence", "-181.26", "9 parameters", "0.245  0.755"]),
    ("outliers-t", ["-1205.7", "20 parameters"]),
    ("answers", ["600 observations × 5 columns", "-2383.69", "29", "preferred by BIC"]),
])  # fmt: skip
def test_other_configurations(name, words, capsys, tmp_path):
    out = ok(capsys, "fit", ROOT / "configs" / f"{name}.yaml", "--output", tmp_path / "run")
    for word in words:
        assert word in out


def test_a_network(capsys, tmp_path):
    """A hidden cause: its probabilities by name, a picture, gaps filled in and rows drawn."""
    run = tmp_path / "run"
    out = ok(capsys, "fit", ROOT / "configs" / "clinic.yaml", "--output", run, "--fit.restarts", 1)
    for word in ("BayesianNetwork · 800 observations × 6 columns", "-2982.91", "21 parameters", "network.png"):
        assert word in out
    assert (run / "labels.csv").read_text().splitlines()[0] == "flu,flu_0,flu_1,log_prob"
    ok(capsys, "sample", run, "--n", 5, "--latents", "true")
    head = "flu,season,vaccinated,smoker,cough,tired,temperature"
    assert (run / "sample.csv").read_text().splitlines()[0] == head
    ok(capsys, "impute", run)
    assert ",," not in (run / "imputed.csv").read_text()


def test_a_race(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ("--fit.restarts", 4, "--fit.race", 1, "--fit.init", "random_from_data", "--fit.budget", 27200)
    out = ok(capsys, "fit", "configs/faithful.yaml", "--output", tmp_path / "race", *options)
    assert "4, of which 3 were dropped in the race" in out
    made = report(tmp_path / "race")["fit"]
    assert made["statuses"].count("dropped") == 3
    assert made["seen"][:2] == [0, 272]


@pytest.fixture(scope="module")
def earthquakes(tmp_path_factory) -> tuple[Path, str]:
    """The run of the shipped configuration, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "earthquakes"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["fit", str(ROOT / "configs" / "earthquakes.yaml"), "--output", str(folder)]) == 0
    return folder, out.getvalue()


def test_earthquakes(earthquakes):
    """W. Zucchini, I. L. MacDonald (2009), table 3.1 and section 4.2: stationary chains of 2 and of 3 states."""
    folder, out = earthquakes
    assert "HMM · 107 frames in 1 sequence × 1 column · float64" in out
    assert "state    rate  stationary   time    → 0    → 1    → 2" in out
    for row in (r"0  15\.472 +0\.661", r"1  26\.125", r"0  13\.146 +0\.444", r"1  19\.721", r"2  29\.71[45] .* 0\.803"):
        assert re.search(row, out)
    assert re.search(r"2 +-342\.32 +4 +692\.64 +703\.33 +\S+\n", out)
    assert re.search(r"3 +-329\.46 +9 +676\.92 +700\.98 +\S+  ← preferred by BIC\n", out)
    pictures = {"states.png", "posterior.png", "transitions.png", "chain.png", "bound.png"}
    models = {"model.safetensors", "model-2.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*pictures, *models, "report.json", "config.yaml", "states.csv"}
    made = report(folder)
    assert made["n_states"] == 3
    two, three = (entry["criteria"] for entry in made["candidates"])
    assert two["loglik"] == pytest.approx(-342.3183, abs=1e-4)
    assert three["loglik"] == pytest.approx(-329.4603, abs=1e-4)
    assert made["criteria"] == three
    assert [s["rate"]["count"] for s in made["states"]] == pytest.approx([13.146, 19.721, 29.714], abs=2e-3)
    assert sum(s["stationary"] for s in made["states"]) == pytest.approx(1)
    assert torchem.load(folder / "model.safetensors").n_states == 3
    assert torchem.load(folder / "model-2.safetensors").n_states == 2


def test_the_level_of_the_nile(capsys, tmp_path):
    """A model of sequences without states to number: its levels are written, read again, drawn and filled in."""
    run = tmp_path / "nile"
    quick = ("--fit.max_iter", 30, "--fit.tol", 1e-2)
    out = ok(capsys, "fit", ROOT / "configs" / "nile.yaml", *quick, "--output", run)
    assert "LinearGaussianStateSpace · 100 frames in 1 sequence × 1 column · float64" in out
    assert {path.name for path in run.iterdir()} == {
        "model.safetensors", "report.json", "config.yaml", "levels.csv", "bound.png", "level.png"
    }  # fmt: skip
    table, nile = read_table(run / "levels.csv"), read_table(DATASETS / "nile.csv").values
    assert table.columns == ["year", "level_volume", "sd_volume"]
    model = torchem.load(run / "model.safetensors")
    law = model.smooth(torch.from_numpy(nile[:, 1]), inputs=torch.from_numpy(nile[:, 2]))
    np.testing.assert_allclose(table.values[:, 1], law.mean[0, :, 0].detach(), atol=1e-9)
    np.testing.assert_allclose(table.values[:, 2], law.stddev[0, :, 0].detach(), atol=1e-9)
    ok(capsys, "predict", run, "--filtered", "true", "--output", tmp_path / "p.csv")
    assert read_table(tmp_path / "p.csv").columns == [*table.columns, "filtered_0"]
    ok(capsys, "sample", run, "--n", 120, "--latents", "true", "--output", tmp_path / "s.csv")
    assert read_table(tmp_path / "s.csv").columns == ["state_0", "volume"]
    assert read_table(tmp_path / "s.csv").values.shape == (120, 2)
    assert "level.png" in ok(capsys, "plot", run)
    holes = "\n".join(f"{y:g},{'' if 1900 <= y < 1905 else v:},{d:g}" for y, v, d in nile)
    (tmp_path / "gaps.csv").write_text(f"year,volume,dam\n{holes}\n")
    assert "gaps filled in: 5" in ok(capsys, "impute", run, tmp_path / "gaps.csv")


def test_the_states_of_each_year(earthquakes):
    folder, _ = earthquakes
    table = read_table(folder / "states.csv")
    assert table.columns == ["year", "state", "posterior_0", "posterior_1", "posterior_2"]
    np.testing.assert_array_equal(table.values[:, 0], np.arange(1900, 2007))
    x = torch.from_numpy(read_table(DATASETS / "earthquakes.csv", ["count"]).values)
    model = torchem.load(folder / "model.safetensors")
    np.testing.assert_array_equal(table.values[:, 1], model.most_likely(x)[0].numpy())
    np.testing.assert_allclose(table.values[:, 2:], model.posterior(x)[0].detach().numpy(), atol=1e-12)


@pytest.mark.parametrize(
    ("states", "rates", "loglik"), [(2, [15.421, 26.018], -341.8787), (3, [13.134, 19.713, 29.710], -328.5275)]
)
def test_a_free_first_state(capsys, tmp_path, states, rates, loglik):
    """The EM estimates of Zucchini and MacDonald (2009), section 4.2."""
    options = ("--states", states, "--model.initial", "torchem.factors.Categorical", "--output", tmp_path / "free")
    ok(capsys, "fit", ROOT / "configs" / "earthquakes.yaml", *options)
    made = report(tmp_path / "free")
    assert made["criteria"]["loglik"] == pytest.approx(loglik, abs=1e-4)
    assert [s["rate"]["count"] for s in made["states"]] == pytest.approx(rates, abs=2e-3)
    assert "candidates" not in made


def test_airquality(capsys, tmp_path, monkeypatch):
    """A table with gaps: fitted, filled in, drawn, and drawn again."""
    monkeypatch.chdir(ROOT)
    run = tmp_path / "run"
    ok(capsys, "fit", "configs/airquality.yaml", "--fit.restarts", 2, "--fit.tol", 1e-4, "--output", run)
    assert (run / "clusters.png").exists()
    table = read_table(DATASETS / "airquality.csv").values
    gaps = np.isnan(table)
    assert "gaps filled in: 44" in ok(capsys, "impute", run)
    filled = read_table(run / "imputed.csv")
    assert filled.columns == ["Ozone", "Solar.R", "Wind", "Temp"]
    assert not np.isnan(filled.values).any()
    assert (filled.values[~gaps] == table[~gaps]).all()
    ok(capsys, "impute", run, "--variance", "true", "--output", tmp_path / "v.csv")
    variance = read_table(tmp_path / "v.csv", [f"{name}_variance" for name in filled.columns]).values
    assert ((variance > 0) == gaps).all()
    for name in "ab":
        ok(capsys, "impute", run, "--draws", 3, "--seed", 1, "--output", tmp_path / f"{name}.csv")
    drawn = read_table(tmp_path / "a.csv").values
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert drawn[:, 0].tolist() == np.repeat(range(3), 153).tolist()
    assert (drawn[:, 1:].reshape(3, 153, 4)[:, ~gaps] == table[~gaps]).all()
    assert (drawn[:, 1:].reshape(3, 153, 4)[:, gaps].std(0) > 0).all()
    # A run may be replaced: what was imputed by its old model goes with it.
    ok(capsys, "fit", "configs/airquality.yaml", "--fit.max_iter", 1, "--fit.tol", 0, "--output", run)
    assert not (run / "imputed.csv").exists()


def test_segment_with_an_image_of_the_users(capsys, work):
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).normal(0, 4, (20, 30, 3)) + np.array([60, 90, 160])
    pixels[:, 15:] += np.array([160, 50, -100])
    pillow.fromarray(pixels.clip(0, 255).astype(np.uint8)).save("my.png")
    config = ROOT / "configs" / "segment.yaml"
    options = ("--data.image", "my.png", "--output", "seg", "--model.n_components", 2, "--fit.restarts", 2)
    assert "600 pixels × 3 columns" in ok(capsys, "fit", config, *options)
    assert (work / "seg" / "segmented.png").stat().st_size > 1000
    assert report(work / "seg")["data"]["colour"] == "lab"
    ok(capsys, "predict", "seg", "my.png", "--output", "painted.png")
    painted = np.asarray(pillow.open("painted.png"))
    assert painted.shape == (20, 30, 3)
    assert len(np.unique(painted.reshape(-1, 3), axis=0)) == 2
    assert np.abs(painted - pixels).mean() < 6  # each pixel in a colour near its own
    ok(capsys, "predict", "seg", "--output", "pixels.csv")
    assert read_table("pixels.csv").columns == ["label", "responsibility_0", "responsibility_1", "log_prob"]
    ok(capsys, "plot", "seg")
    assert read_table(sample(capsys, "seg", 5)).columns == ["lightness", "green_red", "blue_yellow"]
    assert "drawn from 600" in ok(capsys, "fit", config, *options, "--data.max_rows", 100)


def sample(capsys, run: str, n: int) -> str:
    ok(capsys, "sample", run, "--n", n, "--seed", 3, "--output", "s.csv")
    return "s.csv"


def test_the_shipped_photograph_is_readable():
    pytest.importorskip("PIL")
    assert runs.read_pixels(DATASETS / "flower.jpg", "lab").values.shape == (427 * 640, 3)


# ---- the commands -------------------------------------------------------------------------------------------------


def test_fit_predict_sample_plot(capsys, work):
    ok(capsys, "fit", "c.yaml")
    model = torchem.load("out/model.safetensors")
    x = torch.from_numpy(read_table(DATASETS / "faithful.csv").values)

    ok(capsys, "predict", "out")
    table = read_table("out/predictions.csv")
    assert table.columns == ["label", "responsibility_0", "responsibility_1", "log_prob"]
    np.testing.assert_array_equal(table.values[:, 0], model.most_likely(x).numpy())
    np.testing.assert_array_equal(table.values[:, 1:3], model.posterior(x).detach().numpy())
    np.testing.assert_array_equal(table.values[:, 3], model.log_prob(x).detach().numpy())

    (work / "new.csv").write_text("id,waiting,eruptions\nx,80,4\ny,50,2\n")  # other columns, another order
    ok(capsys, "predict", "out", "new.csv", "--output", "labels.csv")
    expected = model.most_likely(torch.tensor([[4.0, 80.0], [2.0, 50.0]], dtype=torch.float64))
    np.testing.assert_array_equal(read_table("labels.csv").values[:, 0], expected.numpy())

    first = Path(sample(capsys, "out", 7)).read_bytes()
    assert read_table("s.csv").columns == ["eruptions", "waiting"]
    assert len(read_table("s.csv").values) == 7
    assert Path(sample(capsys, "out", 7)).read_bytes() == first
    assert ok(capsys, "sample", "out", "--n", 7, "--seed", 3, "--output", "-").encode() == first

    (work / "out" / "clusters.png").unlink()
    ok(capsys, "plot", "out")
    assert (work / "out" / "clusters.png").stat().st_size > 1000
    ok(capsys, "plot", "out", "new.csv", "--format", "svg")
    assert "<svg" in (work / "out" / "clusters.svg").read_text()


def test_every_value_can_be_overridden(capsys, work):
    ok(
        capsys, "fit", "c.yaml", "--model.init_args.n_components", 3, "--model.covariance_type", "diag", "--fit.seed=5",
        "--data.columns", "[waiting]", "--dtype", "float32", "--output", "else/where",
    )  # fmt: skip
    model = torchem.load("else/where/model.safetensors")
    assert model.covariances.shape == (3, 1)
    assert model.dtype == torch.float32
    assert not (work / "out").exists()


def test_a_run_can_be_run_again_from_its_own_folder(capsys, work, tmp_path_factory, monkeypatch):
    ok(capsys, "fit", "c.yaml")
    before = (work / "out" / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    ok(capsys, "fit", work / "out" / "config.yaml")
    assert (work / "out" / "model.safetensors").read_bytes() == before


def test_paths_in_a_configuration_are_relative_to_it(capsys, work, tmp_path_factory, monkeypatch):
    (work / "mine.csv").write_bytes((DATASETS / "faithful.csv").read_bytes())
    write_config(work, str(DATASETS / "faithful.csv"), "mine.csv")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    ok(capsys, "fit", work / "c.yaml")
    assert (work / "out" / "report.json").exists()


def test_without_an_output_the_run_takes_the_configurations_name(capsys, work):
    write_config(work, "output: out\n")
    ok(capsys, "fit", "c.yaml")
    assert (work / "runs" / "c" / "report.json").exists()


def test_weights_are_a_column(capsys, work):
    (work / "w.csv").write_text("w,x\n" + "".join(f"{i % 2},{i}\n" for i in range(40)))
    text = "model: {class_path: torchem.GaussianMixture, init_args: {n_components: 1}}\ndata: {path: w.csv, weights: w}"
    (work / "w.yaml").write_text(text + "\noutput: w")
    ok(capsys, "fit", "w.yaml")
    model = torchem.load("w/model.safetensors")
    assert model.means.item() == pytest.approx(20)
    assert report(work / "w")["criteria"]["n"] == 20
    ok(capsys, "plot", "w")


def test_any_model_can_be_named(capsys, work):
    (work / "m.yaml").write_text(f"""
model:
  class_path: torchem.Mixture
  init_args:
    mixing: {{class_path: torchem.factors.Categorical.rebuild, init_args: {{shape: [2]}}}}
    component: {{class_path: torchem.factors.Gaussian, init_args: {{n_components: 2, n_features: 2}}}}
data: {{path: {DATASETS / "faithful.csv"}}}
fit: {{seed: 0}}
output: m
""")
    assert "Mixture" in ok(capsys, "fit", "m.yaml")
    assert type(torchem.load("m/model.safetensors")) is torchem.Mixture


def test_print_config_is_a_configuration(capsys, work):
    text = ok(capsys, "fit", "c.yaml", "--fit.seed", 7, "--print_config")
    assert "seed: 7" in text
    assert not (work / "out").exists()
    (work / "d.yaml").write_text(text)
    ok(capsys, "fit", "d.yaml")


def test_help_and_version(capsys):
    assert ok(capsys, "--version").strip() == f"torchem {torchem.__version__}"
    text = ok(capsys, "--help")
    assert all(command in text for command in ("fit", "predict", "sample", "plot"))
    assert ok(capsys) == text
    assert "--fit.restarts" in ok(capsys, "fit", "--help")
    assert "RUN" in ok(capsys, "predict", "--help")


def test_the_installed_command(work):
    run = [sys.executable, "-W", "error", "-m", "torchem.cli", "fit", "c.yaml", "--fit.restart", "3"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().endswith("did you mean 'fit.restarts'?")
    assert done.stderr.count("\n") == 1


# ---- sequences ----------------------------------------------------------------------------------------------------

CHAIN = """
model:
  class_path: torchem.HMM
  init_args:
    initial: torchem.factors.Categorical
    transition: torchem.factors.Categorical
    emission: torchem.factors.Poisson
states: 2
data: {path: s.csv, columns: [x], index: day, sequence: who}
fit: {seed: 0, restarts: 3, max_iter: 200}
output: out
"""


@pytest.fixture
def chain(work) -> Path:
    """Two people, a frame a day, rows mixed up, one frame missing."""
    generator = np.random.default_rng(0)
    rows = []
    for day in range(30):
        for who in ("eve", "bob") if day % 2 else ("bob", "eve"):
            x = "" if (day, who) == (7, "eve") else generator.poisson(2 if day // 10 % 2 else 12)
            if who == "eve" or day < 20:
                rows.append(f"{who},2024-03-{day + 1:02d},{x}")
    (work / "s.csv").write_text("who,day,x\n" + "\n".join(rows) + "\n")
    (work / "c.yaml").write_text(CHAIN)
    return work


def column(path: str | Path, name: str) -> list[str]:
    with open(path, newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_several_sequences(capsys, chain):
    out = ok(capsys, "fit", "c.yaml")
    assert "50 frames in 2 sequences × 1 column" in out
    made = report(chain / "out")
    assert made["data"]["sequences"] == 2
    low, high = made["states"]
    assert low["rate"]["x"] < 4 < 9 < high["rate"]["x"]
    # The rows of the file, in its order.
    for name in ("who", "day"):
        assert column("out/states.csv", name) == column("s.csv", name)
    days, state = column("out/states.csv", "day"), column("out/states.csv", "state")
    assert {s for d, s in zip(days, state, strict=True) if "2024-03-12" <= d <= "2024-03-19"} == {"0"}

    ok(capsys, "predict", "out", "--filtered", "true", "--output", "p.csv")
    assert column("p.csv", "state") == state
    names = ["posterior_0", "posterior_1", "filtered_0", "filtered_1"]
    shares = np.array([[float(v) for v in column("p.csv", name)] for name in names])
    np.testing.assert_allclose(shares[:2].sum(0), 1)
    np.testing.assert_allclose(shares[2:].sum(0), 1)
    assert not np.allclose(shares[0], shares[2])

    (chain / "new.csv").write_text("x,who\n1,a\n14,a\n1,b\n")  # nothing says when
    ok(capsys, "predict", "out", "new.csv", "--output", "-")
    (chain / "one.csv").write_text("x\n1\n")
    assert "expected a column 'who'" in fails(capsys, "predict", "out", "one.csv")


def test_frames_of_sequences_are_filled_in(capsys, chain):
    ok(capsys, "fit", "c.yaml")
    ok(capsys, "impute", "out", "--output", "filled.csv")
    for name in ("who", "day"):
        assert column("filled.csv", name) == column("s.csv", name)
    pairs = list(zip(column("s.csv", "x"), column("filled.csv", "x"), strict=True))
    assert all(old in ("", new) for old, new in pairs)
    assert [new.isdigit() for old, new in pairs if old == ""] == [True]  # a count stays one
    ok(capsys, "impute", "out", "--draws", 2, "--variance", "false", "--output", "draws.csv")
    assert column("draws.csv", "day") == 2 * column("s.csv", "day")
    assert "variance" in fails(capsys, "impute", "out", "--draws", 2, "--variance", "true")


def test_sequences_are_drawn(capsys, chain):
    ok(capsys, "fit", "c.yaml")
    first = ok(capsys, "sample", "out", "--seed", 1, "--output", "-")
    assert first.startswith("x\n")
    assert len(first.splitlines()) == 101
    assert ok(capsys, "sample", "out", "--seed", 1, "--output", "-") == first
    assert all(cell.isdigit() for cell in first.split()[1:])
    table = ok(capsys, "sample", "out", "--n", 4, "--sequences", 3, "--latents", "true", "--output", "-").splitlines()
    assert table[0] == "who,state,x"
    assert [row.split(",")[0] for row in table[1:]] == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    for option in ("--n", "--sequences"):
        assert "at least 1, got 0" in fails(capsys, "sample", "out", option, 0)


def test_sequences_that_end_are_as_long_as_they_are(capsys, chain):
    ok(capsys, "fit", "c.yaml", "--model.end", "torchem.factors.Categorical")
    lengths = {len(ok(capsys, "sample", "out", "--seed", seed, "--output", "-").splitlines()) for seed in range(4)}
    assert len(lengths) > 1


def test_several_numbers_of_states(capsys, chain):
    out = ok(capsys, "fit", "c.yaml", "--states", "[3, 1, 2]", "--criterion", "icl")
    assert re.search(r"\n +2 .*  ← preferred by ICL\n", out)
    assert report(chain / "out")["n_states"] == 2
    before = (chain / "out" / "model.safetensors").read_bytes()
    assert "states:\n- 3\n" in (chain / "out" / "config.yaml").read_text()
    ok(capsys, "plot", "out", "--states", 3)
    ok(capsys, "predict", "out", "--states", 3, "--output", "p.csv")
    assert "posterior_2" in (chain / "p.csv").read_text().splitlines()[0]
    assert (chain / "out" / "states-3.png").exists()
    assert "one of those fitted (3, 1, 2), got 4" in fails(capsys, "sample", "out", "--states", 4)
    ok(capsys, "fit", "out/config.yaml")  # from its own folder
    assert (chain / "out" / "model.safetensors").read_bytes() == before
    assert not (chain / "out" / "states-3.png").exists()  # it was another run's
    ok(capsys, "fit", "c.yaml", "--states", 2)
    assert not (chain / "out" / "model-3.safetensors").exists()
    assert "the model of the run alone" in fails(capsys, "sample", "out", "--states", 3)


def test_sizes_follow_for_any_model(capsys, work):
    write_config(work, "  init_args:\n    n_components: 2\n", "states: [1, 2]\n")
    assert re.search(r"\n +2 .*  ← preferred by BIC\n", ok(capsys, "fit", "c.yaml"))
    assert torchem.load("out/model-1.safetensors").n_components == 1
    assert len(report(work / "out")["candidates"][0]["components"]) == 1
    message = "model.init_args.n_components: expected 1, as states says, got 3; leave it out"
    assert message in fails(capsys, "fit", "c.yaml", "--model.n_components", 3)
    ok(capsys, "fit", "c.yaml", "--model", "torchem.GaussianHMM", "--states", 2)
    assert torchem.load("out/model.safetensors").means.shape == (2, 2)
    mixture = ("--model.mixing", "torchem.factors.Categorical", "--model.component", "torchem.factors.Gaussian")
    ok(capsys, "fit", "c.yaml", "--model", "torchem.Mixture", *mixture, "--states", 2)
    assert torchem.load("out/model.safetensors").mixing.shape == (2,)


def test_any_emission_is_told_about(capsys, work):
    rows = [f"{i // 20 % 2},{(i // 20 + 1) % 2},{1 + 3 * (i // 20 % 2) + i % 7}\n" for i in range(100)]
    (work / "d.csv").write_text("a,b,c\n" + "".join(rows))
    text = """
model:
  class_path: torchem.HMM
  init_args: {{initial: stationary, transition: torchem.factors.Categorical, emission: {}}}
data: {{path: d.csv, columns: {}}}
states: 2
fit: {{seed: 0, init: random, max_iter: 1000, tol: 0.1}}
output: out
"""
    table = "{class_path: torchem.factors.Categorical.rebuild, init_args: {shape: [2, 3]}}"
    gaussian = "{class_path: torchem.factors.Gaussian, init_args: {covariance_type: diag}}"
    inside = "{class_path: torchem.factors.Gaussian, init_args: {n_components: 2, n_features: 1}}"
    limits = f"{{class_path: torchem.factors.Censored, init_args: {{factor: {inside}, high: 8}}}}"
    for emission, columns, key in (
        (table, "[a]", "probability"),
        ("torchem.factors.Bernoulli", "[a, b]", "probability"),
        (gaussian, "[a, b]", "mean"),
        ("torchem.factors.Multinomial", "[a, b]", "probability"),
        ("torchem.factors.NegativeBinomial", "[a, c]", "mean"),
        ("torchem.factors.Gamma", "[c]", "mean"),
        (limits, "[c]", "mean"),
    ):
        (work / "e.yaml").write_text(text.format(emission, columns))
        ok(capsys, "fit", "e.yaml")
        assert key in report(work / "out")["states"][0]


def test_an_index_in_no_known_unit_names_rows_alone(capsys, chain):
    text = (chain / "s.csv").read_text().replace("2024-03-", "day ")
    (chain / "s.csv").write_text(text)
    ok(capsys, "fit", "c.yaml")
    assert column("out/states.csv", "day")[0] == "day 01"
    assert (chain / "out" / "states.png").stat().st_size > 1000


def test_weights_of_sequences(capsys, chain):
    rows = (chain / "s.csv").read_text().splitlines()
    rows = [f"{row},{'w' if i == 0 else 2 * row.startswith('eve')}" for i, row in enumerate(rows)]
    (chain / "s.csv").write_text("\n".join(rows) + "\n")
    ok(capsys, "fit", "c.yaml", "--data.weights", "w")
    assert report(chain / "out")["criteria"]["n"] == 60
    (chain / "s.csv").write_text("\n".join(rows).replace(",2", ",1", 1) + "\n")
    assert "one weight for each sequence" in fails(capsys, "fit", "c.yaml", "--data.weights", "x")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("a,2024-01-01,-3", (), "data: expected counts: whole numbers of at least zero, got -3"),
        ("a,2024-01-01,2.5", (), "data: expected counts: whole numbers of at least zero, got 2.5"),
        ("a,2024-01-01,x", (), "expected numbers, got 'x' on line 2, column 'x'"),
        ("a,2024-01-01,3", ("--data.columns", "null", "--data.index", "null"), "got '2024-01-01' .* as data.index"),
        ("a,2024-01-01,3", ("--data.columns", "[y]"), "expected a column 'y', got the columns"),
        ("a,2024-01-01,3", ("--data.index", "dai"), "expected a column 'dai', .*did you mean 'day'"),
        ("a,2024-01-01,3", ("--data.sequence", "whom"), "expected a column 'whom', .*did you mean 'who'"),
        (",2024-01-01,3", (), "the name of a sequence in each row"),
        ("", (), "at least one row under the header"),
        ("a,2024-01-01,3\na,2024-01-02,3", ("--data.max_rows", 1), "data.max_rows: .* for sequences"),
        ("a,2024-01-01,3", ("--states", 0), "states: expected a whole number of at least 1.*got 0"),
        ("a,2024-01-01,3", ("--states", "[2, 2]"), r"states: expected .*distinct ones.* got \[2, 2\]"),
        ("a,2024-01-01,3", ("--states", "two"), r"states: expected .*a list such as \[2, 3\] .*got 'two'"),
        ("a,2024-01-01,3", ("--states", "null"), "n_components: expected the number of states, got none"),
        ("a,2024-01-01,3", ("--state", 2), "state: .*did you mean 'states'"),
        ("a,2024-01-01,3", ("--criterion", "bix"), "criterion: expected one of 'bic', 'aic', 'icl', got 'bix'"),
        ("a,2024-01-01,3", ("--model.initial", "statonary"), "initial: expected Factor or one of 'stationary'"),
        ("a,2024-01-01,3", ("--model.emission", "torchem.factors.Poison"), "did you mean 'torchem.factors.Poisson'"),
        ("a,2024-01-01,3", ("--model.emission", "torchem.factors.Categorical"), "emission: expected a shape, got none"),
        ("a,2024-01-01,3", ("--model.emission.rate", 1), "emission.init_args.rate: .*got an unknown one"),
        ("a,2024-01-01,3", ("--states", 200), r"data: expected at least .*\(200\), got 1"),
        (
            "a,2024-01-01,3",
            ("--model", "torchem.GaussianMixture"),
            "data.sequence: expected none, for a model of single",
        ),
    ],
)
def test_a_mistake_with_sequences(capsys, chain, rows, options, message):
    (chain / "s.csv").write_text(f"who,day,x\n{rows}\n" if rows else "who,day,x\n")
    assert re.search(message, fails(capsys, "fit", "c.yaml", *options))
    assert not (chain / "out").exists()


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_components: 2", "n_component: 2", "model.init_args.n_component: .*did you mean 'n_components'"),
        ("columns:", "colums:", "data.colums: .*did you mean 'data.columns'"),
        ("seed:", "sede:", "fit.sede: .*did you mean 'fit.seed'"),
        ("fit:", "fti:", "fti.*unknown one; did you mean 'fit"),
        ("output:", "outptu:", "outptu: .*did you mean 'output'"),
        ("GaussianMixture", "GausianMixture", "model.class_path: .*did you mean 'torchem.GaussianMixture'"),
        ("torchem.GaussianMixture", "GausianMixture", "model.class_path: .*did you mean 'torchem.GaussianMixture'"),
        ("torchem.GaussianMixture", "nowhere.Model", "model.class_path: .*'nowhere.Model'"),
        ("torchem.GaussianMixture", "torchem.Stats", "model.class_path: .*'torchem.Stats'"),
        ("n_components: 2", "n_components: two", "model.init_args.n_components: expected a whole number, got 'two'"),
        ("n_components: 2", "n_components: 0", "n_components: expected a positive whole number, got 0"),
        ("n_components: 2", "covariance_type: diag", "n_components: expected the number of states, got none"),
        ("n_components: 2", "n_components: 2\n    n_features: 3", "n_features: expected 2, the data's columns, got 3"),
        ("n_components: 2", "n_components: 2\n    covariance_type: ful", "covariance_type: expected one of 'full', "),
        ("n_components: 2", "n_components: 300", r"data: expected at least .*\(300\), got 272"),
        ("seed: 0", "seed: zero", "fit.seed: expected a whole number or null, got 'zero'"),
        ("seed: 0", "restarts: ten", "fit.restarts: expected a whole number, got 'ten'"),
        ("seed: 0", "restarts: 0", "restarts: expected a whole number of at least 1, got 0"),
        ("seed: 0", "init: kmean", "init: expected one of .*did you mean 'kmeans'"),
        ("seed: 0", "device: abacus", "fit.device: expected a device of this machine, got 'abacus'"),
        ("seed: 0", "dead: alive", "fit.dead: expected one of"),
        ("waiting]", "wating]", r"expected a column 'wating'.*did you mean 'waiting'\?"),
        (
            "[eruptions, waiting]",
            "eruptions",
            r"data.columns: expected a list such as \[x, y\] or null, got 'eruptions'",
        ),
        ("faithful.csv", "faithfull.csv", "data.path: expected a path that can be used, .*faithfull.csv' .*not exist"),
        ("output: out", "dtype: float16", "dtype: expected one of 'float64', 'float32', got 'float16'"),
        ("output: out", "output: c.yaml", "output: .*c.yaml"),
        ("output: out", "output: .", "output: expected a new folder, an empty one or an earlier run"),
    ],
)
def test_a_mistake_in_a_configuration(capsys, work, old, new, message):
    write_config(work, old, new)
    assert re.search(message, fails(capsys, "fit", "c.yaml"))
    assert [path.name for path in work.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    "text", ["", "model: [", "just text", "- 1\n- 2", "data: {path: c.yaml}", "model:", b"\xff\xfe: 1"]
)
def test_what_is_no_configuration(capsys, work, text):
    (work / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    fails(capsys, "fit", "c.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "config: expected a YAML file, got none"),
        (["fit", "none.yaml"], "config: .*none.yaml.*not exist"),
        (["fit", "."], "config: .*not a file"),
        (["fit", "c.yaml", "--fit.restart", "3"], "fit.restart: .*did you mean 'fit.restarts'"),
        (["fit", "c.yaml", "--model.n_componets", "3"], "did you mean 'n_components'"),
        (["fit", "c.yaml", "extra"], "got 'extra'"),
        (["fit", "c.yaml", "--data.image", "c.yaml"], "data: expected a path or an image, got both"),
        (["fit", "c.yaml", "--data.path", "c.yaml"], r"expected one of \.csv"),
        (["ft"], "command: expected one of fit, predict, sample, impute, plot, got 'ft'; did you mean 'fit'"),
        (["predict"], "run: expected a value, got none"),
        (["predict", "none"], "none: expected a folder that torchem fit wrote, got no such folder"),
        (["predict", "."], "expected a folder that torchem fit wrote, got something else"),
        (["sample", "out", "--n", "many"], "n: expected a whole number or null, got 'many'"),
        (["plot", "out", "--format", "bmp"], "format: expected one of"),
    ],
)
def test_a_mistake_on_the_command_line(capsys, work, arguments, message):
    assert re.search(message, fails(capsys, *arguments))
    assert [path.name for path in work.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,2\n3,x\n", "got 'x' on line 3, column 'waiting'"),
        ("1,2\n3\n", "got 1 on line 3"),
        ("1,2\n3,inf\n", "data: expected finite values, got inf"),
        ("", "expected at least one row"),
    ],
)
def test_malformed_data(capsys, work, rows, message):
    (work / "bad.csv").write_text("eruptions,waiting\n" + rows)
    assert message in fails(capsys, "fit", "c.yaml", "--data.path", "bad.csv")
    assert not (work / "out").exists()


@pytest.fixture
def out(capsys, work) -> Path:
    ok(capsys, "fit", "c.yaml")
    return work / "out"


def test_a_damaged_run_is_refused(capsys, out):
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:-9])
    assert "whole safetensors file" in fails(capsys, "predict", out)
    (out / "model.safetensors").unlink()
    assert "got no file" in fails(capsys, "sample", out)
    (out / "model.safetensors").write_bytes(content)
    good = report(out)
    for text in ("", "[]", "{}", '{"format": "other"}', "\xff"):
        (out / "report.json").write_text(text)
        fails(capsys, "plot", out)
    for change, message in (({"format_version": 9}, "update torchem"), ({"data": {}}, "whole report")):
        (out / "report.json").write_text(json.dumps({**good, **change}))
        assert message in fails(capsys, "predict", out)


def test_data_that_are_gone_or_lack_a_column(capsys, out, work):
    made = report(out)
    made["data"]["source"] = "../gone.csv"
    (out / "report.json").write_text(json.dumps(made))
    assert "name the data on the command line" in fails(capsys, "predict", out)
    (work / "new.csv").write_text("eruptions,wait\n1,2\n")
    assert "did you mean 'wait'" in fails(capsys, "predict", out, "new.csv")
    assert "no such file" in fails(capsys, "predict", out, "none.csv")
    for place in (work, work / "none" / "x.csv"):
        fails(capsys, "sample", out, "--output", place)
    assert "n: expected" in fails(capsys, "sample", out, "--n", "-1")


# ---- nothing half-written -----------------------------------------------------------------------------------------


def test_a_run_is_replaced_on_success_only(capsys, out, work, monkeypatch):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fails(capsys, "fit", "c.yaml", "--model.n_components", 300)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in fails(capsys, "fit", "c.yaml", "--fit.seed", 1)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_exchange", full)
        assert "No space left" in fails(capsys, "fit", "c.yaml", "--fit.seed", 1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in work.iterdir()) == ["c.yaml", "out"]


def test_files_of_the_users_in_a_run_are_kept(capsys, out, work):
    (out / "notes.txt").write_text("mine")
    (out / "sub").mkdir()
    (out / "sub" / "a").write_text("mine too")
    ok(capsys, "predict", out)
    ok(capsys, "fit", "c.yaml", "--model.n_components", 1)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "sub" / "a").read_text() == "mine too"
    assert not (out / "predictions.csv").exists()  # it was the other model's
    assert len(report(out)["components"]) == 1
    assert sorted(path.name for path in work.iterdir()) == ["c.yaml", "out"]


def test_a_folder_that_is_no_run_is_never_touched(capsys, work):
    (work / "precious").mkdir()
    (work / "precious" / "thesis.tex").write_text("x")
    assert "holds other files" in fails(capsys, "fit", "c.yaml", "--output", "precious")
    assert [path.name for path in (work / "precious").iterdir()] == ["thesis.tex"]
    (work / "empty").mkdir()
    ok(capsys, "fit", "c.yaml", "--output", "empty")


@pytest.mark.filterwarnings("default")
def test_an_honest_end(capsys, work):
    code = cli.main(["fit", "c.yaml", "--fit.max_iter", "1", "--fit.init", "random_from_data"])
    captured = capsys.readouterr()
    assert code == 0
    assert "max_iter after 1 iteration" in captured.out
    assert captured.err.startswith("torchem: warning: ")
    assert captured.err.count("\n") == 1


def test_an_interrupted_command_writes_nothing(capsys, work, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "write_run", interrupt)
    assert cli.main(["fit", "c.yaml"]) == 130
    assert capsys.readouterr().err == "torchem: error: interrupted; nothing was written.\n"
    assert [path.name for path in work.iterdir()] == ["c.yaml"]


def test_an_interruption_writes_the_best_so_far(capsys, work, monkeypatch):
    fit = torchem.fit

    def interrupted(*arguments, **options):
        return fit(*arguments, **options, callbacks=[lambda progress: True])

    interrupted.__wrapped__ = fit
    monkeypatch.setattr(torchem, "fit", interrupted)
    assert cli.main(["fit", "c.yaml"]) == 130
    assert "interrupted" in capsys.readouterr().out
    assert report(work / "out")["fit"]["status"] == "interrupted"


@pytest.mark.filterwarnings("default")
def test_without_matplotlib_the_fit_still_ends_well(capsys, work, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["fit", "c.yaml"]) == 0
    assert re.search(r"^torchem: warning: no pictures: .*torchem\[plot\]", capsys.readouterr().err)
    assert "clusters.png" not in report(work / "out")["files"]
    assert "torchem[plot]" in fails(capsys, "plot", "out")
