"""`linvit check`: find problems in a folder of images, and how training would handle them, without modifying it."""
