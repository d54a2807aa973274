"""Trials: training a model to its targets, one at a time or many as one stacked model."""
