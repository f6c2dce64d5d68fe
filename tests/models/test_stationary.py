"""The stationary initial law, and its M-step, which is joint with the transition's."""

import copy

import pytest
import torch

import torchem
from tests.laws import cases
from tests.laws.cases import close
from torchem.factors import Categorical
from torchem.models.stationary import Stationary


def chain(k: int, seed: int, zeros: bool = False) -> tuple[Categorical, Stationary]:
    table = Categorical(k, k).double()
    probs = (1.5 * cases.randn(k, k, seed=seed)).softmax(-1)
    if zeros:
        probs = probs * (torchem.masks.cyclic(k) | (cases.rand(k, k, seed=seed + 1) < 0.3))
        probs = probs / probs.sum(-1, keepdim=True)
    table.probs = probs
    return table, Stationary(table)


def objective(table: Categorical, logits: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    log_probs = logits.masked_fill(~table.support, -torch.inf).log_softmax(-1)
    probs = log_probs.exp()
    values, vectors = torch.linalg.eig(probs.mT)
    law = vectors[:, values.real.argmax()].real
    law = law / law.sum()
    return (starts * law.log()).sum() + torch.where(table.support, counts * log_probs, 0.0).sum()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_law_is_stationary(k: int) -> None:
    table, law = chain(k, seed=k)
    close(law.probs @ table.probs, law.probs)
    close(law.probs.sum(), torch.ones(()))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("share", [0.05, 1.0, 5.0])
def test_the_joint_m_step_ends_where_no_ascent_is_left(k: int, zeros: bool, share: float) -> None:
    """Against L-BFGS from the same start and from the step's own end."""
    for seed in range(3):
        table, law = chain(k, seed=10 * seed + k, zeros=zeros)
        counts = torch.where(table.support, 20 * cases.rand(k, k, seed=seed), 0.0)
        starts = share * 20 * cases.rand(k, seed=seed + 50)
        new = law.maximize_jointly(torchem.Stats(counts=starts), torchem.Stats(counts=counts))["logits"].detach()
        reached = objective(table, new, starts, counts)
        assert reached >= objective(table, table.logits.detach(), starts, counts)
        assert torch.equal(new.masked_fill(~table.support, -torch.inf).softmax(-1) == 0, ~table.support)
        best = reached
        for start in (table.logits.detach(), new):
            logits = start.clone().requires_grad_()
            search = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

            def closure(search=search, logits=logits, table=table, starts=starts, counts=counts) -> torch.Tensor:
                search.zero_grad()
                loss = -objective(table, logits, starts, counts)
                loss.backward()
                return loss

            search.step(closure)  # pyright: ignore
            best = torch.maximum(best, objective(table, logits.detach(), starts, counts))
        assert best - reached <= 1e-6 * best.abs()


def test_replicas_take_their_own_steps() -> None:
    table, law = chain(3, seed=4)
    counts, starts = 20 * cases.rand(3, 3, 3, seed=5), 10 * cases.rand(3, 3, seed=6)
    alone = [
        law.maximize_jointly(torchem.Stats(counts=s), torchem.Stats(counts=c))["logits"]
        for s, c in zip(starts, counts, strict=True)
    ]
    table.replicate(3)
    together = law.maximize_jointly(torchem.Stats(counts=starts), torchem.Stats(counts=counts))["logits"]
    close(together, torch.stack(alone))


def test_a_fit_is_monotone_and_keeps_the_law_stationary() -> None:
    x = torch.randint(0, 4, (60, 4, 1), generator=cases.rng(1))
    for seed in range(5):
        model = torchem.HMM("stationary", Categorical(4, 4), Categorical(4, 4)).double()
        result = torchem.fit(model, x, seed=seed, max_iter=25, tol=0, progress=False)
        assert all(b >= a - 1e-9 * abs(a) for a, b in zip(result.history, result.history[1:], strict=False))
        close(model.initial_probs @ model.transition_matrix, model.initial_probs, rtol=1e-6, atol=1e-8)


def test_only_a_table_has_a_stationary_law() -> None:
    with pytest.raises(torchem.errors.TorchemError, match="Categorical"):
        torchem.HMM("stationary", torchem.factors.SoftmaxRegression(2, 1, 2), Categorical(2, 3))


# ---- the derivative of the joint M-step ---------------------------------------------------------------------------


def chains(law: Stationary, counts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The transition matrices of replicas, by the steps that derivatives are those of."""
    with torch.enable_grad():
        first, steps = torchem.Stats(counts=starts), torchem.Stats(counts=counts.clone().requires_grad_())
        return law._probs(law.maximize_jointly(first, steps)["logits"]).detach()


@pytest.mark.parametrize("case", ["free", "zeros", "frozen", "unseen", "empty row"])
@pytest.mark.parametrize(("k", "share"), [(2, 0.3), (4, 0.05), (4, 5.0)])
def test_the_derivative_of_the_joint_m_step_is_that_of_the_maximum(k: int, share: float, case: str) -> None:
    """By differences of fourth order in both arguments, from some start, and from the maximum, where no step gains."""
    table, law = chain(k, seed=3 * k, zeros=case == "zeros")
    if case == "frozen":
        table.freeze("probs", mask=torch.eye(k) * torch.arange(k) > 0)
    counts = torch.where(table.support, 20 * cases.rand(k, k, seed=k), 0.0)
    starts, cell = share * 20 * cases.rand(k, seed=k + 50), cases.randn(k, k, seed=9)
    way, along = torch.where(table.support, cases.randn(k, k, seed=11), 0.0), cases.randn(k, seed=12)
    if case == "unseen":  # a cell without counts, which stays so
        counts[0, 0] = way[0, 0] = 0.0
    if case == "empty row":
        counts[0] = way[0] = 0.0

    def value(counts: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        logits = law.maximize_jointly(torchem.Stats(counts=starts), torchem.Stats(counts=counts))["logits"]
        return (law._probs(logits) * cell).sum()

    step = 1e-4 * torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0], dtype=torch.float64)
    for again in (False, True):
        twin = copy.deepcopy(table)
        twin.replicate(5)
        found = chains(Stationary(twin), counts + step[:, None, None] * way, starts + step[:, None] * along)
        high, low, more, less = (found * cell).sum((-2, -1))[:4]
        truth = (8 * (high - low) - (more - less)) / 12e-4
        if again:
            slope = torch.func.jvp(value, (counts, starts), (way, along))[1].detach()
        else:
            back = torch.func.grad(value, argnums=(0, 1))(counts, starts)
            slope = (back[0] * way).sum() + (back[1] * along).sum()
        close(slope, truth, rtol=1e-6, atol=1e-7)
        assert float(truth.abs()) > 1e-4
        with torch.no_grad():
            table.logits.copy_(torch.where(table.support, found[4].clamp(min=1e-300), 1.0).log())


def test_a_cell_without_counts_does_not_stop_the_m_step() -> None:
    """Without first states the M-step is that of the table alone, whose zero counts are zeros."""
    table, law = chain(3, seed=1)
    counts = 20 * cases.rand(3, 3, seed=2)
    counts[0, 1] = 0.0
    found = law.maximize_jointly(torchem.Stats(counts=torch.zeros(3).double()), torchem.Stats(counts=counts))
    close(law._probs(found["logits"]), counts / counts.sum(-1, keepdim=True))
    assert not torch.equal(found["logits"], table.logits)


def test_a_frozen_chain_keeps_its_bits_where_derivatives_are_followed() -> None:
    table, law = chain(3, seed=1)
    table.freeze()
    counts = 20 * cases.rand(3, 3, seed=2)
    found = law.maximize_jointly(torchem.Stats(counts=counts[0]), torchem.Stats(counts=counts.requires_grad_()))
    assert torch.equal(found["logits"], table.logits)


def test_the_map_of_a_fit_at_its_fixed_point_has_the_derivative_of_differences() -> None:
    """A chain of two states, whose joint M-step gains nothing there: through the E-step too, and in float32."""
    model = torchem.HMM("stationary", Categorical(2, 2), Categorical(2, 3)).double()
    model.transition_matrix = [[0.7, 0.3], [0.4, 0.6]]
    model.emission.probs = [[0.8, 0.1, 0.1], [0.1, 0.2, 0.7]]
    x = model.sample(12, 8, generator=cases.rng(2))
    torchem.fit(model, x, init=None, max_iter=60, tol=0.0, accelerate="squarem", progress=False)
    batch, params = model.batch(x), {name: value.detach() for name, value in model.named_parameters()}
    name = "transition.logits"
    way = torch.tensor([[0.7, 0.0], [0.0, -0.4]], dtype=torch.float64)

    def image(e: torch.Tensor) -> torch.Tensor:
        new = torchem.em_map(model)(params | {name: params[name] + e * way.to(params[name])}, batch)
        return new[name].double().softmax(-1)[:, 0]

    both = torch.func.vmap(lambda e: torch.func.jvp(image, (e,), (torch.ones_like(e),)))
    value, slopes = both(1e-4 * torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0], dtype=torch.float64))[:2]
    truth = (8 * (value[0] - value[1]) - (value[2] - value[3])) / 12e-4
    assert float(truth.abs().min()) > 1e-3
    close(slopes[4], truth, rtol=1e-7, atol=1e-10)
    close(value[4], model.transition_matrix[:, 0], rtol=1e-4, atol=1e-4)
    model.float()
    params = {name: value.float() for name, value in params.items()}
    zero = torch.zeros((), dtype=torch.float64)
    close(torch.func.jvp(image, (zero,), (zero + 1,))[1], slopes[4], rtol=1e-2, atol=1e-3)
