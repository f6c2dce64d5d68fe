"""Latent-variable models made of two networks: a decoder of continuous latents, and an encoder that infers them."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchem.batch import Batch, values_known
from torchem.errors import invalid, one_of, whole_number, wrong_type
from torchem.factor import Factor
from torchem.model import EStep, LatentModel, weighted
from torchem.ops.dispatch import declared_precision
from torchem.stats import Stats

Likelihood = Literal["gaussian", "bernoulli"]
Noise = Literal["diag", "spherical"]
Update = Literal["alternate", "joint"]

#: Smallest variance of the noise: a decoder that knows the data by heart would take it to zero.
_LEAST = 1e-6
#: Times that an update whose bound falls is tried again at half the learning rate.
_HALVINGS = 12
#: Draws of `AmortizedModel.log_prob`.
_DRAWS = 256


class AmortizedModel(LatentModel):
    """p(x) = ∫ N(z | 0, I) p(x | f(z)) dz with f a decoder network; an encoder network gives q(z | x).

    The encoder maps x to mean m and log-variance of q(z | x) = N(m, diag s²): inference amortised over all
    observations. Both climb the evidence lower bound

        Σ_n E_ε[log p(x_n | f(m_n + s_n ε))] − KL(q(z | x_n) ‖ N(0, I)),  ε ~ N(0, I),

    by gradients through the draws (reparameterisation): a variational autoencoder, trained as EM. The E-step improves
    the encoder, the M-step the decoder, each by ``steps`` passes of an optimiser, one step per batch (so ``batch_size``
    makes them stochastic), with draws from the fit's own generator.

    Under `torchem.Stochastic` each batch is followed by ``steps`` steps of the optimisers on that batch alone: those of
    the encoder, then those of the decoder, or of both at once. It is the usual training of a variational autoencoder,
    without a guard. Rates are the optimisers' own; the rule's step sizes are for statistics, of which there are none.
    Under `torchem.Incremental` nothing can be kept of a batch, whose posteriors move with the encoder of all: its fit
    is full-batch EM, whose optimisers step after every batch as well, and whose bound never falls.

    A fit with ``init=None`` goes on with the optimisers as the fit before left them, at the learning rate given here.

    The bound that a fit reports, and `elbo`, are taken at draws of their own, always the same: so iterations, restarts
    and models can be compared. An iteration after which it would have fallen is undone and made again at half the
    learning rate. Means over draws are antithetic, and match the moments of ε exactly where there are twice as many
    draws as latents: the bound of a linear model is then without noise.

    Args:
        decoder: Module from latents ``[n, L]`` to means, or logits, of x ``[n, D]``.
        encoder: Module from x ``[n, D]`` to a pair (mean, log-variance) of ``[n, L]`` each, or to both ``[n, 2 L]``.
        n_latents: L.
        likelihood: ``"gaussian"`` with a learned variance, or ``"bernoulli"`` for x in [0, 1].
        noise: Variance of the Gaussian: one for each column (``"diag"``) or for all (``"spherical"``).
        update: ``"alternate"``: E-step, then M-step; ``"joint"``: both networks at once.
        steps: Passes of the optimiser in each step.
        samples: S, draws of z per observation, even.
        learning_rate: What the optimiser is given as ``lr``.
        optimizer: Makes an optimiser of parameters and ``lr``: any of ``torch.optim``. It is not saved with the model.

    Raises:
        InvalidArgument: If the networks disagree about their sizes, or for an option out of range.

    Source: D. P. Kingma, M. Welling (2014); D. J. Rezende, S. Mohamed, D. Wierstra (2014).

    Example:
        >>> m = AmortizedModel(torch.nn.Linear(2, 5), torch.nn.Linear(5, 4), 2)
        >>> m.posterior(torch.zeros(3, 5)).mean.shape
        torch.Size([3, 2])
    """

    decoder: nn.Module
    encoder: nn.Module
    log_variance: Tensor | None

    accelerates: ClassVar[bool] = False

    def __init__(
        self,
        decoder: nn.Module,
        encoder: nn.Module,
        n_latents: int,
        likelihood: Likelihood = "gaussian",
        noise: Noise = "diag",
        *,
        update: Update = "alternate",
        steps: int = 10,
        samples: int = 8,
        learning_rate: float = 1e-2,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    ):
        super().__init__()
        for name, module in (("decoder", decoder), ("encoder", encoder)):
            if not isinstance(module, nn.Module):
                raise wrong_type(name, "a torch module", module, "pass for example torch.nn.Linear(2, 5)")
        for name, size, least in (("n_latents", n_latents, 1), ("steps", steps, 1), ("samples", samples, 2)):
            whole_number(name, size, least)
        if samples % 2:
            raise invalid("samples", "an even number, for draws come in pairs", samples, f"take {samples + 1}")
        if not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < math.inf:
            raise invalid("learning_rate", "a positive finite number", repr(learning_rate), "for Adam take 1e-2")
        one_of("likelihood", likelihood, ("gaussian", "bernoulli"))
        one_of("noise", noise, ("diag", "spherical"))
        one_of("update", update, ("alternate", "joint"))
        self.decoder, self.encoder, self.n_latents = decoder, encoder, n_latents
        self.likelihood: Likelihood = likelihood
        self.noise: Noise = noise
        self.update: Update = update
        self.steps, self.samples, self.learning_rate = steps, samples, float(learning_rate)
        self.optimizer = optimizer
        self.n_features = self._tried()
        like = next(self.parameters(), torch.empty(0))
        size = self.n_features if noise == "diag" else 1
        self.log_variance = nn.Parameter(like.new_zeros(size)) if likelihood == "gaussian" else None
        # The state of a fit, which no copy inherits.
        self._seed, self._draws, self._restart = 0, 0, 0
        self._rate = self.learning_rate
        self._optimizers: list[torch.optim.Optimizer] | None = None
        # What optimisers knew where a fit ended, and whether batches of this pass were learnt as they came.
        self._paused: list[tuple[type, dict[str, Any]]] | None = None
        self._online = False

    def _tried(self) -> int:
        """D, from one pass through both networks."""
        like = next(self.parameters(), torch.empty(0))
        with torch.no_grad(), self._evaluating():
            try:
                x = self.decoder(like.new_zeros(1, self.n_latents))
            except RuntimeError as error:
                raise invalid(
                    "decoder", f"a module that reads [n, {self.n_latents}]", error, "fit its sizes"
                ) from error
            if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != 1:
                got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise invalid("decoder", "a module that gives [n, D]", got, "flatten what it gives")
            try:
                self._encode(torch.zeros_like(x))
            except RuntimeError as error:
                raise invalid("encoder", f"a module that reads [n, {x.shape[-1]}]", error, "fit its sizes") from error
        return x.shape[-1]

    # ---- the contract of models, without factors --------------------------------------------------------------

    def slots(self) -> tuple[tuple[str, Factor], ...]:
        return ()

    @property
    def handles_missing(self) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def replicas(self) -> tuple[int, ...]:
        return ()

    @property
    def replicates(self) -> bool:
        return False

    def row_size(self) -> int:
        return 4 * self.samples * (self.n_features + self.n_latents)

    def cast(self, batch: Batch) -> Batch:
        return batch.with_x(batch.x.to(self.dtype))

    def check(self, batch: Batch) -> Batch:
        if batch.x.shape[-1] != self.n_features:
            raise invalid("data", f"{self.n_features} features", batch.x.shape[-1], "select the decoder's columns")
        for name, value in (("inputs", batch.u), ("labels", batch.evidence)):
            if value is not None:
                raise invalid(
                    name, "none: the latents are continuous and the networks read x alone", "some", "drop them"
                )
        if self.likelihood == "bernoulli" and values_known() and batch.x.numel():
            low, high = float(batch.x.detach().amin()), float(batch.x.detach().amax())
            if low < 0 or high > 1:
                raise invalid("data", "numbers from 0 to 1", f"values from {low:g} to {high:g}", "rescale them")
        return batch

    def n_parameters(self) -> int:
        """Number of parameters of the decoder and the noise: the encoder is inference, not model."""
        noise = 0 if self.log_variance is None else self.log_variance.numel()
        return noise + sum(value.numel() for value in self.decoder.parameters())

    def snapshot(self) -> dict[str, Tensor]:
        # Optimisers write in place, and networks may have running means.
        return {name: value.detach().clone() for name, value in self.state_dict().items()}

    def assign(self, values: dict[str, Tensor]) -> None:
        self.load_state_dict(values, strict=False)

    def load_from(self, other: LatentModel) -> None:
        self.load_state_dict(other.state_dict())
        if isinstance(other, AmortizedModel):
            self._optimizers, self._paused = None, copy.deepcopy(other._memory())

    def config(self) -> dict[str, Any]:
        names = (
            "decoder", "encoder", "n_latents", "likelihood", "noise", "update", "steps", "samples", "learning_rate",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def __getstate__(self) -> dict[str, Any]:
        # Optimisers belong to the very parameters that they move; a copy makes its own, which know the same.
        return {**self.__dict__, "_optimizers": None, "_paused": self._memory()}

    def _memory(self) -> list[tuple[type, dict[str, Any]]] | None:
        """What the optimisers have learnt of their parameters (the moments of Adam), if there are any."""
        if self._optimizers is None:
            return self._paused
        return [(type(optimizer), optimizer.state_dict()) for optimizer in self._optimizers]

    def _resume(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Let new optimisers go on from where those before were, if they are of the same kind and parameters."""
        known, self._paused = self._paused, None
        for optimizer, (kind, state) in zip(optimizers, known or [], strict=False):
            both = optimizer.state_dict(), state
            mine, theirs = ([len(group["params"]) for group in one["param_groups"]] for one in both)
            if type(optimizer) is kind and mine == theirs:
                optimizer.load_state_dict(state)
                for group in optimizer.param_groups:
                    group["lr"] = self._rate

    # ---- the distribution -------------------------------------------------------------------------------------

    @property
    def noise_variance(self) -> Float[Tensor, "d"]:
        """Variance of the Gaussian noise of each column, ``[D]``; assignable."""
        if self.log_variance is None:
            raise invalid("noise_variance", "a Gaussian likelihood", repr(self.likelihood), "a Bernoulli has none")
        return self._log_variance().exp().expand(self.n_features)

    @noise_variance.setter
    def noise_variance(self, value: Any) -> None:
        variance = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        if self.log_variance is None or not bool(((variance > 0) & variance.isfinite()).all()):
            raise invalid("noise_variance", "positive finite numbers of a Gaussian likelihood", value, "correct it")
        with torch.no_grad():
            self.log_variance.copy_(variance.log())

    def _log_variance(self) -> Tensor:
        assert self.log_variance is not None
        return self.log_variance.clamp(min=math.log(_LEAST))

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``[n, L]`` of q(z | x)."""
        out = self.encoder(x)
        parts = tuple(out.chunk(2, -1)) if isinstance(out, Tensor) else tuple(out)
        shape = (len(x), self.n_latents)
        if len(parts) != 2 or any(tuple(part.shape) != shape for part in parts):
            got = [list(part.shape) for part in parts]
            expected = f"mean and log-variance, of shape {list(shape)} each"
            raise invalid("encoder", expected, got, f"let it give [n, {2 * self.n_latents}]")
        return parts[0], parts[1]

    def _log_given(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) of rows ``[n, D]`` under each of their latents ``[S, n, L]``: ``[S, n]``."""
        out = self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        if self.log_variance is None:
            return (x * out - nn.functional.softplus(out)).sum(-1)
        log_variance = self._log_variance()
        square = (x - out).square() * (-log_variance).exp()
        return -0.5 * (square + log_variance + math.log(2 * math.pi)).sum(-1)

    def _bound(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The evidence lower bound of each row ``[n]`` at draws ``[S, 1 or n, L]``, and the entropy of q."""
        mean, log_variance = self._encode(x)
        z = mean + (0.5 * log_variance).exp() * noise
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1)
        entropy = 0.5 * (log_variance + 1 + math.log(2 * math.pi)).sum(-1)
        return self._log_given(x, z).mean(0) - divergence, entropy

    def _noise(self, rows: int, seed: int) -> Tensor:
        """Draws ``[S, rows, L]`` in antithetic pairs; of unit covariance exactly where there are enough."""
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(self.samples // 2, rows, self.n_latents, generator=generator, dtype=torch.float64)
        if self.samples >= 2 * self.n_latents:
            each = half.movedim(0, -2)  # [rows, S / 2, L]
            factor = torch.linalg.cholesky(each.mT @ each / each.shape[-2])
            half = torch.linalg.solve_triangular(factor, each.mT, upper=False).movedim(-1, 0)
        return torch.cat([half, -half]).to(self.device, self.dtype)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Networks without dropout and the like; their modes are left as found."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode

    # ---- EM ---------------------------------------------------------------------------------------------------

    def e_step(self, batch: Batch, kind: EStep = "soft") -> Stats:
        """The bound and the entropy of q at the current networks; neither is moved.

        Raises:
            InvalidArgument: For a hard E-step: a single value of continuous latents has no probability.
        """
        if kind != "soft":
            raise invalid("e_step", "'soft', for the latents are continuous", repr(kind), "use a discrete model")
        with declared_precision(self.device), self._evaluating():
            noise = self._noise(1, 0)
            total: Stats | None = None
            for piece in self.stream(batch):
                bound, entropy = self._bound(piece.x, noise)
                stats = Stats(entropy=weighted(entropy, piece), log_likelihood=weighted(bound, piece))
                total = stats if total is None else total + stats
        assert total is not None
        total["count"] = self.count(batch).to(total["entropy"])
        return total

    def expected_log_prob(self, stats: Stats) -> Tensor:
        """E_q log p(x, z), of the parameters that the statistics were taken at: it is no function of statistics."""
        return stats["log_likelihood"] - stats["entropy"]

    def maximize(self, stats: Stats) -> dict[str, Tensor]:
        raise invalid(
            "AmortizedModel", "a fit: its M-step passes over the data again", "an M-step from statistics alone",
            "call torchem.fit or torchem.partial_fit",
        )  # fmt: skip

    def learn(self, stats: Stats, batch: Batch | None) -> None:
        self._online = True
        if batch is not None:
            self._climb(lambda: [batch])

    def improve(self, stats: Stats, batches: Callable[[], Iterable[Batch]]) -> None:
        if self._online:  # the pass has been learnt, batch by batch
            self._online = False
            return
        start, before = stats["log_likelihood"], self.snapshot()
        for _ in range(_HALVINGS):
            self._climb(batches)
            value = torch.stack([self.e_step(batch)["log_likelihood"] for batch in batches()]).sum()
            if bool(value >= start):
                return
            self.assign(before)
            self._optimizers, self._rate = None, self._rate / 2

    def _climb(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """The E-step's and the M-step's passes of the optimisers, or those of both together."""
        decoder = [*self.decoder.parameters(), *([] if self.log_variance is None else [self.log_variance])]
        groups = [list(self.encoder.parameters()), decoder]
        if self.update == "joint":
            groups = [groups[0] + groups[1]]
        groups = [[value for value in group if value.requires_grad] for group in groups]
        groups = [group for group in groups if group]
        if not groups:
            return
        kept = self._optimizers
        if kept is None or (self.update == "alternate" and isinstance(kept[0], torch.optim.LBFGS)):
            # Curvature that was gathered before the other network moved is of another objective.
            first = kept is None
            kept = self._optimizers = [self.optimizer(group, lr=self._rate) for group in groups]
            if first and not (self.update == "alternate" and isinstance(kept[0], torch.optim.LBFGS)):
                self._resume(kept)
        with torch.enable_grad(), declared_precision(self.device):
            for group, optimizer in zip(groups, kept, strict=True):
                for _ in range(self.steps):
                    for batch in batches():
                        self._step(group, optimizer, batch)

    def _step(self, group: list[nn.Parameter], optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        """One step of an optimiser on a batch, at draws of its own that every evaluation within it shares."""
        total = self.count(batch)
        if not bool(total > 0):
            return
        self._draws += 1
        seed = (self._seed + 1_000_003 * self._draws) % (1 << 62)

        def loss() -> float:
            value = 0.0
            slopes = [torch.zeros_like(p) for p in group]
            for number, piece in enumerate(self.stream(batch)):
                bound, _ = self._bound(piece.x, self._noise(len(piece), seed + number))
                part = -weighted(bound, piece) / total.to(self.device)
                value += float(part.detach())
                found = torch.autograd.grad(part, group, allow_unused=True)
                slopes = [a if b is None else a + b for a, b in zip(slopes, found, strict=True)]
            for parameter, slope in zip(group, slopes, strict=True):
                parameter.grad = slope
            return value

        optimizer.step(loss)
        for parameter in group:
            parameter.grad = None

    # ---- starts -----------------------------------------------------------------------------------------------

    def begin(self, generators: Sequence[torch.Generator], first: int) -> None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1:
            raise invalid(
                "model", "models of factors, for a fit by several processes", "an AmortizedModel",
                "fit it in one: its optimisers do not share their gradients",
            )  # fmt: skip
        self._seed = int(torch.randint(1 << 60, (), generator=generators[0]))
        self._draws, self._restart, self._online = 0, first, False
        self._rate, self._optimizers = self.learning_rate, None

    def initialize(self, batch: Batch, expected: Tensor) -> None:
        """The first start takes the networks as they are; others draw the layers' parameters anew.

        The noise begins with the variance of the data, and the optimisers with nothing.
        """
        self._paused = None
        if self._restart:
            devices = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(self._seed)
                for module in (*self.decoder.modules(), *self.encoder.modules()):
                    reset = getattr(module, "reset_parameters", None)
                    if callable(reset):
                        reset()
        if self.log_variance is not None:
            x = batch.x.to(torch.float64)
            weight = torch.ones_like(x[:, 0]) if batch.weight is None else batch.weight.to(x)
            mean = weight @ x / weight.sum()
            variance = (weight @ (x - mean).square() / weight.sum()).clamp(min=_LEAST)
            variance = variance if self.noise == "diag" else variance.mean(0, keepdim=True)
            self.log_variance.data = variance.log().to(self.log_variance)

    def initialize_at(self, batch: Batch, index: Tensor) -> None:
        self.initialize(batch, index)

    # ---- use --------------------------------------------------------------------------------------------------

    def _rows(self, data: Any, function: Callable[[Tensor], Any]) -> list[Any]:
        batch = self.check(data) if isinstance(data, Batch) else self.batch(data)
        with declared_precision(self.device), self._evaluating():
            return [function(piece.x) for piece in self.stream(batch)]

    def elbo(self, data: Any) -> Float[Tensor, "n"]:
        """The evidence lower bound of each row, ``[N]``, at the draws that a fit's objective is taken at."""
        noise = self._noise(1, 0)
        return torch.cat(self._rows(data, lambda x: self._bound(x, noise)[0]))

    def log_prob(self, data: Any, draws: int = _DRAWS) -> Float[Tensor, "n"]:
        """log p(x) of each row, ``[N]``, estimated by importance sampling from q; at the same draws in each call.

        log (1/S) Σ_s p(x, z_s) / q(z_s | x): below log p(x) on average, and exact in the limit of many draws, or where
        q is the posterior.

        Args:
            data: Rows.
            draws: S.

        Source: Y. Burda, R. Grosse, R. Salakhutdinov (2016), equation 8.
        """
        whole_number("draws", draws, 1, f"the default is {_DRAWS}")
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(draws, 1, self.n_latents, generator=generator, dtype=torch.float64)
        noise = noise.to(self.device, self.dtype)

        def estimate(x: Tensor) -> Tensor:
            mean, log_variance = self._encode(x)
            z = mean + (0.5 * log_variance).exp() * noise
            ratio = 0.5 * (noise.square() + log_variance - z.square()).sum(-1)
            return (self._log_given(x, z) + ratio).logsumexp(0) - math.log(draws)

        return torch.cat(self._rows(data, estimate))

    def posterior(self, data: Any) -> torch.distributions.MultivariateNormal:
        """q(z | x) of each row: ``.mean [N, L]`` and ``.covariance_matrix [N, L, L]``, diagonal."""
        parts = self._rows(data, self._encode)
        mean, log_variance = (torch.cat(part) for part in zip(*parts, strict=True))
        scale = torch.diag_embed((0.5 * log_variance).exp())
        return torch.distributions.MultivariateNormal(mean, scale_tril=scale, validate_args=False)

    def most_likely(self, data: Any) -> Float[Tensor, "n l"]:
        """The mode of q(z | x), its mean, ``[N, L]``."""
        return torch.cat(self._rows(data, lambda x: self._encode(x)[0]))

    @torch.no_grad()
    def sample(self, n: int, *, latents: bool = False, generator: torch.Generator | None = None) -> Any:
        """Draw ``n`` observations ``[n, D]``, and their latents ``[n, L]`` when ``latents`` is True."""
        whole_number("n", n, 0, "give the number of draws")
        z = torch.randn(n, self.n_latents, generator=generator, dtype=self.dtype, device=self.device)
        with self._evaluating():
            out = self.decoder(z)
        if self.log_variance is None:
            x = torch.bernoulli(out.sigmoid(), generator=generator)
        else:
            spread = torch.randn(out.shape, generator=generator, dtype=self.dtype, device=self.device)
            x = out + self.noise_variance.sqrt() * spread
        return (x, z) if latents else x
