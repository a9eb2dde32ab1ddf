"""Other training-free decoding methods for the same models, through the same cached `generate`, to compare with.

Each is a context manager: ``with vcd(model): model.generate(...)``. Inside, greedy decoding, sampling, batches and
several turns work as usual; afterwards the model is as it was. They act on unpatched models.
"""

from __future__ import annotations

from fmd_ext.lab.baselines.avcd import avcd
from fmd_ext.lab.baselines.decoding import method_of
from fmd_ext.lab.baselines.drop import drop
from fmd_ext.lab.baselines.mad import mad
from fmd_ext.lab.baselines.outro import outro
from fmd_ext.lab.baselines.pai import pai
from fmd_ext.lab.baselines.vcd import vcd

__all__ = ["avcd", "drop", "mad", "method_of", "outro", "pai", "vcd"]
