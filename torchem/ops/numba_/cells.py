"""Sums over cells of tables as compiled loops on the CPU: no index is written to memory."""

from torchem.ops.numba_ import vectors as vec


@vec.kernel
def add(total, table, own, base, kind, offset):
    """``total[r, own_i, c] += table[r, base_i + offset[kind_i, c]]``."""
    for r in range(total.shape[0]):
        for i in range(len(own)):
            u, b, k = own[i], base[i], kind[i]
            for c in range(total.shape[2]):
                total[r, u, c] += table[r, b + offset[k, c]]


@vec.kernel
def count(total, share, own, base, kind, offset):
    """``total[r, base_i + offset[kind_i, c]] += share[r, own_i, c]``."""
    for r in range(total.shape[0]):
        for i in range(len(own)):
            u, b, k = own[i], base[i], kind[i]
            for c in range(share.shape[2]):
                total[r, b + offset[k, c]] += share[r, u, c]
