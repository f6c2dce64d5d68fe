"""Who may import whom, and what `import torchem` costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "torchem"
CORE = {"torch", "numpy", "tqdm", "safetensors", "jaxtyping", "jsonargparse"}
HEAVY = {"jsonargparse", "matplotlib", "sklearn", "numba", "pyarrow", "scipy", "pandas", "PIL", "triton", "tensorboard"}

#: A layer and what of torchem it may import; the first rule that fits a module counts.
LAYERS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("ops", "stats", "batch", "sequences", "errors"), ("ops", "stats", "batch", "sequences", "errors")),
    (("factor", "model", "priors"), ("ops", "stats", "batch", "sequences", "errors", "factor", "model", "priors")),
    (("factors",), ("ops", "stats", "batch", "errors", "factor", "priors")),
    (("models",), ("ops", "stats", "batch", "errors", "factor", "model", "priors", "factors")),
]
#: Everything else may import the contracts but no family and no model by name ...
GENERIC_BANS = ("factors", "models")
#: ... save those that anything may be used by, and that nothing imports.
TOP = ("layers", "sklearn", "plot", "cli", "__main__")
#: Parts of the top: reached from it alone.
ABOVE = ("files", "runs", "images", "options", "tables", "result")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__") if name != "__init__" else "", path


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Absolute names of modules that a file imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped |= {id(n) for child in node.body for n in ast.walk(child)}
        if top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            skipped |= {id(n) for n in ast.walk(node) if n is not node}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            # `from torchem import ops` names a module too.
            if node.module.startswith("torchem"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(path: Path) -> set[str]:
    """First parts of the torchem modules that a file imports."""
    names = {name.removeprefix("torchem.").split(".")[0] for name in imports(path) if name.startswith("torchem.")}
    known = {name.split(".")[0] for name, _ in modules()}
    return {name for name in names if name in known}


MODULES = dict(modules())


@pytest.mark.parametrize("name", [n for n in MODULES if n])
def test_layers(name: str) -> None:
    part, used = name.split(".", maxsplit=1)[0], inside(MODULES[name])
    for layer, allowed in LAYERS:
        if part in layer:
            assert used <= {*allowed, part}, f"{name} may not import {used - set(allowed)}"
            return
    if part not in TOP and part not in ABOVE:
        assert not used & set(GENERIC_BANS), f"{name} must know families and models by their contracts only"
        assert not used & set(TOP), f"{name} must not import {used & set(TOP)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("factors.")])
def test_families_never_import_each_other(name: str) -> None:
    others = {n for n in imports(MODULES[name]) if n.startswith("torchem.factors.")}
    # What several of them share has a name of its own, with an underscore; a convenience constructor may name another.
    allowed = {
        "factors.autoregressive": "linear_gaussian", "factors.student_t": "gaussian",
        "factors.zero_inflated": "bernoulli",
    }.get(name)  # fmt: skip
    assert {n for n in others if not n.split(".")[2].startswith("_") and n.split(".")[2] != allowed} == set()


# A kernel may import its own engine: nothing imports the kernel but `ops.dispatch`, where the engine is installed.
ENGINES = {"numba_": {"numba", "llvmlite"}, "triton_": {"triton"}}


def engine(name: str) -> set[str]:
    parts = name.split(".")
    return ENGINES.get(parts[1], set()) if parts[0] == "ops" and len(parts) > 1 else set()


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in ("ops", "stats", "batch", "errors")])
def test_the_lowest_layer_needs_torch_only(name: str) -> None:
    foreign = {n.split(".")[0] for n in imports(MODULES[name], top_level=True)} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "torchem", "numpy", "jaxtyping", *engine(name)}


@pytest.mark.parametrize("name", MODULES)
def test_no_pickle_and_no_optional_package_at_the_top_of_a_module(name: str) -> None:
    found = {n.split(".")[0] for n in imports(MODULES[name])}
    assert not found & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    if name.split(".", maxsplit=1)[0] in ("layers", "sklearn"):
        return
    foreign = {n.split(".")[0] for n in imports(MODULES[name], top_level=True)} - set(sys.stdlib_module_names)
    assert foreign <= {*CORE, *engine(name), "torchem"}, f"{name} must import {foreign - CORE} where it is used"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_torchem_is_light_and_needs_the_core_alone() -> None:
    """Optional packages are made impossible to import, then looked for among what was loaded."""
    code = f"""
import sys
heavy = {sorted(HEAVY)}
class Ban:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy and name.split(".")[0] != "triton":
            raise ImportError(name + " is banned")
import torch
before = set(sys.modules)
sys.meta_path.insert(0, Ban())
import torchem
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(*sorted(loaded & set(heavy)))
model = torchem.GaussianMixture(2, 1)
result = torchem.fit(model, torch.tensor([[0.0], [0.1], [5.0], [5.2]]), seed=0, progress=False)
assert result.bound == result.bound
"""
    assert run(code).strip() == ""


def test_importing_torchem_leaves_global_settings_alone() -> None:
    code = """
import torch
def settings():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(), torch.random.get_rng_state().tolist(),
            torch.are_deterministic_algorithms_enabled())
before = settings()
import torchem
assert settings() == before
"""
    run(code)


def test_every_exported_name_exists() -> None:
    import torchem

    for name in torchem.__all__:
        if name != "plot":
            assert getattr(torchem, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = torchem.no_such_name
