"""How the weight of a loss comes to its full size over the first steps of a run."""

import math

# Kind -> share of the full size when `done` (0 to 1) of the ramp is over.
_SHARES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: done,
    "exponential": lambda done: (1 - math.exp(-5 * done)) / (1 - math.exp(-5)),  # fast at first
    "progressive": lambda done: 1.5 ** (min(2, math.floor(3 * done)) - 2),  # three stairs, each 1.5 times the last
}
RAMPS = tuple(_SHARES)


def ramped(target: float, kind: str, step: int, steps: int) -> float:
    """`target` as far as a ramp of `steps` steps lets it be in the `step`-th step, from 1; never 0 but for target 0.

    From the last step of the ramp on, and where `steps` is 0, it is `target`.
    """
    return target * (_SHARES[kind](min(step / steps, 1.0)) if steps else 1.0)
