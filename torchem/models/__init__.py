"""Models: one file each, inference only."""

from torchem.models.mixture import GaussianMixture, Mixture

__all__ = ["GaussianMixture", "Mixture"]
