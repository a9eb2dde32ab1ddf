"""`merge_`: the merge of fork-merge decoding, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from fmd_ext.ops.arguments import Arguments
from fmd_ext.ops.registration import operator, self_test, wide
from fmd_ext.ops.selftest import Inputs, Pairs, exact


@operator(by_heads=False)
def merge_(hidden: Tensor, home_rows: Tensor, away_rows: Tensor, weights: Tensor) -> None:
    """`hidden[home_rows[j]] = weights[j] * hidden[home_rows[j]] + (1 - weights[j]) * hidden[away_rows[j]]`, in place.

    The merge of fork-merge decoding for one pair of rows per position that has two branches. Computed in float32,
    rounded once.

    Args:
        hidden: `[num_rows, hidden_size]`, last dimension contiguous.
        home_rows: int64 `[num_pairs]`, each row at most once.
        away_rows: int64 `[num_pairs]`, none of them a home row.
        weights: float32 `[num_pairs]`.

    Raises:
        ValueError: shape, dtype, stride or device of an argument, a row out of range, a home row that occurs twice or
            is also an away row.
        RuntimeError: a gradient would be needed.
    """
    _check(hidden, home_rows, away_rows, weights)
    weight = weights[:, None]
    merged = weight * wide(hidden[home_rows]) + (1 - weight) * wide(hidden[away_rows])
    hidden.index_copy_(0, home_rows, merged.to(hidden.dtype))


def _check(hidden: Tensor, home_rows: Tensor, away_rows: Tensor, weights: Tensor) -> None:
    of = Arguments("merge_", hidden=hidden, home_rows=home_rows, away_rows=away_rows, weights=weights)
    of.shape("hidden", "[num_rows, hidden_size]", -1, -1)
    of.index_vector("home_rows", "[num_pairs]", -1)
    of.index_vector("away_rows", "[num_pairs]", len(home_rows))
    of.dtype("weights", torch.float32)
    of.shape("weights", "[num_pairs]", len(home_rows))
    of.floating("hidden")
    of.one_device()
    of.rows("home_rows", len(hidden), "rows of hidden", once=True)
    of.rows("away_rows", len(hidden), "rows of hidden")
    if hidden.device.type == "cpu":
        homes = set(home_rows.tolist())
        for j, row in enumerate(away_rows.tolist()):
            if row in homes:
                of.fail(
                    "away_rows", f"[{j}] is {row}, which is also a home row; accepted are rows that are not written"
                )


@self_test("merge_")
def _self_test(inputs: Inputs) -> Pairs:
    hidden, home, away = inputs.random(5, 64), [0, 2], [4, 3]
    weights = torch.tensor([0.8, 0.5], device=inputs.device)
    want, weight = exact(hidden), exact(weights)[:, None]
    want[home] = weight * want[home] + (1 - weight) * want[away]
    merge_(hidden, inputs.index(home), inputs.index(away), weights)
    return [(hidden, want)]
