"""What is no number at all."""

from collections.abc import Iterable

from torch import Tensor

from trainkit.errors import InputError


def check_finite(tensors: Iterable[Tensor], what: str) -> None:
    """Raises InputError unless all values are finite: of NaN a detector silently finds nothing."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise InputError(f"{what} are not finite; the run has diverged, or --amp fp16 is too narrow for its values")
