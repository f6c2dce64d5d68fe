"""What factors around a family of independent columns have in common: its views are read and assigned through them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchem.batch import Batch
from torchem.errors import invalid, wrong_type
from torchem.factor import Factor
from torchem.factors._composite import Composite
from torchem.ops.gaussian import Entrywise


def columnwise(factor: Factor) -> bool:
    """Whether columns are independent given the state."""
    family = factor.unwrapped
    normal = isinstance(getattr(family, "structure", None), Entrywise)
    return family.independent or normal or family.n_features == 1


class Around(Composite):
    """A factor around another, ``factor``, each column of which stands for itself.

    That each column stands for itself lets the other's own methods tell of single entries: rows that are NaN but for
    one column.

    Args:
        factor: An observed child with independent columns that handles missing entries.

    Raises:
        InvalidArgument: For another one.
    """

    independent = True
    #: Views of its own and the part and view that each stands for.
    own: ClassVar[Mapping[str, tuple[str, str]]] = {}

    factor: Factor

    def __init__(self, factor: Factor):
        super().__init__()
        if not isinstance(factor, Factor):
            raise wrong_type("factor", "a torchem factor", factor, "pass for example factors.Poisson(K, D)")
        if factor.n_components is None or factor.n_features is None or not factor.handles_missing:
            raise invalid(
                "factor", "an observed child of so many columns that handles missing entries", type(factor).__name__,
                "pass for example factors.Poisson(K, D)",
            )  # fmt: skip
        if not columnwise(factor):
            raise invalid(
                "factor", "columns that are independent given the state", type(factor.unwrapped).__name__,
                "use a family of independent columns (a Gaussian of covariance_type 'diag'), or one column",
            )  # fmt: skip
        self.factor = factor
        self._k, self._d = factor.n_components, factor.n_features

    def parts(self) -> dict[str, Factor]:
        return {"factor": self.factor}

    @property
    def n_components(self) -> int:
        return self._k

    @property
    def n_features(self) -> int:
        return self._d

    @property
    def handles_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True."""
        return True

    @property
    def discrete(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the factor inside is of counts."""
        return self.factor.unwrapped.discrete

    def outcomes(self) -> list[Tensor | None]:
        return self.factor.outcomes()

    # ---- views ------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("_modules", {}).get("factor")
        return getattr(inner, name) if inner is not None and name in inner.views else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get("factor")
        if inner is not None and name in inner.views:
            setattr(inner, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def views(self) -> Any:
        """Its own views and those of the factor inside, with their parameters' names here."""
        parts = self.parts()
        own = {view: f"{path}.{parts[path].views[name]}" for view, (path, name) in self.own.items()}
        return own | {view: f"factor.{name}" for view, name in self.factor.views.items()}

    def _path(self, name: str) -> str:
        """A view by the path of the part that it stands for."""
        if name in self.own:
            return ".".join(self.own[name])
        return f"factor.{name}" if name in self.factor.views else name

    def freeze(self, *names: str, mask: Tensor | None = None) -> "Around":
        """Keep views, its own and those of the factor inside, through every M-step; see `Factor.freeze`."""
        super().freeze(*map(self._path, names), mask=mask)
        return self

    def unfreeze(self, *names: str) -> "Around":
        """Let the M-step move these views (all of them when empty) again."""
        super().unfreeze(*map(self._path, names))
        return self

    def paths(self) -> list[str]:
        # Those of a factor inside that is around another itself.
        return [*super().paths(), *(f"factor.{view}" for view in self.factor.views)]

    # ---- single entries ---------------------------------------------------------------------------------------

    def alone(self, values: Tensor) -> Batch:
        """Rows of which one column is known: row d has ``values[d]`` in column d."""
        eye = torch.eye(self._d, dtype=torch.bool, device=self.device)
        return Batch(torch.where(eye, values.to(self.device, torch.float64).unsqueeze(-1), torch.nan).to(self.dtype))

    def entries(self, batch: Batch) -> Tensor:
        """x in the type of the parameters, NaN where an entry is missing."""
        x = batch.x.to(self.dtype)
        return x if batch.observed is None else torch.where(batch.observed, x, torch.nan)

    def row_size(self) -> int:
        return self.factor.row_size() + 8 * self._d


def marked(mask: Tensor, logs: Tensor) -> Tensor:
    """Σ_d of ``logs [*r, K, D]`` over the entries of each row that are marked, ``[*r, *n, K]``; −∞ is no NaN.

    Example:
        >>> marked(torch.tensor([[True, False]]), torch.tensor([[0.5, -torch.inf], [-torch.inf, 0.0]]))
        tensor([[0.5000,   -inf]])
    """
    axes, flat = mask.shape[:-1], mask.reshape(-1, mask.shape[-1]).to(logs)
    value = flat @ torch.where(logs > -torch.inf, logs, 0.0).mT
    broken = flat @ (logs == -torch.inf).to(logs).mT
    return torch.where(broken > 0.5, -torch.inf, value).unflatten(-2, axes)


def mass(mask: Tensor, expected: Tensor) -> Tensor:
    """Σ_n of expectations ``[*r, *n, K]`` over marked entries ``[*n, D]``, ``[*r, K, D]`` in float64."""
    flat = mask.reshape(-1, mask.shape[-1]).to(torch.float64)
    lead = expected.dim() - mask.dim()
    return expected.reshape(*expected.shape[:lead], -1, expected.shape[-1]).to(torch.float64).mT @ flat
