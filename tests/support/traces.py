"""What a patch could leave behind on a model."""

from __future__ import annotations


def snapshot(model):
    """Everything that patching could leave behind on a module."""
    # rope_deltas is the model's own notebook: every forward call writes it.
    skipped = {"_parameters", "_buffers", "_modules", "rope_deltas"}
    state = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key not in skipped:
                state[name, key] = dict(value) if isinstance(value, dict) else value
    return state
