"""Many symbols in one run: features of the next symbol are prepared while one trains, and one failure stays one.

A symbol's work is two calls, `prepare` and `train_one` (`tasks.py`); an engine runs calls in processes of this machine
(`local.py`) or of a Ray cluster (`on_ray.py`); the schedule (`schedule.py`) says which comes next.
"""

from training.universe.run import Universe, build_universe, train_universe

__all__ = ["Universe", "build_universe", "train_universe"]
