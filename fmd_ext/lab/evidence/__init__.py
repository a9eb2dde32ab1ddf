"""Measures what fork-merge decoding does to the small trained model, and writes it down."""
