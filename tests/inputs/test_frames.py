"""Which frames of a picture are kept, by the picture's own packets; and which way up they are."""

from __future__ import annotations

import struct

import av
import numpy as np
import pytest

from clip_files import RATE, claim_seconds, grey, write_tracks
from fmd_ext.inputs.media import load_clip


def numbers(frames):
    """The numbers of the kept frames, below 12, by their brightness."""
    return [int(np.abs([grey(index) - image.mean() for index in range(12)]).argmin()) for image in frames]


def test_sound_that_outlasts_the_picture_does_not_thin_it(tmp_path):
    path = write_tracks(tmp_path / "long_sound.mkv", frames=100, sounds=[range(600)])
    clip = load_clip(path, fps=2.0, max_frames=50)
    assert len(clip.frames) == 40 and clip.fps == 2.0
    assert len(clip.audio) == 600 * 16000 and clip.duration_s == pytest.approx(600)


def test_a_file_that_overstates_its_length(tmp_path, caplog):
    path = write_tracks(tmp_path / "overstated.mkv", frames=100)
    claim_seconds(path, 3 * 3600)
    for rule, count in (({"fps": 2.0, "max_frames": 50}, 40), ({"edge_seconds": 60}, 40), ({"num_frames": 16}, 16)):
        assert len(load_clip(path, **rule).frames) == count
    assert "says it lasts 10800.0 s, but only 20.0 s can be read" in caplog.text


def test_a_file_that_understates_its_length(tmp_path):
    """An MPEG program stream, whose header has no length: FFmpeg looks for the last stamp, and misses it here."""
    path = write_tracks(tmp_path / "short.mpg", frames=50, sounds=[], codec="mpeg2video", options={"bf": "2"})
    with av.open(str(path)) as container:
        said = container.duration / av.time_base
    clip = load_clip(path, fps=RATE, max_frames=25)
    assert clip.duration_s == pytest.approx(50 / clip_rate(path)) and clip.duration_s > said + 1
    assert len(clip.frames) == 25 and clip.fps == pytest.approx(25 / clip.duration_s)


def clip_rate(path):
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate)


@pytest.mark.parametrize(
    "name, codec, options",
    [
        ("frames.avi", "libx264", {"bf": "3"}),  # the stamps are those of packets, not of what is shown
        ("frames.avi", "mpeg4", {"bf": "2"}),
        ("frames.h264", "libx264", {"bf": "3"}),  # no stamps at all
        ("frames.ts", "libx264", {"bf": "3"}),
        ("frames.mp4", "libx264", {"bf": "3"}),  # packets in another order than frames
        ("frames.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "8"}),  # packets that are not shown
        ("frames.flv", "flv", {}),  # packets without a duration
    ],
)
def test_frames_are_told_apart_in_every_container(tmp_path, name, codec, options):
    path = write_tracks(tmp_path / name, frames=12, sounds=[], codec=codec, options=options)
    assert numbers(load_clip(path, pick=lambda total, rate: range(total)).frames) == list(range(12))
    assert numbers(load_clip(path, num_frames=4).frames) == [1, 4, 7, 10]
    rate = clip_rate(path)
    assert numbers(load_clip(path, fps=rate / 3).frames) == [0, 3, 6, 9]


def test_a_rule_may_take_frames_in_any_order(tmp_path):
    path = write_tracks(tmp_path / "clip.mkv", frames=12)
    assert numbers(load_clip(path, pick=lambda total, rate: [7, 2, 2, 9]).frames) == [7, 2, 2, 9]


# a, b, c, d of the display matrix, and what a player makes of the stored image.
TURNS = {
    "as stored": ((1, 0, 0, 1), lambda image: image),
    "by 180": ((-1, 0, 0, -1), lambda image: image[::-1, ::-1]),
    "by 90": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "by 270": ((0, -1, 1, 0), np.rot90),
    "left to right": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "top to bottom": ((1, 0, 0, -1), lambda image: image[::-1]),
    "transposed": ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    "transposed the other way": ((0, -1, -1, 0), lambda image: image[::-1, ::-1].swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_pictures_are_turned_and_mirrored_as_players_do(tmp_path, turn):
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48], image[:32, 48:] = 255, 80
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=RATE)
        video.width, video.height, video.bit_rate = 96, 64, 4_000_000
        for _ in range(5):
            out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(video.encode(None))
    stored = load_clip(path).frames
    (a, b, c, d), shown = TURNS[turn]
    content = bytearray(path.read_bytes())
    at = content.find(b"tkhd") + 44  # the matrix in the track's header, 16.16 fixed point
    content[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    frames = load_clip(path).frames
    assert len(frames) == len(stored) == 2
    for got, own in zip(frames, stored, strict=True):
        assert np.array_equal(got, shown(own))
