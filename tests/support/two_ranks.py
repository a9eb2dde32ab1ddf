"""One of two processes of transformers' tensor parallelism (gloo): a patched model's logits and tokens go to a file.

Started by torchrun with the folder of a model and the file; without torchrun it is the one process to compare with.
"""

from __future__ import annotations

import fmd_ext  # isort: skip  # first: it mends torchvision

import dataclasses
import os
import sys

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omni_inputs import TEXT_ONLY, VIDEO_AUDIO, build_inputs


def sharded() -> dict[str, object]:
    """Arguments of ``from_pretrained``; transformers is about to move this one."""
    from transformers.distributed import DistributedConfig

    moved = "tp_plan" in {field.name for field in dataclasses.fields(DistributedConfig)}
    return {"distributed_config": DistributedConfig(tp_plan="auto")} if moved else {"tp_plan": "auto"}


def main(folder: str, file: str) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, **(sharded() if ranks > 1 else {}))
    split = any(type(weight).__name__ == "DTensor" for weight in model.parameters())
    inputs = build_inputs([VIDEO_AUDIO, TEXT_ONLY], seed=1)
    fmd_ext.patch(model, fork_layers=2, alpha=0.7)
    logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:]
    fmd_ext.unpatch(model)
    plain = model(**inputs).logits[inputs["attention_mask"].bool()]
    torch.save({"split": split, "logits": logits, "tokens": tokens, "plain": plain}, f"{file}.{os.environ.get('RANK')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
