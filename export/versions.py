"""Which ONNX versions a published graph may use, so that every server it can meet loads it.

The embedded Triton (24.10) scores with the ONNX Runtime of this environment; production's image (26.06 or newer) and
an older image on a desk's own cluster bring theirs. A graph is therefore written for the oldest of them.
"""

from __future__ import annotations

# Torch's exporter writes opset 18 natively, without a version converter; ONNX Runtime loads it since 1.14 (2023).
OPSET = 18
# Quantized children arrive as graphs of their own; these opsets need no conversion either.
MIN_OPSET, MAX_OPSET = 13, 19
# onnxmltools converts trees up to this opset; the tree operator itself lives in another domain, so a tree graph is
# then declared at OPSET without touching a node.
TREE_OPSET = 15
# The tree operator in its first form: XGBoost needs nothing newer, and every ONNX Runtime has it.
MAX_ML_OPSET = 3
CONTRIB_OPSET = 1
# Opset 19 asks for IR 9. Triton 24.10's ONNX Runtime (1.19) reads up to 10; nothing here needs what 10 added.
IR_VERSION = 9
MAX_IR_VERSION = 10

CONTRIB_DOMAIN = "com.microsoft"
ML_DOMAIN = "ai.onnx.ml"
# ONNX Runtime's own operators that its quantizer, its fusions and its fp16 converter write; nothing else is loaded
# from that domain.
CONTRIB_OPS = frozenset(
    {
        "DequantizeLinear",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "FusedGemm",
        "FusedMatMul",
        "Gelu",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearAdd",
        "QLinearConcat",
        "QLinearMul",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QuantizeLinear",
    }
)
