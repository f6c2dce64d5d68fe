"""Factorial hidden Markov models: held to the list of all paths, to one chain's exact inference, and to the bound."""

import copy
import itertools
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import torchem
from tests.laws.cases import close, close_dict, close_stats, randn, rng, state, unchanged
from torchem import priors
from torchem.batch import Batch
from torchem.errors import InvalidArgument, InvalidType
from torchem.factors import Categorical, LinearGaussian
from torchem.models import HMM, FactorialHMM

KINDS = ("full", "diag", "spherical", "tied")
FORMS = ("structured", "mean_field", "exact")
VARIATIONAL = FORMS[:2]


def model_of(sizes=(2, 3), d: int = 2, q="structured", kind="full", seed: int = 0, **options) -> FactorialHMM:
    model = FactorialHMM.gaussian(sizes, d, kind, q=q, **options).double()  # pyright: ignore
    generator = rng(seed)
    for table in (*model.initials, *model.transitions):
        table.probs = torch.randn(table.shape, generator=generator, dtype=torch.float64).softmax(-1)
    model.contributions = [torch.randn(k, d, generator=generator, dtype=torch.float64) for k in sizes]
    raw = 0.3 * torch.randn(model.emission.scale.shape, generator=generator, dtype=torch.float64) - 0.4
    model.emission.scale.data = raw.tril() if kind in ("full", "tied") else raw
    return model


def data_of(model: FactorialHMM, n: int = 4, t: int = 4, seed: int = 3) -> Batch:
    return Batch(model.sample(n, t, generator=rng(seed)))


def hard_data(model: FactorialHMM) -> Batch:
    """Ragged, weighted, with missing frames."""
    batch = data_of(model, 5, 4)
    x = batch.x.clone()
    x[1, 0] = x[2, 2] = x[4] = torch.nan
    return Batch(x, lengths=torch.tensor([4, 3, 4, 1, 2]), weight=torch.tensor([1.0, 2.0, 0.0, 0.5, 1.5]).double())


def holed_data(model: FactorialHMM) -> Batch:
    """As `hard_data`, with entries missing from frames: the same one throughout a sequence, and many patterns."""
    batch = hard_data(model)
    x = batch.x.clone()
    d = x.shape[-1]
    x[0, :, -1] = torch.nan
    for t in range(3):
        x[2, t, t % d] = torch.nan
        x[1, t, : 1 + t % (d - 1)] = torch.nan
    return replace(batch, x=x)


def densities(model: FactorialHMM, x: Tensor) -> list[tuple[tuple[tuple[int, ...], ...], Tensor]]:
    """Every configuration of one sequence ``[T, D]``, as a path for each chain, with log p(x, z)."""
    cov = dense(model)
    frame: dict[tuple[int, ...], list[float]] = {}
    for z in itertools.product(*map(range, model.n_states)):
        mean = torch.stack([model.contributions[m][k] for m, k in enumerate(z)]).sum(0).detach()
        frame[z] = []
        for row in x:
            o = ~row.isnan()
            if not bool(o.any()):
                frame[z].append(0.0)
                continue
            law = torch.distributions.MultivariateNormal(mean[o], cov[o][:, o])
            frame[z].append(float(law.log_prob(row[o])))
    first = [p.detach().log().tolist() for p in model.initial_probs]
    step = [p.detach().log().tolist() for p in model.transition_matrices]
    found = []
    for paths in itertools.product(*(itertools.product(range(k), repeat=len(x)) for k in model.n_states)):
        value = sum(frame[z][t] for t, z in enumerate(zip(*paths, strict=True)))
        for m, path in enumerate(paths):
            value += first[m][path[0]] + sum(step[m][a][b] for a, b in itertools.pairwise(path))
        found.append((paths, torch.tensor(value, dtype=torch.float64)))
    return found


def dense(model: FactorialHMM) -> Tensor:
    cov = model.covariance.detach()
    return cov if cov.dim() == 2 else torch.diag(cov.expand(model.emission.n_outputs))


def replicated(model: FactorialHMM, r: int) -> FactorialHMM:
    many = model.replicate(r)
    assert isinstance(many, FactorialHMM)
    return many


def sequences(batch: Batch) -> list[Tensor]:
    return [x[:n] for x, n in zip(batch.x, batch.frames().tolist(), strict=True)]


def moments(model: FactorialHMM, x: Tensor, share: list[tuple[tuple[tuple[int, ...], ...], Tensor]]) -> dict:
    """Expectations of one sequence under a law of its paths."""
    s, d = sum(model.n_states), x.shape[-1]
    first = [torch.zeros(k).double() for k in model.n_states]
    steps = [torch.zeros(k, k).double() for k in model.n_states]
    ux, uu, xx = torch.zeros(s, d).double(), torch.zeros(s, s).double(), torch.zeros(d, d).double()
    weight, cov = torch.cat([part.detach() for part in model.contributions]), dense(model)
    starts = [sum(model.n_states[:m]) for m in range(len(model.n_states))]
    for paths, p in share:
        for m, path in enumerate(paths):
            first[m][path[0]] += p
            for a, b in itertools.pairwise(path):
                steps[m][a, b] += p
        for t, frame in enumerate(x):
            o, h = (~frame.isnan()).nonzero()[:, 0], frame.isnan().nonzero()[:, 0]
            if not len(o):
                continue
            u = torch.zeros(s).double()
            for m, path in enumerate(paths):
                u[starts[m] + path[t]] = 1.0
            # What is missing, given the states and the rest of the frame.
            gain = cov[h][:, o] @ torch.linalg.inv(cov[o][:, o])
            full, mean = frame.clone(), u @ weight
            full[h] = mean[h] + gain @ (frame[o] - mean[o])
            xx += p * full[:, None] * full
            xx[h[:, None], h] += p * (cov[h][:, h] - gain @ cov[o][:, h])
            ux += p * u[:, None] * full
            uu += p * u[:, None] * u
    return {"first": first, "steps": steps, "ux": ux, "uu": uu, "xx": xx}


# ---- exact inference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(2,), (2, 3), (2, 1, 2)])
def test_log_prob_equals_the_list_of_all_paths(kind, sizes) -> None:
    d = 3 if sizes == (2, 3) else 2
    model = model_of(sizes, d, kind=kind, q="exact")
    batch = holed_data(model) if d == 3 else hard_data(model)
    truth = torch.stack([torch.stack([v for _, v in densities(model, x)]).logsumexp(0) for x in sequences(batch)])
    close(model.log_prob(batch), truth, rtol=1e-10)
    close(model.elbo(batch), truth, rtol=1e-10)


@pytest.mark.parametrize("holes", [False, True])
def test_exact_statistics_equal_the_list_of_all_paths(holes: bool) -> None:
    model = model_of((2, 2) if holes else (2, 3), 3, q="exact")
    batch = holed_data(model) if holes else hard_data(model)
    assert batch.weight is not None
    stats = model.e_step(batch)
    wanted = []
    for x, w in zip(sequences(batch), batch.weight, strict=True):
        found = densities(model, x)
        law = torch.stack([v for _, v in found]).softmax(0)
        wanted.append(moments(model, x, [(p, w * q) for (p, _), q in zip(found, law.detach(), strict=True)]))
    for m in range(2):
        close(stats[f"initials.{m}"]["counts"], torch.stack([part["first"][m] for part in wanted]).sum(0))
        close(stats[f"transitions.{m}"]["counts"], torch.stack([part["steps"][m] for part in wanted]).sum(0))
    for name in ("ux", "uu", "xx"):
        close(stats["emission"][name][0], torch.stack([part[name] for part in wanted]).sum(0))
    close(stats["emission"]["count"], torch.tensor([float(4 + 2 * 2 + 0.5)]))
    assert float(stats["count"]) == 4 + 2 * 3 + 0.5 + 1.5 * 2


def test_paths_equal_the_list_of_all_paths() -> None:
    model = model_of(q="exact")
    batch = data_of(model)
    for x, path in zip(batch.x, model.most_likely(batch), strict=True):
        with torch.no_grad():
            best = max(densities(model, x), key=lambda pair: float(pair[1]))[0]
        assert path.mT.tolist() == [list(p) for p in best]


@pytest.mark.parametrize("q", VARIATIONAL)
def test_no_other_path_of_one_chain_improves_what_is_most_likely(q) -> None:
    model = model_of(q=q)
    batch = hard_data(model)
    for x, path in zip(sequences(batch), model.most_likely(batch), strict=True):
        assert bool((path[len(x) :] == -1).all())
        table = {paths: float(value.detach()) for paths, value in densities(model, x)}
        mine = tuple(tuple(p) for p in path[: len(x)].mT.tolist())
        for m in range(2):
            others = [v for paths, v in table.items() if all(paths[i] == mine[i] for i in range(2) if i != m)]
            assert table[mine] >= max(others) - 1e-9


@pytest.mark.parametrize("q", ["structured", "exact"])
def test_one_chain_is_a_hidden_markov_model(q) -> None:
    k, d = 3, 2
    model = model_of((k,), d, q=q, kind="tied")
    emission = LinearGaussian(k, 1, d, "tied").double()
    emission.weight = model.contributions[0].detach().unsqueeze(-1)
    emission.covariances = model.covariance.detach()
    one = HMM(copy.deepcopy(model.initials[0]), copy.deepcopy(model.transitions[0]), emission).double()
    batch = hard_data(model)
    twin = replace(batch, u=torch.ones(5, 4, 1).double())
    close(model.log_prob(batch), one.log_prob(twin), rtol=1e-10, atol=1e-10)
    close(model.elbo(batch), one.log_prob(twin), rtol=1e-10, atol=1e-10)
    close(model.posterior(batch)[0], one.posterior(twin), rtol=1e-10, atol=1e-10)
    inside = torch.arange(4) < twin.frames().unsqueeze(-1)
    assert torch.equal(model.most_likely(batch)[..., 0][inside], one.most_likely(twin)[inside])
    mine, truth = model.e_step(batch), one.e_step(twin)
    for a, b in (("initials.0", "initial"), ("transitions.0", "transition")):
        close_stats(mine[a], truth[b], rtol=1e-10)
    close(mine["log_likelihood"], truth["log_likelihood"], rtol=1e-10)
    close(mine["emission"]["ux"][0], truth["emission"]["ux"].squeeze(-2), rtol=1e-10)
    for _ in range(3):
        model.m_step(model.e_step(batch))
        one.m_step(one.e_step(twin))
    assert isinstance(one.emission, LinearGaussian)
    close(model.contributions[0], one.emission.weight.squeeze(-1), rtol=1e-8)
    close(model.covariance, one.emission.covariances, rtol=1e-8)


# ---- the bound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [(2, 3), (2, 2, 2)])
def test_bounds_are_in_order(seed: int, sizes) -> None:
    """Mean field ≤ structured ≤ exact: each q is a special case of the next."""
    options = {"tolerance": 1e-12, "max_sweeps": 500}
    model = model_of(sizes, q="structured", seed=seed, **options)
    batch = data_of(model, 6, 8)
    free = model_of(sizes, q="mean_field", seed=seed, **options)
    with torch.no_grad():
        exact, structured, field = model.log_prob(batch), model.elbo(batch), free.elbo(batch)
        assert bool((structured <= exact + 1e-10).all())
        assert bool((field <= exact + 1e-10).all())
        # Of local optima this holds where the one starts from the other.
        warm = model._infer(batch, "soft", free.posterior(batch)).value
    assert bool((warm >= field - 1e-10).all())
    assert float((exact - structured).max()) > 1e-5, "the approximation must show"
    assert float((warm - field).max()) > 1e-5


def path_laws(model: FactorialHMM, batch: Batch, beta: float = 1.0) -> list[dict[tuple[int, ...], Tensor]]:
    """q(z^m) of a sequence of two frames, which the expected step of each chain tells."""
    stats = model.e_step(batch, beta=beta)
    tables = [stats[f"transitions.{m}"]["counts"] for m in range(len(model.n_states))]
    return [{(a, b): t[a, b] for a in range(len(t)) for b in range(len(t))} for t in tables]


@pytest.mark.parametrize("q", VARIATIONAL)
@pytest.mark.parametrize(("sizes", "holes"), [((2, 3), True), ((2, 2, 2), False)])
def test_the_bound_is_that_of_the_enumerated_posterior(q, sizes, holes: bool) -> None:
    """E_q[log p(x, z)] + H(q), and all expectations, summed over every configuration of two frames."""
    model = model_of(sizes, 3, q=q)
    batch = data_of(model, 1, 2)
    if holes:
        batch.x[0, 0, 1] = batch.x[0, 1, :2] = torch.nan
    laws = path_laws(model, batch)
    elbo, entropy, law = torch.zeros(()).double(), torch.zeros(()).double(), []
    for paths, value in densities(model, batch.x[0]):
        p = torch.stack([laws[m][path] for m, path in enumerate(paths)]).prod()
        elbo, entropy = elbo + p * (value - p.log()), entropy - p * p.log()
        law.append((paths, p.detach()))
    stats = model.e_step(batch)
    close(model.bound(stats), elbo, rtol=1e-10)
    close(model.elbo(batch)[0], elbo, rtol=1e-10)
    close(stats["log_likelihood"], elbo, rtol=1e-10)
    truth = moments(model, batch.x[0], law)
    for name in ("ux", "uu", "xx"):
        close(stats["emission"][name][0], truth[name])
    # The entropy of what is missing belongs to the statistics, as inner latents do.
    assert holes or torch.allclose(stats["entropy"], entropy, rtol=1e-9)
    for m in range(len(sizes)):
        close(stats[f"initials.{m}"]["counts"], truth["first"][m])
    if q == "mean_field":
        for table in (stats[f"transitions.{m}"]["counts"] for m in range(len(sizes))):
            close(table, table.sum(1, keepdim=True) * table.sum(0), rtol=1e-10)


@pytest.mark.parametrize("q", VARIATIONAL)
def test_ascent_ends_where_the_bound_is_stationary(q) -> None:
    """No q of the same form near the found one is better: tilting each chain's law by any evidence lowers the bound."""
    model = model_of(q=q, tolerance=0.0, max_sweeps=300)
    batch = data_of(model, 1, 2)
    with torch.no_grad():
        laws = path_laws(model, batch)
        table = densities(model, batch.x[0])

        def value(laws):
            total = torch.zeros(()).double()
            for paths, log_p in table:
                p = torch.stack([laws[m][path] for m, path in enumerate(paths)]).prod()
                total += p * (log_p - p.log())
            return total

        best = value(laws)
        for seed in range(6):
            tilted = []
            for m, (k, law) in enumerate(zip(model.n_states, laws, strict=True)):
                tilt = 0.1 * randn(2, k, seed=10 * seed + m)
                heavy = {(a, b): p * (tilt[0, a] + tilt[1, b]).exp() for (a, b), p in law.items()}
                tilted.append({path: p / sum(heavy.values()) for path, p in heavy.items()})
            assert value(tilted) < best


@pytest.mark.parametrize("q", FORMS)
@pytest.mark.parametrize(("kind", "sweeps"), [("full", 1), ("full", 50), ("diag", 2), ("spherical", 1), ("tied", 2)])
def test_the_bound_never_falls(q, kind, sweeps: int) -> None:
    """However few sweeps an E-step may take: each goes on from where the last one ended."""
    for seed in range(2):
        truth = model_of((2, 2, 3), kind=kind, seed=seed)
        model = model_of((2, 2, 3), kind=kind, seed=seed + 100, q=q, max_sweeps=sweeps)
        x = truth.sample(6, 12, generator=rng(seed))
        x[0, 3:5] = x[1:3, ::3, 0] = x[4, :, 1] = torch.nan
        batch = Batch(x, lengths=torch.tensor([12, 12, 7, 1, 5, 9]), weight=torch.tensor([1, 2, 0, 0.5, 1, 1.0]))
        values = []
        with torch.no_grad():
            for _ in range(25):
                stats = model.e_step(batch)
                values.append(float(model.bound(stats)))
                close(model.bound(stats), stats["log_likelihood"], rtol=1e-10)
                model.m_step(stats)
                values.append(float(model.bound(stats)))
        for before, after in itertools.pairwise(values):
            assert after >= before - 1e-9 * (1 + abs(before))
        assert values[-1] > values[0] + 1


@pytest.mark.parametrize("q", FORMS)
def test_the_hard_objective_never_falls(q) -> None:
    truth = model_of((2, 3))
    model = model_of((2, 3), q=q, seed=5)
    batch = Batch(truth.sample(6, 12, generator=rng(1)))
    values = []
    with torch.no_grad():
        for _ in range(12):
            stats = model.e_step(batch, "hard")
            close(model.bound(stats), stats["log_likelihood"], rtol=1e-10)
            assert abs(float(stats["entropy"])) < 1e-8
            values.append(float(stats["log_likelihood"]))
            model.m_step(stats)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("beta", [0.3, 1.6])
@pytest.mark.parametrize("q", FORMS)
def test_the_free_energy_is_that_of_the_enumerated_posterior(q, beta: float) -> None:
    """E_q[log p(x, z)] + H(q) / β over every configuration of two frames; at its best Σ log Z_β / β, and below."""
    model = model_of(q=q, tolerance=1e-12, max_sweeps=300)
    batch = data_of(model, 1, 2)
    found = densities(model, batch.x[0])
    tempered = torch.stack([beta * value for _, value in found])
    stats = model.e_step(batch, beta=beta)
    if q == "exact":
        close(stats["log_likelihood"], tempered.logsumexp(0) / beta, rtol=1e-10)
        law = [(paths, p) for (paths, _), p in zip(found, tempered.softmax(0).detach(), strict=True)]
    else:
        laws, free, law = path_laws(model, batch, beta), torch.zeros(()).double(), []
        for paths, value in found:
            p = torch.stack([laws[m][path] for m, path in enumerate(paths)]).prod()
            free = free + p * (value - p.log() / beta)
            law.append((paths, p.detach()))
        close(stats["log_likelihood"], free, rtol=1e-10)
        assert stats["log_likelihood"] < tempered.logsumexp(0) / beta
    close(model.bound(stats), stats["log_likelihood"], rtol=1e-10)
    truth = moments(model, batch.x[0], law)
    close(stats["emission"]["ux"][0], truth["ux"])
    close(stats["emission"]["uu"][0], truth["uu"])
    assert not torch.allclose(stats["emission"]["ux"], model.e_step(batch)["emission"]["ux"], rtol=0.05)


@pytest.mark.parametrize("beta", [0.4, 1.5])
@pytest.mark.parametrize("q", FORMS)
def test_the_free_energy_never_falls(q, beta: float) -> None:
    model = model_of((2, 3), q=q, seed=5, max_sweeps=2)
    batch = hard_data(model_of((2, 3)))
    values = []
    with torch.no_grad():
        for _ in range(12):
            stats = model.e_step(batch, beta=beta)
            values.append(float(stats["log_likelihood"]))
            model.m_step(stats)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(values))
    assert values[-1] > values[0] + 0.1


@pytest.mark.parametrize("q", FORMS)
def test_draws_have_the_law_of_the_posterior(q) -> None:
    """Counts of 4000 draws of one sequence of two frames are binomial: within five standard deviations."""
    model = model_of(q=q, tolerance=1e-12, max_sweeps=300)
    one, n = data_of(model, 1, 2), 4000
    many, generator = Batch(one.x.expand(n, -1, -1)), rng(7)
    with torch.no_grad():
        soft = model.e_step(one)
        drawn = model.e_step(many, "sample", 1.0, lambda shape: torch.rand(shape, generator=generator).double())
    close(drawn["log_likelihood"], n * soft["log_likelihood"], rtol=1e-9)
    close(drawn["entropy"], drawn["log_likelihood"] - model.expected_log_prob(drawn), rtol=1e-12)
    pairs = [(drawn[name]["counts"], soft[name]["counts"]) for name in soft if name.split(".")[0] in FIRST_AND_STEPS]
    own = torch.block_diag(*(torch.ones(k, k) for k in model.n_states)).bool()
    # Two frames of which either may have a pair of states of two chains: their sum is no binomial, and varies at most
    # twice as much as if they were the same.
    pairs.append((drawn["emission"]["uu"][0][~own] / 2, soft["emission"]["uu"][0][~own] / 2))
    for count, p in pairs:
        assert bool(((count - n * p).abs() <= 5 * (n * p * (1 - p)).clamp(min=0).sqrt() + 1e-6).all())
        whole = count * (2 if count.dim() == 1 else 1)
        close(whole, whole.round())
    assert float((drawn["transitions.1"]["counts"] / n - soft["transitions.1"]["counts"]).abs().max()) > 1e-4


FIRST_AND_STEPS = ("initials", "transitions")


@pytest.mark.parametrize("q", FORMS)
def test_draws_of_hard_data(q) -> None:
    """Weights, lengths and missing frames count in draws as they do in expectations; forbidden steps are not drawn."""
    model = model_of((3, 2), q=q)
    model.transitions[0].probs = [[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    batch = hard_data(model)
    with torch.no_grad():
        soft, drawn = model.e_step(batch), model.e_step(batch, "sample")
    for name in ("initials.0", "transitions.0", "transitions.1"):
        close(drawn[name]["counts"].sum(), soft[name]["counts"].sum())
    close(drawn["emission"]["count"], soft["emission"]["count"])
    close(drawn["count"], soft["count"])
    assert bool((drawn["transitions.0"]["counts"][[0, 1, 2, 2], [2, 0, 0, 1]] == 0).all())
    model.covariance = 20 * torch.eye(2)  # chains about which little is known
    many = replicated(model, 3)
    with torch.no_grad():
        each = many.e_step(batch, "sample")
    counts = each["transitions.1"]["counts"]
    assert counts.shape == (3, 2, 2)
    assert not torch.equal(counts[0], counts[1])


@pytest.mark.parametrize("q", VARIATIONAL)
@pytest.mark.filterwarnings("ignore::torchem.errors.ConvergenceWarning")
def test_a_loader_that_makes_new_batches_goes_on_from_where_it_was(q) -> None:
    """With few sweeps the bound falls where each pass sets out anew, as under a loader that shuffles."""
    x = model_of((2, 2, 3), seed=2).sample(6, 12, generator=rng(2))
    histories = []
    for shuffle in (False, True):
        model = model_of((2, 2, 3), seed=102, q=q, max_sweeps=2)
        loader = DataLoader(TensorDataset(x), 2, shuffle=shuffle, generator=rng(0))
        histories.append(torchem.fit(model, loader, init=None, max_iter=10, tol=0, progress=False).history)
        assert not model._places
        assert not model._met
    rises = [min(b - a for a, b in itertools.pairwise(history)) for history in histories]
    assert rises[0] > 0 > rises[1]


def test_other_data_in_the_same_place_set_out_anew() -> None:
    model = model_of()
    one, two = data_of(model, 3, 6, seed=1), data_of(model, 3, 6, seed=2)
    with torch.no_grad():
        fresh = model.e_step(two)["log_likelihood"]
        del model._met[two]
        model.visit(0)
        model.e_step(one)
        close(model.e_step(Batch(two.x.clone()))["log_likelihood"], fresh, rtol=1e-12)
    assert len(model._places) == 1


# ---- labels -------------------------------------------------------------------------------------------------------


def known() -> tuple[Tensor, Tensor]:
    """States of both chains, some unknown; and soft evidence on all states."""
    labels = torch.tensor([[[0, -1], [-1, 2], [1, 1], [-1, -1]], [[-1, -1], [-1, 0], [0, 0], [1, 2]]])
    weights = cases_rand(2, 4, 5)
    weights[0, 1, 3] = 0.0
    return labels, weights


def cases_rand(*shape: int) -> Tensor:
    return torch.rand(shape, generator=rng(8), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("form", ["states", "sets", "soft"])
@pytest.mark.parametrize("q", FORMS)
def test_labels_leave_what_agrees_with_them(q, form: str) -> None:
    model = model_of(q=q, tolerance=1e-12, max_sweeps=300)
    x = data_of(model, 2, 4).x
    labels, soft = known()
    table = soft if form == "soft" else torch.cat(
        [(labels[..., m, None] == torch.arange(k)) | (labels[..., m, None] < 0) for m, k in enumerate((2, 3))], -1
    )  # fmt: skip
    batch = model.batch(x, labels=labels if form == "states" else table)
    best = torch.cat([t / t.amax(-1, keepdim=True) for t in table.double().split((2, 3), -1)], -1)
    with torch.no_grad():
        for n in range(2):
            share = []
            for paths, value in densities(model, x[n]):
                chance = [best[n, t, 2 * m + path[t]] for m, path in enumerate(paths) for t in range(4)]
                share.append((paths, value + torch.stack(chance).log().sum()))
            total = torch.stack([value for _, value in share]).logsumexp(0)
            close(model.log_prob(batch)[n], total, rtol=1e-10)
            elbo = model.elbo(batch)[n]
            assert elbo <= total + 1e-10
            if q == "exact":
                close(elbo, total, rtol=1e-10)
                law = torch.stack([value for _, value in share]).softmax(0)
                close(model.entropy(batch[n : n + 1]), torch.special.entr(law).sum(), rtol=1e-8)
        found = model.posterior(batch)
        for m, g in enumerate(found):
            assert bool((g[table.split((2, 3), -1)[m] == 0] == 0).all())
            close(g.sum(-1), torch.ones(2, 4))
        path = model.most_likely(batch)
        if form == "states":
            assert torch.equal(path[labels >= 0], labels[labels >= 0])
        stats, drawn = model.e_step(batch), model.e_step(batch, "sample")
        close(model.bound(stats), stats["log_likelihood"], rtol=1e-10)
        if form == "states":
            assert drawn["initials.0"]["counts"][0] >= 1


@pytest.mark.parametrize("q", FORMS)
def test_labels_of_all_chains_make_one_step_of_counting(q) -> None:
    truth = model_of((2, 3))
    x, z = truth.sample(20, 15, latents=True, generator=rng(4))
    model = FactorialHMM.gaussian([2, 3], 2, q=q).double()
    result = torchem.fit(model, x, labels=z, seed=0, max_iter=3, tol=0, progress=False)
    for m, k in enumerate((2, 3)):
        pairs = torch.bincount((z[:, :-1, m] * k + z[:, 1:, m]).flatten(), minlength=k * k).view(k, k).double()
        close(model.transition_matrices[m], pairs / pairs.sum(-1, keepdim=True), rtol=1e-6, atol=1e-6)
    u = torch.cat([torch.nn.functional.one_hot(z[..., m], k) for m, k in enumerate((2, 3))], -1).flatten(0, 1).double()
    fitted = u @ torch.linalg.pinv(u) @ x.flatten(0, 1)
    mean = torch.stack([model.contributions[m][z[..., m]] for m in range(2)]).sum(0).flatten(0, 1)
    close(mean, fitted, rtol=1e-6, atol=1e-6)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(result.history))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.zeros(3, 4, dtype=torch.long), r"\[12, 2\], or a table \[12, 5\]"),
        (torch.full((3, 4, 2), 2), r"0 to 1.*2 at sequence 0, frame 0, chain 0"),
        (torch.zeros(3, 4, 5, dtype=torch.bool), r"at least one state.*chain 0"),
        (torch.zeros(3, 4, 3), r"shape \[12, 3\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        model_of().batch(torch.zeros(3, 4, 2), labels=labels)


def test_labels_that_no_path_agrees_with_name_their_sequence() -> None:
    model = model_of((5, 5, 5, 5, 5), 1)
    model.transitions[0].probs = torch.eye(5)
    labels = torch.full((2, 3, 5), -1)
    labels[1, :2, 0] = torch.tensor([0, 1])
    with pytest.raises(InvalidArgument, match="sequence 1"):
        torchem.fit(model, torch.zeros(2, 3, 1), labels=labels, init=None, progress=False)


@pytest.mark.parametrize("q", FORMS)
def test_the_gradient_of_the_bound_is_that_of_its_optimum(q) -> None:
    """Fisher's identity: what θ moves of the bound at its maximum over q is Q alone."""
    model = model_of(q=q, tolerance=0.0, max_sweeps=200)
    batch = data_of(model, 3, 5)
    with torch.no_grad():
        stats = model.e_step(batch)
    values = list(model.parameters())
    surrogate = torch.autograd.grad(model.bound(stats), values)
    for a, b in zip(torch.autograd.grad(model.elbo(batch).sum(), values), surrogate, strict=True):
        close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q", FORMS)
def test_priors_join_the_objective(q) -> None:
    model = model_of(q=q, seed=4)
    for table in (*model.initials, *model.transitions):
        table.prior = priors.Dirichlet(2.0)
    batch = data_of(model, 4, 10)
    values = []
    with torch.no_grad():
        for _ in range(15):
            stats = model.e_step(batch)
            close(model.bound(stats), stats["log_likelihood"] + model.log_prior(), rtol=1e-10)
            values.append(float(model.bound(stats)))
            model.m_step(stats)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(values))


# ---- zeros --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", FORMS)
def test_forbidden_steps_stay_forbidden(q) -> None:
    model = model_of((3, 2), q=q)
    model.initials[0].probs = [1.0, 0.0, 0.0]
    model.transitions[0].probs = [[0.6, 0.4, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    batch = data_of(model, 5, 4)
    with torch.no_grad():
        truth = torch.stack([torch.stack([v for _, v in densities(model, x)]).logsumexp(0) for x in batch.x])
        close(model.log_prob(batch), truth)
        elbo = model.elbo(batch)
        assert bool(elbo.isfinite().all())
        assert bool((elbo <= truth + 1e-10).all())
        values = []
        for _ in range(10):
            stats = model.e_step(batch)
            assert all(leaf.isfinite().all() for leaf in stats.leaves())
            values.append(float(model.bound(stats)))
            model.m_step(stats)
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(values))
    assert bool((model.transition_matrices[0][[0, 1, 2], [2, 0, 1]] == 0).all())
    # A path that steps along what is allowed.
    path = model.most_likely(batch)[..., 0]
    assert bool((path.diff(dim=1) >= 0).all() and (path.diff(dim=1) <= 1).all() and (path[:, 0] == 0).all())


# ---- missing entries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", FORMS)
def test_frames_without_a_hole_are_as_they_were_and_a_column_without_an_entry_is_none(q) -> None:
    """Also in a batch beside others that have some."""
    model = model_of(d=3, q=q)
    whole, batch = hard_data(model), holed_data(model)
    with torch.no_grad():
        assert model._problem(whole).law is None
        assert model._problem(batch).law is not None
        close(model.elbo(batch)[[3, 4]], model.elbo(whole)[[3, 4]], rtol=1e-12)
        # A column that is missing throughout is one that the model does not have.
        x = data_of(model, 3, 5).x
        few = FactorialHMM.gaussian(model.n_states, 2, q=q).double()
        few.contributions = [part[:, :2].detach() for part in model.contributions]
        few.covariance = model.covariance.detach()[:2, :2]
        for old, new in zip((*model.initials, *model.transitions), (*few.initials, *few.transitions), strict=True):
            new.probs = old.probs.detach()
        less = x.clone()
        less[..., 2] = torch.nan
        close(model.elbo(less), few.elbo(x[..., :2]), rtol=1e-9)
        for a, b in zip(model.posterior(less), few.posterior(x[..., :2]), strict=True):
            close(a, b)
        assert torch.equal(model.most_likely(less), few.most_likely(x[..., :2]))
        close(model.surprise(Batch(less[0])), few.surprise(Batch(x[0, :, :2])))


def test_one_chain_with_holes_is_a_hidden_markov_model() -> None:
    """Its regression completes what is missing in the same way."""
    model = model_of((3,), 3, q="structured", kind="tied")
    emission = LinearGaussian(3, 1, 3, "tied").double()
    emission.weight = model.contributions[0].detach().unsqueeze(-1)
    emission.covariances = model.covariance.detach()
    one = HMM(copy.deepcopy(model.initials[0]), copy.deepcopy(model.transitions[0]), emission).double()
    batch = holed_data(model)
    twin = replace(batch, u=torch.ones(5, 4, 1).double())
    for _ in range(3):
        mine, truth = model.e_step(batch), one.e_step(twin)
        close(mine["log_likelihood"], truth["log_likelihood"], rtol=1e-10)
        close(mine["emission"]["ux"][0], truth["emission"]["ux"].squeeze(-2), rtol=1e-9)
        close(mine["emission"]["xx"].flatten(), truth["emission"]["xx"].flatten(), rtol=1e-9)
        model.m_step(mine)
        one.m_step(truth)


@pytest.mark.parametrize("kind", KINDS)
def test_completed_moments_under_every_form_of_the_posterior(kind) -> None:
    """A mean field that is one-hot is a path, and its moments are those of the path."""
    model = model_of((2, 2), 3, kind=kind, q="mean_field")
    batch = data_of(model, 1, 2)
    batch.x[0, 0, 0] = batch.x[0, 1, 1:] = torch.nan
    stats, laws = model.e_step(batch), path_laws(model, batch)
    pairs = itertools.product(itertools.product(range(2), repeat=2), repeat=2)
    law = [(paths, (laws[0][paths[0]] * laws[1][paths[1]]).detach()) for paths in pairs]
    truth = moments(model, batch.x[0], law)
    close(stats["emission"]["ux"][0], truth["ux"])
    found, xx = stats["emission"]["xx"], truth["xx"]
    wanted = {"diag": xx.diagonal(), "spherical": xx.trace()}.get(kind, xx)
    close(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("q", FORMS)
def test_entries_are_filled_by_their_law_under_q(q) -> None:
    """Mean and variance of what is missing by enumeration of the chains, and of many draws."""
    model = model_of((2, 2), 3, q=q)
    x = data_of(model, 1, 2).x
    x[0, 0, 0] = x[0, 1, 1:] = torch.nan
    batch, weight, cov = Batch(x), torch.cat([part.detach() for part in model.contributions]), dense(model)
    if q == "exact":
        values = torch.stack([v for _, v in densities(model, x[0])])
        law = [(paths, p) for (paths, _), p in zip(densities(model, x[0]), values.softmax(0), strict=True)]
    else:
        laws = path_laws(model, batch)
        pairs = itertools.product(itertools.product(range(2), repeat=2), repeat=2)
        law = [(paths, laws[0][paths[0]].detach() * laws[1][paths[1]].detach()) for paths in pairs]
    first, second = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for paths, p in law:
        for t, frame in enumerate(x[0]):
            h, o = frame.isnan().nonzero()[:, 0], (~frame.isnan()).nonzero()[:, 0]
            mean = weight[paths[0][t]] + weight[2 + paths[1][t]]
            gain = cov[h][:, o] @ torch.linalg.inv(cov[o][:, o])
            filled = mean[h] + gain @ (frame[o] - mean[o])
            first[t, h] += p * filled
            second[t, h] += p * (filled.square() + (cov[h][:, h] - gain @ cov[o][:, h]).diagonal())
    value, variance = model.impute(x, variance=True)
    holes = x[0].isnan()
    close(value[0][holes], first[holes], rtol=1e-9)
    close(variance[0][holes], (second - first.square())[holes], rtol=1e-8)
    assert torch.equal(value[0][~holes], x[0][~holes])
    assert not bool(variance[0][~holes].any())
    drawn = model.impute(x, draws=4000, generator=rng(0))[:, 0]
    close(drawn.mean(0)[holes], first[holes], rtol=0, atol=0.1)
    close(drawn.var(0)[holes], (second - first.square())[holes], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("q", FORMS)
def test_what_is_missing_may_be_hidden_from_python(q) -> None:
    """Under vmap over sequences patterns cannot be looked at; derivatives are finite, and those of the plain call."""
    model = model_of(d=3, q=q, max_sweeps=20)
    x = holed_data(model).x
    params = {name: value.detach() for name, value in model.named_parameters()}

    def each(params, row):
        own = torch.func.functional_call(model, params, (row.unsqueeze(0),), {})
        return own[0]

    mapped = torch.func.vmap(each, (None, 0))(params, x)
    close(mapped, model.log_prob(x), rtol=1e-9)
    slopes = torch.func.vmap(torch.func.grad(each), (None, 0))(params, x)
    plain = torch.autograd.grad(model.log_prob(x).sum(), list(model.parameters()))
    for (name, own), whole in zip(slopes.items(), plain, strict=True):
        assert bool(own.isfinite().all()), name
        close(own.sum(0), whole, rtol=1e-8)


def test_columns_of_any_size_and_a_fit_from_few_entries() -> None:
    """A third of all entries missing, so that hardly a frame is whole; in units that differ by twelve orders."""
    truth = told_apart()
    x = truth.sample(8, 30, generator=rng(0))
    x[torch.rand(x.shape, generator=rng(1)) < 0.35] = torch.nan
    unit = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)
    for q in FORMS:
        values = []
        for scale in (torch.ones(3).double(), unit):
            model = FactorialHMM.gaussian([2, 3], 3, q=q).double()
            result = torchem.fit(model, x * scale, seed=0, restarts=2, max_iter=8, tol=0.0, progress=False)
            assert all(b >= a - 1e-6 for a, b in itertools.pairwise(result.history))
            values.append(result.bound + float((~x.isnan()).sum((0, 1)).double() @ scale.log()))
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    small = FactorialHMM.gaussian([2, 3], 3)
    assert torchem.fit(small, x.float(), seed=0, max_iter=4, tol=0.0, progress=False).status == "max_iter"


# ---- invariances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", FORMS)
def test_how_data_are_cut_does_not_matter(q) -> None:
    model = model_of(q=q)
    batch = holed_data(model)
    whole = model.e_step(batch)
    parts = [model.e_step(batch[i : i + 1]) for i in range(5)]
    close_stats(whole, parts[0] + parts[1] + parts[2] + parts[3] + parts[4], rtol=1e-8)
    values = model.elbo(batch)
    model.memory_budget = 1
    close_stats(whole, model.e_step(batch), rtol=1e-8)
    close(values, model.elbo(batch))
    with torch.no_grad():
        for _ in range(2):
            small = model.e_step(batch)
        close(model.bound(small), small["log_likelihood"], rtol=1e-10)


@pytest.mark.parametrize("q", FORMS)
def test_weights_order_and_padding(q) -> None:
    model = model_of(q=q)
    batch = holed_data(model)
    assert batch.weight is not None
    stats = model.e_step(batch)
    order = torch.tensor([3, 1, 4, 0, 2])
    close_stats(stats, model.e_step(batch[order]), rtol=1e-9)
    longer = batch.with_frames(7)
    close_stats(stats, model.e_step(longer), rtol=1e-9)
    close(model.elbo(batch), model.elbo(longer))
    twice = Batch(batch.x[[0, 1, 1]], lengths=torch.tensor([4, 3, 3]))
    close_stats(model.e_step(replace(batch[:3], weight=torch.tensor([1.0, 2.0, 0.0]))), model.e_step(twice), rtol=1e-9)


@pytest.mark.parametrize("q", FORMS)
def test_replicas_are_models_of_their_own(q) -> None:
    models = [model_of(q=q, seed=s) for s in range(3)]
    many = replicated(models[0], 3)
    for name, value in many.named_parameters():
        value.data = torch.stack([m.get_parameter(name).data for m in models])
    batch = holed_data(models[0])
    close(many.elbo(batch), torch.stack([m.elbo(batch) for m in models]))
    close(many.log_prob(batch), torch.stack([m.log_prob(batch) for m in models]))
    for a, *b in zip(many.posterior(batch), *(m.posterior(batch) for m in models), strict=True):
        close(a, torch.stack(b))
    new = many.maximize(many.e_step(batch))
    for i, model in enumerate(models):
        close_dict({k: v[i] for k, v in new.items()}, model.maximize(model.e_step(batch)), rtol=1e-7)
        one = many.take_replicas(i)
        assert isinstance(one, FactorialHMM)
        close(one.elbo(batch), model.elbo(batch))


@pytest.mark.parametrize("q", VARIATIONAL)
def test_what_is_left_of_the_replicas_goes_on_from_where_they_were(q) -> None:
    many = replicated(model_of(q=q), 3)
    for i, value in enumerate(many.parameters()):
        value.data += 0.3 * randn(*value.shape, seed=i) * (value.dim() < 4)
    batch = data_of(model_of(), 4, 10)
    with torch.no_grad():
        many.e_step(batch)
        few = many.take_replicas(torch.tensor([0, 2]))
    assert isinstance(few, FactorialHMM)
    for a, b in zip(few._met[batch].q, many._met[batch].q, strict=True):
        assert torch.equal(a, b[[0, 2]])


@pytest.mark.parametrize("q", FORMS)
def test_float32_is_near_float64(q) -> None:
    model = model_of(q=q, tolerance=1e-4)
    batch = data_of(model, 4, 20)
    small = copy.deepcopy(model).float()
    close(small.elbo(batch), model.elbo(batch), rtol=1e-4, atol=1e-3)
    shifted = copy.deepcopy(model)
    shifted.contributions = [c.detach() + 500.0 for c in model.contributions]
    close(shifted.float().elbo(Batch(batch.x + 1000.0)), model.elbo(batch), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("q", FORMS)
def test_constants_that_chains_exchange_change_nothing(q) -> None:
    model = model_of(q=q)
    batch = data_of(model)
    before = model.elbo(batch).detach()
    a, b = model.contributions
    model.contributions = [a.detach() + 3.0, b.detach() - 3.0]
    close(model.elbo(batch), before)


@pytest.mark.parametrize("q", FORMS)
def test_the_pure_map_is_the_step(q) -> None:
    model = model_of(q=q, max_sweeps=4)
    batch = holed_data(model)
    before, params = state(model), {k: v.detach() for k, v in model.named_parameters()}
    new = torchem.em_map(model)(params, batch)
    unchanged(model, before)
    # Under transforms no ascent stops early; twenty times the tolerance is then no matter.
    tangent = {k: torch.ones_like(v) for k, v in params.items()}
    moved = torch.func.jvp(lambda p: torchem.em_map(model)(p, batch), (params,), (tangent,))[1]
    assert all(v.isfinite().all() for v in moved.values())
    stepped = copy.deepcopy(model)
    stepped.m_step(stepped.e_step(batch))
    close_dict(new, dict(stepped.named_parameters()), rtol=1e-9)
    unchanged(model, before)


def test_each_form_of_the_posterior_sets_out_by_itself() -> None:
    """Marginals of exact chains need not be possible for a mean field where steps are forbidden."""
    model = model_of((3, 2))
    model.transitions[0].probs = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    batch = data_of(model, 3, 6)
    with torch.no_grad():
        model.e_step(batch)
        model.q = "mean_field"
        assert bool(model.e_step(batch)["log_likelihood"].isfinite())


def test_batches_are_not_kept_alive() -> None:
    model = model_of()
    batch = data_of(model)
    with torch.no_grad():
        model.e_step(batch)
    assert len(model._met) == 1
    assert len(copy.deepcopy(model)._met) == len(pickle.loads(pickle.dumps(model))._met) == 0
    del batch
    assert len(model._met) == 0


@pytest.mark.parametrize("q", FORMS)
def test_what_is_frozen_stays(q) -> None:
    model = model_of(q=q)
    model.emission.freeze("weight")
    model.transitions[0].freeze()
    model.transitions[1].freeze("probs", mask=torch.eye(3, dtype=torch.bool))
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.m_step(model.e_step(data_of(model, 5, 10)))
    close(model.contributions[0], before.contributions[0], rtol=0, atol=0)
    close(model.transition_matrices[0], before.transition_matrices[0], rtol=0, atol=0)
    close(model.transition_matrices[1].diagonal(), before.transition_matrices[1].diagonal(), rtol=1e-12)
    for a, b in ((model.transition_matrices[1], before.transition_matrices[1]), (model.covariance, before.covariance)):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("q", FORMS)
def test_no_sequences_are_nothing(q) -> None:
    model = model_of(q=q)
    batch = data_of(model)
    stats = model.e_step(batch)
    close_stats(stats + model.e_step(batch[:0]), stats)


@pytest.mark.parametrize("q", FORMS)
def test_one_table_may_serve_several_chains(q) -> None:
    """Its counts are those of both, and it is one parameter."""
    model = model_of((2, 2), q=q)
    tied = FactorialHMM(model.initials, [model.transitions[0]] * 2, model.emission, q)
    assert tied.n_parameters() == model.n_parameters() - 2
    batch = data_of(tied, 4, 10)
    values = []
    with torch.no_grad():
        for _ in range(8):
            stats = tied.e_step(batch)
            counts = stats["transitions.0"]["counts"] + stats["transitions.1"]["counts"]
            values.append(float(tied.bound(stats)))
            tied.m_step(stats)
            close(tied.transition_matrices[1], counts / counts.sum(-1, keepdim=True))
    assert all(b >= a - 1e-9 * (1 + abs(a)) for a, b in itertools.pairwise(values))


# ---- fits ---------------------------------------------------------------------------------------------------------


def told_apart(q="structured", **options) -> FactorialHMM:
    """Two slow chains whose contributions lie in different directions."""
    model = FactorialHMM.gaussian([2, 3], 3, q=q, **options).double()
    model.transitions[0].probs = [[0.95, 0.05], [0.1, 0.9]]
    model.transitions[1].probs = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7]]
    model.contributions = [[[-2.0, 0.0, 1.0], [2.0, 0.0, 0.0]], [[0.0, 3.0, 0.0], [0.0, 0.0, 3.0], [0.5, -3.0, 0.0]]]
    model.covariance = 0.3 * torch.eye(3)
    return model


@pytest.mark.parametrize("q", FORMS)
def test_the_truth_is_recovered(q) -> None:
    truth = told_apart()
    x = truth.sample(30, 40, generator=rng(0))
    model = FactorialHMM.gaussian([2, 3], 3, q=q).double()
    result = torchem.fit(model, x, seed=1, restarts=6, max_iter=200, tol=1e-5, progress=False)
    assert result.converged
    assert all(b >= a - 1e-9 * (1 + abs(a)) for h in result.histories for a, b in itertools.pairwise(h))
    assert len(result.restarts) == 6
    assert result.bound == max(result.restarts)
    frames = x.shape[0] * x.shape[1]
    gap = float((model.log_prob(x).sum() - truth.log_prob(x).sum()).detach() / frames)
    assert 0 < gap < 0.03, "a fit explains its own data a little better than the truth does"

    def levels(m: FactorialHMM) -> Tensor:
        a, b = m.contributions
        return (a.unsqueeze(1) + b).flatten(0, 1).detach()

    nearest = torch.cdist(levels(truth), levels(model)).min(-1).values
    assert float(nearest.max()) < 0.3
    order = model.transition_matrices[0].diagonal().sort().values
    close(order.detach(), torch.tensor([0.9, 0.95]), rtol=0, atol=0.05)
    close(model.covariance, truth.covariance, rtol=0, atol=0.06)


def test_a_fit_of_ragged_sequences_and_files(tmp_path) -> None:
    truth = told_apart()
    data = [truth.sample(1, t, generator=rng(t))[0] for t in (5, 40, 200, 17, 3)]
    model = FactorialHMM.gaussian([2, 3], 3, "diag", q="mean_field").double()
    result = torchem.fit(model, data, seed=0, max_iter=10, tol=0.0, progress=False)
    assert result.n_iter == 10
    model.transitions[1].prior = priors.StickyDirichlet(2.0)
    torchem.save(model, tmp_path / "m.safetensors")
    again = torchem.load(tmp_path / "m.safetensors")
    assert isinstance(again, FactorialHMM)
    assert (again.q, again.n_states, again.max_sweeps) == ("mean_field", (2, 3), 50)
    assert again.transitions[1].prior is not None
    close(again.elbo(data), model.elbo(data), rtol=0, atol=0)
    assert model.n_parameters() == 1 + 2 + 2 + 6 + 3 * (2 + 3 - 1) + 3


def test_samples_follow_the_chains() -> None:
    model = told_apart()
    x, z = model.sample(200, 50, latents=True, generator=rng(2))
    assert x.shape == (200, 50, 3)
    assert z.shape == (200, 50, 2)
    for m, k in enumerate(model.n_states):
        pairs = torch.bincount((z[:, :-1, m] * k + z[:, 1:, m]).flatten(), minlength=k * k).reshape(k, k).double()
        close(pairs / pairs.sum(-1, keepdim=True), model.transition_matrices[m], rtol=0, atol=0.03)
    mean = torch.stack([model.contributions[m][z[..., m]] for m in range(2)]).sum(0)
    residual = (x - mean).flatten(0, 1)
    close(residual.mT @ residual / len(residual), model.covariance, rtol=0, atol=0.02)
    assert model.sample(0, 3).shape == (0, 3, 3)
    assert (model.most_likely(x[:20]) == z[:20]).double().mean() > 0.97


@pytest.mark.parametrize("q", FORMS)
def test_states_without_mass_are_named_reseeded_or_taken_out(q) -> None:
    truth = told_apart()
    x = truth.sample(10, 30, generator=rng(0))

    def start() -> FactorialHMM:
        model = FactorialHMM.gaussian([2, 4], 3, q=q).double()
        model.contributions = [
            truth.contributions[0].detach(),
            torch.cat([truth.contributions[1], 90 * torch.ones(1, 3)]),
        ]
        model.covariance = truth.covariance.detach()
        return model

    options: dict[str, Any] = {"init": None, "max_iter": 15, "tol": 0.0, "progress": False}
    model = start()
    result = torchem.fit(model, x, **options)
    assert result.dead == [5]
    pruned = start()
    pruned.transitions[1].prior = priors.Dirichlet(1.0)
    found = torchem.fit(pruned, x, dead="prune", **options)
    assert found.pruned == [5]
    assert pruned.n_states == (2, 3)
    assert pruned.transitions[1].prior is not None
    for m in range(2):
        close(pruned.contributions[m], model.contributions[m][:3], rtol=1e-3, atol=1e-3)
    again = torchem.fit(pruned, x, init=None, max_iter=1, tol=0, progress=False)
    # The row that went had a density of its own, Γ(3).
    assert again.history[0] == pytest.approx(found.bound - math.log(2), abs=1e-6)
    few = start()
    reseeded = torchem.fit(few, x, dead="respawn", **options)
    assert not reseeded.dead
    assert reseeded.bound > result.bound
    with pytest.raises(torchem.errors.DegenerateComponent, match="component 5"):
        torchem.fit(start(), x, dead="raise", **options)


def test_tables_that_chains_share_are_not_pruned() -> None:
    model = model_of((2, 2))
    tied = FactorialHMM(model.initials, [model.transitions[0]] * 2, model.emission)
    with pytest.raises(InvalidArgument, match="where chains share tables"):
        tied.forbid(torch.tensor([True, False, False, False]))


def test_a_reseeded_state_adds_what_the_others_leave() -> None:
    """With few enough states to try all: the frame's mean is then the frame itself."""
    model = told_apart()
    frames = Batch(torch.randn(20, 3, generator=rng(3), dtype=torch.float64))
    with torch.no_grad():
        surprise, exact = model.surprise(frames), told_apart(q="exact").surprise(frames)
        assert bool((surprise >= exact - 1e-9).all())
        shares = [g[7, 0] @ w for g, w in zip(model._alone(frames).marginals, model.contributions, strict=True)]
        model.respawn(frames, torch.arange(5) == 3, torch.full((5,), 7))
    close(model.contributions[1][1] + shares[0], frames.x[7], rtol=1e-12)
    close(model.contributions[1][[0, 2]], told_apart().contributions[1][[0, 2]], rtol=0, atol=0)


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_large_products_are_refused_and_bounded() -> None:
    model = model_of((5, 5, 5, 5, 5))
    x = model.sample(2, 15, generator=rng(0))
    with pytest.raises(InvalidArgument, match=r"log_prob: .*1024 states.*5 · 5 · 5 · 5 · 5 = 3125; use elbo"):
        model.log_prob(x)
    with pytest.raises(InvalidArgument, match=r"q: .*1024"):
        model_of((5, 5, 5, 5, 5), q="exact")
    assert bool(model.elbo(x).isfinite().all())
    torchem.fit(model, x, seed=0, max_iter=3, tol=0.0, progress=False)


def test_parts_that_do_not_fit_are_refused() -> None:
    first, step, emission = Categorical(2), Categorical(2, 2), LinearGaussian(1, 4, 2)
    for message, parts in {
        "transitions: ": ([first], [], emission),
        r"transitions\[1\]": ([first, Categorical(3)], [step, step], emission),
        r"emission: .*4 inputs": ([first, first], [step, step], LinearGaussian(1, 3, 2)),
        r"emission: .*1 component": ([first, first], [step, step], LinearGaussian(2, 4, 2)),
    }.items():
        with pytest.raises(InvalidArgument, match=message):
            FactorialHMM(*parts)
    with pytest.raises(InvalidType, match=r"initials\[0\]"):
        FactorialHMM([emission], [step], emission)
    with pytest.raises(InvalidType, match="emission"):
        FactorialHMM([first], [step], Categorical(2, 2))
    for name, value in (("tolerance", -1.0), ("tolerance", math.inf), ("max_sweeps", 0)):
        option: dict[str, Any] = {name: value}
        with pytest.raises(InvalidArgument, match=name):
            FactorialHMM.gaussian([2], 1, **option)
    with pytest.raises(InvalidArgument, match="n_states"):
        FactorialHMM.gaussian([], 1)
    model = model_of()
    with pytest.raises(InvalidArgument, match="2 features"):
        model.elbo(torch.zeros(3, 4, 5))
    with pytest.raises(InvalidArgument, match="inputs"):
        model.elbo(torch.zeros(3, 4, 2), u=torch.zeros(3, 4, 1))
    with pytest.raises(InvalidArgument, match="contributions"):
        model.contributions = [torch.zeros(2, 2)]
    with pytest.raises(InvalidArgument, match="length"):
        model.sample(2)
