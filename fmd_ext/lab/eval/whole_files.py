"""Files that hold just what a question is asked with, for harnesses that hand a model one whole file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import av
import av.stream

from fmd_ext.lab.eval.items import Item


def whole_file(item: Item, folder: Path) -> Path:
    """The item's own file where it holds just the senses that are given, else a copy in ``folder``.

    A copy is a QuickTime file with the picture, the sound, or the picture with the sound of its own file, which then
    begins with the picture. What is encoded is copied as it is, so that the model gets the same frames and samples.

    Raises ValueError for a file that cannot be read or whose coding QuickTime does not take.
    """
    picture = item.path if item.senses != "sound" else None
    sound = (item.sound or item.path) if item.senses != "picture" else None
    if picture == sound:
        return item.path
    only = item.path if picture is None or sound is None else None
    try:
        if only is not None and not _has(only, "audio" if sound is None else "video"):
            return only
        name = "\n".join(str(path and path.resolve()) for path in (picture, sound))
        target = folder / f"{item.path.stem}-{hashlib.sha256(name.encode()).hexdigest()[:12]}.mov"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(f".{os.getpid()}.part")
            _copy(picture, sound, part)
            part.replace(target)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise ValueError(f"{item.path} cannot be copied without what is not asked about: {error}") from error
    return target


def _has(path: Path, kind: str) -> bool:
    with av.open(str(path)) as container:
        return bool(_streams(container, kind))


def _streams(container: av.container.InputContainer, kind: str) -> list[av.stream.Stream]:
    """Of one kind, without the covers of music files."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams if stream.type == kind and not stream.disposition & cover]


def _copy(picture: Path | None, sound: Path | None, target: Path) -> None:
    start = 0.0  # seconds at which the picture begins
    with av.open(str(target), "w", format="mov") as copy:
        sources = [(av.open(str(path)), kind) for path, kind in ((picture, "video"), (sound, "audio")) if path]
        try:
            pairs = []
            for source, kind in sources:  # all streams before the first packet
                (stream, *_) = _streams(source, kind)
                pairs.append((source, stream, copy.add_stream_from_template(stream)))
            for source, stream, own in pairs:
                if stream.type == "video":
                    start = float((stream.start_time or 0) * stream.time_base)
                later = round(start / stream.time_base) if stream.type == "audio" else 0
                for packet in source.demux(stream):
                    if packet.dts is None:  # the end
                        continue
                    packet.dts += later
                    packet.pts += later
                    packet.stream = own
                    copy.mux(packet)
        finally:
            for source, _ in sources:
                source.close()
