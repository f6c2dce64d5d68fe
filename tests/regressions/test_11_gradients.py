"""Gradients, and theirs, are finite and zero where nothing can move: at −inf, in padding, under weights of zero."""

import pytest
import torch

import torchem
from tests.regressions.common import rand, randn
from torchem.ops import chain, scan


@pytest.fixture(params=["compiled", "scan"], autouse=True)
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "scan":
        monkeypatch.setattr(chain, "chain_kernel", lambda emission: scan)


def case(device: torch.device) -> tuple[torchem.GaussianHMM, torchem.Batch]:
    """Forbidden steps and starts, states ruled out by evidence, a sequence that cannot be, padding, zero weights."""
    model = torchem.GaussianHMM(3, 2, "full").double().to(device)
    model.means = randn(3, 2, seed=1)
    model.restrict(torchem.masks.left_right(3))
    model.initial_probs = [0.6, 0.4, 0.0]
    evidence = torch.zeros(5, 4, 3, dtype=torch.float64)
    evidence[0, 1, 0] = evidence[1, :, 2] = evidence[2, 2] = -torch.inf
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    lengths = torch.tensor([4, 3, 4, 1, 2])
    batch = torchem.Batch(randn(5, 4, 2, seed=2), evidence=evidence, weight=weight, lengths=lengths)
    return model, batch.to(device)


def total(model: torchem.HMM, batch: torchem.Batch) -> torch.Tensor:
    value = model.log_prob(batch)
    assert batch.weight is not None
    return (torch.where(batch.weight > 0, value, 0.0) * batch.weight).sum()


def test_of_the_likelihood(device: torch.device) -> None:
    model, batch = case(device)
    x = batch.x.clone().requires_grad_()
    evidence = batch.evidence.clone().requires_grad_()  # pyright: ignore
    moved = torchem.Batch(x, evidence=evidence, weight=batch.weight, lengths=batch.lengths)
    assert model.log_prob(moved)[2] == -torch.inf
    wanted = [x, evidence, *model.parameters()]
    grads = torch.autograd.grad(total(model, moved), wanted, create_graph=True)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][evidence == -torch.inf] == 0).all()
    for n, length in enumerate([4, 3, 0, 1, 0]):
        assert (grads[0][n, length:] == 0).all()
        assert (grads[1][n, length:] == 0).all()
    # The score of a table moves only within its support.
    assert (grads[2 + list(dict(model.named_parameters())).index("transition.logits")].tril(-1) == 0).all()
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)
    assert all(g.isfinite().all() for g in second)
    assert (second[1][evidence == -torch.inf] == 0).all()


def test_twice_by_finite_differences(device: torch.device) -> None:
    model, batch = case(device)
    keep = torch.tensor([0, 1, 3, 4], device=device)
    batch = batch[keep]
    names = list(dict(model.named_parameters()))
    start = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def value(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        moved = (batch.with_x(x),)
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), moved)

    x = batch.x.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (x, *start), fast_mode=True)
    assert torch.autograd.gradgradcheck(value, (x, *start), fast_mode=True, atol=1e-4)


def test_of_an_em_iteration(device: torch.device) -> None:
    """The EM map of a batch with sequences that do not count: they have no gradient, and spoil no other."""
    model, batch = case(device)
    x = batch.x.clone().requires_grad_()
    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    new = torchem.em_map(model)(start, batch.with_x(x))
    loss = sum((value.softmax(-1) if "logits" in name else value).square().sum() for name, value in new.items())
    grads = torch.autograd.grad(loss, [x, *start.values()])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][[2, 4]] == 0).all()
    assert (grads[0][1, 3:] == 0).all()
    assert (grads[0][0] != 0).any()


def test_of_a_step_that_is_nearly_impossible(device: torch.device) -> None:
    """Probabilities that underflow have gradients all the same."""
    model = torchem.GaussianHMM(2, 1).double().to(device)
    model.means = [[0.0], [60.0]]
    with torch.no_grad():
        model.transition.logits.copy_(torch.tensor([[0.0, -900.0], [-900.0, 0.0]]))
    x = torch.cat([0.1 * rand(20, 1), 60 + 0.1 * rand(20, 1)]).to(device).requires_grad_()
    value = model.log_prob(x)
    grads = torch.autograd.grad(value.sum(), [x, *model.parameters()])
    assert all(g.isfinite().all() for g in grads)
    assert float(value.detach()) == pytest.approx(-900, abs=100)
