"""Eight tests that two abilities explain: writes torchem/datasets/abilities.csv.

    python examples/abilities.py --write    # the table
    python examples/abilities.py            # factor analyses with one to four factors

The pupils are made up: 300 of them, with scores in reading, vocabulary, grammar, writing, algebra, geometry, sums and
puzzles. The first four need a way with words, the next three one with numbers, puzzles a little of both; one entry in
twenty is missing.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import torchem
from torchem.tables import read_table

CSV = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "abilities.csv"
TESTS = ["reading", "vocabulary", "grammar", "writing", "algebra", "geometry", "sums", "puzzles"]


def truth() -> torchem.FactorAnalysis:
    """Words and numbers."""
    model = torchem.FactorAnalysis(8, 2).double()
    model.mean = [52.0, 48.0, 50.0, 55.0, 47.0, 51.0, 60.0, 40.0]
    model.loadings = [
        [9.0, 1.0], [8.0, 0.0], [7.0, 1.0], [6.0, 1.0], [1.0, 9.0], [0.0, 7.0], [2.0, 6.0], [4.0, 4.0]
    ]  # fmt: skip
    model.noise_variance = [16.0, 25.0, 36.0, 49.0, 16.0, 36.0, 49.0, 64.0]
    return model


def generate() -> Tensor:
    """Scores ``[300, 8]``, some of them missing."""
    generator = torch.Generator().manual_seed(0)
    x = truth().sample(300, generator=generator)
    return x.masked_fill(torch.rand(300, 8, generator=generator) < 0.05, torch.nan)


def read() -> Tensor:
    """The table as it is shipped."""
    return torch.from_numpy(read_table(CSV, TESTS).values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    if parser.parse_args().write:
        rows = [",".join("" if v != v else f"{v:.1f}" for v in row) for row in generate().tolist()]
        CSV.write_text("\n".join([",".join(TESTS), *rows]) + "\n")
        return
    x = read()
    for q in (1, 2, 3, 4):
        model = torchem.FactorAnalysis(8, q).double()
        torchem.fit(model, x, tol=1e-7, max_iter=5000, accelerate="squarem", seed=0, progress=False)
        print(q, "factors: BIC", round(torchem.criteria(model, x).bic, 1))


if __name__ == "__main__":
    main()
