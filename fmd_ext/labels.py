"""Labels of positions, as the planner and every ``modality_labels`` argument use them.

A joint position mixes visual and audio features in one embedding (channel-wise fusion): it is in both branches, with an
embedding for each.
"""

from __future__ import annotations

PADDING, TEXT, VISUAL, AUDIO, JOINT = -1, 0, 1, 2, 3
LABELS = {"text": TEXT, "visual": VISUAL, "audio": AUDIO, "joint": JOINT}
