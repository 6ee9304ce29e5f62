"""When objects are moved: `moves`, shares of a run's steps, as arguments and configuration files have them.

Objects are moved after the step during which a share of the steps lies behind: with 0.15 of 20 steps after the fourth,
during which three lie behind. (Parts of steps do not count: with 25 steps it is the fourth as well.)

Nothing here needs torch, so that a slip of the pen in a file is told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__multisubject_version__ = "0.1.0"

FEWEST_STEPS = 10
"""Shorter runs are left alone: an object that was moved needs some steps to settle."""

EXPECTED = "shares of the steps, from 0 to less than 1, such as [0.15, 0.3, 0.45], or [] to move nothing"
"""What is said of a value for which `are_moves` is False."""


def are_moves(value: Any) -> bool:
    """Whether a value can be `moves`: a list or tuple of numbers from 0 to less than 1, which may be empty."""
    return isinstance(value, (list, tuple)) and all(
        isinstance(share, (int, float)) and not isinstance(share, bool) and 0 <= share < 1 for share in value
    )


def steps_of_moves(moves: Sequence[float], num_steps: int) -> set[int]:
    """The steps of a run, counted from 0, after which objects are moved.

    None of a run of less than `FEWEST_STEPS`, and not the last one: no noise is left after it, and nothing settles.
    """
    if num_steps < FEWEST_STEPS:
        return set()
    return {_step(share, num_steps) for share in moves} - {num_steps - 1}


def check_moves(moves: Sequence[float], num_steps: int) -> None:
    """Raise `ValueError` where somebody asks for shares in a run of too few steps, or for one during its last step."""
    if moves and num_steps < FEWEST_STEPS:
        raise ValueError(
            f"`moves` is {[*moves]}, but the run has {num_steps} steps, expected at least {FEWEST_STEPS}: what is moved"
            " needs some to settle. Take more steps, or give [] to move nothing."
        )
    if late := [share for share in moves if _step(share, num_steps) == num_steps - 1]:
        raise ValueError(
            f"`moves` is {[*moves]}, but {late[0]} is during the last of {num_steps} steps, after which nothing can be"
            f" moved; expected shares of less than {(num_steps - 1) / num_steps:.4g}. Leave {late[0]} out, or give an"
            " earlier one."
        )


def _step(share: float, num_steps: int) -> int:
    return min(int(share * num_steps + 1e-6), num_steps - 1)  # 0.15 * 20 is a little less than 3, or more
