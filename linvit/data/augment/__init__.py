"""Training and evaluation pipelines: crops, automatic augmentation (RandAugment and others) and random erasing."""
