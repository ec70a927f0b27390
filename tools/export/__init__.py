"""Export the whole network to ONNX and OpenVINO, and check the result: python -m tools.export."""
