"""Input that cannot be used: the type of the exception, and a message that names the argument, what was expected, what
came, and what to do. Types are checked as users meet them, without the checks of annotations that tests run under."""

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import torchem
from tests.regressions.common import COVARIANCE_TYPES, as_users_run_it, blobs, mixture, same, started
from torchem import factors
from torchem.errors import (
    CollinearWarning,
    DegenerateComponent,
    InvalidArgument,
    InvalidFile,
    InvalidType,
    MissingExtra,
    TorchemError,
    describe,
    one_of,
    require,
)
from torchem.factors import Categorical, Gaussian, Poisson
from torchem.sequences import as_buckets

#: ``argument: expected …, got …; remedy.``
FORM = re.compile(r"(?s)^([^:\n]+): expected (.+), got (.+); (.+)[.?]$")


@pytest.fixture(autouse=True)
def _unchecked() -> Iterator[None]:
    with as_users_run_it():
        yield


def x(n: int = 20) -> torch.Tensor:
    return blobs(n, 2, 2)


def told(error: pytest.ExceptionInfo[BaseException], argument: str, *words: str) -> None:
    """The message has the form of the house, begins with the argument, and holds these words."""
    message = str(error.value)
    found = FORM.match(message)
    assert found, message
    assert found[1] == argument, message
    for word in words:
        assert word in message


# ---- fit's options ------------------------------------------------------------------------------------------------

OPTIONS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("init", "kmean", ("'kmeans'", "did you mean")),
    ("init", "nonsense", ("'hierarchical'", "choose one of them")),
    ("init", 3, ("'kmeans++'", "3")),
    ("restarts", 0, ("at least 1", "0")),
    ("restarts", -2, ("at least 1", "-2")),
    ("restarts", 1.5, ("whole number", "1.5")),
    ("restarts", True, ("whole number", "True")),
    ("restarts", "3", ("whole number", "'3'")),
    ("max_iter", -1, ("at least 0", "-1")),
    ("max_iter", 2.0, ("whole number", "2.0")),
    ("max_iter", None, ("whole number", "None")),
    ("tol", -1e-3, ("at least 0", "-0.001")),
    ("tol", math.nan, ("finite", "nan")),
    ("tol", math.inf, ("finite", "inf")),
    ("tol", "small", ("finite number", "'small'")),
    ("tol", None, ("finite number", "None")),
    ("seed", -1, ("at least 0", "-1")),
    ("seed", 1.0, ("whole number", "1.0")),
    ("seed", "zero", ("whole number", "'zero'")),
    ("batch_size", 0, ("positive whole number", "0")),
    ("batch_size", 2.5, ("positive whole number", "2.5")),
    ("batch_size", True, ("positive whole number", "True")),
    ("batch_size", 21, ("at most 20", "21")),
    ("dead", "prone", ("did you mean 'prune'",)),
    ("dead", None, ("'respawn'", "None")),
    ("device", "gpu", ("cpu", "'gpu'")),
    ("device", "cuda:99", ("cuda:99",)),
    ("accumulate", "full", ("Accumulator", "str")),
    ("callbacks", 3, ("functions", "int")),
    ("callbacks", [3], ("functions", "int")),
    ("weights", "heavy", ("real numbers",)),
    ("weights", torch.ones(19), ("[20]", "[19]")),
    ("weights", -torch.ones(20), ("non-negative", "row 0")),
    ("weights", torch.full((20,), math.nan), ("finite", "nan at row 0")),
    ("weights", torch.zeros(20), ("at least one positive weight", "all zero")),
    ("inputs", torch.ones(19, 1), ("[20, M]", "[19, 1]")),
    ("inputs", torch.full((20, 1), math.inf), ("finite covariates",)),
    ("inputs", torch.ones(20, 1, 1), ("[20, M]", "[20, 1, 1]")),
]


@pytest.mark.parametrize(("name", "value", "words"), OPTIONS, ids=[f"{n}={v}"[:40] for n, v, _ in OPTIONS])
def test_options(name: str, value: Any, words: tuple[str, ...]) -> None:
    model = started(x(), 2)
    before = copy.deepcopy(model)
    with pytest.raises((InvalidArgument, InvalidType)) as error:
        torchem.fit(model, x(), **{name: value}, progress=False)
    told(error, name, *words)
    assert same(model, before)


def test_restarts_from_given_parameters() -> None:
    with pytest.raises(InvalidArgument) as error:
        torchem.fit(mixture(2, 2), x(), init=None, restarts=3)
    told(error, "restarts", "1 when init=None", "3")


def test_an_option_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="max_iters"):
        torchem.fit(mixture(2, 2), x(), max_iters=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2), Gaussian(2, 2), torchem.GaussianMixture, "gmm"])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(TorchemError) as error:
        torchem.fit(model, x())
    told(error, "model", "torchem.GaussianMixture")


# ---- data ---------------------------------------------------------------------------------------------------------

DATA: list[tuple[str, Callable[[], Any], type[Exception], tuple[str, ...]]] = [
    ("no rows", lambda: torch.empty(0, 2), InvalidArgument, ("at least one observation", "[0, 2]")),
    ("no columns", lambda: torch.empty(4, 0), InvalidArgument, ("at least one feature", "[4, 0]")),
    ("three axes", lambda: torch.zeros(2, 3, 2), InvalidArgument, ("[N, D]", "[2, 3, 2]")),
    ("scalar", lambda: torch.tensor(1.0), InvalidArgument, ("[N, D]", "[]")),
    ("columns", lambda: torch.zeros(5, 3), InvalidArgument, ("2 features", "3")),
    ("a vector", lambda: torch.zeros(5), InvalidArgument, ("2 features", "1")),
    ("few rows", lambda: torch.zeros(1, 2), InvalidArgument, ("at least as many observations as components (2)", "1")),
    ("nan", lambda: x().index_fill(1, torch.tensor([1]), math.nan), InvalidArgument, ("none in column 1",)),
    ("inf", lambda: x().index_fill(0, torch.tensor([3]), math.inf), InvalidArgument, ("inf at row 3, column 0",)),
    ("-inf", lambda: x().index_fill(0, torch.tensor([3]), -math.inf), InvalidArgument, ("-inf at row 3, column 0",)),
    ("complex", lambda: x().to(torch.complex64), InvalidType, ("real numbers", "complex64")),
    ("text", lambda: np.array([["a", "b"]]), InvalidType, ("real numbers", "<U1")),
    ("objects", lambda: np.array([[1, None]], dtype=object), InvalidType, ("real numbers", "object")),
    ("dates", lambda: np.array([["2020-01-01"] * 2], dtype="datetime64[D]"), InvalidType, ("real numbers", "datetime")),
    ("structured", lambda: np.zeros(3, [("a", float), ("b", float)]), InvalidType, ("real numbers", "'a'")),
    ("complex array", lambda: x().numpy() + 0j, InvalidType, ("real numbers", "complex128")),
    ("ragged", lambda: [[1.0, 2.0], [3.0]], InvalidArgument, ("rectangular", "equal length")),
    ("sparse", lambda: torch.eye(2).to_sparse(), InvalidType, ("dense tensor",)),
    ("None", lambda: None, InvalidType, ("tensor, array", "NoneType")),
    ("number", lambda: 3, InvalidType, ("tensor, array", "int")),
    ("function", lambda: len, InvalidType, ("tensor, array",)),
    ("generator", lambda: (row for row in x()), InvalidType, ("pass over repeatedly", "generator")),
]


@pytest.mark.parametrize(("make", "kind", "words"), [row[1:] for row in DATA], ids=[row[0] for row in DATA])
def test_data(make: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    model = started(x(), 2)
    before = copy.deepcopy(model)
    with pytest.raises(kind) as error:
        torchem.fit(model, make(), progress=False)
    told(error, "data", *words)
    assert same(model, before)


#: What a fit alone can say, and where data come from that only a fit reads.
_FIT_ONLY = {"few rows", "nan", "None", "number", "function", "generator"}
_USES = ("log_prob", "posterior", "most_likely", "forward")


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [row[1:] for row in DATA if row[0] not in _FIT_ONLY],
    ids=[row[0] for row in DATA if row[0] not in _FIT_ONLY],
)
def test_data_of_a_model_in_use(
    use: str, make: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as error:
        getattr(started(x(), 2), use)(make())
    told(error, "data", *words)


@pytest.mark.parametrize("use", _USES)
def test_a_model_in_use_is_not_given_nothing(use: str) -> None:
    for nothing in (None, "text", object()):
        with pytest.raises((InvalidType, InvalidFile)):
            getattr(started(x(), 2), use)(nothing)


@pytest.mark.parametrize(
    "value", [torch.tensor([[0.5]]), torch.tensor([[-1]]), torch.tensor([[3]]), torch.tensor([[0, 1]])], ids=str
)
def test_categories(value: torch.Tensor) -> None:
    model = torchem.Mixture(Categorical(2), Categorical(2, 3))
    with pytest.raises(InvalidArgument) as error:
        model.log_prob(value)
    told(error, "data")


@pytest.mark.parametrize("shape", [(19, 2), (20, 3), (20,)])
def test_evidence(shape: tuple[int, ...]) -> None:
    model = started(x(), 2)
    with pytest.raises(InvalidArgument) as error:
        torchem.fit(model, torchem.Batch(x(), evidence=torch.zeros(shape)))
    told(error, "evidence")


def test_labels_that_forbid_everything() -> None:
    evidence = torch.zeros(20, 2)
    evidence[6] = -math.inf
    with pytest.raises(InvalidArgument, match="row 6"):
        torchem.fit(started(x(), 2), torchem.Batch(x(), evidence=evidence), init=None)


# ---- constructors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("n_components", (0, 2), {}),
        ("n_components", (-1, 2), {}),
        ("n_components", (2.0, 2), {}),
        ("n_components", ("2", 2), {}),
        ("n_components", (True, 2), {}),
        ("n_features", (2, 0), {}),
        ("n_features", (2, None), {}),
        ("covariance_type", (2, 2, "ful"), {}),
        ("covariance_type", (2, 2, None), {}),
        ("covariance_type", (2, 2, "banded"), {}),
        ("covariance_floor", (2, 2), {"covariance_floor": -1.0}),
        ("covariance_floor", (2, 2), {"covariance_floor": math.nan}),
        ("covariance_floor", (2, 2), {"covariance_floor": math.inf}),
        ("covariance_floor", (2, 2), {"covariance_floor": "tiny"}),
        ("floor_type", (2, 2), {"floor_type": "relativ"}),
    ],
)
def test_gaussian_mixture(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    for kind in (torchem.GaussianMixture, Gaussian):
        with pytest.raises(InvalidArgument) as error:
            kind(*arguments, **options)
        told(error, name)


def test_the_nearest_option_is_named() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'full'"):
        torchem.GaussianMixture(2, 2, "ful")  # pyright: ignore
    with pytest.raises(InvalidArgument, match="did you mean 'spherical'"):
        torchem.GaussianMixture(2, 2, "sphericl")  # pyright: ignore


@pytest.mark.parametrize("shape", [(), (0,), (2, -1), (2.0,), ("2",), (True, 2)])
def test_categorical(shape: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidArgument) as error:
        Categorical(*shape)
    told(error, "shape")


def test_mixture_of_unequal_parts() -> None:
    with pytest.raises(InvalidArgument) as error:
        torchem.Mixture(Categorical(3), Gaussian(2, 2))
    told(error, "component", "3 components", "2")


@pytest.mark.parametrize("parts", [(Categorical(2), None), (None, Gaussian(2, 2)), (2, 2), ("a", "b")])
def test_mixture_of_no_factors(parts: tuple[Any, Any]) -> None:
    with pytest.raises((InvalidArgument, InvalidType)) as error:
        torchem.Mixture(*parts)
    told(error, "mixing" if not isinstance(parts[0], Categorical) else "component")


# ---- views --------------------------------------------------------------------------------------------------------

VIEWS: list[tuple[str, Any, tuple[str, ...]]] = [
    ("weights", [0.5, 0.6], ("sum to one", "0.1")),
    ("weights", [1.5, -0.5], ("at least zero",)),
    ("weights", [math.nan, 0.5], ("finite",)),
    ("weights", [1.0], ("[2]", "[1]")),
    ("weights", [[0.5, 0.5]], ("[2]", "[1, 2]")),
    ("weights", "even", ("numbers",)),
    ("weights", None, ("numbers",)),
    ("means", [[0.0, 0.0]], ("[2, 2]", "[1, 2]")),
    ("means", [[0.0, math.inf], [0.0, 0.0]], ("finite",)),
    ("means", [[0.0, 0.0], [0.0]], ("numbers",)),
    ("means", [["a", "b"], ["c", "d"]], ("numbers",)),
    ("covariances", [[1.0, 1.0]], ("[2, 2, 2]", "full")),
    ("covariances", [[[1.0, 0.5], [0.0, 1.0]]] * 2, ("symmetric", "(C + C.mT) / 2")),
    ("covariances", [[[1.0, 2.0], [2.0, 1.0]]] * 2, ("positive definite",)),
    ("covariances", [[[0.0, 0.0], [0.0, 0.0]]] * 2, ("positive definite",)),
    ("covariances", [[[math.nan, 0.0], [0.0, 1.0]]] * 2, ("positive definite",)),
    ("covariances", [[[math.inf, 0.0], [0.0, 1.0]]] * 2, ("positive definite",)),
]


@pytest.mark.parametrize(("name", "value", "words"), VIEWS, ids=[f"{n}={v}"[:40] for n, v, _ in VIEWS])
def test_views(name: str, value: Any, words: tuple[str, ...]) -> None:
    model = started(x(), 2)
    before = copy.deepcopy(model)
    with pytest.raises((InvalidArgument, InvalidType)) as error:
        setattr(model, name, value)
    told(error, name, *words)
    assert same(model, before)


@pytest.mark.parametrize("covariance_type", COVARIANCE_TYPES[1:])
def test_covariances_of_other_types(covariance_type: str) -> None:
    model = started(x(), 2, covariance_type)
    shape = tuple(model.covariances.shape)
    for value in (torch.ones(3, 3, 3), -torch.ones(shape), torch.full(shape, math.nan), torch.zeros(shape)):
        with pytest.raises(InvalidArgument) as error:
            model.covariances = value
        told(error, "covariances")


@pytest.mark.parametrize(
    ("names", "mask", "argument"),
    [
        (("mean",), None, "freeze"),
        (("weights",), None, "freeze"),
        (("means", "covariances"), [True, False], "mask"),
        ((), [True, False], "mask"),
        (("means",), [True, False, True], "mask"),
        (("means",), [[True, False], [False, True]], "mask"),
        (("means",), "all", "mask"),
    ],
)
def test_freeze(names: tuple[str, ...], mask: Any, argument: str) -> None:
    model = started(x(), 2)
    with pytest.raises((InvalidArgument, InvalidType)) as error:
        model.component.freeze(*names, mask=mask)
    told(error, argument)
    # Half a freeze is none.
    assert model.component.frozen("mean") is None


def test_unfreeze_what_is_no_view() -> None:
    with pytest.raises(InvalidArgument, match="did you mean 'means'"):
        started(x(), 2).component.unfreeze("mean")


@pytest.mark.parametrize("n", [-1, 1.5, "3", None, True])
def test_sample(n: Any) -> None:
    with pytest.raises(InvalidArgument) as error:
        started(x(), 2).sample(n)
    told(error, "n", "whole number")


@pytest.mark.parametrize("covariance_type", ["tied"])
def test_a_mask_of_what_is_shared(covariance_type: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        started(x(), 2, covariance_type).component.freeze("covariances", mask=torch.tensor([True, False]))
    told(error, "mask", "freeze it whole")


# ---- the exceptions themselves ------------------------------------------------------------------------------------


def test_exceptions_are_also_pythons_own() -> None:
    """Code that knows nothing of torchem may catch them by what they are."""
    pairs = [
        (InvalidArgument, ValueError), (InvalidType, TypeError), (InvalidFile, ValueError),
        (MissingExtra, ImportError), (DegenerateComponent, RuntimeError),
    ]  # fmt: skip
    for ours, pythons in pairs:
        assert issubclass(ours, TorchemError)
        assert issubclass(ours, pythons)


def test_describe() -> None:
    assert describe("tol", "a number", "'x'", "give 1e-3") == "tol: expected a number, got 'x'; give 1e-3."


@pytest.mark.parametrize(("value", "end"), [("floo", "did you mean 'floor'?"), ("zzz", "choose one of them.")])
def test_one_of(value: str, end: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        one_of("dead", value, ["floor", "raise"])
    assert str(error.value) == f"dead: expected one of 'floor', 'raise', got {value!r}; {end}"
    one_of("dead", "floor", ["floor", "raise"])


def test_a_missing_extra_names_the_command() -> None:
    with pytest.raises(MissingExtra, match=re.escape("pip install 'torchem[plot]'")):
        require("a_module_that_is_not_there", "plot")
    assert require("math", "plot") is math


@pytest.mark.parametrize("name", ["Gaussianmixture", "fits", "GMM"])
def test_a_name_that_torchem_does_not_have(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(torchem, name)


# ---- misspelt names -------------------------------------------------------------------------------------------------


def wrapped() -> torchem.GaussianMixture:
    return torchem.variational(torchem.GaussianMixture(2, 1, "diag"))


@pytest.mark.parametrize(
    ("build", "name", "meant"),
    [
        (lambda: Gaussian(2, 1, "diag"), "variances", "covariances"),
        (lambda: Poisson(2, 1), "rate", "rates"),
        (lambda: factors.StudentT(2, 1), "df", "dof"),
        (lambda: Categorical(2), "prob", "probs"),
        (lambda: factors.Autoregressive.gaussian(2, 1, 1), "weights", "weight"),
        (lambda: torchem.GaussianMixture(2, 1), "mean", "means"),
        (lambda: torchem.GaussianMixture(2, 1), "weight", "weights"),
        (lambda: torchem.GaussianHMM(2, 1), "transition_matrx", "transition_matrix"),
        (lambda: torchem.GaussianHMM(2, 1), "initial_prob", "initial_probs"),
        (lambda: torchem.FactorialHMM.gaussian([2], 1), "contribution", "contributions"),
        (wrapped, "covariance", "covariances"),
        (lambda: wrapped().component, "mean_s", "means"),
    ],
)
def test_a_misspelt_name_is_refused(build: Any, name: str, meant: str) -> None:
    thing = build()
    for value in (torch.ones(2, 1), [[1.0], [1.0]], 1.0):
        with pytest.raises(InvalidArgument, match=rf"{name}: .* did you mean {meant}\?"):
            setattr(thing, name, value)
    assert not hasattr(thing, name)


@pytest.mark.parametrize(
    ("build", "name", "views"),
    [
        (lambda: factors.StudentT(2, 1), "freedom", "means, scales, dof"),
        (lambda: Poisson(2, 1), "means", "rates"),
        (lambda: factors.Bernoulli(2, 1), "p", "probs"),
        (lambda: factors.LinearGaussian(2, 1, 1), "coefficients", "weight, covariances"),
        (lambda: wrapped().component, "spread", "means, covariances"),
    ],
)
def test_a_family_takes_numbers_under_the_names_that_it_has(build: Any, name: str, views: str) -> None:
    thing = build()
    for value in (torch.ones(2, 1), np.ones((2, 1)), [[1.0], [1.0]], 1.0):
        with pytest.raises(InvalidArgument, match=rf"^{name}: expected a view of \w+ \({views}\)"):
            setattr(thing, name, value)
    assert not hasattr(thing, name)


def test_views_of_a_part_are_not_the_models_own() -> None:
    model: Any = torchem.Mixture(Categorical(2), Gaussian(2, 1))
    with pytest.raises(InvalidArgument, match=r"^means: .* one of its component; assign component\.means"):
        model.means = torch.zeros(2, 1)
    assert not hasattr(model, "means")


def test_a_view_takes_the_values_of_a_parameter() -> None:
    values = torch.nn.Parameter(torch.tensor([[1.0], [2.0]]))
    for thing in (Gaussian(2, 1), torchem.GaussianMixture(2, 1), wrapped()):
        thing.means = values
        assert torch.equal(thing.means, values)
        assert "means" not in dict(thing.named_parameters())


def test_misspelt_slots_and_priors_are_refused() -> None:
    hmm: Any = torchem.GaussianHMM(2, 1)
    with pytest.raises(InvalidArgument, match="did you mean emission"):
        hmm.emision = Gaussian(2, 1)
    with pytest.raises(InvalidArgument, match="did you mean prior"):
        hmm.transition.priors = torchem.priors.Dirichlet(2.0)


class Own(Gaussian):
    """What users write: attributes of its own, set where it likes."""

    def __init__(self) -> None:
        self.early = [1, 2]
        super().__init__(2, 1)
        self.mean_start = self.variances = torch.zeros(2)
        self.covariance = 1.0

    def remember(self) -> None:
        self.covarianes = torch.ones(1)


def test_names_of_ones_own_are_free() -> None:
    own: Any = Own()
    own.remember()
    own.covariance, own.variances = 2.0, torch.ones(2)  # there already
    own.scaler, own.title, own.weighted, own._mean = torch.ones(1), "means", True, 1.0
    own.means_are = "known"
    own.register_buffer("averages_seen", torch.ones(2))
    copied: Any = pickle.loads(pickle.dumps(copy.deepcopy(own)))
    assert copied.covarianes == 1
    assert copied.title == "means"
    model: Any = torchem.GaussianMixture(2, 1)
    model.note, model.threshold, model.columns = "a", 0.5, ["x"]
    model.component = Gaussian(2, 1)
    model.helper = torch.nn.Linear(1, 1)


# ---- entries that a family gives no probability to ----------------------------------------------------------------

#: A family of one column, an entry that it cannot have, and words of what it may be.
DOMAINS: dict[str, tuple[Callable[[int], Any], float, str]] = {
    "Poisson": (lambda k: Poisson(k, 1), -1.0, "counts"),
    "NegativeBinomial": (lambda k: factors.NegativeBinomial(k, 1), 0.5, "counts"),
    "Bernoulli": (lambda k: factors.Bernoulli(k, 1), 2.0, "zeros and ones"),
    "Categorical": (lambda k: Categorical(k, 3), 3.0, "from 0 to 2"),
    "Categoricals": (lambda k: factors.Categoricals(k, [3]), -1.0, "from 0 to 2"),
    "Exponential": (lambda k: factors.Exponential(k, 1), -0.25, "at least zero"),
    "Gamma": (lambda k: factors.Gamma(k, 1), 0.0, "above zero"),
    "VonMises": (lambda k: factors.VonMises(k, 1), 90.0, "radians"),
    "ZeroInflated": (lambda k: factors.ZeroInflated(Poisson(k, 1)), 0.5, "counts"),
    "Truncated": (lambda k: factors.Truncated(Poisson(k, 1), low=1), 0.0, "within the limits"),
    "Censored": (lambda k: factors.Censored(factors.Exponential(k, 1), high=9.0), -1.0, "at least zero"),
    "Mixture": (lambda k: factors.Mixture(Categorical(k, 2), Poisson(2 * k, 1)), -1.0, "counts"),
    "FromDistribution": (
        lambda k: torchem.Gradient(
            factors.FromDistribution(torch.distributions.Gamma, k, 1), torch.optim.Adam, steps=2, lr=1e-2
        ),
        -3.0,
        "support of Gamma",
    ),
    "PoissonDuration": (lambda k: factors.PoissonDuration(k, 9), 0.0, "from 1 to 9"),
}


@pytest.mark.parametrize("family", DOMAINS)
def test_a_bad_entry_is_named_by_its_place(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a table, beside columns of other families, and in sequences of very different lengths."""
    build, bad, kind = DOMAINS[family]
    rows = torch.ones(14, 1)
    rows[12] = bad
    with pytest.raises(InvalidArgument) as error:
        torchem.fit(torchem.Mixture(Categorical(2), build(2)), rows)
    told(error, "data", kind, f"got {bad:g} at row 12, column 0")
    wide = torch.cat([torch.zeros(14, 3), rows], -1)
    product = factors.Product([Gaussian(2, 2), build(2), factors.Bernoulli(2, 1)], [[0, 2], [3], [1]])
    with pytest.raises(InvalidArgument) as error:
        torchem.Mixture(Categorical(2), product).log_prob(wide)
    told(error, "data", kind, f"{bad:g} at row 12, column 3 (read by ")
    # The second of two long ones, which make a batch of their own.
    monkeypatch.setattr("torchem.sequences._PADDING", 0)
    sequences = [torch.ones(n, 1) for n in (3, 40, 2, 2, 3, 2, 2, 40)]
    sequences[7][7] = bad
    hmm = torchem.HMM(Categorical(2), Categorical(2, 2), build(2))
    assert len(as_buckets(sequences)) > 1
    with pytest.raises(InvalidArgument) as error:
        torchem.fit(hmm, sequences)
    told(error, "data", kind, f"got {bad:g} at sequence 7, frame 7, column 0")
    with pytest.raises(InvalidArgument) as error:
        hmm.batch(sequences[6:])
    told(error, "data", kind, f"got {bad:g} at sequence 1, frame 7, column 0")


def test_a_bad_row_is_named_too() -> None:
    model = torchem.Mixture(Categorical(2), factors.Product([Poisson(2, 1), factors.VonMisesFisher(2, 2)]))
    data = torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0], [0.0, 3.0, 4.0]])
    with pytest.raises(InvalidArgument) as error:
        model.log_prob(data)
    told(error, "data", "unit vectors", "length 5 at row 2 (columns [1, 2], read by VonMisesFisher)")
    parts = torchem.Mixture(Categorical(2), factors.Product([Poisson(2, 1), factors.Multinomial(2, 2)]))
    with pytest.raises(InvalidArgument) as error:
        parts.log_prob(torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, -3.0]]))
    told(error, "data", "counts", "-3 at row 1, column 2 (columns [1, 2], read by Multinomial)")
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.index) == (str(error.value), {"row": 1, "column": 2})


def test_bad_labels_trials_and_covariates_are_named_by_their_row() -> None:
    mixture = torchem.Mixture(Categorical(2), factors.BinomialRegression(2, 1, 1))
    data, u = torch.ones(6, 1), torch.ones(6, 1)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("labels", {"labels": [0, 1, -1, 0, 2, 1]}, "got 2 at row 4"),
        ("trials", {"trials": [1, 1, 1, -2, 1, 1]}, "got -2 at row 3"),
        ("trials", {"trials": [1, 1, 1, 1.5, 1, 1]}, "got 1.5 at row 3"),
        ("inputs", {"inputs": torch.where(torch.arange(6) == 2, math.nan, 1.0)}, "NaN or infinity at row 2, column 0"),
        ("offset", {"offset": [0.0, 0.0, 0.0, 0.0, 0.0, math.inf]}, "got inf at row 5"),
        ("weights", {"weights": [1.0, -1.0, 1.0, 1.0, 1.0, 1.0]}, "-1.0 at row 1"),
    ]
    for argument, given, words in cases:
        with pytest.raises(InvalidArgument) as error:
            torchem.fit(mixture, data, **{"inputs": u, **given})
        told(error, argument, words)


def test_a_category_never_seen_and_collinear_regressors_have_a_policy() -> None:
    """Neither is an error: such a category has probability zero, what nothing tells of coefficients keeps its value."""
    model = torchem.Mixture(Categorical(2), Categorical(2, 4)).double()
    torchem.fit(model, torch.tensor([0, 1, 1, 3, 3, 3, 0, 1]), seed=0, max_iter=5, progress=False)
    assert float(model.component.probs[:, 2].detach().max()) < 1e-300  # pyright: ignore
    assert bool(model.log_prob(torch.tensor([2])) < -600)
    line = torchem.Mixture(Categorical(1), factors.LinearGaussian(1, 3, 1)).double()
    u = torch.randn(30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = 1 + 2 * u
    with pytest.warns(CollinearWarning, match=r"^inputs: columns \[2\] are .* in component \(LinearGaussian\)"):
        torchem.fit(line, y, inputs=torch.cat([torch.ones_like(u), u, 3 * u], -1), seed=0, max_iter=3, progress=False)
    gated = torchem.Mixture(
        factors.SoftmaxRegression(2, 2, columns=[0, 2]), factors.LinearGaussian(2, 2, 1, columns=[0, 1])
    )
    covariates = torch.cat([torch.ones_like(u), u, torch.full_like(u, 2.0)], -1)
    with pytest.warns(CollinearWarning, match=r"columns \[2\] .* in mixing"):
        torchem.fit(gated.double(), y, inputs=covariates, seed=0, max_iter=1, tol=0, progress=False)
    weight = line.component.weight[0, 0].detach()  # pyright: ignore
    assert weight[[0, 2]].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert float(weight[1]) == pytest.approx(2.0)


def test_numbers_whose_squares_overflow_are_told_of_as_such() -> None:
    with pytest.raises(InvalidArgument) as error:
        torchem.fit(
            torchem.GaussianMixture(2, 2).double(), x().double() * torch.tensor([1.0, 1e160], dtype=torch.float64)
        )
    told(error, "data", "column 1", "squares overflow", "rescale")


def test_labels_that_contradict_structural_zeros_are_named_as_what_may_be_wrong() -> None:
    model = torchem.GaussianHMM(2, 2).double()
    model.transition_matrix = [[1.0, 0.0], [0.5, 0.5]]
    labels = torch.full((20,), -1)
    labels[4], labels[9] = 0, 1
    with pytest.raises(InvalidArgument) as error:
        torchem.fit(model, x(), labels=labels, seed=0)
    told(error, "data", "probability zero at sequence 0", "label")


# ---- slots and lists ------------------------------------------------------------------------------------------------


def test_slots_that_do_not_fit_are_refused_with_a_hint() -> None:
    model, x = torchem.GaussianMixture(2, 2), torch.tensor([[0.0, math.nan], [1.0, 1.0]])
    with as_users_run_it():
        for match, call in (
            (
                r"^component: .*3 components.*Categorical, which",
                lambda: torchem.Mixture(Categorical(3), Categorical(3)),
            ),
            (
                r"^component: .*SoftmaxRegression, which",
                lambda: torchem.Mixture(Categorical(2), factors.SoftmaxRegression(2, 2)),
            ),
            (r"^mixing: .*Gaussian, a family .*in this order", lambda: torchem.Mixture(Gaussian(3, 2), Categorical(3))),
            (r"^mixing: .*a table \[2, 3\]", lambda: torchem.Mixture(Categorical(2, 3), Gaussian(3, 2))),
            (r"^factors: .*Stacked\(\[f, g\]\)", lambda: factors.Stacked(Gaussian(1, 2))),  # pyright: ignore
            (
                r"^factors: .*Product\(\[f, g\]\)",
                lambda: factors.Product(Gaussian(1, 2), Poisson(1, 1)),  # pyright: ignore
            ),
            (r"^generator: .*got int", lambda: model.sample(3, generator=0)),  # pyright: ignore
            (r"^generator: .*got int", lambda: model.impute(x, draws=2, generator=0)),  # pyright: ignore
            (r"^seed: .*generator=", lambda: model.impute(x, draws=2, seed=0)),
            (r"^lable: .*labels", lambda: model.log_prob(x, lable=[0, 1])),
        ):
            with pytest.raises((InvalidArgument, InvalidType), match=match):
                call()
