"""Ports of models that transformers lacks, as ordinary transformers models that load the published checkpoints."""
