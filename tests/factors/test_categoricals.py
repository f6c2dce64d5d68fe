"""Answers: one product of indicators against tables looked up, holes, excluded answers, latent classes."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import torchem
from tests.factors.common import operations, replicated, with_holes
from tests.laws.cases import assign, close, close_stats, randn, rng, soft
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument
from torchem.factors import Categorical, Categoricals, Product

ROOT = Path(__file__).resolve().parents[2]
SIZES = [2, 4, 3]


def answers(k: int = 3, seed: int = 0) -> Categoricals:
    c = Categoricals(k, SIZES).double()
    c.tables = [(2 * randn(k, m, seed=seed + m)).softmax(-1) for m in SIZES]
    return c


def looked_up(c: Categoricals) -> Product:
    """The same law, a table at a time."""
    parts = [Categorical(c.n_components, m).double() for m in c.sizes]
    for part, table in zip(parts, c.tables, strict=True):
        part.probs = table.detach()
    return Product(parts)


def rows(n: int = 40, holes: float = 0.0, seed: int = 1) -> Tensor:
    x = torch.stack([torch.randint(0, m, (n,), generator=rng(seed + m)) for m in SIZES], -1).double()
    return with_holes(x, holes) if holes else x


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_it_is_a_product_of_tables(holes: float) -> None:
    c, x, expected = answers(), Batch(rows(holes=holes)), soft(40, 3)
    product = looked_up(c)
    close(c.log_prob(x), product.log_prob(x))
    counts, theirs = c.stats(x, expected)["counts"], product.stats(x, expected)
    for d, m in enumerate(SIZES):
        close(counts[:, d, :m], theirs[f"factors.{d}"]["counts"])
        assert (counts[:, d, m:] == 0).all()
    best = answers()
    assign(best, c.maximize(c.stats(x, expected)))
    for d, values in enumerate(best.tables):
        close(values, product.factors[d].maximize(theirs[f"factors.{d}"])["logits"].softmax(-1))  # pyright: ignore
    assert c.n_parameters() == product.n_parameters() == 3 * (1 + 3 + 2)
    if not holes:
        whole = x.with_x(x.x.long())
        close(c.log_prob(whole), c.log_prob(x))


def test_one_product_for_the_potentials_and_one_for_the_statistics() -> None:
    c, x, expected = answers().float(), Batch(rows(500).float()), soft(500, 3).float()

    def run() -> None:
        kernel = c.kernel()
        kernel.log_potential(x)
        kernel.collect(x, expected)

    assert operations(run).products == 2


def test_an_answer_that_is_excluded_stays_excluded() -> None:
    c = answers(2)
    c.tables = [[[1.0, 0.0], [0.5, 0.5]], torch.full((2, 4), 0.25), torch.full((2, 3), 1 / 3)]
    x = Batch(torch.tensor([[1.0, 2.0, 0.0], [0.0, torch.nan, 2.0]]))
    value = c.log_prob(x)
    assert value.exp()[0, 0] == 0
    assert value[1].isfinite().all()
    (slope,) = torch.autograd.grad(value[1].sum() + value[0, 1], [c.logits])
    assert slope.isfinite().all()
    model = torchem.Mixture(Categorical(2), c).double()
    result = torchem.fit(model, rows(200), init=None, max_iter=30, progress=False, tol=0)
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(result.history))
    assert c.tables[0][0, 1].item() == 0
    assert c.n_parameters() == 2 * 6 - 1
    small = c.select(torch.tensor([0]))
    assert small.forbids
    close(small.log_prob(x), c.log_prob(x)[:, :1])


def test_replicas_and_files_with_excluded_answers(tmp_path) -> None:
    c = answers(2)
    c.tables = [[[1.0, 0.0], [0.5, 0.5]], *[t.detach() for t in c.tables[1:]]]
    torchem.save(c, tmp_path / "c.safetensors")
    again = torchem.load(tmp_path / "c.safetensors")
    assert again.forbids
    close(again.log_prob(Batch(rows())), c.log_prob(Batch(rows())), rtol=0, atol=0)
    x, expected = Batch(rows(holes=0.2)), soft(40, 2)
    many = replicated(answers(2), 2)
    many.load_state_dict({key: torch.stack([value, value]) for key, value in c.state_dict().items()})
    close(many.log_prob(x), c.log_prob(x).expand(2, -1, -1))
    close_stats(many.stats(x, expected.expand(2, -1, -1)).map(lambda leaf: leaf[1]), c.stats(x, expected))


def test_a_prior_counts_for_each_column_and_the_posterior_is_that_of_tables() -> None:
    x = rows(120, holes=0.1)
    one = torchem.variational(torchem.Mixture(Categorical(2), answers(2))).double()
    two = torchem.variational(torchem.Mixture(Categorical(2), looked_up(answers(2)))).double()
    first, second = (
        torchem.fit(model, x, init=None, max_iter=25, tol=0, progress=False, seed=0) for model in (one, two)
    )
    assert first.history[1:] == pytest.approx(second.history[1:], rel=1e-9)
    c = answers(2)
    c.prior = priors.Dirichlet(1.5)
    values = c.maximize(c.penalized(c.stats(Batch(x[:0]), torch.zeros(0, 2, dtype=torch.float64))))
    close(values["logits"].masked_fill(~c.support, -torch.inf).softmax(-1).sum(-1), torch.ones(2, 3))
    product = looked_up(c)
    for part in product.factors:
        part.prior = priors.Dirichlet(1.5)  # pyright: ignore
    close(torch.as_tensor(c.log_prior()), torch.as_tensor(product.log_prior()))


def test_latent_classes_are_found_and_missing_answers_do_not_matter() -> None:
    truth = Categoricals(3, [2, 2, 3, 4, 2]).double()
    truth.tables = [(4 * randn(3, m, seed=m + i)).softmax(-1) for i, m in enumerate(truth.sizes)]
    z = torch.arange(6000) % 3
    x = with_holes(truth.sample(z, generator=rng(3)).double(), 0.15)
    model = torchem.Mixture(Categorical(3), Categoricals(3, truth.sizes)).double()
    torchem.fit(model, x, seed=0, restarts=8, tol=1e-6, max_iter=500, progress=False)
    best = min(
        max((a[list(order)] - b).abs().max().item() for a, b in zip(model.component.tables, truth.tables, strict=True))
        for order in itertools.permutations(range(3))
    )
    assert best < 0.06


#: Made-up answers of 100 people to four yes-or-no questions: counts of 0000, 0001, … 1111.
PATTERNS = [22, 6, 5, 3, 7, 2, 3, 4, 4, 3, 2, 6, 3, 5, 8, 17]


def test_two_classes_are_those_of_flexmix() -> None:
    """flexmix 2.3.18, R 4.2.2: the best of ten starts of

    x <- as.matrix(expand.grid(d=0:1, c=0:1, b=0:1, a=0:1))[, 4:1]; x <- x[rep(1:16, n), ]
    flexmix(x ~ 1, k=2, model=FLXMCmvbinary(), control=list(minprior=0, iter.max=3000, tolerance=1e-14))
    """
    x = torch.cartesian_prod(*[torch.arange(2.0)] * 4).double()
    model = torchem.Mixture(Categorical(2), Categoricals(2, [2] * 4)).double()
    n = torch.tensor(PATTERNS)
    result = torchem.fit(model, x, weights=n, seed=0, restarts=5, tol=1e-11, max_iter=3000, progress=False)
    assert result.bound == pytest.approx(-249.91460869, abs=1e-6)
    top = int(model.weights.argmax())
    close(model.weights[top], torch.tensor(0.5057423), rtol=1e-4)
    ones = torch.stack([table[top, 1] for table in model.component.tables])
    close(ones, torch.tensor([0.8207809, 0.7534032, 0.7789812, 0.7080465]), rtol=1e-4)
    assert torchem.criteria(model, x).n_parameters == 9


def test_the_example_reports_the_shipped_answers() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "answers.py"), run_name="example")
    x = torch.from_numpy(np.genfromtxt(example["CSV"], delimiter=",", skip_header=1))
    model = torchem.Mixture(Categorical(3), Categoricals(3, [2, 3, 3, 4, 2])).double()
    torchem.fit(model, x, restarts=3, seed=0, tol=1e-8, max_iter=2000, progress=False)
    report = example["report"](model, x)
    assert "log-likelihood -2383.690, 29 parameters" in report
    assert len(report.splitlines()) == 1 + 5 * 4 + 3 + 1


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: Categoricals(2, []), "^sizes: "),
        (lambda: Categoricals(0, [2]), "^n_components: "),
        (lambda: Categoricals(2, [2, 0]), "^sizes: "),
        (lambda: answers().check(Batch(torch.tensor([[0.0, 1.0, 3.0]]))), "0 to 2, got 3 at row 0, column 2"),
        (lambda: answers().check(Batch(torch.tensor([[0.0, 0.5, 1.0]]))), "got 0.5 at row 0, column 1"),
        (lambda: answers().check(Batch(torch.tensor([[0, 1, -1]]))), "got -1 at row 0, column 2"),
        (lambda: answers().check(Batch(rows() + 1)), "subtract 1"),
        (lambda: answers().check(Batch(torch.zeros(3, 2))), "3 features"),
        (lambda: setattr(answers(), "tables", [torch.ones(3, 2) / 2]), "^tables: "),
        (lambda: setattr(answers(), "probs", torch.full((3, 3, 4), 0.25)), "^probs: .* assign to tables"),
    ],
)
def test_bad_input(act, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        act()
