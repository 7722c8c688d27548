"""Predictions on image files and arrays, optionally in tiles: `linvit predict` and `linvit.Predictor`."""
