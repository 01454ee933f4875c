"""Paired data sets: one sample type for training, validation and inference (see macl.data.sample)."""

from macl.data.llvip import LLVIP, hold_out
from macl.data.sample import find_pairs, read_image, read_pair
from macl.data.scenes import NIGHT, Domain
from macl.data.synthetic import SyntheticPairs

__all__ = ["LLVIP", "NIGHT", "Domain", "SyntheticPairs", "find_pairs", "hold_out", "read_image", "read_pair"]
