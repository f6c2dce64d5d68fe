"""The stationary initial law, and its M-step, which is joint with the transition's."""

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
