"""Fused operators with their plain-PyTorch twins."""
