"""The paired visible + infrared detector."""
