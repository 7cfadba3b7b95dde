"""beta and the learning rate by optimizer step, against values worked out by hand or in
exact fractions."""

import math
from fractions import Fraction

import pytest

from dsvae.config import BetaConfig, Phase2Config, PhaseConfig
from dsvae.objective.schedules import beta_at, free_bits_at, lr_factor, next_beta


def betas(steps, **fields):
    return [beta_at(step, steps, BetaConfig(**fields)) for step in range(steps)]


def factors(**fields):
    phase = PhaseConfig(**fields)
    return [lr_factor(step, phase) for step in range(phase.steps)]


def test_constant_is_its_value_from_the_first_step_on():
    assert betas(3, kind="constant", max=0.4, zero=0.5, rise=0.5) == [0.4, 0.4, 0.4]


def test_linear_by_hand():
    expected = [0, 0, 0, 0.4, 0.8, 1.2, 1.6, 2, 2, 2]
    assert betas(10, kind="linear", max=2.0, zero=0.2, rise=0.5) == pytest.approx(expected)


def test_linear_without_a_zero_share_starts_at_0_and_without_a_rise_jumps():
    assert betas(4, kind="linear", zero=0.0, rise=1.0) == pytest.approx([0, 0.25, 0.5, 0.75])
    assert betas(4, kind="linear", zero=0.5, rise=0.0) == [0, 0, 1, 1]
    assert betas(4, kind="linear", zero=0.0, rise=0.0) == [1, 1, 1, 1]


def test_cyclic_by_hand():
    assert betas(12, kind="cyclic", cycles=3, zero=0.25, rise=0.5) == pytest.approx(
        [0, 0, 0.5, 1] * 3
    )


def test_cyclic_by_hand_where_the_cycles_do_not_divide_the_steps():
    expected = [0, 0.4, 0.8, 0.2, 0.6, 0, 0.4, 0.8, 0.2, 0.6]  # cycles begin at 0, 2.5, 5 and 7.5
    assert betas(10, kind="cyclic", cycles=4, zero=0.0, rise=1.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "cycles"), [(1000, 30), (997, 4), (1000, 7), (90, 27), (20000, 10)]
)
def test_cyclic_is_the_exact_fraction_at_every_step(steps, cycles):
    """In floating point the first step of a cycle may look like the end of the one
    before, where beta is `max`."""
    zero, rise = Fraction(1, 2), Fraction(1, 4)
    wrong = []
    for step, got in enumerate(betas(steps, kind="cyclic", cycles=cycles, zero=0.5, rise=0.25)):
        position = Fraction(step * cycles, steps) % 1
        expected = float(min(1, max(0, (position - zero) / rise)))
        if abs(got - expected) > 1e-6:
            wrong.append((step, got, expected))
    assert wrong == []


def test_cyclic_falls_once_between_two_cycles():
    values = betas(1003, kind="cyclic", cycles=6, zero=0.1, rise=0.3)
    falls = [i + 1 for i in range(1002) if values[i + 1] < values[i]]
    assert falls == [math.ceil(Fraction(1003 * cycle, 6)) for cycle in range(1, 6)]


def test_a_rise_is_continuous():
    values = betas(500, kind="linear", max=3.0, zero=0.1, rise=0.4)
    assert max(abs(b - a) for a, b in zip(values, values[1:], strict=False)) == pytest.approx(
        3.0 / (0.4 * 500)
    )
    assert values == sorted(values)


@pytest.mark.parametrize("kind", ["constant", "linear", "cyclic"])
@pytest.mark.parametrize(
    ("zero", "rise"), [(0, 0), (0, 1), (1, 0), (0.1, 0.2), (0.3, 0.7), (0.35, 0.45)]
)
def test_beta_stays_within_0_and_max(kind, zero, rise):
    for steps in (1, 2, 7, 10, 333):
        for value in betas(steps, kind=kind, max=0.3, zero=zero, rise=rise, cycles=3):
            assert 0 <= value <= 0.3 + 1e-15


@pytest.mark.parametrize("steps", [1, 7, 100, 1300])
@pytest.mark.parametrize("percent", range(0, 100, 7))
def test_free_bits_are_off_in_the_last_share_of_the_steps(steps, percent):
    """In floating point, 0.29 * 100 is less than 29."""
    phase = Phase2Config(steps=steps, free_bits=0.5, release=percent / 100)
    values = [free_bits_at(step, phase) for step in range(steps)]
    off = round(Fraction(percent * steps, 100))
    assert values == [0.5] * (steps - off) + [0.0] * off


def test_warm_up_begins_above_0_and_ends_at_the_peak():
    assert factors(steps=5, warmup_steps=3, lr_schedule="constant") == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1]
    )


def test_constant_learning_rate():
    assert factors(steps=4, lr_schedule="constant") == [1, 1, 1, 1]


def test_linear_fall_reaches_0_one_step_behind_the_last():
    assert factors(steps=6, warmup_steps=2, lr_schedule="linear") == pytest.approx(
        [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]
    )
    assert lr_factor(6, PhaseConfig(steps=6, warmup_steps=2, lr_schedule="linear")) == 0


def test_fall_in_a_share_of_the_steps():
    late = {"steps": 10, "warmup_steps": 2, "lr_decay": 0.5}
    assert factors(lr_schedule="linear", **late) == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    half = math.sqrt(0.5) / 2
    assert factors(lr_schedule="cosine", **late)[-4:] == pytest.approx(
        [1, 0.5 + half, 0.5, 0.5 - half]
    )


def test_cosine_fall_by_hand():
    half = math.sqrt(0.5) / 2
    assert factors(steps=4, lr_schedule="cosine") == pytest.approx([1, 0.5 + half, 0.5, 0.5 - half])
    assert lr_factor(4, PhaseConfig(steps=4, lr_schedule="cosine")) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 50])
def test_every_step_learns_and_none_above_the_peak(schedule, warmup):
    values = factors(steps=50, warmup_steps=warmup, lr_schedule=schedule)
    assert 0 < min(values) <= max(values) <= 1
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    if schedule != "constant" and warmup < 50:
        assert values[-1] <= 1 / (50 - warmup) + 1e-12


def test_the_target_is_reached_on_a_plant():
    """KL = 20 (1 - beta): the KL settles at the target, and beta stays inside its
    bounds even where the target cannot be reached."""
    settings = BetaConfig(kind="target", target=8.0, gain=1e-2)
    beta = 0.0
    for _ in range(500):
        beta = next_beta(beta, 20 * (1 - beta), settings)
    assert 20 * (1 - beta) == pytest.approx(8.0, abs=1e-6)
    for kl, bound in ((100.0, 1.0), (0.0, 0.0)):
        for _ in range(500):
            beta = next_beta(beta, kl, settings)
        assert beta == bound
    # A KL far above the target moves beta by no more than 8 nats would.
    assert next_beta(0.0, 100.0, settings) == next_beta(0.0, 16.0, settings) == pytest.approx(0.08)
    # Nothing has wound up: the first step in the other direction moves it.
    assert next_beta(0.0, 9.0, settings) == pytest.approx(0.01)
