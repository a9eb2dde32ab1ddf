"""For people who live in lmms-eval (0.7 and later): a model that decodes by any method here, and task files.

The model is found by the entry point of this package; the task files are written from the published data:

    python -m fmd_ext.lab.lmms_eval --benchmark avhbench --data AVHBench --output tasks
    lmms-eval --include_path tasks --tasks fmd_avhbench --model fmd_ext \\
        --model_args pretrained=Qwen/Qwen2.5-Omni-7B,method=fmd-zero:fork_layers=7
"""

from __future__ import annotations

from fmd_ext.lab.lmms_eval.tasks import (
    doc_to_target,
    doc_to_text,
    doc_to_visual,
    mean_score,
    process_results,
    write_task,
)

__all__ = ["doc_to_target", "doc_to_text", "doc_to_visual", "manifest", "mean_score", "process_results", "write_task"]


def manifest() -> object:
    """What lmms-eval's entry point group ``lmms_eval.models`` takes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("fmd_ext", simple_class_path="fmd_ext.lab.lmms_eval.model.FMDModel")
