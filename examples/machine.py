"""The power that a machine draws, minute by minute: writes torchem/datasets/machine.csv.

    python examples/machine.py --write    # the table
    python examples/machine.py            # fits a hidden semi-Markov model and a hidden Markov model to it

The machine is made up. It idles for anything from a minute to an hour, heats for about twelve minutes, runs for about
twenty, and idles again; one time in four it runs without heating. Power is measured in watts and noisy, the same
to within its noise while heating and at the peaks of a run: durations tell what power leaves open.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import torchem
from torchem.tables import read_table

CSV = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "machine.csv"
MINUTES, LONGEST = 900, 60


def truth() -> torchem.GaussianHSMM:
    """Idle, heating, running."""
    model = torchem.GaussianHSMM(3, 1, LONGEST, "negative_binomial").double()
    model.means, model.covariances = [[5.0], [90.0], [55.0]], [[12.0**2], [40.0**2], [40.0**2]]
    model.duration.means, model.duration.dispersions = [18.0, 11.0, 19.0], [0.9, 0.01, 0.02]
    model.initial_probs = [1.0, 0.0, 0.0]
    model.transition_matrix = [[0.0, 0.75, 0.25], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    return model


def generate() -> tuple[Tensor, Tensor]:
    """Watts ``[T, 1]`` and states ``[T]``."""
    x, z = truth().sample(1, MINUTES, latents=True, generator=torch.Generator().manual_seed(4))
    return x[0], z[0]


def read() -> tuple[Tensor, Tensor]:
    """The table as it is shipped."""
    table = torch.from_numpy(read_table(CSV, ["power", "state"]).values)
    return table[:, :1], table[:, 1].long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    if parser.parse_args().write:
        x, z = generate()
        rows = [f"{t},{watts:.1f},{state}" for t, (watts, state) in enumerate(zip(x[:, 0], z.tolist(), strict=True))]
        CSV.write_text("\n".join(["minute,power,state", *rows]) + "\n")
        return
    x, z = read()
    for name, model in (
        ("semi-Markov", torchem.GaussianHSMM(3, 1, LONGEST, "negative_binomial").double()),
        ("Markov", torchem.GaussianHMM(3, 1).double()),
    ):
        result = torchem.fit(model, x, restarts=10, max_iter=500, tol=1e-6, seed=0, progress=False)
        # The states by their means, as those of the truth: idle, running, heating.
        order = model.means[:, 0].argsort()
        names = torch.empty(3, dtype=torch.long)
        names[order] = torch.tensor([0, 2, 1])
        right = float((names[model.most_likely(x)[0]] == z).double().mean())
        print(f"{name}: {result.bound:.1f} nats, {100 * right:.1f} % of the minutes right")
        if isinstance(model, torchem.GaussianHSMM):
            print("mean durations:", model.mean_durations[order][[0, 2, 1]].tolist())


if __name__ == "__main__":
    main()
