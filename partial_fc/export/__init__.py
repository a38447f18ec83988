"""Trained backbones for use elsewhere: folders, ONNX, torch.export, galleries, embeddings of images."""
