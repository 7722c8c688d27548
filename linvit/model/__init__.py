"""The model: Linformer attention, its projections, LinformerViT, and the models registered with timm."""
