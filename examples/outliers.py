"""Three clusters among outliers: writes torchem/datasets/outliers.csv.

    python examples/outliers.py

The points are made up: three Gaussian clusters in the plane of 100, 80 and 60 points, and 40 points anywhere in a box
about them. The third column, which models do not read, says which is which: 0, 1, 2, and 3 for outliers.
"""

from pathlib import Path

import torch
from torch import Tensor

CSV = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "outliers.csv"


def generate() -> tuple[Tensor, Tensor]:
    """Points ``[280, 2]`` and their origins."""
    generator = torch.Generator().manual_seed(3)
    means = torch.tensor([[0.0, 0.0], [6.0, 1.0], [2.0, 6.0]], dtype=torch.float64)
    roots = torch.tensor([[[1.0, 0.0], [0.4, 0.6]], [[0.6, 0.0], [-0.3, 0.9]], [[1.2, 0.0], [0.0, 0.4]]]).double()
    z = torch.arange(4).repeat_interleave(torch.tensor([100, 80, 60, 40]))
    noise = torch.randn(280, 2, 1, generator=generator, dtype=torch.float64)
    own = z.clamp(max=2)
    x = means[own] + (roots[own] @ noise)[..., 0]
    anywhere = 30 * torch.rand(280, 2, generator=generator, dtype=torch.float64) - 12
    return torch.where((z == 3).unsqueeze(-1), anywhere, x), z


def main() -> None:
    x, z = generate()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = [f"{a:.4f},{b:.4f},{kind}" for (a, b), kind in zip(x[order].tolist(), z[order].tolist(), strict=True)]
    CSV.write_text("\n".join(["x,y,origin", *rows]) + "\n")


if __name__ == "__main__":
    main()
