"""Training and evaluation pipelines: crops, RandAugment and its relatives, erasing."""
