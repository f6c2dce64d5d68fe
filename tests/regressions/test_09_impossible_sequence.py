"""A sequence of probability zero is −inf in every kernel, flagged, without NaN anywhere."""

import pytest
import torch

import torchem
from tests.laws import cases
from torchem.errors import InvalidArgument
from torchem.factors import Categorical
from torchem.ops import chain, scan


def model() -> torchem.HMM:
    """State 0 emits 0 or 1, state 1 emits 1 or 2, and there is no way back from 1."""
    m = torchem.HMM(Categorical(2), Categorical(2, 2), Categorical(2, 3)).double()
    m.transition_matrix = [[0.5, 0.5], [0.0, 1.0]]
    m.emission.probs = [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]  # pyright: ignore
    return m


DATA = torch.tensor([[[0], [1], [2]], [[2], [1], [0]], [[0], [0], [1]]])


@pytest.mark.parametrize("compiled", [True, False])
def test_log_prob_posterior_and_paths(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(chain, "chain_kernel", lambda emission: scan)
    m = model()
    value = m.log_prob(DATA)
    assert (value == -torch.inf).tolist() == [False, True, False]
    posterior = m.posterior(DATA)
    assert posterior.isfinite().all()
    assert (posterior[1] == 0).all()
    assert (posterior[0].sum(-1) - 1).abs().max() < 1e-12
    assert (m.most_likely(DATA)[1] == -1).all()
    assert (m.filter(DATA)[1] == 0).all()
    assert (m.sample_posterior(DATA, 3)[:, 1] == -1).all()
    scores, paths = m.best_paths(DATA, 2)
    assert (scores[1] == -torch.inf).all()
    assert (paths[1] == -1).all()
    grads = torch.autograd.grad(torch.where(value.isfinite(), value, 0.0).sum(), list(m.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_the_reference_agrees() -> None:
    m = model()
    batch = m.batch(DATA)
    potentials = {
        "initial": m.initial.log_table(batch), "transition": m.transition.log_table(batch),
        "emission": m.emission.log_potential(batch),
    }  # fmt: skip
    assert (m.log_partition(potentials, batch) == -torch.inf).tolist() == [False, True, False]


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_fit_names_it_unless_it_does_not_count(weight: float) -> None:
    m = model()
    weights = torch.tensor([1.0, weight, 1.0])
    if weight:
        with pytest.raises(InvalidArgument, match="sequence 1"):
            torchem.fit(m, DATA, weights=weights, init=None, progress=False)
        return
    result = torchem.fit(m, DATA, weights=weights, init=None, tol=0, max_iter=5, progress=False)
    assert result.bound > -torch.inf
    assert all(p.isfinite().all() for p in m.parameters())


def test_among_sequences_of_other_lengths_it_is_named_by_its_own_number() -> None:
    m = model()
    long = [torch.zeros(n, 1, dtype=torch.long) for n in (3, 400_000, 5)]
    with pytest.raises(InvalidArgument, match="sequence 3"):
        torchem.fit(m, [*long, DATA[1]], init=None, progress=False, max_iter=1)


def test_random_zeros_never_give_nan() -> None:
    for seed in range(20):
        table, first, emission = (
            cases.rand(*shape, seed=seed + i) for i, shape in enumerate([(1, 3, 3), (1, 3), (6, 4, 3)])
        )
        parts = [torch.where(cases.rand(*p.shape, seed=seed + 9) < 0.6, -torch.inf, p.log()) for p in (table, first)]
        emission = torch.where(cases.rand(*emission.shape, seed=seed + 11) < 0.3, -torch.inf, emission.log())
        log_z, *expected = chain.expectations(parts[1], parts[0], emission)
        assert not log_z.isnan().any()
        assert all(e.isfinite().all() for e in expected)
        assert (expected[2][log_z == -torch.inf] == 0).all()
