"""Latent classes of answers: writes torchem/datasets/answers.csv, and prints what a latent class analysis reports.

    python examples/answers.py            # the report
    python examples/answers.py --write    # the data again

The answers are made up: 600 inhabitants of a town say how they travel. They are of three kinds, which the table does
not tell, and one answer in twenty is missing.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import torchem
from torchem.factors import Categorical, Categoricals

QUESTIONS = {
    "car": ["no", "yes"],
    "bicycle": ["never", "sometimes", "daily"],
    "train": ["never", "sometimes", "daily"],
    "distance": ["below 2 km", "2 to 10 km", "10 to 30 km", "further"],
    "ticket": ["no", "yes"],
}
CSV = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "answers.csv"


def truth() -> torchem.Mixture:
    """Those who ride a bicycle, who take the train, and who drive."""
    model = torchem.Mixture(Categorical(3), Categoricals(3, [len(answers) for answers in QUESTIONS.values()])).double()
    model.weights = [0.4, 0.25, 0.35]
    model.component.tables = [
        [[0.7, 0.3], [0.6, 0.4], [0.05, 0.95]],
        [[0.05, 0.25, 0.7], [0.3, 0.5, 0.2], [0.6, 0.35, 0.05]],
        [[0.5, 0.45, 0.05], [0.02, 0.13, 0.85], [0.75, 0.24, 0.01]],
        [[0.5, 0.45, 0.04, 0.01], [0.05, 0.15, 0.45, 0.35], [0.1, 0.3, 0.4, 0.2]],
        [[0.85, 0.15], [0.05, 0.95], [0.97, 0.03]],
    ]
    return model


def generate(n: int = 600) -> Tensor:
    """Answers as codes from 0, NaN where one is missing."""
    generator = torch.Generator().manual_seed(7)
    x = truth().sample(n, generator=generator).double()
    return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.05, torch.nan)


def report(model: torchem.Mixture, x: Tensor) -> str:
    """Answers of each class, shares of classes, and how well they fit."""
    lines = ["answers by class"]
    for (question, answers), table in zip(QUESTIONS.items(), model.component.tables, strict=True):
        lines.append(f"{question:>12} " + "".join(f"{answer:>13}" for answer in answers))
        lines += [f"     class {k} " + "".join(f"{p:13.3f}" for p in row) for k, row in enumerate(table.tolist())]
    shares, labels = model.weights.tolist(), model.most_likely(x)
    modal = [float((labels == k).double().mean()) for k in range(len(shares))]
    lines.append("shares of classes        " + "".join(f"{p:9.3f}" for p in shares))
    lines.append("by most likely class     " + "".join(f"{p:9.3f}" for p in modal))
    gamma = model.posterior(x).detach()
    sure = [float(gamma[labels == k, k].mean()) for k in range(len(shares))]
    lines.append("their mean probability   " + "".join(f"{p:9.3f}" for p in sure))
    c = torchem.criteria(model, x)
    lines.append(f"log-likelihood {c.loglik:.3f}, {c.n_parameters} parameters, AIC {c.aic:.1f}, BIC {c.bic:.1f}")
    return "\n".join(lines)


def main() -> None:
    x = generate()
    if "--write" in sys.argv[1:]:
        rows = ["" if value != value else str(int(value)) for row in x.tolist() for value in row]
        table = [",".join(rows[i : i + len(QUESTIONS)]) for i in range(0, len(rows), len(QUESTIONS))]
        CSV.write_text("\n".join([",".join(QUESTIONS), *table]) + "\n")
        return
    for k in (1, 2, 3, 4):
        model = torchem.Mixture(Categorical(k), Categoricals(k, [len(a) for a in QUESTIONS.values()])).double()
        result = torchem.fit(model, x, restarts=20, max_iter=2000, tol=1e-8, seed=0, progress=False)
        print(f"{k} classes: log-likelihood {result.bound:.3f}, BIC {torchem.criteria(model, x).bic:.1f}")
        if k == 3:
            found = report(model, x)
    print(found)


if __name__ == "__main__":
    main()
