"""Prediction on loose images: which ones, whole or in tiles, what is made of them, and where it is written."""
