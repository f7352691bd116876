"""Training nets: one loop for every family, from windows that are views of the table to weights that can be resumed."""

from training.nets.job import NetJob
from training.nets.trainer import reproducible

__all__ = ["NetJob", "reproducible"]
