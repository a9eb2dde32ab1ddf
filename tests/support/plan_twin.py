"""The planner's rules written out one by one in plain Python: slow, and meant to be checked by reading."""

from __future__ import annotations

PADDING, TEXT, VISUAL, AUDIO, JOINT = -1, 0, 1, 2, 3
UNFORKED, PREFIX_OPEN, FORKED = 0, 1, 2
PREFIX_SEGMENT = 0


def is_forked(labels, start_phase, position):
    """Whether a position of one sample lies behind the sample's prefix."""
    if start_phase == UNFORKED:
        return False
    if start_phase == FORKED:
        return True
    return any(label in (VISUAL, AUDIO, JOINT) for label in labels[: position + 1])


def home_segment(labels, start_phase, position):
    if not is_forked(labels, start_phase, position):
        return PREFIX_SEGMENT
    return {TEXT: 1, VISUAL: 1, AUDIO: 2, JOINT: 1}[labels[position]]


def has_away_row(labels, start_phase, position, masking):
    if not is_forked(labels, start_phase, position):
        return False
    return masking == "zero" or labels[position] == TEXT


def away_segment(labels, position):
    return {TEXT: 2, VISUAL: 2, AUDIO: 1, JOINT: 2}[labels[position]]


def groups(rows, start_lengths, num_segments):
    """The RowGroups of rows (sample, position, segment), as a dict of lists."""
    out = {"qo_rows": [], "cu_seqlens_q": [0], "group_segment": [], "max_qo_len": 0}
    row_offset = [None] * len(rows)
    for sample in range(len(start_lengths)):
        for segment in range(num_segments):
            members = [r for r, (b, _, s) in enumerate(rows) if (b, s) == (sample, segment)]
            members.sort(key=lambda r: rows[r][1])
            for rank, r in enumerate(members):
                row_offset[r] = start_lengths[sample][segment] + rank
            if members:
                out["qo_rows"] += members
                out["cu_seqlens_q"].append(len(out["qo_rows"]))
                out["group_segment"].append(sample * num_segments + segment)
                out["max_qo_len"] = max(out["max_qo_len"], len(members))
    out["row_segment"] = [b * num_segments + s for b, _, s in rows]
    out["row_offset"] = row_offset
    return out


def make_plan(labels, seg_len, trunk_len, phase, masking):
    """The plan as a dict of lists; arguments are nested lists, see fmd_ext._core.make_plan."""
    length = len(labels[0]) if labels else 0
    homes = [(b, p) for b, sample in enumerate(labels) for p, label in enumerate(sample) if label != PADDING]
    aways = [(b, p) for b, p in homes if has_away_row(labels[b], phase[b], p, masking)]
    fork_rows = [(b, p, home_segment(labels[b], phase[b], p)) for b, p in homes]
    fork_rows += [(b, p, away_segment(labels[b], p)) for b, p in aways]
    return {
        "num_home": len(homes),
        "positions": [b * length + p for b, p in homes + aways],
        "home_rows": [homes.index(row) for row in aways],
        "away_modality": [labels[b][p] for b, p in aways],
        "fork": groups(fork_rows, seg_len, 3),
        "trunk": groups([(b, p, 0) for b, p in homes], [[n] for n in trunk_len], 1),
        "seg_len": [
            [seg_len[b][s] + sum((rb, rs) == (b, s) for rb, _, rs in fork_rows) for s in range(3)]
            for b in range(len(labels))
        ],
        "phase": [FORKED if is_forked(sample, phase[b], length - 1) else phase[b] for b, sample in enumerate(labels)],
    }
