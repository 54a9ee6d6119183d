"""The device half: edge model and data to tuned weights. NumPy and onnxruntime; never torch, never transformers."""
