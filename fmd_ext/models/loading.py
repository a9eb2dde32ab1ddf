"""Checkpoints that do not fit are refused, where transformers would fill the holes with random weights."""

from __future__ import annotations

from typing import Any


class CompleteCheckpoints:
    """A base in front of `PreTrainedModel`: ``from_pretrained`` raises ValueError for missing or unfit tensors."""

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        # Unfit shapes are reported instead of raised, so that the error can name them.
        model, report = super().from_pretrained(
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        missing = sorted(report["missing_keys"])
        if missing:
            others = sorted(report["unexpected_keys"])
            hint = f"; it holds {len(others)} others, such as {others[0]}" if others else ""
            raise ValueError(
                f"{source} is no complete {cls.__name__}: it lacks {len(missing)} tensors: {_few(missing)}{hint}"
            )
        unfit = sorted(
            f"{name} is {list(has)} instead of {list(wants)}" for name, has, wants in report["mismatched_keys"]
        )
        if unfit and not ignore_mismatched_sizes:
            raise ValueError(
                f"{source} does not fit its configuration in the shape of {len(unfit)} tensors: {_few(unfit)}"
            )
        return (model, report) if output_loading_info else model


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
