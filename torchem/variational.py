"""Variational Bayes over parameters: a factor that keeps the posterior of its parameters instead of a point.

With a conjugate prior the posterior is prior + statistics, and inference needs nothing but expected natural parameters:
so every model does variational Bayes without knowing. The bound of a model gains −KL(q ‖ prior) of each such factor.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import InvalidArgument, invalid, wrong_type
from torchem.factor import Conjugate, Factor, Kernel, Moments, Prior, Quadratic, conjugate
from torchem.model import LatentModel
from torchem.ops.missing import any_missing
from torchem.stats import Stats
from torchem.wrapper import Wrapper, outer


class Variational(Wrapper):
    """The posterior of a factor's parameters: q(θ) ∝ p(θ) exp⟨S, η(θ)⟩.

    The E-step is fed E_q log p(x | θ), the M-step is q = prior + S, and −KL(q ‖ p) joins the bound, which is then that
    on the marginal likelihood:

        log p(x) ≥ E_q[log p(x, z | θ)] + H[q(z)] − KL(q(θ) ‖ p(θ)).

    The wrapped factor's parameters are posterior means (for covariances the inverses of expected precisions), read and
    assigned by its own names, so ``model.means`` and the like stay; how much the posterior has seen is kept beside
    them. `log_prob` is the posterior predictive: Student's t for normal families, negative binomial for counts. Of the
    frames of a sequence it takes the product, as if each knew nothing of the others but their states.

    What is frozen is known: the posterior is that of the rest given it, and the bound is on log p(x | what is frozen).
    Given its mean a precision is Wishart, given its covariance a mean is normal, and given some of its cells the others
    of a row are Dirichlet in what these leave; see `freeze`.

    Where scikit-learn's ``BayesianGaussianMixture`` agrees: with ``"full"`` covariances, its ``covariance_prior`` as
    ``scale`` and the same responsibilities all posteriors are the same (its default scale is the data's covariance
    matrix, here its diagonal). Its ``lower_bound_`` is that after an M-step less what no iteration moves:
    −½ N D log 2π − log Z of the prior, with Z the normalisers of weights, means and precisions. Its other covariances
    are not the posteriors of a model: ``"tied"`` counts N/K degrees of freedom and scatter, ``"spherical"`` as many for
    D columns as for one, and ``"diag"``, whose posteriors do agree, takes E log |Λ| of a full matrix for them. Here
    they are normal–inverse-Wishart and normal–inverse-gamma posteriors, under which the bound never falls.

    Args:
        factor: A family with a conjugate prior, which becomes part of this one.
        prior: None for the factor's own prior, or else a weak one.

    Raises:
        InvalidType: If it is no factor.
        InvalidArgument: If it has no conjugate prior, the prior is another family's, or parts of it are frozen that
            leave a posterior of another form; see `freeze`.

    Source: H. Attias (2000); C. M. Bishop (2006), section 10.2; M. D. Hoffman et al. (2013) for natural coordinates.

    Example:
        >>> import torchem
        >>> m = torchem.GaussianMixture(3, 1)
        >>> m.mixing = Variational(m.mixing, torchem.priors.Dirichlet(0.1))
        >>> m.component = Variational(m.component)
        >>> x = torch.tensor([[-1.1], [-1.0], [-0.9], [4.9], [5.0], [5.1]])
        >>> result = torchem.fit(m, x, seed=0, progress=False)
        >>> result.bound <= m.log_prob(x).sum().item()
        True
    """

    averages = True

    def __init__(self, factor: Factor, prior: Prior | None = None):
        super().__init__()
        if not isinstance(factor, Factor):
            raise wrong_type("factor", "a torchem factor", factor, "pass for example model.component")
        family = conjugate(factor)
        given = prior if prior is not None else factor.prior
        self.factor = factor
        self._known: tuple[list[Any], list[Any], tuple[Stats, Tensor]] | None = None
        self._check_frozen(given)
        self._prior = self._accepted(family.weak_prior() if given is None else given)
        factor.prior = None
        # Whatever its parameters are now, they begin with one observation more than the prior.
        one = copy.deepcopy(factor)
        for _ in factor.replicas:
            one.take_replicas(0)
        start = self._prior.posterior_stats(one).map(lambda leaf: leaf + 1.0)
        for name, value in conjugate(one).strengths(start).items():
            self.new_parameter(name, value.detach().to(factor.device, factor.dtype))
        for size in reversed(factor.replicas):  # in a mixture of models, one for each
            Factor.replicate(self, size)

    def _accepted(self, prior: Prior) -> Prior:
        if not isinstance(prior, Prior):
            raise wrong_type("prior", "a prior of torchem.priors", prior, "pass for example priors.Dirichlet(0.1)")
        value = prior.log_normalizer(self.factor, prior.posterior_stats(self.factor))
        if not bool(value.isfinite().all()):
            raise invalid("prior", "a proper prior", repr(prior), "make its parameters positive (definite)")
        return prior

    @property
    def _family(self) -> Conjugate:
        return conjugate(self.factor)

    # ---- the posterior ----------------------------------------------------------------------------------------

    @property
    def prior(self) -> Prior | None:
        """The prior; assignable. The posterior follows at the next M-step."""
        return self._prior

    @prior.setter
    def prior(self, value: Prior | None) -> None:
        self._prior = self._accepted(self._family.weak_prior() if value is None else value)

    @property
    def _given(self) -> Prior:
        assert self._prior is not None
        return self._prior

    def posterior(self) -> Stats:
        """q in natural coordinates: the prior's and the statistics of the last M-step, float64."""
        return self._family.posterior(self._strengths())

    def _strengths(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._rank}

    def _sureness(self) -> Stats:
        """What of the posterior is not in the wrapped factor's parameters, or all of it."""
        return self._family.sureness(self._strengths())

    def divergence(self) -> Tensor:
        """KL(q ‖ prior) ``[*r]``, in nats, of what is not frozen, against its prior given what is."""
        if self._some_frozen:
            return self._divergence_given(self.posterior())
        return self._given.divergence(self.factor, self._sureness(), *self._start())

    def _start(self) -> tuple[Stats, Tensor]:
        """The prior in natural coordinates and its log-normaliser, kept as long as nothing that they read moves."""
        prior, factor = self._given, self.factor
        read = [factor, prior, *vars(prior).values(), *factor._buffers.values()]
        state = [item._version for item in read if isinstance(item, Tensor)]
        state += [factor.replicas, factor.device, getattr(factor, "version", 0)]
        if self._known is not None:
            was, then, made = self._known
            if state == then and len(read) == len(was) and all(map(operator.is_, read, was)):
                return made
        stats = prior.posterior_stats(factor)
        made = stats, prior.log_normalizer(factor, stats)
        # What a transform makes does not outlive it.
        if not (torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()):
            self._known = read, state, made
        return made

    def _divergence_given(self, posterior: Stats) -> Tensor:
        prior = self._given.posterior_stats(self.factor)
        if self._still:
            return torch.zeros(self.replicas, dtype=torch.float64, device=self.device)
        names = [name for name, leaf in posterior.items() if isinstance(leaf, Tensor)]
        # A prior is common to all replicas.
        start = {name: prior[name].expand_as(posterior[name]) for name in names}

        def norm(values: dict[str, Tensor]) -> Tensor:
            return self._family.log_normalizer_given(posterior.like({**posterior, **values}))

        norm_q, pull, *_ = torch.func.vjp(norm, {name: posterior[name] for name in names})
        slopes = pull(torch.ones_like(norm_q))[0]
        lead = len(self.replicas)
        terms = [(slopes[name] * (posterior[name] - start[name])).flatten(lead).sum(-1) for name in names]
        return torch.stack(terms).sum(0) - norm_q + norm(start)

    def penalized(self, stats: Stats) -> Stats:
        """Statistics alone: `maximize` adds the prior."""
        return stats

    def log_prior(self) -> Tensor:
        """−KL(q ‖ prior): what the bound has in place of a log-density of the parameters."""
        return -self.divergence()

    @property
    def probs(self) -> Tensor:
        """Posterior means of probabilities; assignable."""
        table = hasattr(self.factor, "logits") and not self._still
        means = self._given.means(self.factor, self.posterior()) if table else None
        return getattr(self.factor, "probs") if means is None else means.to(self.dtype)  # noqa: B009

    # ---- the distribution -------------------------------------------------------------------------------------

    def log_prob(self, batch: Batch) -> Tensor:
        """Log of the posterior predictive ``[*r, *n, K]``."""
        if self._still:
            return self.factor.log_prob(batch)
        return self._family.predictive(self.posterior(), batch)

    def log_potential(self, batch: Batch) -> Tensor:
        """Expected log-density under the posterior."""
        return self.kernel().log_potential(batch)

    def log_table(self, batch: Batch) -> Tensor:
        """Log of the posterior predictive: posterior means."""
        if self._still:
            return self.factor.log_table(batch)
        means = self._given.means(self.factor, self.posterior())
        if means is None:
            return self.factor.log_table(batch)
        return means.log().to(self.dtype).unsqueeze(-1 - len(self.factor.shape))  # pyright: ignore[reportArgumentType]

    def table_potential(self, batch: Batch) -> Tensor:
        """Expected log-probabilities under the posterior."""
        if self._still:
            return self.factor.table_potential(batch)
        return self._family.expected_table(self.posterior(), self._given)

    def kernel(self) -> Kernel:
        if self._still:
            return self.factor.kernel()
        return self._family.expected_kernel(self._sureness(), self._given)

    def quadratic(self) -> Quadratic:
        """Expected log-density under the posterior, as a quadratic function of normal latents."""
        return self.factor.quadratic() if self._still else self._family.expected_quadratic(self.posterior())

    def sample(self, z: Tensor, batch: Batch | None = None, generator: torch.Generator | None = None) -> Tensor:
        """One observation from the posterior predictive for each state in ``z [n]``."""
        if self._still:
            return self.factor.sample(z, batch, generator)
        drawn = self._family.draw_predictive(self.posterior(), z, batch, generator)
        return self.factor.sample(z, batch, generator) if drawn is None else drawn

    # ---- EM ---------------------------------------------------------------------------------------------------

    def stats(self, batch: Batch, expected: Tensor) -> Stats:
        if self._still or not self._family.latent:
            return self.factor.stats(batch, expected)
        return self._family.stats_under(self._sureness(), batch, expected)

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        """The posterior prior + S, as means and strengths: the maximiser of the bound over all q."""
        if self._still:
            return outer(self.factor.maximize(stats))
        posterior = self._given.combined(self.factor, self._start()[0], stats, self._sureness)
        values = outer(self._family.settle(posterior))
        return values | {name: v.to(self.dtype) for name, v in self._family.strengths(posterior).items()}

    def expected_log_prob(self, stats: Stats) -> Tensor:
        if self._still:
            return self.factor.expected_log_prob(stats)
        return self._family.expected_inner(self._sureness(), self._given, stats)

    def initialize(self, batch: Batch, expected: Tensor) -> dict[str, Tensor]:
        """The posterior given responsibilities."""
        start = self.factor
        if self._family.latent or (batch.x.is_floating_point() and any_missing(batch.x)):
            # What is missing, or latent, is completed by a first estimate.
            start = self._placed(start.initialize(batch, expected))
        return self.maximize(start.first_stats(batch, expected))

    def _placed(self, values: dict[str, Tensor]) -> Factor:
        """A copy of the wrapped factor with these parameters."""
        start = copy.deepcopy(self.factor)
        for name, value in values.items():
            start.get_parameter(name).data = value
        return start

    def initialize_at(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        """Posterior means at the wrapped factor's start, as sure as an even share of the data makes them."""
        size, k = len(batch), index.shape[-1]
        even = torch.full((*index.shape[:-1], size, k), 1.0 / k, dtype=self.dtype, device=batch.x.device)
        at = self.factor.initialize_at(batch, index)
        values = self.maximize(
            self._placed(at).first_stats(batch, even) if self._family.latent else self.gather(batch, even)
        )
        return values | outer(at)

    # ---- numerics ---------------------------------------------------------------------------------------------

    def prepare(self, moments: Moments) -> None:
        self.factor.prepare(moments)
        self._prior = self._given.completed(self.factor, moments)

    # ---- freezing, bookkeeping --------------------------------------------------------------------------------

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Variational":
        """Keep values, or parts of them, as if they were known: the rest has a posterior given these.

        The bound is then that on log p(x | what is kept); see `Factor.freeze`. Of tables single cells may be kept, of
        normal components means or covariances, of Bernoulli and Poisson ones whole components.

        Raises:
            InvalidArgument: Where the posterior of the rest has no form of the family's own.
        """
        before = dict(self.factor._buffers)
        self.factor.freeze(*names, mask=mask)
        try:
            self._check_frozen(self._prior)
        except InvalidArgument:
            self.factor._buffers.clear()
            self.factor._buffers.update(before)
            raise
        return self

    def unfreeze(self, *names: str) -> "Variational":
        self.factor.unfreeze(*names)
        return self

    def frozen(self, parameter: str) -> Tensor | None:
        return self.factor.frozen(parameter.removeprefix("factor."))

    @property
    def _some_frozen(self) -> bool:
        return any(self.factor.frozen(name) is not None for name in self.factor.views.values())

    @property
    def _still(self) -> bool:
        """Whether all is frozen: a factor as any other."""
        masks = [self.factor.frozen(name) for name in self.factor.views.values()]
        return all(mask is not None and bool(mask.all()) for mask in masks)

    def _check_frozen(self, prior: Prior | None) -> None:
        """Refuse to keep what leaves a posterior of another form."""
        kept = [view for view, name in self.factor.views.items() if self.factor.frozen(name) is not None]
        if not kept or self._still:
            return
        self._family.check_given()
        name = type(self.factor).__name__
        if not set(kept) <= self._family.splits:
            raise invalid(
                "freeze", f"all of {list(self.factor.views)} of a posterior of {name}, or none", kept,
                "freeze the rest as well, or leave that factor out of variational Bayes",
            )  # fmt: skip
        if prior is not None:
            prior.check_given(kept)

    def rewrap(self, pruned: Factor, keep: Tensor) -> "Variational":
        out = Variational(pruned, self._given.selected(self.factor, keep))
        index = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        for name, rank in self._rank.items():
            value = getattr(self, name)
            out.get_parameter(name).data = (value[index] if rank else value).detach().clone()
        return out

    def config(self) -> dict[str, Any]:
        # The prior is written apart, as of every factor.
        return {"factor": self.factor}


def variational(model: LatentModel, **priors: Prior) -> Any:
    """Variational Bayes for all parameters: wrap every factor of a model in `Variational`, in place.

    Args:
        model: One whose factors all have conjugate priors; of factors that are made of others their parts. What learns
            nothing (`factors.Uniform`) stays as it is, and degrees of freedom (`factors.StudentT`) stay points.
        **priors: The prior of a slot by its name; the others keep the factor's own, or take a weak one: for tables
            Dirichlet of total concentration one per row, for normal families one observation at the mean of the data
            and D degrees of freedom with the data's variances as scatter.

    Returns:
        The model.

    Raises:
        InvalidArgument: If there is no such slot, or a factor has no conjugate prior.

    Source: C. M. Bishop (2006), section 10.2.

    Example:
        >>> import torchem
        >>> m = variational(torchem.GaussianMixture(2, 3), mixing=torchem.priors.Dirichlet(0.01))
        >>> m.mixing.prior
        Dirichlet(concentration=0.01)
    """
    if not isinstance(model, LatentModel):
        raise wrong_type("model", "a torchem model", model, "pass for example torchem.GaussianMixture(2, 3)")
    slots = dict(model.slots())
    for name in priors:
        if name not in slots:
            raise invalid("variational", f"slots of the model, {list(slots)}", repr(name), "name one of them")
    for factor in slots.values():
        _check(factor)
    wrapped = {factor: _wrapped(factor, priors.get(slots[0])) for factor, slots in model.factors().items()}
    for slot, factor in slots.items():
        model.set_submodule(slot, wrapped[factor])
    return model


def _parts(factor: Factor) -> dict[str, Factor]:
    """The factors that a factor is made of, by their paths in it; none for a family."""
    return getattr(factor, "parts", dict)() if not isinstance(factor, Wrapper) else {}


def _learns(factor: Factor) -> bool:
    """Whether there is something to have a posterior, of its own or (a stationary law) of what it is made of."""
    return bool(factor.no_conjugate) or next(factor.parameters(), None) is not None


def _check(factor: Factor) -> None:
    """Refuse a factor with a part that has no conjugate prior, before any is wrapped."""
    if isinstance(factor, Variational):
        return
    parts = _parts(factor)
    for part in parts.values():
        _check(part)
    own = next(factor.parameters(recurse=False), None) is not None and not factor.points
    # Parameters besides those of parts have a posterior of their own; where nothing is learnt there is none.
    if own or (not parts and _learns(factor)):
        conjugate(factor)


def _wrapped(factor: Factor, prior: Prior | None) -> Factor:
    """The factor with all of its families in `Variational`."""
    if isinstance(factor, Variational):
        if prior is not None:
            factor.prior = prior
        return factor
    parts = _parts(factor)
    if not parts:
        return Variational(factor, prior) if prior is not None or _learns(factor) else factor
    if prior is not None and len(parts) > 1:
        raise invalid(
            "prior", f"a factor of one family to stand over (of {list(parts)})", type(factor).__name__,
            "set the prior of each part before: part.prior = …",
        )  # fmt: skip
    for path, part in parts.items():
        factor.set_submodule(path, _wrapped(part, prior))
    return factor
