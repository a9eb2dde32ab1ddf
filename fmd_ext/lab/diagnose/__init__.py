"""What a model does with what it sees and hears."""

from __future__ import annotations

from fmd_ext.lab.diagnose.attention import AttentionShare, LayerShare, attention_share

__all__ = ["AttentionShare", "LayerShare", "attention_share"]
