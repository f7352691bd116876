"""Architectures only: nets as torch modules; no training loops."""
