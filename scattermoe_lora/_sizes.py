"""Integer arithmetic of launch grids, in plain Python: Triton's own costs microseconds a call."""


def ceil_div(value: int, by: int) -> int:
    """The number of blocks of `by` that cover `value`."""
    return -(-value // by)


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`; 1 for values below 2."""
    return 1 << max(value - 1, 0).bit_length()


def power_of_two(value: int, *, low: int, high: int) -> int:
    """The smallest power of two that is at least `value`, within [low, high] (powers of two)."""
    return min(max(next_power_of_two(value), low), high)
