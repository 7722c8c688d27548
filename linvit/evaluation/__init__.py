"""Evaluation of classifiers (`linvit eval`): metrics with intervals, classes matched by name, comparisons, plots."""
