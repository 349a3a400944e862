"""One step of half-quadratic quantization, in the order in which hqq's torch operations round.

hqq stops when the mean error of the whole matrix no longer falls, so a step goes over the whole matrix, in one pass:
codes, errors and new zero points together. Sums follow torch's order on a CPU with one thread (SumKernel.cpp: vectors
of 8, four side by side, partial sums in four levels), so that results are the same to the last bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from fewbits.kernels.lanes import EXACT

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
INLINE = {**EXACT, "inline": "always"}
ZERO = np.float32(0)
VECTOR, WIDE = 8, 32
LEVELS, BUFFER = 4, 4096
OUTLIER = np.float32(0.17)
"""Residuals up to this shrink to nothing: x^1.3 must exceed 1 / beta."""
OUTLIER_BITS = OUTLIER.view(np.int32)
PENALTY = np.float32(0.1)
"""1 / beta. hqq's default solver leaves beta where it starts."""


@njit(**INLINE)
def level_power(count: int) -> int:
    """After 2^this rows torch passes a partial sum on to the next level."""
    power = 0
    while (1 << power) < count:
        power += 1
    return max(4, power // LEVELS)


@njit(**INLINE)
def pass_on(partial: F32, done: int, power: int) -> None:
    """Move partial sums [levels, n] up, where so many rows added call for it."""
    mask = (1 << power) - 1
    if done & mask == 0:
        for j in range(1, LEVELS):
            for k in range(partial.shape[1]):
                partial[j, k] += partial[j - 1, k]
                partial[j - 1, k] = ZERO
            if done & (mask << (j * power)):
                break


@njit(**INLINE)
def add_rows(values: F32, rows: int, power: int, done: int, partial: F32) -> None:
    """Add rows of 32 of flat values to partial sums [levels, 32]; done: rows added before."""
    first = partial[0]
    for row in range(rows):
        # of slices Numba knows that no index is negative, and vector code loads them whole
        line = values[row * WIDE : (row + 1) * WIDE]
        for k in range(line.size):
            first[k] += line[k]
        pass_on(partial, done + row + 1, power)


@njit(**INLINE)
def finish(partial: F32, rest: F32, count: int, vector: int) -> np.float32:
    """torch's sum from partial sums [levels, 4 vectors] and the values that are left, fewer than make four vectors."""
    for j in range(1, partial.shape[0]):
        for k in range(partial.shape[1]):
            partial[0, k] += partial[j, k]
    whole = count // vector
    for i in range(whole):
        for k in range(vector):
            partial[0, k] += rest[i * vector + k]
    for i in range(1, 4):
        for k in range(vector):
            partial[0, k] += partial[0, i * vector + k]
    total = ZERO
    for i in range(whole * vector, count):
        total += rest[i]
    for k in range(vector):
        total += partial[0, k]
    return total


@njit(**INLINE)
def has_outliers(errors: F32) -> bool:
    """Whether one of these magnitudes is an outlier. On bits, since vector code has no maximum of floats."""
    bits = errors.view(np.int32)
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i])
    return bool(largest > OUTLIER_BITS)


@njit(**INLINE)
def take(errors: F32, pending: int, power: int, done: int, total: F32) -> int:
    """Sum the full rows of 32 among the pending errors and move the rest to the front; how many rows there were."""
    rows = pending // WIDE
    add_rows(errors, rows, power, done, total)
    for i in range(pending - rows * WIDE):
        errors[i] = errors[rows * WIDE + i]
    return rows


@njit(**INLINE)
def sum_row(drift: F32, power: int, sums: F32) -> np.float32:
    """torch's sum of contiguous values; sums: work, [levels, 32]."""
    for j in range(sums.shape[0]):
        for k in range(WIDE):
            sums[j, k] = ZERO
    rows = drift.size // WIDE
    add_rows(drift, rows, power, 0, sums)
    return finish(sums, drift[rows * WIDE :], drift.size - rows * WIDE, VECTOR)


@njit(**INLINE)
def sum_tail(drift: F32, power: int, sums: F32) -> np.float32:
    """torch's sum of a column that fills no four vectors with its neighbours; sums: work, [levels, 4]."""
    sums[:] = ZERO
    rest = drift.size - drift.size % 4
    for i in range(0, rest, 4):
        for j in range(4):
            sums[0, j] += drift[i + j]
        pass_on(sums, i // 4 + 1, power)
    return finish(sums, drift[rest:], drift.size - rest, 1)


@njit(**INLINE)
def sum_column(drift: F32, power: int, sums: F32) -> np.float32:
    """torch's sum of a column among many; sums: work, [levels, 4]."""
    sums[:] = ZERO
    for i in range(drift.size):
        sums[0, 0] += drift[i]
        pass_on(sums, i + 1, power)
    return ((sums[0, 0] + sums[1, 0]) + sums[2, 0]) + sums[3, 0]


@njit(**EXACT)
def step_rows(w: F32, scale: F32, zero: F32, top: np.float32, moved: F32, flags: U8) -> np.float32:
    """New zero points of groups that are rows.

    Args:
        w: [groups, elements].
        scale: [groups], inverse scales.
        zero: [groups].
        top: the largest code.
        moved: out, [groups], the new zero points; wrong where there are outliers.
        flags: out, uint8 [groups], whether there are.

    Returns:
        Sum of the magnitudes of the errors with the old zero points.
    """
    groups, elements = w.shape
    rows = elements // WIDE
    power, own_power = level_power(w.size // WIDE), level_power(rows)
    total = np.zeros((LEVELS, WIDE), np.float32)
    sums = np.zeros((1 if rows < 16 else LEVELS, WIDE), np.float32)
    errors, drift = np.empty(BUFFER + elements, np.float32), np.empty(elements, np.float32)
    pending, done = 0, 0
    for g in range(groups):
        s, z, line = scale[g], zero[g], w[g]
        error = errors[pending : pending + elements]
        for i in range(elements):
            x = line[i]
            t = x * s
            q = min(max(np.rint(t + z), ZERO), top)
            drift[i] = q - t
            error[i] = abs(x - (q - z) / s)
        flags[g] = has_outliers(error)
        moved[g] = sum_row(drift, own_power, sums) / np.float32(elements)
        pending += elements
        if pending >= BUFFER:
            more = take(errors, pending, power, done, total)
            done += more
            pending -= more * WIDE
    more = take(errors, pending, power, done, total)
    return finish(total, errors, pending - more * WIDE, VECTOR)


@njit(**EXACT)
def step_columns(w: F32, scale: F32, zero: F32, top: np.float32, moved: F32, flags: U8) -> np.float32:
    """`step_rows` for groups that are columns: w [elements, groups]."""
    elements, groups = w.shape
    power, own_power, tail_power = level_power(w.size // WIDE), level_power(elements), level_power(elements // 4)
    total, sums = np.zeros((LEVELS, WIDE), np.float32), np.zeros((LEVELS, groups), np.float32)
    whole = groups - groups % WIDE
    tail, own = np.empty((groups - whole, elements), np.float32), np.empty((LEVELS, 4), np.float32)
    errors, drift = np.empty(2 * BUFFER, np.float32), np.empty(BUFFER, np.float32)
    pending, done = 0, 0
    flags[:] = 0
    for row in range(elements):
        for start in range(0, groups, BUFFER):
            stop = min(start + BUFFER, groups)
            n = stop - start
            line, s, z = w[row, start:stop], scale[start:stop], zero[start:stop]
            error, first, flag = errors[pending : pending + n], sums[0, start:stop], flags[start:stop]
            for k in range(n):
                x, inverse = line[k], s[k]
                t = x * inverse
                q = min(max(np.rint(t + z[k]), ZERO), top)
                drift[k] = q - t
                error[k] = abs(x - (q - z[k]) / inverse)
            if has_outliers(error):
                for k in range(n):
                    flag[k] |= np.uint8(error[k] > OUTLIER)
            for k in range(n):
                first[k] += drift[k]
            for k in range(max(whole, start), stop):
                tail[k - whole, row] = drift[k - start]
            pending += n
            more = take(errors, pending, power, done, total)
            done += more
            pending -= more * WIDE
        pass_on(sums, row + 1, own_power)
    for j in range(1, LEVELS):
        for k in range(groups):
            sums[0, k] += sums[j, k]
    for k in range(whole):
        moved[k] = sums[0, k] / np.float32(elements)
    for k in range(whole, groups):
        moved[k] = sum_tail(tail[k - whole], tail_power, own) / np.float32(elements)
    return finish(total, errors, pending, VECTOR)


@njit(**EXACT)
def mend(
    w: F32, columns: bool, scale: F32, zero: F32, top: np.float32, flags: U8, powers: F32, outliers: F32, moved: F32
) -> int:
    """Collect the outliers of flagged groups or, their powers given, make up for them in the new zero points.

    Args:
        w: [groups, elements]; columns: whether these are columns of a matrix, which torch sums otherwise.
        scale, zero, top: as for `step_rows`.
        powers: of the outliers that an earlier call found, in its order; empty: find them.
        outliers: out, their magnitudes.
        moved: out, [groups].

    Returns:
        How many outliers there are.
    """
    groups, elements = w.shape
    whole = groups - groups % WIDE
    own_power, tail_power = level_power(elements if columns else elements // WIDE), level_power(elements // 4)
    sums, own, drift = (
        np.empty((LEVELS, WIDE), np.float32),
        np.empty((LEVELS, 4), np.float32),
        np.empty(elements, np.float32),
    )
    line, codes, left = np.empty(elements, np.float32), np.empty(elements, np.float32), np.empty(elements, np.float32)
    count = 0
    for g in range(groups):
        if flags[g] == 0:
            continue
        s, z = scale[g], zero[g]
        for i in range(elements):
            line[i] = w[g, i]
        for i in range(elements):
            x = line[i]
            q = min(max(np.rint(x * s + z), ZERO), top)
            codes[i] = q
            left[i] = x - (q - z) / s
        for i in range(elements):
            size = abs(left[i])
            if size > OUTLIER:
                if powers.size > 0:
                    size = max(size - PENALTY * powers[count], ZERO)
                    line[i] -= size if left[i] > ZERO else -size
                else:
                    outliers[count] = size
                count += 1
        if powers.size == 0:
            continue
        for i in range(elements):
            drift[i] = codes[i] - line[i] * s
        if not columns:
            total = sum_row(drift, own_power, sums)
        elif g < whole:
            total = sum_column(drift, own_power, own)
        else:
            total = sum_tail(drift, tail_power, own)
        moved[g] = total / np.float32(elements)
    return count


@njit(**EXACT)
def round_rows(w: F32, scale: F32, zero: F32, top: np.float32, codes: U8) -> None:
    """Codes, uint8 [groups, elements], of groups that are rows."""
    for g in range(w.shape[0]):
        s, z, line, out = scale[g], zero[g], w[g], codes[g]
        for i in range(line.size):
            out[i] = np.uint8(np.int32(min(max(np.rint(line[i] * s + z), ZERO), top)))


@njit(**EXACT)
def round_columns(w: F32, scale: F32, zero: F32, top: np.float32, codes: U8) -> None:
    """Codes, uint8 [elements, groups], of groups that are columns."""
    for row in range(w.shape[0]):
        line, out = w[row], codes[row]
        for k in range(line.size):
            out[k] = np.uint8(np.int32(min(max(np.rint(line[k] * scale[k] + zero[k]), ZERO), top)))
