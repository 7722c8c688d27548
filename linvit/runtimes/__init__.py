"""Models that `linvit export` wrote, opened by ONNX Runtime, OpenVINO or torch.export."""
