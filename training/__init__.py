"""Jobs that make bundles: gradient-boosted trees and nets, validated by purged walk-forward."""

import os

# OpenMP threads spin while they wait by default, which slows short fits badly on a machine that does anything else.
# Read when the library loads, so it is set before XGBoost and PyTorch are imported; a choice already made stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
