"""Bundle to ONNX to Triton model repository: parity gates and config.pbtxt."""
