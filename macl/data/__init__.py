"""Paired data sets: one sample type for training, validation and inference (see macl.data.sample)."""

from macl.data.llvip import LLVIP, hold_out
from macl.data.sample import find_pairs, read_image, read_pair

__all__ = ["LLVIP", "find_pairs", "hold_out", "read_image", "read_pair"]
