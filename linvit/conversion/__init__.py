"""Convert pretrained Vision Transformers to Linformers: `linvit.convert_vit` and `linvit convert`."""
