"""Pretrained Vision Transformers become Linformers: `linvit.convert_vit` and `linvit convert`."""
