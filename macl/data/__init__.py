"""Paired data sets: one sample type for training, validation and inference."""
