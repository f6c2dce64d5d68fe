#!/usr/bin/env python
"""Measure torchem against its peers: alternately, in one process, on the same starts and iteration counts.

    python scripts/benchmark.py gmm [--device cpu] [--rounds 5] [--quick] [--part large memory small] [--json PATH]
    python scripts/benchmark.py hmm [--rounds 5] [--quick] [--part iteration decode gradient memory time] [--json PATH]
    python scripts/benchmark.py modes [--rounds 5] [--quick] [--part online file restarts variational tradeoffs]
    python scripts/benchmark.py models [--rounds 5] [--quick] [--part missing counts experts student]
    python scripts/benchmark.py structured [--rounds 5] [--quick] [--part network kalman scan semi_markov …]

Prints median times, their ratio to the peer's (median and range over rounds), the share of the machine's
matrix-product rate that an E-step reaches, and the peak of extra memory. `modes` holds the ways to run EM against each
other; its tradeoffs (passes, shares, scores) are the same on every machine and fill the tables of docs/guide.md.
"""

import argparse
import importlib
import json
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PARTS = {
    "gmm": ["large", "memory", "small"],
    "hmm": ["iteration", "decode", "gradient", "memory", "time"],
    "modes": ["online", "file", "restarts", "variational", "tradeoffs"],
    "models": ["missing", "counts", "experts", "student"],
    "structured": ["network", "kalman", "scan", "semi_markov", "semi_markov_fit", "factor_analysis", "nested"],
}


def machine(device: str) -> dict:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = {}
    for package in ("torch", "numpy", "numba", "scikit-learn", "hmmlearn", "jax", "dynamax", "statsmodels", "pgmpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(PARTS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the data, for a first look")
    parser.add_argument("--part", nargs="+", help="some of the parts named above")
    parser.add_argument("--json", type=Path, help="write the figures here; parts not measured now are kept")
    options = parser.parse_args()
    unknown = set(options.part or []) - set(PARTS[options.what])
    if unknown:
        parser.error(f"--part: expected some of {', '.join(PARTS[options.what])}, got {', '.join(sorted(unknown))}")
    options.part = options.part or PARTS[options.what]
    warnings.filterwarnings("ignore")
    figures = importlib.import_module(f"benchmarks.{options.what}").run(options)
    command = " ".join(["python", *sys.argv])
    result = {"machine": machine(options.device), "commands": [command], options.what: figures}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        if options.json.exists():
            old = json.loads(options.json.read_text())
            result = old | result
            result["commands"] = [*old.get("commands", []), command]
            result[options.what] = old.get(options.what, {}) | figures
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()
