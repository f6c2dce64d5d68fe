"""A mixture inside each state: emissions of any shape from simple parts."""

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor, Kernel
from torchem.factors._composite import Composite, reshaped
from torchem.ops import directional, kmeans, reduce
from torchem.stats import Stats

#: Iterations of k-means that tell the parts of a state apart at the start.
_LLOYD = 20
#: Share of the observations that a part without members starts with.
_BLUR = 0.01


class Mixture(Composite):
    """A mixture of M parts in each of K states, as one emission.

    log p(x | k) = log Σ_m w_km p(x | part m of state k).

    Which part emitted stays inside: the model above sees K states. Given expectations of the states, the statistics are
    those of the parts under the current parameters, so the M-step is one of EM.

    Args:
        mixing: Law of the part given the state: ``Categorical(K, M)``, or a gate with K parents.
        component: An observed child with K · M components, those of state 0 first.

    Raises:
        InvalidArgument: If the two do not fit, or the component remembers earlier states.

    Source: L. R. Rabiner (1989), section IV.A.

    Example:
        >>> from torchem.factors import Bernoulli, Categorical
        >>> b = Bernoulli(4, 1)
        >>> b.probs = [[0.0], [1.0], [0.5], [0.5]]
        >>> Mixture(Categorical(2, 2), b).log_prob(Batch(torch.ones(1, 1)))
        tensor([[-0.6931, -0.6931]], grad_fn=<...>)
    """

    mixing: Factor
    component: Factor

    def __init__(self, mixing: Factor, component: Factor):
        super().__init__()
        for name, factor in (("mixing", mixing), ("component", component)):
            if not isinstance(factor, Factor):
                raise wrong_type(name, "a torchem factor", factor, "pass for example factors.Categorical(K, M)")
        k, total = mixing.n_components, component.n_components
        if k is None:
            raise invalid("mixing", "a law of parts for each state", type(mixing).__name__, "use Categorical(K, M)")
        parts = (total or 0) // k
        if not parts or total != k * parts or tuple(getattr(mixing, "shape", (k, parts))) != (k, parts):
            table = getattr(mixing, "shape", f"{k} states")
            raise invalid("component", f"K · M components for mixing {table}", total, "build it with one for each part")
        if component.memory:
            raise invalid(
                "component", "parts without memory", f"memory {component.memory}", "use one part in each state"
            )
        self.mixing, self.component = mixing, component
        self._k, self._m = k, parts

    def parts(self) -> dict[str, Factor]:
        return {"mixing": self.mixing, "component": self.component}

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int | None:
        return self.component.n_features

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the parts do."""
        return self.component.handles_missing

    @property
    def default_init(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the parts start."""
        return self.component.default_init

    def cast(self, x: Tensor) -> Tensor:
        return self.component.cast(x)

    def check(self, batch: Batch) -> None:
        self.component.check(batch)

    def context(self, batch: Batch) -> Batch:
        return self.component.context(batch)

    # ---- parts and states -------------------------------------------------------------------------------------

    def opened(self, stats: Stats) -> dict[str, Stats]:
        lead = len(self.replicas)
        component = reshaped(stats["component"], lambda leaf: leaf.flatten(lead, lead + 1))
        return {"mixing": stats["mixing"], "component": component}

    def closed(self, parts: dict[str, Stats]) -> Stats:
        lead, sizes = len(self.replicas), (self._k, self._m)
        component = reshaped(parts["component"], lambda leaf: leaf.unflatten(lead, sizes))
        return Stats(mixing=parts["mixing"], component=component)

    def components_of(self, path: str, states: Tensor) -> Tensor:
        return states.repeat_interleave(self._m, -1) if path == "component" else states

    def states_of(self, path: str, components: Tensor) -> Tensor:
        return components.unflatten(-1, (self._k, self._m)).any(-1) if path == "component" else components

    def _joint(self, batch: Batch, value: Tensor, score: bool = False) -> Tensor:
        """log w_km p(x | part m of state k) ``[*r, n, K, M]`` from log-densities ``[*r, *n, K · M]`` of the parts."""
        lead = len(self.replicas)
        log_table = self.mixing.log_table if score else self.mixing.table_potential
        table = log_table(batch).flatten(lead, -3)
        return table + value.flatten(lead, -2).unflatten(-1, (self._k, self._m))

    def _folded(self, batch: Batch, value: Tensor) -> Tensor:
        """``[*r, *n, …]`` of ``[*r, n, …]``."""
        lead, axes = len(self.replicas), batch.x.shape[:-1]
        return value if len(axes) == 1 else value.unflatten(lead, axes)

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        return self._folded(batch, reduce.logsumexp(self._joint(batch, self.component.log_prob(batch), score=True)))

    def log_potential(self, batch: Batch) -> Tensor:
        return self._folded(batch, reduce.logsumexp(self._joint(batch, self.component.log_potential(batch))))

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        """``mixing`` and ``component``, the leaves of the latter ``[*r, K, M, …]``."""
        share = reduce.responsibilities(self._joint(batch, self.component.log_potential(batch)))[1]
        each, flat = self._shared(batch, expected, share)
        mixing, component = self.mixing.table_stats(batch, each), self.component.stats(batch, flat)
        return self.closed({"mixing": mixing, "component": component})

    def _shared(self, batch: Batch, expected: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Expectations of the parts, ``[*r, *n, K, M]`` and ``[*r, *n, K · M]``."""
        each = self._folded(batch, expected.flatten(len(self.replicas), -2).unsqueeze(-1) * share)
        return each, each.flatten(-2)

    def kernel(self) -> Kernel:
        return _MixtureKernel(self)

    def row_size(self) -> int:
        return self.component.row_size() + 4 * self._k * self._m

    def cdf(self, batch: Batch) -> Tensor:
        each = self.component.cdf(batch).unflatten(-2, (self._k, self._m))
        return (self._weight(batch, each) * each).sum(-2)

    def _weight(self, batch: Batch, each: Tensor) -> Tensor:
        """Weights of the parts, to broadcast to ``each [*r, *n, K, M, D]``."""
        weight = self.mixing.log_table(batch).exp().unsqueeze(-1)
        if weight.dim() < each.dim():
            weight = weight.unflatten(len(self.replicas), [1] * (each.dim() - weight.dim() + 1))
        return weight

    def moments(self, batch: Batch) -> tuple[Tensor, Tensor]:
        mean, variance = (v.unflatten(-2, (self._k, self._m)) for v in self.component.moments(batch))
        weight = self._weight(batch, mean)
        center = (weight * mean).sum(-2)
        return center, (weight * (variance + (mean - center.unsqueeze(-2)).square())).sum(-2)

    def conditional(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Those of the parts, by their shares given what was observed; see `Factor.conditional`."""
        mean, variance = (v.unflatten(-2, (self._k, self._m)) for v in self.component.conditional(batch))
        weight = self._folded(batch, self._shares(batch))
        share = weight.unsqueeze(-1)
        center = (share * mean).sum(-2)
        spread = torch.where(share > 0, share * (variance + (mean - center.unsqueeze(-2)).square()), 0.0).sum(-2)
        if any(self.circular):
            angles, turns = torch.tensor(self.circular, device=mean.device), directional.mixed(weight, mean, variance)
            center, spread = (torch.where(angles, *pair) for pair in zip(turns, (center, spread), strict=True))
        missing = batch.x.isnan().unsqueeze(-2)
        return torch.where(missing, center, batch.x.to(center).unsqueeze(-2)), torch.where(missing, spread, 0.0)

    def conditional_covariance(self, batch: Batch) -> Tensor:
        within = self.component.conditional_covariance(batch).unflatten(-3, (self._k, self._m))
        mean = self.component.conditional(batch)[0].unflatten(-2, (self._k, self._m))
        share = self._folded(batch, self._shares(batch))
        gap = mean - (share.unsqueeze(-1) * mean).sum(-2, keepdim=True)
        spread = within + gap.unsqueeze(-1) * gap.unsqueeze(-2)
        share = share[..., None, None]
        return torch.where(share > 0, share * spread, 0.0).sum(-3)

    def complete(self, batch: Batch, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        share = self._shares(batch).detach()[torch.arange(len(z), device=z.device), z]
        part = torch.multinomial(share, 1, generator=generator)[:, 0] if len(z) else z
        return self.component.complete(batch, z * self._m + part, generator)

    def _shares(self, batch: Batch) -> Tensor:
        """Probability of each part given the state and what was observed, ``[*r, n, K, M]``."""
        value = self.component.log_prob(batch.with_x(self.cast(batch.x)))
        return reduce.responsibilities(self._joint(batch, value, score=True))[1]

    def placed(self, rows: Batch, value: Tensor) -> Tensor:
        return self.component.placed(rows, value)

    def outcomes(self) -> list[Tensor | None]:
        return self.component.outcomes()

    @property
    def nominal(self) -> list[bool]:
        return self.component.nominal

    @property
    def circular(self) -> list[bool]:
        return self.component.circular

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        part = self.mixing.sample(z, batch, generator)[:, 0].to(z)
        return self.component.sample(z * self._m + part, batch, generator)

    # ---- starts -----------------------------------------------------------------------------------------------

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """First parameters with the observations of each state divided among its parts by k-means."""
        each, flat = self._shared(batch, expected, self._divided(batch, expected))
        values = {
            "mixing": self.mixing.maximize(self.mixing.table_stats(batch, each)),
            "component": self.component.initialize(batch, flat),
        }
        return self.joined(values)

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """The first part of each state at its observation, the others at observations ever further from it."""
        even = torch.ones(*self.replicas, 1, self._k, self._m, dtype=self.dtype, device=self.device)
        values = {
            "mixing": self.mixing.maximize(self.mixing.table_stats(batch[:1], even)),
            "component": self.component.initialize_at(batch, self._around(batch.x, index)),
        }
        return self.joined(values)

    def _divided(self, batch: Batch, expected: Tensor) -> Tensor:
        """Shares ``[*r, n, K, M]`` of the parts in their states: parts that start equal would stay equal."""
        x = _standardized(batch.x)
        weight = expected.detach().to(torch.float64).reshape(-1, len(x), self._k)
        share = weight.new_zeros(*weight.shape, self._m)
        for r, state in torch.cartesian_prod(torch.arange(len(weight)), torch.arange(self._k)).tolist():
            rows = (weight[r, :, state] > 0).nonzero()[:, 0]
            if not len(rows):
                continue
            mass, generator = weight[r, rows, state], torch.Generator().manual_seed(r)
            seeds = kmeans.seed(x[rows], self._m, [generator], mass)
            labels = kmeans.lloyd(x[rows], x[rows][seeds], _LLOYD, mass)[0]
            own = torch.nn.functional.one_hot(labels, self._m).to(mass)
            blur = torch.rand(own.shape, generator=generator, dtype=torch.float64).to(own.device)
            share[r, rows, state] = torch.where(own.sum(0) == 0, _BLUR * blur, own)
        return share.to(expected).reshape(*expected.shape, self._m)

    def _around(self, x: Tensor, index: Tensor) -> Tensor:
        """Observations ``[*r, K · M]``: those at ``index [*r, K]``, each followed by M − 1 that differ from it."""
        points, place = _standardized(x).unique(dim=0, return_inverse=True)
        turn = torch.arange(len(x), device=x.device)
        row = torch.full((len(points),), len(x), device=x.device).scatter_reduce(0, place, turn, "amin")
        gap = torch.cdist(points[place[index.reshape(-1)]], points, compute_mode="donot_use_mm_for_euclid_dist")
        # Evenly by rank over as many of the nearest as a state has on average.
        step = max(1, len(points) // (self._k * self._m))
        rank = (torch.arange(self._m, device=x.device) * step).clamp(max=len(points) - 1)
        return row[gap.argsort(-1)[:, rank]].reshape(*index.shape[:-1], -1)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def select(self, keep: Tensor) -> "Mixture":
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        parts = (index.unsqueeze(-1) * self._m + torch.arange(self._m, device=index.device)).flatten()
        return Mixture(self.mixing.pruned(index), self.component.pruned(parts))

    @classmethod
    def example(cls) -> tuple[Factor, Batch]:
        return cls.examples()[0]

    @classmethod
    def examples(cls) -> list[tuple[Factor, Batch]]:
        """Counts, and normal columns with a covariance that all parts share."""
        from torchem import factors

        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        counts, normal = factors.Poisson(6, 2), factors.Gaussian(4, 3, "tied")
        counts.rates, normal.means = 1 + 5 * draw(6, 2), 2 * draw(4, 3)
        found: list[tuple[Factor, Batch]] = []
        for k, part, x in ((3, counts, (7 * draw(30, 2)).floor()), (2, normal, 3 * draw(30, 3))):
            table = factors.Categorical(k, 2)
            table.probs = draw(k, 2).softmax(-1)
            found.append((cls(table, part).double(), Batch(x)))
        return found


class _MixtureKernel(Kernel):
    """The pass of the parts; the share of each in its state is remembered from potentials to statistics."""

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self.kernel = mixture.component.kernel()
        self.mixing: Stats | None = None

    def log_potential(self, batch: Batch) -> Tensor:
        joint = self.mixture._joint(batch, self.kernel.log_potential(batch))
        value, self.share = reduce.responsibilities(joint)
        return self.mixture._folded(batch, value)

    def collect(self, batch: Batch, expected: Tensor) -> None:
        each, flat = self.mixture._shared(batch, expected, self.share)
        self.kernel.collect(batch, flat)
        mixing = self.mixture.mixing.table_stats(batch, each)
        self.mixing = mixing if self.mixing is None else self.mixing + mixing

    def stats(self) -> Stats:
        if self.mixing is None:
            raise RuntimeError("a kernel has no statistics before its first piece")
        return self.mixture.closed({"mixing": self.mixing, "component": self.kernel.stats()})

    def inner(self) -> Tensor:
        assert self.mixing is not None
        return self.mixture.mixing.expected_log_prob(self.mixing) + self.kernel.inner()


def _standardized(x: Tensor) -> Tensor:
    """Rows for clustering: columns of mean zero and variance one, missing entries at the mean."""
    x = x.detach().to(torch.float64)
    x = (x - x.nanmean(0)).nan_to_num(nan=0.0)
    scale = x.square().mean(0).sqrt()
    return x / torch.where(scale > 0, scale, 1.0)
