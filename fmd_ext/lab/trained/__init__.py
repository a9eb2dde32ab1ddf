"""The small model that comes with the package, trained by ``fmd_ext.lab.training`` on synthetic clips, and a few clips.

It is of the class that Qwen2.5-Omni-7B is of, with 1.4 million parameters. It knows eight kinds of objects in clips of
two seconds and leans on the picture: see docs/evidence.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from fmd_ext.lab.synthetic import Scene

_HERE = Path(__file__).resolve().parent

MODEL = _HERE / "model"  # as `from_pretrained` loads it
SETTINGS = _HERE / "settings.json"  # of fork-merge decoding, chosen on validation clips
ROUTED = _HERE / "routed.json"  # the same with text_weight="auto"
FIGURES = _HERE / "figures.json"  # those of docs/evidence.md that the demo shows
CLIPS = _HERE / "clips"  # laid out as ``python -m fmd_ext.lab.synthetic`` does


def bundled_scenes() -> dict[Path, Scene]:
    """The bundled clips' files, and what is in them."""
    records = json.loads((CLIPS / "scenes.json").read_text())
    return {
        CLIPS / "video" / f"{record['video_id']}.mp4": Scene(
            tuple(record["seen"]), tuple(record["heard"]), record["relation"], int(record["video_id"])
        )
        for record in records
    }
