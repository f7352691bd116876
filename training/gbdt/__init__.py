"""Gradient-boosted trees (XGBoost): what they learn, how little memory that takes, which columns, on which device."""

from training.gbdt.job import GbdtJob
from training.gbdt.selection import select_columns

__all__ = ["GbdtJob", "select_columns"]
