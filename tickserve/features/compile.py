"""Compile the engine's kernels into numba's cache, and run them once: `python -m tickserve.features.compile`.

`make install` and the image build call this, so that no trading process ever waits for a compiler. The cache lies in
`NUMBA_CACHE_DIR`, or beside the sources. The kernels serve every spec, so there is nothing to compile per spec.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from tickserve.events import Events, columns_of
from tickserve.features.spec import FeatureSpec, default_bars_spec, default_book_spec


def exercise(spec: FeatureSpec) -> None:
    """Run a batch and a step of `spec` over two events, which loads or compiles what they need."""
    from tickserve.features.engine import FeatureEngine

    engine = FeatureEngine(spec)
    values = np.ones((2, len(columns_of(spec.kind, spec.levels))))
    engine.batch(Events(spec.kind, spec.levels, np.array([0, 1], np.int64), values))
    engine.step(2, values[0])


def main() -> int:
    """Compile, and say how long it took."""
    start = time.perf_counter()
    for spec in (default_book_spec(5), default_bars_spec()):
        exercise(spec)
    sys.stdout.write(f"feature kernels ready in {time.perf_counter() - start:.1f} s\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
