"""Reading clips: what is kept, when, how it is aligned, and what is refused. All clips are written here."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from fmd_ext.inputs.media import Clip, MediaError, check_clip, load_clip
from fmd_ext.inputs.sample_clip import AUDIO_RATE, FRAME_RATE, draw_frames, draw_tone, write_clip


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", seconds=3.0, seed=5)


@pytest.fixture(scope="module")
def drawn():
    """The frames and the tone that clip_path was written from."""
    rng = np.random.default_rng(5)
    return draw_frames(rng, 75, 160, 112), draw_tone(rng, 3 * AUDIO_RATE)


def nearest(image, frames):
    """Index of the frame that looks most like the image."""
    return int(((frames.astype(np.float32) - image.astype(np.float32)) ** 2).mean((1, 2, 3)).argmin())


def write(path, frames=(), wave=None, *, codec="mpeg4", wave_start=0, rotation=None, cover=False):
    """A file with frames [n, H, W, 3] at 25 per second and a wave at 44.1 kHz, ``wave_start`` samples late."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream(codec, rate=25) if len(frames) else None
        audio = container.add_stream("aac", rate=AUDIO_RATE, layout="mono") if wave is not None else None
        if video is not None:
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
            if rotation is not None:
                video.set_display_rotation(rotation)
            if cover:
                video.disposition = av.stream.Disposition.attached_pic
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                container.mux(video.encode(frame))
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(wave[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, wave_start, Fraction(1, AUDIO_RATE)
            container.mux(audio.encode(frame))
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))
    return path


def test_metadata_need_not_be_utf8(clip_path, tmp_path):
    content = clip_path.read_bytes()
    assert b"Lavf" in content  # the writer's name
    (tmp_path / "old.mp4").write_bytes(content.replace(b"Lavf", b"\xe9\xff\xfeq"))
    assert np.array_equal(load_clip(tmp_path / "old.mp4").frames, load_clip(clip_path).frames)


def test_frames_are_those_on_show_at_the_sampling_times(clip_path, drawn):
    clip = load_clip(clip_path, fps=2.0)
    assert clip.frames.dtype == np.uint8 and clip.frames.shape == (6, 112, 160, 3)
    assert clip.fps == 2.0 and clip.missing is None and clip.path == clip_path
    assert abs(clip.duration_s - 3.0) < 0.05
    # At second k / 2 the frame number floor(25 k / 2) is on show. The disc is back where it was after 50 frames.
    assert [nearest(image, drawn[0][:50]) for image in clip.frames] == [0, 12, 25, 37, 0, 12]
    assert np.abs(clip.frames[1].astype(int) - drawn[0][12]).mean() < 4


@pytest.mark.parametrize("fps, expected", [(1.0, 3), (2.5, 8), (25.0, 75), (50.0, 150), (0.1, 1)])
def test_number_of_frames_follows_the_rate(clip_path, fps, expected):
    assert len(load_clip(clip_path, fps=fps).frames) == expected


def test_max_frames_spreads_the_frames_over_the_clip(clip_path, drawn):
    clip = load_clip(clip_path, fps=25.0, max_frames=4)
    assert len(clip.frames) == 4
    assert clip.fps == pytest.approx(4 / clip.duration_s, rel=0.01)
    shown = [int(k / clip.fps * FRAME_RATE) % 50 for k in range(4)]
    assert [nearest(image, drawn[0][:50]) for image in clip.frames] == shown


def test_a_fixed_number_of_frames_is_the_middles_of_equal_parts(clip_path, drawn):
    clip = load_clip(clip_path, num_frames=4, fps=1.0, max_frames=2)
    assert clip.frames.shape == (4, 112, 160, 3) and clip.fps == pytest.approx(4 / 3, rel=0.01)
    # 74 steps between 75 frames, in four parts: their middles are 9.25, 27.75, 46.25 and 64.75.
    assert [nearest(image, drawn[0][:50]) for image in clip.frames] == [9, 28, 46, 65 - 50]


@pytest.mark.parametrize("seconds, count", [(0.04, 3), (0.12, 8)])
def test_a_fixed_number_of_frames_repeats_those_of_a_short_clip(tmp_path, seconds, count):
    clip = load_clip(write_clip(tmp_path / "short.mp4", seconds=seconds), num_frames=count)
    assert len(clip.frames) == count and clip.audio is not None
    numbers = [round(index) for index in (seconds * 25 - 1) * (np.arange(count) + 0.5) / count]
    for one, other, same in zip(clip.frames, clip.frames[1:], np.diff(numbers) == 0, strict=False):
        assert np.array_equal(one, other) == same


def test_a_fixed_number_of_frames_of_sound_alone_is_none(tmp_path):
    assert load_clip(write_clip(tmp_path / "blind.mp4", seconds=1.0, picture=False), num_frames=4).frames is None


@pytest.mark.parametrize(
    "seconds, limit, expected",
    [
        (2.48, 60, [0, 24, 25, 49, 37, 61]),  # the last second is counted from the end
        (2.0, 60, [0, 24, 25, 49]),
        (0.4, 60, [0, 9]),
        (2.48, 1, [0, 24]),
    ],
)
def test_the_first_and_last_frame_of_each_second(tmp_path, seconds, limit, expected):
    path = write_clip(tmp_path / "clip.mp4", seconds=seconds)
    every = load_clip(path, fps=25.0).frames
    clip = load_clip(path, edge_seconds=limit, fps=1.0, max_frames=1)
    assert clip.fps == 2.0 and np.array_equal(clip.frames, every[expected])


def test_a_rule_picks_frames_by_their_number(clip_path, drawn):
    told = []

    def ends(total, rate):
        told.append((total, rate))
        return [0, 7, total - 1]

    clip = load_clip(clip_path, pick=ends, fps=1.0, max_frames=1)
    assert told == [(75, 25.0)] and clip.fps == pytest.approx(1.0, rel=0.01)
    assert [nearest(image, drawn[0][:50]) for image in clip.frames] == [0, 7, 74 - 50]


def test_check_clip_refuses_without_decoding(clip_path, tmp_path):
    check_clip(clip_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_clip(tmp_path / "nothing.mp4")
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(MediaError, match="text.txt is"):
        check_clip(tmp_path / "text.txt")


def test_max_pixels_scales_both_sides(clip_path):
    assert load_clip(clip_path, max_pixels=160 * 112 // 4).frames.shape[1:] == (56, 80, 3)


def test_sound_is_resampled_and_in_time(clip_path, drawn):
    clip = load_clip(clip_path, sampling_rate=16000)
    assert clip.audio.dtype == np.float32 and clip.sampling_rate == 16000
    assert abs(len(clip.audio) - 3 * 16000) < 1000
    times = np.arange(3 * 16000 - 1) / 16000
    expected = np.interp(times, np.arange(3 * AUDIO_RATE) / AUDIO_RATE, drawn[1])
    # At 200 Hz and more, a shift by a millisecond would show.
    assert np.corrcoef(clip.audio[: len(times)], expected)[0, 1] > 0.98
    assert np.abs(clip.audio).max() == pytest.approx(np.abs(drawn[1]).max(), abs=0.05)


def test_sound_that_starts_late_is_preceded_by_silence(tmp_path, drawn):
    path = write(tmp_path / "late.mp4", drawn[0][:50], drawn[1][:AUDIO_RATE], wave_start=AUDIO_RATE // 2)
    audio = load_clip(path, sampling_rate=8000).audio
    assert np.abs(audio[:3800]).max() == 0
    assert np.abs(audio[4000:5000]).max() > 0.1
    assert abs(len(audio) - 1.5 * 8000) < 500


def test_stereo_is_mixed(tmp_path):
    path = tmp_path / "stereo.mp4"
    wave = np.zeros((2, AUDIO_RATE), np.float32)
    wave[0] = 0.5 * np.sin(2 * np.pi * 440 * np.arange(AUDIO_RATE) / AUDIO_RATE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=AUDIO_RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = AUDIO_RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    audio = load_clip(path).audio
    assert np.abs(audio[4000:12000]).max() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("picture, sound, missing", [(True, False, "audio"), (False, True, "video")])
def test_a_missing_stream_is_none(tmp_path, picture, sound, missing):
    clip = load_clip(write_clip(tmp_path / "a.mp4", seconds=1.0, picture=picture, sound=sound))
    assert clip.missing == missing
    assert (clip.frames is None, clip.audio is None) == (not picture, not sound)
    assert clip.duration_s == pytest.approx(1.0, abs=0.05)


def test_a_fixed_number_of_frames_is_kept_where_the_end_is_damaged(tmp_path, caplog):
    """Packets that give no frame are counted beforehand: the last picture stands for theirs."""
    path = write_clip(tmp_path / "damaged.mp4", seconds=2.0, sound=False)
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[(start + end) // 2 : end] = b"\xff" * (end - (start + end) // 2)
    path.write_bytes(data)
    frames = load_clip(path, num_frames=16).frames
    assert len(frames) == 16 and (frames[-1] == frames[-2]).all()
    assert "damaged.mp4 is damaged" in caplog.text


def test_a_cover_picture_is_no_video(tmp_path, drawn):
    path = write(tmp_path / "song.m4a", drawn[0][:1], drawn[1], codec="png", cover=True)
    assert load_clip(path).missing == "video"


def test_pictures_are_turned_upright(tmp_path):
    frames = np.zeros((5, 32, 64, 3), np.uint8)
    frames[:, :, :32] = 255  # the left half is white
    path = write(tmp_path / "turned.mp4", frames, rotation=90)
    image = load_clip(path).frames[0]
    assert image.shape == (64, 32, 3)
    # Turned by 90 degrees counterclockwise the left half comes to lie at the bottom.
    assert image[48:].mean() > 230 and image[:16].mean() < 25


def test_a_clip_shorter_than_a_sampling_step(tmp_path):
    clip = load_clip(write_clip(tmp_path / "short.mp4", seconds=0.04), fps=0.5)
    assert len(clip.frames) == 1 and clip.audio.size > 0


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: .*nothing.mp4"):
        load_clip(tmp_path / "nothing.mp4")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_clip(tmp_path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("note.mp4", b"just words\n" * 50, "no media file"),
        ("note.txt", b"just words\n" * 50, "is a text file, not a clip"),
        ("empty.mp4", b"", "no media file"),
        ("zeros.avi", bytes(10000), "no media file"),
        ("words.srt", b"1\n00:00:01,000 --> 00:00:02,000\nHello\n\n", "neither a video nor an audio stream"),
    ],
)
def test_files_that_are_no_media(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MediaError, match=message) as caught:
        load_clip(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_stream_that_cannot_be_decoded(tmp_path):
    path = write_clip(tmp_path / "broken.mp4", seconds=1.0, picture=False)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start : data.index(b"moov") - 4] = b"\xff" * (data.index(b"moov") - 4 - start)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"nothing in its audio stream \(aac\) can be decoded"):
        load_clip(path)


def test_damage_is_reported_and_the_rest_is_read(tmp_path, caplog):
    path = write_clip(tmp_path / "damaged.mp4", seconds=2.0, picture=False)
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[(start + end) // 2 : end] = b"\xff" * (end - (start + end) // 2)
    path.write_bytes(data)
    clip = load_clip(path)
    assert 0.5 < len(clip.audio) / clip.sampling_rate < 1.8
    assert "damaged.mp4 is damaged" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [
        {"fps": 0},
        {"fps": float("nan")},
        {"max_frames": 0},
        {"max_frames": 1.5},
        {"num_frames": 0},
        {"edge_seconds": 1.5},
        {"sampling_rate": -1},
        {"max_pixels": ""},
    ],
)
def test_arguments_out_of_range(clip_path, arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be a"):
        load_clip(clip_path, **arguments)


def test_two_ways_to_choose_frames(clip_path):
    with pytest.raises(ValueError, match="num_frames and edge_seconds exclude each other"):
        load_clip(clip_path, num_frames=4, edge_seconds=2)
    with pytest.raises(ValueError, match="edge_seconds and pick exclude each other"):
        load_clip(clip_path, pick=lambda total, rate: [0], edge_seconds=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"frames": None, "audio": None}, "got neither"),
        ({"frames": np.zeros((2, 4, 4, 3), np.float32)}, "frames must be uint8"),
        ({"frames": np.zeros((2, 3, 4, 4), np.uint8)}, r"uint8 \[T, H, W, 3\], got uint8 \[2, 3, 4, 4\]"),
        ({"audio": np.zeros((2, 9), np.float32)}, "audio must be float32"),
        ({"audio": np.zeros(9)}, "audio must be float32"),
        ({"fps": 0.0}, "must be above 0"),
    ],
)
def test_a_clip_checks_its_parts(arguments, message):
    parts = {"frames": np.zeros((1, 4, 4, 3), np.uint8), "audio": np.zeros(9, np.float32), "fps": 1.0}
    with pytest.raises(ValueError, match=message):
        Clip(**{**parts, "sampling_rate": 16000, "duration_s": 1.0, **arguments})


def test_writing_refuses_an_empty_clip(tmp_path):
    with pytest.raises(ValueError, match="picture or sound"):
        write_clip(tmp_path / "a.mp4", picture=False, sound=False)
    with pytest.raises(ValueError, match="even width and height"):
        write_clip(tmp_path / "a.mp4", width=15)
