"""Laws of the paired bootstrap."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnn2bin.errors import DataError, UsageError
from rnn2bin.evaluation.bootstrap import MAX_BLOCKS, Drop, paired_drop


@st.composite
def measurements(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Totals of two networks over the same sequences, and their token counts."""
    n = draw(st.integers(1, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale, bias = draw(st.floats(0.01, 100)), draw(st.floats(-1, 1))
    weights = generator.integers(1, 200, n).astype(float)
    teacher = weights * generator.random(n) * scale
    return teacher, teacher + weights * (generator.normal(size=n) + bias) * scale * 0.1, weights


@settings(deadline=None, max_examples=50)
@given(measurements(), st.booleans())
def test_identical_networks_lose_exactly_nothing(data: tuple[np.ndarray, ...], higher: bool) -> None:
    teacher, _, weights = data
    drop = paired_drop(teacher, teacher, weights=weights, higher_is_better=higher, resamples=50)
    assert drop == Drop(0.0, 0.0, (0.0, 0.0), teacher.size)
    assert "-0.0" not in repr(drop)


@settings(deadline=None, max_examples=50)
@given(measurements(), st.booleans())
def test_swapping_the_networks_or_the_direction_negates(data: tuple[np.ndarray, ...], higher: bool) -> None:
    teacher, student, weights = data
    drop = paired_drop(teacher, student, weights=weights, higher_is_better=higher, resamples=101)
    for other in (
        paired_drop(student, teacher, weights=weights, higher_is_better=higher, resamples=101),
        paired_drop(teacher, student, weights=weights, higher_is_better=not higher, resamples=101),
    ):
        assert other.value == -drop.value
        assert other.ci95 == pytest.approx((-drop.ci95[1], -drop.ci95[0]), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(measurements(), st.booleans(), st.floats(-10, 10))
def test_a_constant_loss_per_token_moves_value_and_interval_by_itself(data: tuple[np.ndarray, ...], higher: bool, shift: float) -> None:
    teacher, student, weights = data
    drop = paired_drop(teacher, student, weights=weights, higher_is_better=higher, resamples=101)
    sign = -1 if higher else 1
    worse = paired_drop(teacher, student + sign * shift * weights, weights=weights, higher_is_better=higher, resamples=101)
    both = paired_drop(teacher + shift * weights, student + shift * weights, weights=weights, higher_is_better=higher, resamples=101)
    moved = (drop.value + shift, *(end + shift for end in drop.ci95))
    assert (worse.value, *worse.ci95) == pytest.approx(moved, rel=1e-7, abs=1e-9)
    assert (both.value, *both.ci95) == pytest.approx((drop.value, *drop.ci95), rel=1e-7, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(measurements(), st.floats(0.1, 10))
def test_the_unit_of_the_metric_scales_the_drop_and_leaves_the_relative_drop(data: tuple[np.ndarray, ...], factor: float) -> None:
    teacher, student, weights = data
    one = paired_drop(teacher, student, weights=weights, higher_is_better=True, resamples=51)
    many = paired_drop(factor * teacher, factor * student, weights=weights, higher_is_better=True, resamples=51)
    assert (many.value, *many.ci95) == pytest.approx([factor * x for x in (one.value, *one.ci95)], rel=1e-7, abs=1e-9)
    assert many.relative == pytest.approx(one.relative, rel=1e-7, abs=1e-9)


@settings(deadline=None, max_examples=100)
@given(measurements(), st.booleans())
def test_the_interval_holds_the_value(data: tuple[np.ndarray, ...], higher: bool) -> None:
    teacher, student, weights = data
    drop = paired_drop(teacher, student, weights=weights, higher_is_better=higher, resamples=400)
    slack = 1e-9 * (1 + abs(drop.value))
    assert drop.ci95[0] - slack <= drop.value <= drop.ci95[1] + slack


@pytest.mark.parametrize("n", [300, 3 * MAX_BLOCKS + 7])  # each sequence by itself, and in random groups
def test_the_interval_covers_the_truth_about_95_times_in_100(n: int) -> None:
    generator = np.random.default_rng(3)
    hits = 0
    for trial in range(100):
        teacher = generator.random(n)
        drop = paired_drop(teacher, teacher - 0.05 + generator.normal(size=n), higher_is_better=True, resamples=300, seed=trial)
        hits += drop.ci95[0] <= 0.05 <= drop.ci95[1]
        assert np.diff(drop.ci95)[0] == pytest.approx(2 * 1.96 / np.sqrt(n), rel=0.35)
    assert 86 <= hits <= 100


def test_known_numbers() -> None:
    teacher, student, tokens = np.array([8.0, 1.0]), np.array([6.0, 1.0]), np.array([8, 2])
    drop = paired_drop(teacher, student, weights=tokens, higher_is_better=True)
    assert [drop.value, drop.relative, drop.n] == pytest.approx([0.2, 2 / 9, 2])
    assert drop.ci95 == pytest.approx((0.0, 0.25))  # the resamples are {2nd, 2nd}, {one of each}, {1st, 1st}
    assert paired_drop(teacher, student, weights=tokens, higher_is_better=False).value == pytest.approx(-0.2)


def test_the_seed_decides() -> None:
    generator = np.random.default_rng(0)
    teacher, student = generator.random((2, 40))
    one, same, other = (paired_drop(teacher, student, higher_is_better=True, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.ci95 != other.ci95


def test_empty_sequences_do_not_count() -> None:
    generator = np.random.default_rng(0)
    teacher, student = generator.random((2, 40))
    padded = [np.concatenate([values, np.zeros(5)]) for values in (teacher, student, np.ones(40))]
    with_empty = paired_drop(padded[0], padded[1], weights=padded[2], higher_is_better=True)
    assert with_empty == paired_drop(teacher, student, higher_is_better=True)


def test_a_teacher_at_zero_has_no_relative_drop() -> None:
    assert paired_drop(np.zeros(3), np.ones(3), higher_is_better=False).relative is None


@pytest.mark.parametrize(
    ("teacher", "student", "weights", "message"),
    [
        ([], [], None, "no held-out sequence"),
        ([1.0], [1.0, 2.0], None, "one \\(N,\\) shape"),
        ([1.0], [1.0], [1, 1], "one \\(N,\\) shape"),
        ([np.nan], [1.0], None, "finite"),
        ([1.0], [1.0], [-1], "negative"),
        ([1.0], [1.0], [0], "weight 0"),
    ],
)
def test_what_does_not_fit_is_refused(teacher: list[float], student: list[float], weights: list[int] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        paired_drop(np.array(teacher), np.array(student), weights=None if weights is None else np.array(weights), higher_is_better=True)


def test_no_resamples_is_refused() -> None:
    with pytest.raises(UsageError, match="resamples"):
        paired_drop(np.ones(1), np.ones(1), higher_is_better=True, resamples=0)


def test_a_million_sequences_fit_in_memory() -> None:
    generator = np.random.default_rng(0)
    teacher, student = generator.random((2, 1_000_000))
    tracemalloc.start()
    started = time.perf_counter()
    drop = paired_drop(teacher, student, higher_is_better=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drop.n == 1_000_000
    assert peak < 120e6
    assert time.perf_counter() - started < 30
