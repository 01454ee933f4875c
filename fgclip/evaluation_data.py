"""Older names of what is in `fgclip.data`."""

from fgclip.data import DCI, ClassFolders, COCOBoxes, Flickr30k, ShareGPT4V, by_image  # noqa: F401
