"""How the weight of a loss, or another number, comes to its full size over the first steps of a run."""

import math

from trainkit.errors import InputError

RAMPS = ("constant", "linear", "exponential", "progressive")
_STEEPNESS = 5.0  # of "exponential"
_STAIR = 1.5  # of "progressive"


def ramp(kind: str, done: float) -> float:
    """The share of its full size that a number has when `done` (from 0; 1 and more is all) of the ramp is over.

    "constant": 1. "linear": done. "exponential": (1 - exp(-5 done)) / (1 - exp(-5)), fast at first. "progressive":
    three stairs, each 1.5 times the one before: 1 / 2.25, 1 / 1.5, and 1. Raises InputError for another kind.
    """
    done = min(max(done, 0.0), 1.0)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return done
    if kind == "exponential":
        return (1 - math.exp(-_STEEPNESS * done)) / (1 - math.exp(-_STEEPNESS))
    if kind == "progressive":
        return _STAIR ** (min(2, math.floor(3 * done)) - 2)
    raise InputError(f"a ramp of kind {kind!r}: expected one of {', '.join(RAMPS)}.")


def ramped(target: float, kind: str, step: int, steps: int) -> float:
    """`target` as far as the ramp of `steps` steps lets it be in the `step`-th step, from 1; never 0 but for target 0.

    From the last step of the ramp on, and where `steps` is 0, it is `target`.
    """
    return target * (ramp(kind, step / steps) if steps else 1.0)
