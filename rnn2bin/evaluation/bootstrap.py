"""The drop of a metric from teacher to student, with a paired bootstrap interval over held-out sequences (Efron 1979, percentiles)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rnn2bin.errors import DataError, UsageError

Floats = NDArray[np.float64]

# Above this many sequences, random groups of them are resampled instead: groups of independent sequences have the same
# variance for the sum, the interval's width is then known to about 1/sqrt(2 * 8192) < 1 %, and memory and time stop growing.
MAX_BLOCKS = 8192
# Draws held at once: 2^20 indices and twice as many gathered values, about 24 MB.
CHUNK_DRAWS = 1 << 20


@dataclass(frozen=True)
class Drop:
    """What the student lost. Positive is worse, whichever way the metric points; `relative` is None where the teacher's metric is 0."""

    value: float
    relative: float | None
    ci95: tuple[float, float]
    n: int


def paired_drop(
    teacher: NDArray[np.floating],
    student: NDArray[np.floating],
    *,
    weights: NDArray[np.number] | None = None,
    higher_is_better: bool,
    resamples: int = 2000,
    seed: int = 0,
) -> Drop:
    """Drop of metric = sum(totals) / sum(weights) from teacher to student, both measured on the same sequences.

    teacher, student: (N,) totals of the metric over each sequence; weights: (N,) what each total counts (tokens), default 1.
    Sequences of weight 0 hold nothing and are left out; `n` counts the others. Raises DataError where the arrays do not fit.
    """
    if resamples < 1:
        raise UsageError(f"resamples: {resamples} is less than 1")
    totals, counts = _checked(teacher, student, weights)
    worse = totals[0] - totals[1] if higher_is_better else totals[1] - totals[0]
    value = float(worse.sum() / counts.sum()) + 0.0  # + 0.0: no "-0.0" in a report
    lo, hi = np.quantile(_resampled(worse, counts, resamples=resamples, seed=seed), (0.025, 0.975)) + 0.0
    return Drop(value, _relative(value, float(totals[0].sum() / counts.sum())), (float(lo), float(hi)), counts.size)


def _relative(value: float, base: float) -> float | None:
    if value == 0:
        return 0.0
    return value / abs(base) if base else None


def _checked(teacher: NDArray[np.floating], student: NDArray[np.floating], weights: NDArray[np.number] | None) -> tuple[Floats, Floats]:
    """Totals (2, N) and counts (N,) of the sequences that count, in float64."""
    first, second = np.asarray(teacher, np.float64), np.asarray(student, np.float64)
    counts = np.ones(first.shape) if weights is None else np.asarray(weights, np.float64)
    if first.ndim != 1 or first.shape != second.shape or first.shape != counts.shape:
        raise DataError(f"paired drop: teacher {first.shape}, student {second.shape} and weights {counts.shape} must be one (N,) shape")
    totals = np.stack([first, second])
    reasons = []
    if not (np.isfinite(totals).all() and np.isfinite(counts).all()):
        reasons.append("paired drop: totals and weights must be finite; a network whose metric is not finite cannot be compared")
    if (counts < 0).any() or (totals[:, counts == 0] != 0).any():
        reasons.append("paired drop: weights must not be negative, and a sequence of weight 0 must have a total of 0")
    if not (counts > 0).any():
        reasons.append("paired drop: there is no held-out sequence to measure on")
    if reasons:
        raise DataError(*reasons)
    return totals[:, counts > 0], counts[counts > 0]


def _resampled(worse: Floats, counts: Floats, *, resamples: int, seed: int) -> Floats:
    """The drop in each of `resamples` draws with replacement, (resamples,)."""
    generator = np.random.default_rng(seed)
    if worse.size > MAX_BLOCKS:
        block = generator.permutation(worse.size) % MAX_BLOCKS  # random: neighbours in a file are seldom independent
        worse, counts = (np.bincount(block, values, MAX_BLOCKS).astype(np.float64) for values in (worse, counts))
    drops = np.empty(resamples)
    rows = max(1, CHUNK_DRAWS // worse.size)
    for start in range(0, resamples, rows):
        # (rows, N) picks; the teacher's and the student's total of a sequence are always drawn together
        picks = generator.integers(worse.size, size=(min(rows, resamples - start), worse.size))
        drops[start : start + rows] = worse[picks].sum(1) / counts[picks].sum(1)
    return drops
