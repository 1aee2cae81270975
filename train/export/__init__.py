"""Cascades as ONNX models, and what holds of their answers: ``python -m train.export``."""
