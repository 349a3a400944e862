"""ONNX models as onnxruntime-genai runs them: the graph by its own builder, the weights ours."""
