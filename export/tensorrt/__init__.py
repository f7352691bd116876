"""TensorRT: engines for one GPU, one driver and one graph, or the job that builds them where such a GPU is.

No server loads such an engine (a plan). It says, on the GPU it is for, whether TensorRT gives research's numbers and
what a call costs. What serves on a GPU is ONNX Runtime, with its TensorRT provider where `export.tensorrt` asks for it.

accelerator.py  ONNX Runtime's TensorRT provider in config.pbtxt; it builds engines of its own
target.py       the GPU, driver and TensorRT of this machine, or what is missing
plan.py         a plan's key, where it is stored, and why a foreign or damaged one is refused
profiles.py     the shapes an engine is optimised for
build.py        the `tensorrt` package at work
engine.py       running a plan, to hold it against golden rows before it is accepted
job.py          the Kubernetes Job for the target node
"""
