"""Which implementation an operator runs."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None


def choose(implementation, device):
    """ "triton" or "torch" for the `implementation` argument of an operator on `device`; raises where it cannot run."""
    if implementation not in ("auto", "triton", "torch"):
        raise ValueError(f'implementation must be "auto", "triton" or "torch", got {implementation!r}')
    if implementation == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if implementation == "triton" and not HAS_TRITON:
        raise ValueError('implementation="triton" needs the triton package, which is not installed here')
    return implementation
