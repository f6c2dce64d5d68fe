"""The command line on segments and on scores: what is printed, written and drawn."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.test_cli import ROOT, ok
from torchem.tables import read_table


def test_a_machine_and_its_durations(capsys, tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = ok(
        capsys, "fit", ROOT / "configs" / "machine.yaml", "--fit.restarts", 2, "--fit.tol", 1e-4, "--output", run
    )  # fmt: skip
    assert "duration: frames on average" in out
    states = json.loads((run / "report.json").read_text())["states"]
    assert [round(state["duration"]) for state in states] == [16, 20, 11]
    # Long-run shares weigh each visit by how long it lasts: those of the data are near them.
    assert sum(state["stationary"] for state in states) == pytest.approx(1.0)
    assert all(abs(state["stationary"] - state["time"]) < 0.12 for state in states)
    assert (run / "durations.png").exists()
    ok(capsys, "predict", run, "--output", tmp_path / "states.csv")
    truth = read_table(ROOT / "torchem" / "datasets" / "machine.csv", ["state"]).values[:, 0]
    found = read_table(tmp_path / "states.csv", ["state"]).values[:, 0]
    assert np.mean(np.array([0, 2, 1])[found.astype(int)] == truth) > 0.94


def test_abilities_and_their_scores(capsys, tmp_path: Path) -> None:
    run = tmp_path / "run"
    out = ok(capsys, "fit", ROOT / "configs" / "abilities.yaml", "--fit.tol", 1e-4, "--output", run)
    assert "31 parameters" in out
    assert (run / "loadings.png").exists()
    ok(capsys, "predict", run, "--output", tmp_path / "scores.csv")
    scores = read_table(tmp_path / "scores.csv", ["score_0", "score_1"]).values
    assert scores.shape == (300, 2)
    assert 0.5 < scores.var() < 1.1
    ok(capsys, "impute", run, "--output", tmp_path / "whole.csv")
    assert not np.isnan(read_table(tmp_path / "whole.csv", ["reading", "sums"]).values).any()
    ok(capsys, "sample", run, "--n", 5, "--latents", "true", "--output", tmp_path / "drawn.csv")
    assert read_table(tmp_path / "drawn.csv", ["score_1", "puzzles"]).values.shape == (5, 2)
