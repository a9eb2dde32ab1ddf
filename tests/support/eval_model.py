"""What the tests of evaluation runs share: the tiny model, answering a benchmark."""

from __future__ import annotations

from fmd_ext.lab.eval.clips import Reading
from fmd_ext.lab.eval.generation import Decoding
from fmd_ext.lab.eval.methods import parse_methods
from fmd_ext.lab.eval.run import Runner
from fmd_ext.lab.tiny import tiny_processor
from fmd_ext.lab.tiny.processor import unreadable_tokens

READING = Reading(fps=2.0, max_frames=4, frame_pixels=(3136, 3136))
METHODS = "vanilla,fmd-zero:fork_layers=2,fmd-attention"


def readable(model):
    """Random weights pick tokens that are no text, and the processor refuses placeholders; these are left out."""
    model.generation_config.suppress_tokens = unreadable_tokens()
    return model


def runner(model, loaded, results, *, methods=METHODS, decoding=None):
    decoding = decoding or Decoding(max_new_tokens=3)
    results.begin({"digest": loaded.digest, "decoding": str(decoding)}, loaded.items)
    return Runner(
        model,
        tiny_processor(),
        parse_methods(methods),
        results,
        limits=loaded.benchmark.max_new_tokens,
        decoding=decoding,
        reading=READING,
    )
