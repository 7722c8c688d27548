"""Image files become normalised batches: sources, decoding, augmentation, loading and caching."""

import os

# Otherwise `import albumentations` asks PyPI for its newest version.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
