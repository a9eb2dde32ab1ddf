"""The compiled planner and the one in Python: against each other, what fork-merge decoding means, and bad input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fmd_ext import _core
from fmd_ext.engine import planner
from fmd_ext.engine.planner import AUDIO, FORKED, JOINT, PADDING, PREFIX_OPEN, TEXT, UNFORKED, VISUAL

MASKINGS = ("zero", "attention")
PHASES = (UNFORKED, PREFIX_OPEN, FORKED)
GROUP_FIELDS = ("qo_rows", "cu_seqlens_q", "group_segment", "row_segment", "row_offset")


both_planners = pytest.mark.parametrize(
    "make_plan", [_core.make_plan, planner.make_plan_in_python], ids=["compiled", "python"]
)


def run(make_plan, labels, seg_len, trunk_len, phase, masking):
    return make_plan(
        np.asarray(labels, np.int8).reshape(len(labels), -1),
        np.asarray(seg_len, np.int64).reshape(-1, 3),
        np.asarray(trunk_len, np.int64),
        np.asarray(phase, np.int8),
        masking,
    )


def as_dict(plan):
    def groups(g):
        return {name: getattr(g, name).tolist() for name in GROUP_FIELDS} | {"max_qo_len": g.max_qo_len}

    return {
        "num_home": plan.num_home,
        "positions": plan.positions.tolist(),
        "home_rows": plan.home_rows.tolist(),
        "away_modality": plan.away_modality.tolist(),
        "fork": groups(plan.fork),
        "trunk": groups(plan.trunk),
        "seg_len": plan.seg_len.tolist(),
        "phase": plan.phase.tolist(),
    }


def assert_planners_agree(*state):
    assert as_dict(run(_core.make_plan, *state)) == as_dict(run(planner.make_plan_in_python, *state))


def strings(alphabet, longest):
    return [list(s) for n in range(longest + 1) for s in itertools.product(alphabet, repeat=n)]


def random_batch(rng, batch, length, kind):
    """Labels as they occur: text around blocks, interleaved runs, or anything anywhere; padding at a side or inside."""
    labels = np.zeros((batch, length), np.int64)
    for sample in labels:
        if kind == "blocks":
            a, b, c = np.sort(rng.integers(0, length + 1, 3))
            sample[a:b], sample[b:c] = rng.permutation([VISUAL, AUDIO])
        elif kind == "interleaved":
            start, stop = np.sort(rng.integers(0, length + 1, 2))
            runs = np.repeat(np.arange(stop - start) % 2 + 1, rng.integers(1, 6, stop - start))
            sample[start:stop] = runs[: stop - start]
        else:
            sample[:] = rng.integers(TEXT, AUDIO + 1, length)
        pad = rng.integers(0, length // 3 + 1)
        side = rng.integers(3)
        if side < 2:
            sample[slice(0, pad) if side == 0 else slice(length - pad, length)] = PADDING
        else:
            sample[rng.random(length) < 0.1] = PADDING
    return labels.tolist()


def random_state(rng, batch):
    return rng.integers(0, 9, (batch, 3)).tolist(), rng.integers(0, 9, batch).tolist()


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("phase", PHASES)
def test_every_string_up_to_six(masking, phase):
    for labels in strings((TEXT, VISUAL, AUDIO), 6):
        assert_planners_agree([labels], [[5, 3, 2]], [7], [phase], masking)


@pytest.mark.parametrize("phase", PHASES)
def test_joint_positions_are_in_both_branches(phase):
    """Every string up to five over all labels, and what it means: after the prefix each position has two rows."""
    for labels in strings((TEXT, VISUAL, AUDIO, JOINT), 5):
        assert_planners_agree([labels], [[5, 3, 2]], [7], [phase], "zero")
    plan = run(_core.make_plan, [[TEXT, JOINT, JOINT, TEXT]], [[0, 0, 0]], [0], [PREFIX_OPEN], "zero")
    assert plan.seg_len.tolist() == [[1, 3, 3]] and plan.away_modality.tolist() == [JOINT, JOINT, TEXT]


@pytest.mark.parametrize("masking", MASKINGS)
def test_every_pair_of_short_strings_with_padding(masking):
    for length in (1, 2, 3):
        alphabet = (PADDING, TEXT, VISUAL, AUDIO)
        for first, second in itertools.product(itertools.product(alphabet, repeat=length), repeat=2):
            assert_planners_agree(
                [list(first), list(second)], [[1, 0, 0], [4, 2, 3]], [1, 6], [PREFIX_OPEN, FORKED], masking
            )


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("kind", ("blocks", "interleaved", "anything"))
@pytest.mark.parametrize("batch,length", [(1, 1), (2, 17), (3, 63), (5, 113), (2, 400)])
def test_long_random_batches(masking, kind, batch, length):
    rng = np.random.default_rng([batch, length, len(kind)])
    for _ in range(4):
        labels = random_batch(rng, batch, length, kind)
        seg_len, trunk_len = random_state(rng, batch)
        assert_planners_agree(labels, seg_len, trunk_len, rng.integers(0, 3, batch).tolist(), masking)


@both_planners
@pytest.mark.parametrize("masking", MASKINGS)
def test_rows_see_what_their_branch_sees(make_plan, masking):
    """From the meaning of the two branches, not from the planner's rules: a row in branch b attends to every earlier
    position that exists in b, and the rows of b are exactly those positions."""
    for labels in strings((PADDING, TEXT, VISUAL, AUDIO), 5):
        plan = run(make_plan, [labels], [[0, 0, 0]], [0], [PREFIX_OPEN], masking)
        fork = plan.fork
        stored = {}  # (segment, offset) -> position
        for row, position in enumerate(plan.positions):
            stored[int(fork.row_segment[row]), int(fork.row_offset[row])] = int(position)
        assert len(stored) == plan.num_rows
        prefix_len = int(plan.seg_len[0, 0])

        valid = [p for p, label in enumerate(labels) if label != PADDING]
        first_av = next((p for p in valid if labels[p] != TEXT), len(labels))
        rows_seen = set()
        for g, segment in enumerate(fork.group_segment.tolist()):
            rows = fork.qo_rows[fork.cu_seqlens_q[g] : fork.cu_seqlens_q[g + 1]]
            for i, row in enumerate(rows.tolist()):
                position = int(plan.positions[row])
                rows_seen.add((segment, position))
                own = [stored[segment, offset] for offset in range(i + 1)]
                prefix = [stored[0, offset] for offset in range(prefix_len)] if segment else []
                absent = {1: AUDIO, 2: VISUAL}.get(segment) if masking == "attention" else None
                assert prefix + own == [p for p in valid if p <= position and labels[p] != absent]
        expected = {(0, p) for p in valid if p < first_av}
        for branch, other in ((1, AUDIO), (2, VISUAL)):
            for p in valid:
                if p >= first_av and (masking == "zero" or labels[p] != other):
                    expected.add((branch, p))
        assert rows_seen == expected


@both_planners
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("kind", ("blocks", "interleaved", "anything"))
def test_chunks_equal_one_call(make_plan, masking, kind):
    rng = np.random.default_rng(len(kind))
    for _ in range(12):
        batch, length = int(rng.integers(1, 4)), int(rng.integers(2, 60))
        labels = np.asarray(random_batch(rng, batch, length, kind))
        phase = rng.integers(0, 3, batch)
        seg_len, trunk_len = map(np.asarray, random_state(rng, batch))

        def places(plan, start, width):
            """Every row as (position, fork segment and offset, trunk segment and offset of its home row, is away)."""
            found = []
            homes = list(range(plan.num_home)) + plan.home_rows.tolist()
            for row, home in enumerate(homes):
                sample, position = divmod(int(plan.positions[row]), width)
                found.append(
                    (
                        sample,
                        start + position,
                        *(int(x[row]) for x in (plan.fork.row_segment, plan.fork.row_offset)),
                        *(int(x[home]) for x in (plan.trunk.row_segment, plan.trunk.row_offset)),
                        row >= plan.num_home,
                    )
                )
            return found

        whole = run(make_plan, labels, seg_len, trunk_len, phase, masking)
        pieces = []
        cuts = sorted({0, length, *rng.integers(0, length + 1, 3).tolist()})
        now_seg, now_trunk, now_phase = seg_len, trunk_len, phase
        for start, stop in itertools.pairwise(cuts):
            chunk = labels[:, start:stop]
            plan = run(make_plan, chunk, now_seg, now_trunk, now_phase, masking)
            pieces += places(plan, start, stop - start)
            now_seg, now_phase = plan.seg_len, plan.phase
            now_trunk = now_trunk + (chunk != PADDING).sum(1)
        assert sorted(pieces) == sorted(places(whole, 0, length))
        assert now_seg.tolist() == whole.seg_len.tolist()
        assert now_phase.tolist() == whole.phase.tolist()


@both_planners
@pytest.mark.parametrize("masking", MASKINGS)
def test_invariants(make_plan, masking):
    rng = np.random.default_rng(0)
    for _ in range(40):
        batch, length = int(rng.integers(1, 5)), int(rng.integers(0, 80))
        labels = np.asarray(random_batch(rng, batch, length, "anything"), np.int8).reshape(batch, length)
        seg_len, trunk_len = random_state(rng, batch)
        plan = run(make_plan, labels, seg_len, trunk_len, rng.integers(0, 3, batch), masking)

        valid = np.flatnonzero(labels.reshape(-1) != PADDING)
        assert plan.positions[: plan.num_home].tolist() == valid.tolist()
        assert plan.positions[plan.num_home :].tolist() == plan.positions[plan.home_rows].tolist()
        assert len(set(plan.home_rows.tolist())) == len(plan.home_rows) == plan.num_rows - plan.num_home
        assert (plan.away_modality == labels.reshape(-1)[plan.positions[plan.num_home :]]).all()
        for groups, before, rows in (
            (plan.fork, np.ravel(seg_len), plan.num_rows),
            (plan.trunk, np.asarray(trunk_len), plan.num_home),
        ):
            assert sorted(groups.qo_rows.tolist()) == list(range(rows))
            sizes = np.diff(groups.cu_seqlens_q)
            assert (sizes > 0).all() and groups.max_qo_len == sizes.max(initial=0)
            assert (np.diff(groups.group_segment) > 0).all()
            for g, segment in enumerate(groups.group_segment):
                members = groups.qo_rows[groups.cu_seqlens_q[g] : groups.cu_seqlens_q[g + 1]]
                assert (groups.row_segment[members] == segment).all()
                # In causal order, and the segment grows without a gap from where it ended.
                assert (np.diff(plan.positions[members]) > 0).all()
                offsets = groups.row_offset[members]
                assert offsets.tolist() == list(range(before[segment], before[segment] + len(members)))


def test_arrays_outlive_the_plan_and_are_views():
    plan = run(_core.make_plan, [[TEXT, VISUAL, AUDIO, TEXT]], [[0, 0, 0]], [0], [PREFIX_OPEN], "zero")
    assert np.shares_memory(plan.positions, plan.positions)  # no copy per access
    offsets, positions = plan.fork.row_offset, plan.positions
    expected = as_dict(plan)
    del plan
    churn = [np.ones(7, np.int64) for _ in range(1000)]
    assert len(churn) == 1000
    assert positions.tolist() == expected["positions"]
    assert offsets.tolist() == expected["fork"]["row_offset"]
    assert positions.dtype == offsets.dtype == np.int64 and positions.flags.writeable


@both_planners
def test_arguments_are_left_alone(make_plan):
    seg_len, phase = np.array([[1, 0, 0]]), np.array([PREFIX_OPEN], np.int8)
    plan = make_plan(np.array([[TEXT, VISUAL]], np.int8), seg_len, np.array([1]), phase, "zero")
    assert plan.phase.tolist() == [FORKED] and plan.seg_len.tolist() == [[2, 1, 1]]
    assert seg_len.tolist() == [[1, 0, 0]] and phase.tolist() == [PREFIX_OPEN]


@both_planners
def test_strided_labels(make_plan):
    wide = np.array([[TEXT, 9, VISUAL, 9, AUDIO, 9], [TEXT, 9, TEXT, 9, PADDING, 9]], np.int8)
    plan = run(make_plan, wide[:, ::2], [[0] * 3] * 2, [0, 0], [PREFIX_OPEN] * 2, "zero")
    dense = run(make_plan, wide[:, ::2].copy(), [[0] * 3] * 2, [0, 0], [PREFIX_OPEN] * 2, "zero")
    assert as_dict(plan) == as_dict(dense)


@both_planners
@pytest.mark.parametrize("batch,length", [(0, 0), (0, 5), (2, 0)])
def test_nothing_to_plan(make_plan, batch, length):
    plan = make_plan(
        np.zeros((batch, length), np.int8),
        np.ones((batch, 3), np.int64),
        np.ones(batch, np.int64),
        np.ones(batch, np.int8),
        "zero",
    )
    assert plan.num_home == plan.num_rows == len(plan.home_rows) == 0
    assert plan.fork.cu_seqlens_q.tolist() == plan.trunk.cu_seqlens_q.tolist() == [0]
    assert plan.seg_len.tolist() == [[1, 1, 1]] * batch and plan.phase.tolist() == [1] * batch


GOOD = {
    "labels": np.zeros((2, 3), np.int8),
    "seg_len": np.zeros((2, 3), np.int64),
    "trunk_len": np.zeros(2, np.int64),
    "phase": np.zeros(2, np.int8),
    "masking": "zero",
}


@both_planners
@pytest.mark.parametrize(
    "bad,said",
    [
        ({"labels": np.full((2, 3), 4, np.int8)}, r"labels\[0, 0\] is 4; a label is -1 \(padding\), 0 \(text\)"),
        ({"labels": np.full((2, 3), 3, np.int8), "masking": "attention"}, r"labels\[0, 0\] is 3; a joint position"),
        ({"labels": np.array([[0, 0, 0], [0, -2, 0]], np.int8)}, r"labels\[1, 1\] is -2"),
        ({"labels": np.zeros((2, 3), np.int64)}, r"labels is int64 \[2, 3\], accepted is int8 \[batch, length\]"),
        ({"labels": np.zeros(3, np.int8)}, r"labels is int8 \[3\], accepted is int8 \[batch, length\]"),
        ({"seg_len": np.zeros((2, 2), np.int64)}, r"seg_len is int64 \[2, 2\], accepted is int64 \[2, 3\]"),
        ({"seg_len": np.zeros((2, 3), np.int32)}, r"seg_len is int32 \[2, 3\], accepted is int64 \[2, 3\]"),
        ({"seg_len": np.array([[0, 0, 0], [0, 0, -1]])}, r"seg_len\[1, 2\] is -1; a length is at least 0"),
        ({"trunk_len": np.zeros(3, np.int64)}, r"trunk_len is int64 \[3\], accepted is int64 \[2\]"),
        ({"trunk_len": np.array([0, -4])}, r"trunk_len\[1\] is -4"),
        ({"phase": np.zeros(2, np.int64)}, r"phase is int64 \[2\], accepted is int8 \[2\]"),
        ({"phase": np.array([0, 3], np.int8)}, r"phase\[1\] is 3; a phase is 0 \(unforked\)"),
        ({"masking": "none"}, r"masking is 'none', accepted is 'zero' or 'attention'"),
    ],
)
def test_bad_input(make_plan, bad, said):
    with pytest.raises(ValueError, match=said):
        make_plan(**(GOOD | bad))
