"""Trained models written for other runtimes, and checked in them: `linvit export`."""
