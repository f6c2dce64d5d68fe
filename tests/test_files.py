"""Models as files: what is saved comes back to the bit, and what is no model is refused with a reason."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import torchem
from torchem import factors, files, priors
from torchem.errors import InvalidArgument, InvalidFile, InvalidType
from torchem.factors import Categorical, Gaussian, Poisson
from torchem.models.stationary import Stationary

TYPES = ["full", "tied", "diag", "spherical"]


def fitted(
    covariance_type: str = "full", dtype: torch.dtype = torch.float64
) -> tuple[torchem.GaussianMixture, torch.Tensor]:
    x = torch.cat([torch.randn(60, 2), torch.randn(60, 2) * 0.1 + 50]).to(dtype)
    model = torchem.GaussianMixture(2, 2, covariance_type, covariance_floor=1e-4).to(dtype)
    torchem.fit(model, x, seed=0, max_iter=40, tol=1e-6, progress=False)
    return model, x


def assert_same(a: torchem.Mixture, b: torchem.Mixture, x: torch.Tensor) -> None:
    assert type(a) is type(b)
    assert a.dtype == b.dtype
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name
    assert torch.equal(a.log_prob(x), b.log_prob(x))
    assert torch.equal(a.posterior(x), b.posterior(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_a_fitted_mixture_comes_back_to_the_bit(tmp_path, covariance_type, dtype):
    model, x = fitted(covariance_type, dtype)
    path = tmp_path / "m.safetensors"
    torchem.save(model, path)
    again = torchem.load(path)
    assert_same(model, again, x)
    assert again.config() == model.config()
    assert (again.component.direct, again.component.version) == (model.component.direct, model.component.version)
    assert torchem.criteria(again, x) == torchem.criteria(model, x)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_fit_goes_on_after_loading(tmp_path):
    model, x = fitted()
    model.means = torch.randn(2, 2)
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    for one in (model, again):
        torchem.fit(one, x, init=None, max_iter=3, tol=0.0, progress=False)
    assert_same(model, again, x)


def test_origins_per_component_and_indirect_route_are_kept(tmp_path):
    model = torchem.GaussianMixture(2, 2).double()
    model.means = [[0.0, 0.0], [1e6, 1e6]]
    model.component.tune(100)
    assert model.component.origin.shape == (2, 2)
    torchem.save(model, tmp_path / "m")
    x = torch.randn(9, 2, dtype=torch.float64)
    assert_same(model, torchem.load(tmp_path / "m"), x)


def test_structural_zeros_and_frozen_masks_are_kept(tmp_path):
    model = torchem.GaussianMixture(3, 1).double()
    model.weights = [0.5, 0.5, 0.0]
    model.component.freeze("means", mask=torch.tensor([True, False, False]))
    model.mixing.freeze()
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert_same(model, again, torch.randn(5, 1, dtype=torch.float64))
    assert again.n_parameters() == model.n_parameters()
    assert torch.equal(again.component.frozen("mean"), torch.tensor([True, False, False]))
    assert again.mixing.frozen("logits").shape == ()


def test_composites_keep_their_factors(tmp_path):
    model = torchem.Mixture(Categorical(2), Categorical(2, 3))
    model.component.probs = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert_same(model, again, torch.tensor([[0], [1], [2]]))


def test_replaced_slots_come_back_replaced(tmp_path):
    model = torchem.GaussianMixture(2, 2)
    model.component = Gaussian(2, 2, "diag", covariance_floor=0.25)
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert again.component.covariance_type == "diag"
    assert_same(model, again, torch.randn(4, 2))


def test_pruned_and_replicated_models(tmp_path):
    model, x = fitted()
    model.prune(torch.tensor([True, False]))
    torchem.save(model, tmp_path / "m")
    assert_same(model, torchem.load(tmp_path / "m"), x)
    many = fitted()[0].replicate(3)
    torchem.save(many, tmp_path / "r")
    again = torchem.load(tmp_path / "r")
    assert again.replicas == (3,)
    assert_same(many, again, x)


# ---- chains and priors --------------------------------------------------------------------------------------------


def assert_same_chain(a: torchem.HMM, b: torchem.HMM, x: torch.Tensor) -> None:
    assert_same(a, b, x)  # pyright: ignore
    assert torch.equal(a.most_likely(x), b.most_likely(x))
    assert a.n_parameters() == b.n_parameters()


def test_a_stationary_chain_keeps_its_one_table(tmp_path):
    model = torchem.HMM("stationary", Categorical(2, 2), Poisson(2, 1)).double()
    model.transition_matrix, model.emission.rates = [[0.9, 0.1], [1.0, 0.0]], [[1.0], [0.0]]
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert again.initial.transition is again.transition
    assert again.end is None
    assert_same_chain(model, again, torch.tensor([[1.0], [0.0], [3.0]]).double())
    header = json.loads(safetensors_header(tmp_path / "m"))
    assert [entry["class"] for entry in header["modules"]] == ["HMM", "Stationary", "Categorical", "Poisson"]
    for one in (model, again):
        torchem.fit(one, [0, 3, 1, 0, 2, 2], init=None, max_iter=3, tol=0.0, progress=False)
    assert torch.equal(model.transition_matrix, again.transition_matrix)


def test_chains_keep_their_parts(tmp_path):
    model = torchem.GaussianHMM(3, 2, "full").double()
    model.restrict(torch.ones(3, 3).triu())
    model.initial = Stationary(model.transition)
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert torch.equal(again.transition.support, model.transition.support)
    assert again.initial.transition is again.transition
    ended = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3), end=Categorical(2, 2))
    ended.end_probs = [0.1, 0.5]
    ended.initial.freeze()
    torchem.save(ended, tmp_path / "e")
    again = torchem.load(tmp_path / "e")
    assert_same_chain(ended, again, torch.tensor([[0], [2]]))
    assert again.initial.frozen("logits") is not None


def test_replicated_chains(tmp_path):
    model = torchem.HMM("stationary", Categorical(2, 2), Poisson(2, 1)).replicate(3)
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert again.replicas == (3,)
    assert again.initial.transition is again.transition
    assert_same(model, again, torch.tensor([[1.0], [4.0]]))  # pyright: ignore


def test_every_family_is_kept_as_an_emission(tmp_path):
    kept = 0
    for name in factors.__all__:
        family = getattr(factors, name)
        if not family.sufficient:
            continue  # networks are passed in: tests/test_gradient.py
        for emission, _ in family.examples() if hasattr(family, "examples") else [family.example()]:
            if emission.n_components is None:
                continue
            k = emission.n_components
            model = torchem.HMM("stationary", Categorical(k, k), emission)
            torchem.save(model, tmp_path / "m")
            again = torchem.load(tmp_path / "m")
            assert type(again.emission) is family
            for key, value in model.state_dict().items():
                torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)
            kept += 1
    assert kept >= 5


def test_priors_are_kept(tmp_path):
    model = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)).double()
    model.transition_matrix = [[0.5, 0.5], [0.0, 1.0]]
    model.initial.prior = priors.Dirichlet(torch.tensor([2.0, 5.0]))
    model.transition.prior = priors.StickyDirichlet(7.0, 1.5)
    torchem.save(model, tmp_path / "m")
    again = torchem.load(tmp_path / "m")
    assert again.initial.prior.config() == {"concentration": [2.0, 5.0]}
    assert again.transition.prior.config() == model.transition.prior.config()
    assert again.emission.prior is None
    assert torch.equal(again.log_prior(), model.log_prior())


class Flat(priors.Dirichlet):
    """A prior of a user."""

    def __init__(self, concentration=1.0):
        super().__init__(concentration)


def test_priors_of_users_are_passed_in(tmp_path):
    model = torchem.GaussianMixture(2, 1)
    model.mixing.prior = Flat(3.0)
    torchem.save(model, tmp_path / "m")
    with pytest.raises(InvalidFile, match=r"prior 'Flat'; pass modules=\{'Flat': …\}"):
        torchem.load(tmp_path / "m")
    assert isinstance(torchem.load(tmp_path / "m", modules={"Flat": Flat}).mixing.prior, Flat)


@pytest.mark.parametrize(
    "prior",
    [
        {"class": "os.system", "config": {"command": "true"}},
        {"class": "ABC", "config": {}},
        {"class": "Prior", "config": {}},
        {"class": "_Concentrations", "config": {}},
        {"class": "Dirichlet", "config": {"concentration": -1.0}},
        {"class": "Dirichlet", "config": {"concentration": [1.0] * 7}},
        {"class": "Dirichlet", "config": {"nonsense": 1}},
        {"class": "Dirichlet"},
        {"config": {}},
        ["Dirichlet"],
        7,
    ],
)
def test_priors_that_do_not_fit_are_refused(saved, prior):
    rewrite(saved, header=lambda h: h["modules"][1].update(prior=prior))
    with pytest.raises(InvalidFile, match="prior"):
        torchem.load(saved)


def test_files_of_the_first_version_still_load(saved):
    def older(header):
        header["format_version"] = 1
        for entry in header["modules"]:
            entry.pop("prior", None)

    before = torchem.load(saved)
    rewrite(saved, header=older)
    assert_same(before, torchem.load(saved), torch.randn(3, 2).double())


def safetensors_header(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["torchem"]


class Pair(torchem.Mixture):
    """A user's model with a factor in two slots and an argument of each kind."""

    def __init__(self, mixing, component, tail=None, options=None, scale=1.0, pair=(1, 2), table=None):
        super().__init__(mixing, component)
        self.tail = component if tail is None else tail
        self.options, self.scale, self.pair, self.table = options, scale, pair, table

    def slots(self):
        return (*super().slots(), ("tail", self.tail))


def test_a_shared_factor_is_saved_once_and_stays_shared(tmp_path):
    model = Pair(Categorical(2), Gaussian(2, 1), options={"a": [1, None, "b"]}, scale=float("inf"), table=torch.eye(2))
    torchem.save(model, tmp_path / "m")
    with pytest.raises(InvalidFile, match=r"class 'Pair'; pass modules=\{'Pair': …\}"):
        torchem.load(tmp_path / "m")
    again = torchem.load(tmp_path / "m", modules={"Pair": Pair})
    assert again.tail is again.component
    assert again.options == {"a": [1, None, "b"]}
    assert (again.scale, again.pair) == (float("inf"), (1, 2))
    assert torch.equal(again.table, torch.eye(2))
    assert len([name for name in files._tensors(model) if name.endswith("mean")]) == 1


class Networked(Gaussian):
    """A user's factor around a network that cannot tell its arguments."""

    def __init__(self, network, n_components=2):
        super().__init__(n_components, 1)
        self.network = network

    def config(self):
        return {"network": self.network, "n_components": 2}


def test_foreign_modules_are_passed_in(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model = torchem.Mixture(Categorical(2), Networked(network))
    torchem.save(model, tmp_path / "m")
    blank = torch.nn.Sequential(torch.nn.Linear(2, 2))
    again = torchem.load(tmp_path / "m", modules={"Networked": Networked, "component.network": blank})
    assert again.component.network is blank
    assert torch.equal(blank[0].weight, network[0].weight)
    with pytest.raises(InvalidFile, match="Sequential"):
        torchem.load(tmp_path / "m", modules={"Networked": Networked})


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(InvalidType, match="torchem model"):
        torchem.save(torch.nn.Linear(1, 1), tmp_path / "m")
    with pytest.raises(InvalidType, match=r"Pair\.config"):
        torchem.save(Pair(Categorical(2), Gaussian(2, 1), options=object()), tmp_path / "m")
    with pytest.raises(InvalidFile, match="place to write"):
        torchem.save(torchem.GaussianMixture(1, 1), tmp_path / "none" / "m")
    assert not list(tmp_path.iterdir())


def test_a_forgotten_attribute_is_named(tmp_path):
    class Forgetful(Gaussian):
        def __init__(self, spread):
            super().__init__(1, 1)

    with pytest.raises(InvalidArgument, match="no attribute 'spread'"):
        torchem.save(torchem.Mixture(Categorical(1), Forgetful(2)), tmp_path / "m")


# ---- files that are none ------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path) -> Path:
    torchem.save(fitted()[0], tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def rewrite(path: Path, header=None, tensors=None) -> None:
    """Change the header or the tensors of a saved file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["torchem"])
        content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    (header or (lambda h: None))(meta)
    (tensors or (lambda t: None))(content)
    save_file(content, path, {"torchem": json.dumps(meta)})


def set_class(h, name):
    h["modules"][0]["class"] = name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"header": lambda h: h.update(format_version=99)},
            "format version 2 or older, got version 99; update torchem",
        ),
        ({"header": lambda h: h.update(format_version="1")}, "header with a version"),
        ({"header": lambda h: h.pop("modules")}, "header in JSON"),
        ({"header": lambda h: h.update(modules=[])}, "header that describes a model"),
        ({"header": lambda h: h["modules"][0].pop("factors")}, "header that describes a model"),
        ({"header": lambda h: h["modules"][0]["factors"].update(mixing=77)}, "header that describes a model"),
        ({"header": lambda h: h["modules"][0]["factors"].update(mixing=0)}, "header that describes a model"),
        ({"header": lambda h: set_class(h, "os.system")}, "class 'os.system'"),
        ({"header": lambda h: set_class(h, "Unknown")}, "class 'Unknown'"),
        (
            {"header": lambda h: h["modules"][0]["config"].update(n_components=-3)},
            "arguments that GaussianMixture accepts",
        ),
        ({"header": lambda h: h["modules"][0]["config"].update(nonsense=1)}, "arguments that GaussianMixture accepts"),
        ({"header": lambda h: h["modules"][2]["config"].update(n_components=7)}, "'component.mean' of shape"),
        ({"header": lambda h: h["modules"][2]["state"].update(direct=3)}, "state that Gaussian has"),
        ({"header": lambda h: h["modules"][2]["state"].update(novel=True)}, "state that Gaussian has"),
        ({"header": lambda h: h.update(replicas=[2])}, "shape"),
        ({"header": lambda h: h.update(replicas=["x"])}, ""),
        ({"tensors": lambda t: t.pop("component.mean")}, "'component.mean' of shape [2, 2], got none"),
        ({"tensors": lambda t: t.update({"component.mean": torch.zeros(3, 2)})}, "got shape [3, 2]"),
        ({"tensors": lambda t: t.update({"component.origin": torch.zeros(5, 2)})}, "got shape [5, 2]"),
        ({"tensors": lambda t: t.update({"component.mean": torch.zeros(2, 2, dtype=torch.long)})}, "of kind"),
        ({"tensors": lambda t: t.update({"mixing.support": torch.ones(2)})}, "of kind"),
        ({"tensors": lambda t: t.update({"component.frozen_mean": torch.ones(9, dtype=torch.bool)})}, "frozen_mean"),
        ({"tensors": lambda t: t.update(extra=torch.zeros(1))}, "no tensors but the model's, got 'extra' too"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(saved, change, message):
    rewrite(saved, **change)
    with pytest.raises(InvalidFile) as error:
        torchem.load(saved)
    assert message in str(error.value)
    assert str(saved) in str(error.value)


def test_a_truncated_or_damaged_file_is_refused(saved):
    content = saved.read_bytes()
    for size in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(InvalidFile, match="whole safetensors file"):
            torchem.load(saved)
    saved.write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    with pytest.raises(InvalidFile):
        torchem.load(saved)


def test_foreign_files_are_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(InvalidFile, match="tensors without torchem's header"):
        torchem.load(tmp_path / "plain.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors", {"torchem": "{"})
    with pytest.raises(InvalidFile, match="header in JSON"):
        torchem.load(tmp_path / "odd.safetensors")
    with pytest.raises(InvalidFile, match="a folder"):
        torchem.load(tmp_path)
    with pytest.raises(InvalidFile, match="no file"):
        torchem.load(tmp_path / "none")


def test_pickles_are_never_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save(Trap(), tmp_path / "m")
    with pytest.raises(InvalidFile):
        torchem.load(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


# ---- writing ------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InvalidFile, match="No space left"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_written_files_have_ordinary_permissions(tmp_path):
    path = tmp_path / "a"
    old = os.umask(0o027)
    try:
        files.write_atomic(path, b"")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o600)
        files.write_atomic(path, b"")
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)


def test_reports_never_hold_infinity():
    text = files.to_json({"a": [1.0, float("inf"), (float("nan"),)], "b": torch.tensor([-torch.inf])})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.0, None, [None]], "b": [None]}
