"""A network and its caches as ONNX graphs, and ONNX Runtime as a backend; needs the extra onnx."""
