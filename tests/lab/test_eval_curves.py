"""Curves out of tables whose methods differ in one setting."""

from __future__ import annotations

import pytest
from test_eval_scores import TASKS, make

from fmd_ext.lab.eval.curves import curves_of, table_by
from fmd_ext.lab.eval.scores import evaluate

RIGHT = ["No.", "Yes."] * 8  # the right answers of `make`'s items
HALF = ["No."] * 16


def test_one_line_per_group_and_the_largest_family_of_methods(tmp_path):
    answers = {
        "vanilla": HALF,
        "fmd-zero:fork_layers=2:alpha=0.5": HALF,
        "fmd-zero:fork_layers=2:alpha=0.9": RIGHT,
        "fmd-zero:fork_layers=2:alpha=0.7": RIGHT[:8] + HALF[8:],
        "fmd-zero:fork_layers=1:alpha=0.9": HALF,
        "fmd-zero:alpha=auto:fork_layers=2": HALF,
        "fmd-attention:fork_layers=2": RIGHT,
    }
    evaluation = evaluate(make(tmp_path, answers))
    panels = curves_of(table_by(evaluation, None))
    assert list(panels) == ["fork layers", "alpha"]
    (line,) = panels["alpha"]
    assert (line.name, line.x, line.y) == ("all questions", [0.5, 0.7, 0.9], [0.5, 0.75, 1.0])
    assert line.baseline == 0.5 and all(0 <= low <= y for low, y in zip(line.low, line.y, strict=True))
    (line,) = panels["fork layers"]
    assert (line.x, line.y) == ([1.0, 2.0], [0.5, 1.0])
    by_task = curves_of(table_by(evaluation, "task"))["alpha"]
    assert {line.name for line in by_task} == set(TASKS)


def test_an_evaluation_without_a_varied_setting(tmp_path):
    evaluation = evaluate(make(tmp_path, {"vanilla": HALF, "fmd-zero:alpha=0.5": RIGHT, "fmd-zero": HALF}))
    with pytest.raises(ValueError, match="differ in one of fork_layers, alpha, mask_scale alone"):
        curves_of(table_by(evaluation, None))
    with pytest.raises(ValueError, match="no table by 'colour'; there are task"):
        table_by(evaluation, "colour")
