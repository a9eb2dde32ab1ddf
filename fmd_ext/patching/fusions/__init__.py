"""Fusions: parts of a model that run as fewer, larger ops, with the same results up to rounding."""
