"""Speed and memory of methods, measured apart from the answers: the same prompts, answers of equal length, in turn.

Everything is relative to the first method, for instance vanilla decoding with its KV cache. A baseline without a cache
would make any method look cheap.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fmd_ext.lab.eval.items import Item
from fmd_ext.lab.eval.predictions import Results, write_atomically

if TYPE_CHECKING:
    from fmd_ext.lab.eval.run import Runner


def measure(runner: Runner, items: Sequence[Item], *, tokens: int = 32) -> dict[str, Any]:
    """Times each of the runner's methods on each item, one prompt at a time, ``tokens`` tokens exactly.

    The first item is answered once by every method before any clock runs. Memory is the peak of what torch allocated
    on the GPU during the call, in bytes; None on a CPU, where nobody counts per call.

    Returns:
        ``tokens``, ``items``, ``prompt_tokens`` (median), and per method under ``methods`` the medians of
        first_token_s, tokens_per_s (after the first), their ratios to the first method's on the same item with
        quartiles, and peak_bytes (the largest).
    """
    # Only now: who reads measurements needs no model.
    import torch

    from fmd_ext.inputs.chat import to_device
    from fmd_ext.lab.eval.generation import answer

    if tokens < 2:
        raise ValueError(f"tokens must be 2 or more to have a rate after the first, got {tokens}")
    rows: dict[str, list[tuple[float, float, int | None]]] = {choice.name: [] for choice in runner.choices}
    lengths: list[int] = []
    cuda = runner.model.device.type == "cuda"
    for number, item in enumerate(items):
        (group,) = runner.clips.prepare([item])
        if group.inputs is None:
            raise ValueError(f"{item.id} cannot be asked: {group.error}")
        inputs = to_device(group.inputs, runner.model.device)
        lengths.append(inputs["input_ids"].shape[1])
        for choice in runner.choices:
            for warming in (True, False) if number == 0 else (False,):
                if cuda:
                    torch.cuda.reset_peak_memory_stats(runner.model.device)
                said = answer(
                    runner.model,
                    runner.processor,
                    choice,
                    inputs,
                    runner.decoding,
                    max_new_tokens=tokens,
                    exactly=True,
                    random_key=(item.id,),
                )
                peak = torch.cuda.max_memory_allocated(runner.model.device) if cuda else None
                if not warming:
                    rate = (tokens - 1) / (said.seconds - said.first_token_s)
                    rows[choice.name].append((said.first_token_s, rate, peak))
    reference = np.array([row[:2] for row in next(iter(rows.values()))])
    methods = {}
    for name, own in rows.items():
        times = np.array([row[:2] for row in own])
        ratios = np.quantile(times / reference, (0.25, 0.5, 0.75), axis=0)
        methods[name] = {
            "first_token_s": float(np.median(times[:, 0])),
            "tokens_per_s": float(np.median(times[:, 1])),
            "first_token_ratio": ratios[:, 0].tolist(),
            "tokens_per_s_ratio": ratios[:, 1].tolist(),
            "peak_bytes": max(row[2] for row in own) if cuda else None,
        }
    return {"tokens": tokens, "items": len(items), "prompt_tokens": float(np.median(lengths)), "methods": methods}


def write_speed(results: Results, speed: dict[str, Any]) -> None:
    """Beside the predictions, as ``speed.json``."""
    write_atomically(results.folder / "speed.json", json.dumps(speed, indent=1))


def read_speed(results: Results) -> dict[str, Any] | None:
    """What `write_speed` wrote; None where nothing was measured."""
    path = results.folder / "speed.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
