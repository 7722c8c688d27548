"""LinformerViT: attention, projections, and the names registered with timm."""
