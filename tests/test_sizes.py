"""Integer arithmetic of launches: blocks cover, and powers of two are the smallest."""

import pytest

from scattermoe_lora._sizes import ceil_div, next_power_of_two, power_of_two

pytestmark = pytest.mark.correctness


def test_the_next_power_of_two_is_the_smallest_that_holds_the_value():
    powers = [2**exponent for exponent in range(12)]
    for value in range(-2, 2049):
        assert next_power_of_two(value) == next(power for power in powers if power >= value)


def test_blocks_cover_and_none_is_left_over():
    for by in (1, 2, 3, 16, 128):
        for value in range(300):
            blocks = ceil_div(value, by)
            assert blocks * by >= value
            assert (blocks - 1) * by < value


def test_a_bounded_power_of_two_stays_within_its_bounds():
    for value in range(1, 600):
        found = power_of_two(value, low=16, high=256)
        assert found == min(max(next_power_of_two(value), 16), 256)
