"""A Bayesian network with a hidden cause: writes torchem/datasets/clinic.csv, and asks a fitted network about flu.

    python examples/clinic.py            # the report
    python examples/clinic.py --write    # the data again

The patients are made up: 800 come to a clinic and are asked whether they are vaccinated, smoke, cough and are tired;
their temperature is taken. Whether they have the flu nobody finds out, and one entry in twenty is missing.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import torchem
from torchem.factors import Gaussian

STATES = {
    "season": ["summer", "winter"],
    "vaccinated": ["no", "yes"],
    "smoker": ["no", "yes"],
    "flu": ["no", "yes"],
    "cough": ["none", "some", "strong"],
    "tired": ["no", "yes"],
}
EDGES = [
    ("season", "flu"),
    ("vaccinated", "flu"),
    ("flu", "cough"),
    ("smoker", "cough"),
    ("flu", "tired"),
]
CSV = Path(__file__).resolve().parent.parent / "torchem" / "datasets" / "clinic.csv"


def network() -> torchem.BayesianNetwork:
    """Flu comes with the season, and shows in a cough, tiredness and temperature."""
    sizes = {name: len(states) for name, states in STATES.items()}
    leaves = {"temperature": (("flu",), Gaussian(2, 1))}
    return torchem.BayesianNetwork(sizes, EDGES, hidden=("flu",), leaves=leaves, states=STATES).double()


def truth() -> torchem.BayesianNetwork:
    """The network that the patients are drawn from."""
    net = network()
    net.tables["season"], net.tables["vaccinated"], net.tables["smoker"] = [0.5, 0.5], [0.7, 0.3], [0.75, 0.25]
    net.tables["flu"] = [[[0.9, 0.1], [0.97, 0.03]], [[0.4, 0.6], [0.75, 0.25]]]
    net.tables["cough"] = [[[0.85, 0.12, 0.03], [0.3, 0.5, 0.2]], [[0.15, 0.35, 0.5], [0.05, 0.25, 0.7]]]
    net.tables["tired"] = [[0.8, 0.2], [0.15, 0.85]]
    leaf = net.conditionals["temperature"]
    leaf.means, leaf.covariances = [[36.8], [38.4]], [[[0.1]], [[0.4]]]
    return net


def generate(n: int = 800) -> Tensor:
    """Patients: codes from 0 and a temperature, NaN where an entry is missing."""
    generator = torch.Generator().manual_seed(3)
    x = truth().sample(n, generator=generator)
    x[:, -1] = (x[:, -1] * 10).round() / 10
    return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.05, torch.nan)


def report(net: torchem.BayesianNetwork) -> str:
    """The tables of the hidden node's family, and what evidence says of it."""
    lines = [f"temperature without and with flu: {net.conditionals['temperature'].means.flatten().tolist()}"]
    for season, rows in zip(STATES["season"], net.tables["flu"].tolist(), strict=True):
        lines.append(f"flu in {season}: {rows[0][1]:.2f} of the unvaccinated, {rows[1][1]:.2f} of the vaccinated")
    for seen in (
        {"season": "winter"},
        {"season": "winter", "cough": "strong"},
        {"cough": "strong", "temperature": 36.6},
    ):
        share = float(net.posterior("flu", seen)[0, 1].detach())
        lines.append(f"{share:.2f} have the flu, given {', '.join(f'{k} = {v}' for k, v in seen.items())}")
    return "\n".join(lines)


def main() -> None:
    if "--write" in sys.argv:
        rows = [",".join("" if v != v else f"{v:g}" for v in row) for row in generate().tolist()]
        CSV.write_text("\n".join([",".join(network().columns), *rows]) + "\n")
        return
    net = network()
    result = torchem.fit(net, generate(), restarts=5, seed=0, tol=1e-6, max_iter=1000)
    print(f"{result.status} after {result.n_iter} iterations, bound {result.bound:.2f}")
    # Which of the states is the flu only their meaning tells: the hotter one.
    means = net.conditionals["temperature"].means.flatten().tolist()
    if means[0] > means[1]:
        print("(state 0 is the flu here)")
    print(report(net))


if __name__ == "__main__":
    main()
