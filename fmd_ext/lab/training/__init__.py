"""Trains a small Qwen2.5-Omni thinker on synthetic clips, with the imbalance that makes models hear what they see."""
