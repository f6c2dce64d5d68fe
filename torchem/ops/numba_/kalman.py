"""Compiled recursions of `torchem.ops.kalman` for CPU: the same steps, one group or sequence after the other."""

import numpy as np

from torchem.ops.numba_.vectors import compiled, kernel


@compiled
def _factorised(matrix, out, k):
    """Lower Cholesky factor of a matrix; NaN where there is none."""
    for i in range(k):
        for j in range(i + 1):
            total = matrix[i, j]
            for m in range(j):
                total -= out[i, m] * out[j, m]
            out[i, j] = np.sqrt(total) if i == j else total / out[j, j]
        for j in range(i + 1, k):
            out[i, j] = 0.0


@compiled
def _product(left, right, out, k):
    """left · right."""
    for i in range(k):
        for j in range(k):
            out[i, j] = 0.0
        for m in range(k):
            scale = left[i, m]
            for j in range(k):
                out[i, j] += scale * right[m, j]


@kernel
def riccati(first, dynamics, noise, node, valid, roots, inners, factors):
    """Roots L of predicted covariances, K of filtered ones and S, of each group.

    Args:
        first: ``[B, L, L]`` roots of the first frame.
        dynamics: ``[B, T or 1, L, L]``.
        noise: ``[B, T or 1, L, L]``.
        node: ``[B, T or 1, L, L]``, J.
        valid: ``[B, T]``, or empty where all frames are.
        roots: ``[T, B, L, L]``, written.
        inners: ``[T, B, L, L]``, written.
        factors: ``[T, B, L, L]``, written.
    """
    frames, k = roots.shape[0], first.shape[-1]
    inner, moved, ahead = np.empty_like(first[0]), np.empty_like(first[0]), np.empty_like(first[0])
    for b in range(first.shape[0]):
        for i in range(k):
            for j in range(k):
                roots[0, b, i, j] = first[b, i, j]
        for t in range(frames):
            root, factor, found = roots[t, b], factors[t, b], inners[t, b]
            # S Sᵀ = I + LᵀJL
            _product(node[b, t if node.shape[1] > 1 else 0], root, moved, k)
            for i in range(k):
                for j in range(i + 1):
                    total = 1.0 if i == j else 0.0
                    for m in range(i, k):
                        total += root[m, i] * moved[m, j]
                    ahead[i, j] = total
            _factorised(ahead, factor, k)
            # K = S⁻¹ Lᵀ
            for i in range(k):
                for j in range(k):
                    total = root[j, i]
                    for m in range(i):
                        total -= factor[i, m] * found[m, j]
                    found[i, j] = total / factor[i, i]
            if t + 1 == frames:
                break
            going = valid.shape[0] == 0 or valid[b, t + 1]
            if going:
                step = dynamics[b, t + 1 if dynamics.shape[1] > 1 else 0]
                for i in range(k):
                    for j in range(k):
                        total = 0.0
                        for m in range(k):
                            total += found[i, m] * step[j, m]
                        inner[i, j] = total
            else:
                inner[:] = found
            for i in range(k):
                for j in range(i + 1):
                    total = noise[b, t + 1 if noise.shape[1] > 1 else 0, i, j] if going else 0.0
                    for m in range(k):
                        total += inner[m, i] * inner[m, j]
                    ahead[i, j] = total
            _factorised(ahead, roots[t + 1, b], k)


@kernel
def affine(step, shift, first, which, out):
    """x_t = F_t x_{t−1} + k_t of each sequence.

    Args:
        step: ``[R, T or 1, G, L, L]``.
        shift: ``[R, T, N, L]``.
        first: ``[R, N, L]``, before them.
        which: ``[N]`` group of each sequence.
        out: ``[R, T + 1, N, L]``, written.
    """
    k = first.shape[-1]
    for r in range(shift.shape[0]):
        out[r, 0] = first[r]
        # Frames outermost, as they lie in memory.
        for t in range(shift.shape[1]):
            matrices = step[r, t if step.shape[1] > 1 else 0]
            for n in range(shift.shape[2]):
                matrix = matrices[which[n]]
                for i in range(k):
                    total = shift[r, t, n, i]
                    for j in range(k):
                        total += matrix[i, j] * out[r, t, n, j]
                    out[r, t + 1, n, i] = total


@kernel
def congruent(step, shift, first, out):
    """P_t = F_t P_{t−1} F_tᵀ + D_t of each group.

    Args:
        step: ``[R, T or 1, G or 1, L, L]``.
        shift: ``[R, T, G, L, L]``.
        first: ``[R, G, L, L]``, before them.
        out: ``[R, T + 1, G, L, L]``, written.
    """
    k = first.shape[-1]
    moved = np.empty_like(first[0, 0])
    for r in range(shift.shape[0]):
        for g in range(shift.shape[2]):
            out[r, 0, g] = first[r, g]
            for t in range(shift.shape[1]):
                matrix = step[r, t if step.shape[1] > 1 else 0, g if step.shape[2] > 1 else 0]
                now = out[r, t + 1, g]
                _product(matrix, out[r, t, g], moved, k)
                for i in range(k):
                    for j in range(k):
                        total = shift[r, t, g, i, j]
                        for m in range(k):
                            total += moved[i, m] * matrix[j, m]
                        now[i, j] = total
