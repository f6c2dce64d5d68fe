"""Any distribution of torch as a family of independent columns."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to, constraints, transform_to

from torchem.batch import Batch, as_tensor, refuse_entries, values_known
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor
from torchem.factors._climbed import Climbed

#: The distributions that a file may name: torch's own.
_TORCH: dict[str, type[Distribution]] = {
    name: kind
    for name in torch.distributions.__all__
    if isinstance(kind := getattr(torch.distributions, name), type) and issubclass(kind, Distribution)
}
#: Starts by moments are no nearer to the end of a scale than this, in units of the spread of all data.
_NARROW = 1e-3


class FromDistribution(Climbed):
    """Independent columns given the state, each of a law of ``torch.distributions`` (or a class like these).

    log p(x | k) = Σ_d log p(x_d; θ_kd), over the entries observed (NaN is missing); −∞ outside the law's support.

    Each argument that the class declares in ``arg_constraints`` is a view ``[K, D]`` under its own name, readable and
    assignable (``family.loc``, ``family.scale``), kept inside its constraint by ``biject_to``; those that are given
    stay as they are. Logits are learnt where a law also takes probabilities.

    Q is no function of statistics that torch knows of: an M-step climbs, passing over the data again, and the family
    must stand in a `torchem.Gradient`. Where torchem has a family of its own, with its M-step in closed form,
    `FromDistribution.of` gives that.

    Args:
        distribution: A class of scalar distributions, such as ``torch.distributions.Laplace``.
        n_components: K, the number of states.
        n_features: D, the number of columns.
        **given: Arguments that are known, one number or ``[D]`` each (``df=3.0``, ``total_count=10``).

    Raises:
        InvalidType: If it is no class of distributions.
        InvalidArgument: For sizes below one, a law of vectors, arguments that it has not, or that cannot be learnt.

    Source: A. P. Dempster, N. M. Laird, D. B. Rubin (1977), section 2, for what an M-step that only climbs does.

    Example:
        >>> import torchem
        >>> laplace = FromDistribution(torch.distributions.Laplace, 2, 1)
        >>> laplace.loc = [[-1.0], [1.0]]
        >>> laplace.log_prob(Batch(torch.tensor([[1.0]])))
        tensor([[-2.6931, -0.6931]], grad_fn=<...>)
        >>> component = torchem.Gradient(laplace, torch.optim.LBFGS, steps=2)
        >>> model = torchem.Mixture(torchem.factors.Categorical(2), component)
    """

    no_conjugate: ClassVar[str] = "its law may be any"
    handles_missing: ClassVar[bool] = True
    independent = True

    def __init__(self, distribution: type[Distribution], n_components: int, n_features: int, **given: Any):
        super().__init__()
        if not isinstance(distribution, type) or not issubclass(distribution, Distribution):
            raise wrong_type(
                "distribution", "a class of torch.distributions", distribution, "pass torch.distributions.Laplace or so"
            )
        for name, size in (("n_components", n_components), ("n_features", n_features)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise invalid(name, "a positive whole number", repr(size), "give at least 1")
        declared: Any = distribution.arg_constraints
        if isinstance(declared, property):
            raise invalid(
                "distribution", "a law whose parameters are constrained one by one", distribution.__name__,
                "use a family of torchem: factors.Uniform for a box",
            )  # fmt: skip
        if unknown := sorted(set(given) - set(declared)):
            raise invalid(unknown[0], f"an argument of {distribution.__name__}: {list(declared)}", given, "correct it")
        self._law, self._k, self._d = distribution, n_components, n_features
        self._given = {name: as_tensor(value, name).tolist() for name, value in given.items()}
        self._learnt: dict[str, Any] = {}
        # Of probabilities and their logits a law takes one.
        named = not {"probs", "logits"}.isdisjoint(given)
        spare = {"probs", "logits"} if named else {"probs"} if "logits" in declared else set()
        for name, constraint in declared.items():
            if name not in given and name not in spare:
                self._learnt[name] = constraint
                self.new_parameter(f"raw_{name}", self._start(name, constraint))
        if not self._learnt:
            raise invalid("given", "arguments left to learn", sorted(given), "write a Factor of your own for a law")
        self._try()

    def _start(self, name: str, constraint: Any) -> Tensor:
        """Where a parameter begins: in the middle of its constraint."""
        shape = (self._k, self._d)
        try:
            value = biject_to(constraint)(torch.zeros(shape))
        except NotImplementedError as error:
            raise invalid(
                name, "a parameter that can be learnt by gradients", f"one that is {constraint} in "
                f"{self._law.__name__}", f"give it: {name}=…, or use a family of torchem's own",
            ) from error  # fmt: skip
        if value.shape != shape:
            raise invalid(
                "distribution", "a law of single numbers", f"{self._law.__name__}, whose {name} is {constraint}",
                "use a family of torchem for vectors",
            )  # fmt: skip
        return torch.zeros(shape)

    def _try(self) -> None:
        """Refuse what cannot be built, and laws of vectors."""
        try:
            law = self._built(self.arguments())
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise invalid(
                "distribution", f"arguments that {self._law.__name__} takes", reason, "give the others by name"
            ) from error
        if law.event_shape or law.batch_shape != (self._k, self._d):
            raise invalid(
                "distribution", "a law of single numbers", f"{self._law.__name__} of shape {list(law.event_shape)}",
                "use a family of torchem for vectors",
            )  # fmt: skip

    # ---- parameters by their names ----------------------------------------------------------------------------

    @property
    def views(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The arguments that are learnt."""
        return {name: f"raw_{name}" for name in self.__dict__.get("_learnt", {})}

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_learnt", {}):
            return biject_to(self._learnt[name])(getattr(self, f"raw_{name}"))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dict__.get("_learnt", {}):
            super().__setattr__(name, value)
            return
        value = as_tensor(value, name).to(self.device, torch.float64)
        if value.shape != (self._k, self._d):
            raise invalid(name, f"shape {[self._k, self._d]}", list(value.shape), "give one row per component")
        constraint = self._learnt[name]
        if not bool(constraint.check(value).all()):
            raise invalid(name, f"numbers that are {constraint}", "another one", "correct it")
        with torch.no_grad():
            getattr(self, f"raw_{name}").copy_(biject_to(constraint).inv(value))

    def arguments(self) -> dict[str, Tensor]:
        """All arguments of the law, ``[K, D]`` each."""
        own = {name: getattr(self, name) for name in self._learnt}
        like = next(iter(own.values()))
        fixed = {name: torch.as_tensor(v, dtype=like.dtype, device=like.device) for name, v in self._given.items()}
        return own | {name: value.expand(self._k, self._d) for name, value in fixed.items()}

    def _built(self, arguments: dict[str, Tensor]) -> Distribution:
        law: Any = self._law
        return law(**arguments, validate_args=False)

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    # ---- the distribution -------------------------------------------------------------------------------------

    def check(self, batch: Batch) -> None:
        super().check(batch)
        if not values_known() or not len(batch) or _moves(self._law):
            return
        x = self.cast(batch.x.detach()).reshape(-1, 1, self._d)
        with torch.no_grad():
            support: Any = self._built(self.arguments()).support
            bad = ~(support.check(x).any(1) | x[:, 0].isnan())
        kind = f"values in the support of {self._law.__name__}, {support}"
        refuse_entries(batch, bad.reshape(batch.x.shape), kind, "correct it, or set it to NaN")

    def log_prob(self, batch: Batch) -> Tensor:
        law = self._built(self.arguments())
        support: Any = law.support
        x = batch.x.to(self.dtype).unsqueeze(-2)
        missing = x.isnan()
        inside = support.check(x)
        # What is outside, or missing, must not enter the derivatives as NaN.
        value = law.log_prob(torch.where(inside & ~missing, x, _inner(support, law.batch_shape, x)))
        value = torch.where(inside, value, -torch.inf)
        return torch.where(missing, 0.0, value).sum(-1)

    def row_size(self) -> int:
        return 8 * self._k * self._d

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        law, shape = self._built(self.arguments()), (*[1] * (batch.x.dim() - 1), self._k, self._d)
        return law.mean.reshape(shape), law.variance.reshape(shape)

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        law = self._built({name: value.detach()[z] for name, value in self.arguments().items()})
        if generator is None:
            return law.sample()
        # Laws of torch draw from the global generator alone: it is borrowed, and given back as it was.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return law.sample()

    # ---- EM ---------------------------------------------------------------------------------------------------

    def guess(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """Locations at the mean and scales at the spread of a component's share, where the law has these."""
        x = batch.x.to(torch.float64)
        seen = ~x.isnan()
        x, share = torch.where(seen, x, 0.0), expected.to(torch.float64)
        count = (share.mT @ seen.to(x)).clamp(min=1e-30)
        mean = share.mT @ x / count
        middle = x.sum(0) / seen.sum(0).clamp(min=1)
        spread = (torch.where(seen, x - middle, 0.0).square().sum(0) / seen.sum(0).clamp(min=1)).sqrt()
        variance = share.mT @ (x - middle).square().masked_fill(~seen, 0.0) / count - (mean - middle).square()
        scale = variance.clamp(min=0.0).sqrt().maximum(_NARROW * spread).clamp(min=1e-30)
        found = {"loc": (mean, constraints.real), "scale": (scale, constraints.positive)}
        values = {}
        # As the class declares them: a copy of a family has constraints of its own.
        declared: Any = self._law.arg_constraints
        for name, (value, kind) in found.items():
            if name in self._learnt and declared[name] is kind and "loc" in self._learnt:
                values[f"raw_{name}"] = self.keep_frozen(f"raw_{name}", biject_to(kind).inv(value).to(self.dtype))
        return values if self._law.support is constraints.real else {}

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def n_parameters(self) -> int:
        masks = [self.frozen(name) for name in self.views.values()]
        return sum((self._k - (0 if mask is None else int(mask.expand(self._k).sum()))) * self._d for mask in masks)

    def select(self, keep: Tensor) -> "FromDistribution":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        small = FromDistribution(self._law, len(index), self._d, **self._given).to(self.device, self.dtype)
        for name, value in self.named_parameters():
            small.get_parameter(name).data = value.detach()[index].clone()
            if (mask := self.frozen(name)) is not None:
                small.register_buffer(f"frozen_{name}", mask[index] if mask.dim() else mask)
        return small

    def config(self) -> dict[str, Any]:
        # By its name: `rebuild` looks it up among torch's own, and imports nothing.
        return {
            "distribution": self._law.__name__, "n_components": self._k, "n_features": self._d, **self._given,
        }  # fmt: skip

    @classmethod
    def rebuild(cls, distribution: str, n_components: int, n_features: int, **given: Any) -> "FromDistribution":
        """The family of a saved configuration, its law named as in ``torch.distributions``.

        Raises:
            InvalidArgument: If torch has no such law: a class of a user's own is passed in as a ready family.
        """
        if distribution not in _TORCH:
            raise invalid(
                "distribution", "the name of a class of torch.distributions", distribution,
                "pass modules={SLOT: FromDistribution(YourClass, K, D)} to load, by the name of the slot",
            )  # fmt: skip
        return cls(_TORCH[distribution], n_components, n_features, **given)

    @classmethod
    def of(cls, distribution: type[Distribution], n_components: int, n_features: int) -> Factor:
        """torchem's own family of a law, whose M-step has a closed form; a `FromDistribution` where there is none.

        Example:
            >>> type(FromDistribution.of(torch.distributions.Normal, 2, 1)).__name__
            'Gaussian'
        """
        from torchem import factors

        k, d = n_components, n_features
        if distribution is torch.distributions.Normal:
            return factors.Gaussian(k, d, "diag")
        same = {
            torch.distributions.Bernoulli: "Bernoulli",
            torch.distributions.Exponential: "Exponential",
            torch.distributions.Poisson: "Poisson",
            torch.distributions.VonMises: "VonMises",
            torch.distributions.Gamma: "Gamma",
            torch.distributions.NegativeBinomial: "NegativeBinomial",
        }
        own = getattr(factors, same.get(distribution, ""), None)
        return cls(distribution, k, d) if own is None else own(k, d)

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        """Laplace columns, some entries missing."""
        generator = torch.Generator().manual_seed(0)
        family = cls(torch.distributions.Laplace, 3, 2).double()
        for parameter in family.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        x = 2 * torch.randn(20, 2, generator=generator, dtype=torch.float64)
        return family, Batch(x.masked_fill(torch.rand(20, 2, generator=generator) < 0.2, torch.nan))


def _moves(law: type[Distribution]) -> bool:
    """Whether the support depends on parameters: then it is a property of each instance."""
    return isinstance(law.support, property)


def _inner(support: Any, shape: torch.Size, like: Tensor) -> Tensor:
    """A point of the support for each cell."""
    zero = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if support.is_discrete:
        return zero + getattr(support, "lower_bound", 0.0)
    try:
        return transform_to(support)(zero)
    except NotImplementedError:
        return zero
