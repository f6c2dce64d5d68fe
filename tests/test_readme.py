"""The README's code runs, and its worked example is the file it names."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import torchem

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_twelve_lines_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks()[0], "README.md", "exec"), {})
    assert "converged" in capsys.readouterr().out
    assert isinstance(torchem.load("mixture.safetensors"), torchem.GaussianMixture)


def test_the_twelve_lines_are_twelve():
    lines = [line for line in blocks()[0].splitlines() if line.strip()]
    assert len(lines) <= 12


def test_the_worked_example_is_the_file():
    shown = re.search(r"<!-- example: (\S+) -->\n```python\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert shown[2].strip() in (ROOT / shown[1]).read_text()


def test_the_chain_runs():
    exec(compile(blocks()[1], "README.md", "exec"), {})


def test_the_tables_of_modes_are_those_of_the_grid():
    path = ROOT / "scripts" / "modes_table.py"
    spec = importlib.util.spec_from_file_location("modes_table", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.replaced(README) == README, "run python scripts/modes_table.py"


PAGES = sorted(ROOT.glob("docs/**/*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs").with_suffix("")))
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
    pytest.importorskip("matplotlib.pyplot").close("all")


def test_pages_show_the_configuration_as_it_is():
    import yaml

    shown = re.search(
        r"```yaml\n# configs/earthquakes.yaml\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL
    )
    assert shown is not None
    page, real = yaml.safe_load(shown[1]), yaml.safe_load((ROOT / "configs" / "earthquakes.yaml").read_text())
    real["fit"] = {key: real["fit"][key] for key in page["fit"]}
    assert page == real


@pytest.fixture
def geometric():
    namespace = {"__name__": "geometric"}
    exec(compile((ROOT / "examples" / "geometric.py").read_text(), "geometric.py", "exec"), namespace)
    return namespace["Geometric"]


def test_the_worked_example_recovers_what_it_sampled(geometric):
    truth = torchem.Mixture(torchem.factors.Categorical(2), geometric(2, 1)).double()
    truth.component.logits.data = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    x = truth.sample(20_000, generator=torch.Generator().manual_seed(0))
    model = torchem.Mixture(torchem.factors.Categorical(2), geometric(2, 1)).double()
    result = torchem.fit(model, x, restarts=4, seed=0, tol=1e-9, max_iter=2000)
    assert result.converged
    found = model.component.probs.detach().flatten().sort().values
    torch.testing.assert_close(found, truth.component.probs.detach().flatten().sort().values, atol=0.02, rtol=0)


def test_the_worked_example_keeps_the_laws(geometric):
    family, batch = geometric.example()
    expected = torch.rand(len(batch), 2, dtype=torch.float64)
    stats = family.stats(batch, expected)
    direct = (expected * family.log_prob(batch)).sum()
    torch.testing.assert_close(family.expected_log_prob(stats), direct)
    better = family.maximize(stats)
    family.logits.data = better["logits"].detach()
    (gradient,) = torch.autograd.grad(family.expected_log_prob(stats), family.logits)
    assert gradient.abs().max() < 1e-9


def test_the_worked_example_fits_as_replicas_and_saves(geometric, tmp_path):
    x = torch.tensor([[0.0], [1.0], [0.0], [9.0], [12.0], [7.0]], dtype=torch.float64)
    model = torchem.Mixture(torchem.factors.Categorical(2), geometric(2, 1)).double()
    many = torchem.fit(model, x, restarts=3, seed=1, tol=1e-6, max_iter=500)
    assert len(many.restarts) == 3
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors", modules={"Geometric": geometric})
    torch.testing.assert_close(again.log_prob(x), model.log_prob(x))
