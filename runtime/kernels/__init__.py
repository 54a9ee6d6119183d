"""ONNX graphs that change weights on a device; their source is export/kernels.py."""
