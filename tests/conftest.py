"""What every test runs under: run-time checked annotations, warnings as errors, fixed seeds, each device present."""

import os
from collections.abc import Iterator

import tests.typecheck  # the hook looks it up as an attribute of its package

# Before anything imports torchem.
tests.typecheck.install()

import hypothesis
import jaxtyping
import pytest
import torch

hypothesis.settings.register_profile(
    "torchem", deadline=None, max_examples=25, derandomize=bool(os.environ.get("CI")), database=None
)
hypothesis.settings.load_profile("torchem")

# Warnings are errors, and torch gives some of them once only: whichever test came first would fail.
torch.set_warn_always(True)
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_configure(config: pytest.Config) -> None:
    """Hold without pyproject.toml too, as when the tests run against an installed package."""
    if "error" not in config.getini("filterwarnings"):
        config.addinivalue_line("filterwarnings", "error")
    for marker in ("slow: takes long; left out unless asked for with -m slow", "cuda: needs a CUDA device"):
        config.addinivalue_line("markers", marker)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device present in turn."""
    return torch.device(request.param)


@pytest.fixture
def _routes_by_rounding(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rounding alone choose a Gaussian's route, so that the small cases of laws take that of large problems too.

    Regressions run as users do: there the shape has its say.
    """
    if "regressions" in request.path.parts:
        return
    from torchem.ops.gaussian import STRUCTURES

    for structure in STRUCTURES.values():
        monkeypatch.setattr(type(structure), "prefers_differences", lambda self, k, d: False)


#: Files whose tests are of whole fits, by the hundred: they run as users run them, without the checks of annotations
#: that tests of single functions hold those to.
_AS_USERS = {"test_modes.py", "test_aspects.py", "test_accumulate.py", "test_readme.py", "test_plot.py"}


@pytest.fixture(autouse=True)
def _as_users_run_it(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.name not in _AS_USERS:
        yield
        return
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    # For devices that are not there `torch.manual_seed` would keep a stack trace of each test.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
