"""An older place of what is in `fgclip.data`."""

from fgclip.data import hold_out  # noqa: F401
