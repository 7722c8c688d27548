"""Images from folders to normalised batches: options, reading, augmentation, loading."""

import os

# Importing albumentations asks PyPI for its newest version, unless told not to before the import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
