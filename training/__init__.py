"""Jobs that make bundles: gradient-boosted trees and nets, validated by purged walk-forward."""

import os

# OpenMP's threads spin while they wait by default: on a machine that does anything else, a fit of a tenth of a second then
# takes several. Read when the library loads, so it is set before XGBoost and PyTorch are imported; a user's choice stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
