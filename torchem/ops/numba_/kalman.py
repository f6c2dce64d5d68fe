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
            # K = S⁻¹ Lᵀ, row by row: the innermost loops go along memory.
            for i in range(k):
                for j in range(k):
                    found[i, j] = root[j, i]
                for m in range(i):
                    scale = factor[i, m]
                    for j in range(k):
                        found[i, j] -= scale * found[m, j]
                for j in range(k):
                    found[i, j] /= factor[i, i]
            if t + 1 == frames:
                break
            going = valid.shape[0] == 0 or valid[b, t + 1]
            if going:
                step = dynamics[b, t + 1 if dynamics.shape[1] > 1 else 0]
                for i in range(k):
                    for j in range(k):
                        moved[i, j] = step[j, i]
                _product(found, moved, inner, k)
            else:
                inner[:] = found
            for i in range(k):
                for j in range(k):
                    ahead[i, j] = noise[b, t + 1 if noise.shape[1] > 1 else 0, i, j] if going else 0.0
            for m in range(k):
                for i in range(k):
                    scale = inner[m, i]
                    for j in range(k):
                        ahead[i, j] += scale * inner[m, j]
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
    k, groups = first.shape[-1], step.shape[2]
    turned = np.empty((groups, k, k), step.dtype)
    for r in range(shift.shape[0]):
        out[r, 0] = first[r]
        # Frames outermost, as they lie in memory; transposed, so that the innermost loop goes along it.
        for t in range(shift.shape[1]):
            if t == 0 or step.shape[1] > 1:
                for g in range(groups):
                    for i in range(k):
                        for j in range(k):
                            turned[g, j, i] = step[r, t if step.shape[1] > 1 else 0, g, i, j]
            for n in range(shift.shape[2]):
                matrix, now = turned[which[n]], out[r, t + 1, n]
                for i in range(k):
                    now[i] = shift[r, t, n, i]
                for j in range(k):
                    scale = out[r, t, n, j]
                    for i in range(k):
                        now[i] += matrix[j, i] * scale


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
