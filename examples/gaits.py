"""Makes torchem/datasets/gaits.csv: how three kinds of walkers move, to be told apart by their dynamics alone.

Each of 45 walkers is resting (speeds about 0) or moving (about 2) at each of 25 to 60 moments. Some switch rarely, some
often, and some rest, start and stop at once again: all of them are in each state about equally long.

    python examples/gaits.py
"""

import csv
from pathlib import Path

import torch

import torchem

#: Probabilities to go on resting, and to go on moving.
KINDS = ((0.95, 0.95), (0.6, 0.6), (0.15, 0.15))


def chain(rest: float, move: float) -> torchem.GaussianHMM:
    """The chain of one kind of walker."""
    model = torchem.GaussianHMM(2, 1).double()
    model.means, model.covariances = [[0.0], [2.0]], [[0.3], [0.3]]
    model.transition_matrix = [[rest, 1 - rest], [1 - move, move]]
    return model


def main() -> None:
    generator = torch.Generator().manual_seed(4)
    kinds = torch.randperm(45, generator=generator) % 3
    lengths = torch.randint(25, 61, (45,), generator=generator)
    path = Path(__file__).parent.parent / "torchem" / "datasets" / "gaits.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["walker", "time", "speed", "kind"])
        for walker, (kind, length) in enumerate(zip(kinds.tolist(), lengths.tolist(), strict=True)):
            x = chain(*KINDS[kind]).sample(1, length, generator=generator)[0, :, 0]
            for time, speed in enumerate(x.tolist()):
                writer.writerow([walker, time, f"{speed:.3f}", kind])


if __name__ == "__main__":
    main()
