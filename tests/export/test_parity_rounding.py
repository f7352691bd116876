"""The wider tolerance of rounded activations is for graphs that round them, and no wider than fixed."""

from __future__ import annotations

import pytest

from export.parity import ROUNDED_ACTIVATIONS, check_rounding, check_tolerance
from tests.export.tiny import manifest_of
from tickserve.errors import GateRefusedError
from tickserve.manifest import Manifest, Tolerance

ROUNDED = {"kind": "mlp", "rounded": "activations"}


def manifest(**changes: object) -> Manifest:
    given = {"family": "mlp", "precision": "int8", "tolerance": ROUNDED_ACTIVATIONS, "architecture": ROUNDED}
    return manifest_of("rounded", 1, **(given | changes))


def test_rounded_activations_may_differ_by_a_step_and_no_more() -> None:
    check_tolerance(manifest())
    with pytest.raises(GateRefusedError, match=r"tolerance.atol"):
        check_tolerance(manifest(tolerance=Tolerance(atol=0.02, rtol=0.0)))


@pytest.mark.parametrize("changes", [{"architecture": {"kind": "mlp"}}, {"precision": "fp32"}])
def test_nothing_else_gets_that_tolerance(changes: dict[str, object]) -> None:
    with pytest.raises(GateRefusedError, match=r"tolerance.atol"):
        check_tolerance(manifest(**changes))


def test_a_claim_that_the_graph_does_not_bear_out_is_refused() -> None:
    check_rounding(manifest(), ["MatMul", "QuantizeLinear"])
    check_rounding(manifest(architecture={"kind": "mlp"}), ["MatMul"])
    with pytest.raises(GateRefusedError, match=r"architecture.rounded"):
        check_rounding(manifest(), ["MatMul", "DequantizeLinear"])
