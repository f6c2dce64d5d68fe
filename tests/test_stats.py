"""Statistics are a vector space, a dictionary and a pytree."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from torchem import Stats
from torchem.errors import InvalidArgument


def stats(seed: int = 0, version: int = 0) -> Stats:
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    inner = Stats(count=leaf(3), second=leaf(2, 2), shared={"second"}, version=version)
    return Stats(component=inner, mixing=Stats(counts=leaf(3)), entropy=leaf())


def equal(a: Stats, b: Stats) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for x, y in zip(a.leaves(), b.leaves(), strict=True))


def near(a: Stats, b: Stats) -> None:
    assert a.keys() == b.keys()
    for x, y in zip(a.leaves(), b.leaves(), strict=True):
        torch.testing.assert_close(x, y)


numbers = st.floats(-10, 10)


@given(numbers, numbers, st.integers(0, 99))
def test_axioms_of_a_vector_space(p: float, q: float, seed: int) -> None:
    a, b, c = stats(seed), stats(seed + 1), stats(seed + 2)
    near(a + b, b + a)
    near((a + b) + c, a + (b + c))
    near((a - b) + b, a)
    near((a + b) * p, a * p + b * p)
    near(a * (p + q), a * p + a * q)
    near(p * a, a * p)
    near(a * 1.0, a)
    near(a.lerp(b, p), a * (1 - p) + b * p)
    assert equal(a.lerp(b, 0.0), a)
    assert equal(a.lerp(b, 1.0), b)
    assert all((leaf == 0).all() for leaf in (a - a).leaves())


def test_declarations_survive_every_operation() -> None:
    a, b = stats(1, version=4), stats(2, version=4)
    for c in (a + b, a - b, a * 2.0, 2.0 * a, a.lerp(b, 0.1), a.map(torch.abs), a.unflatten(a.flatten())):
        assert isinstance(c, Stats)
        assert isinstance(c["component"], Stats)
        assert c["component"].shared == {"second"}
        assert c["component"].version == 4


def test_nothing_is_changed_in_place() -> None:
    a, b = stats(1), stats(2)
    kept = a.map(torch.clone)
    a + b, a - b, a * 3.0, a.lerp(b, 0.5), a.flatten(), a.unflatten(a.flatten() * 2)
    assert equal(a, kept)


def test_flat_round_trip() -> None:
    a = stats(3)
    flat = a.flatten()
    assert flat.dtype == torch.float64
    assert flat.shape == (3 + 4 + 3 + 1,)
    assert equal(a.unflatten(flat), a)
    near(a.unflatten(a.flatten() + stats(4).flatten()), a + stats(4))


def test_order_of_names_does_not_matter() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    a, b = Stats(x=one, y=two), Stats(y=two + 5, x=one + 1)
    near(a + b, Stats(x=one + one + 1, y=two + 5))


@pytest.mark.parametrize("function", [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a.lerp(b, 0.5)])
def test_other_names_or_origins_are_refused(function) -> None:
    with pytest.raises(InvalidArgument, match="leaves"):
        function(Stats(x=torch.ones(1)), Stats(y=torch.ones(1)))
    with pytest.raises(InvalidArgument, match="origin"):
        function(stats(0, version=1), stats(0, version=2))


def test_select_keeps_shared_leaves() -> None:
    a = stats(5)["component"]
    for index in ([2, 0], torch.tensor([2, 0])):
        b = a.select(index)
        assert torch.equal(b["count"], a["count"][[2, 0]])
        assert torch.equal(b["second"], a["second"])
    mask = torch.tensor([True, False, True])
    assert torch.equal(a.select(mask)["count"], a["count"][mask])


def test_is_a_pytree() -> None:
    a = stats(6, version=3)
    leaves, spec = pytree.tree_flatten(a)
    assert len(leaves) == 4
    b = pytree.tree_unflatten(leaves, spec)
    assert equal(a, b)
    assert b["component"].shared == {"second"}
    assert b["component"].version == 3
    doubled = pytree.tree_map(lambda leaf: leaf * 2, a)
    near(doubled, a * 2.0)


def test_passes_through_transforms() -> None:
    a, b = stats(7), stats(8)
    both = a.map(lambda x, y: torch.stack([x, y]), b)
    totals = torch.func.vmap(lambda s: s * 2.0 + s)(both)
    near(totals.map(lambda leaf: leaf[1]), b * 3.0)
    slope = torch.func.grad(lambda s: sum(leaf.square().sum() for leaf in s.leaves()))(a)
    near(slope, a * 2.0)


def test_weights_per_replica_would_be_ambiguous_but_scalars_are_not() -> None:
    near(stats(9) * torch.tensor(0.5, dtype=torch.float64), stats(9) * 0.5)
