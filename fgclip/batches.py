"""Older names of what is in `fgclip.data`."""

from fgclip.data import Collate, RegionDataset, data_statistics, evenly, hold_out, usable_regions  # noqa: F401
