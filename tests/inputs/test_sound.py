"""Tracks of sound: which one is heard, what is missing in it, and that a bad one does not take the picture along."""

from __future__ import annotations

import numpy as np
import pytest

from clip_files import replace_bytes, write_tracks
from fmd_ext.inputs.media import MediaError, check_clip, load_clip


def test_an_empty_sound_track_loses_only_the_sound(tmp_path, caplog):
    clip = load_clip(write_tracks(tmp_path / "empty.mkv", sounds=[()]))
    assert clip.missing == "audio" and len(clip.frames) == 8
    assert "nothing in its audio stream (pcm_f32le) can be decoded, the rest is taken" in caplog.text


def test_an_empty_picture_track_loses_only_the_picture(tmp_path, caplog):
    clip = load_clip(write_tracks(tmp_path / "empty.mkv", frames=0, sounds=[(0,)]))
    assert clip.missing == "video" and len(clip.audio) == 16000
    assert "nothing in its video stream (mpeg4) can be decoded, the rest is taken" in caplog.text


@pytest.mark.parametrize(
    "known, unknown, missing",
    [(b"A_PCM/FLOAT/IEEE", b"A_NEW/FLOAT/IEEE", "audio"), (b"V_MPEG4/ISO/ASP", b"V_NEWER/ISO/ASP", "video")],
)
def test_a_codec_that_ffmpeg_does_not_know_loses_only_its_track(tmp_path, caplog, known, unknown, missing):
    path = write_tracks(tmp_path / "new.mkv")
    replace_bytes(path, known, unknown)
    assert load_clip(path).missing == missing
    assert f"{missing} stream (of a codec that FFmpeg does not know)" in caplog.text


def test_two_empty_tracks_are_no_clip(tmp_path):
    path = write_tracks(tmp_path / "new.mkv")
    replace_bytes(path, b"A_PCM/FLOAT/IEEE", b"A_NEW/FLOAT/IEEE")
    replace_bytes(path, b"V_MPEG4/ISO/ASP", b"V_NEWER/ISO/ASP")
    with pytest.raises(MediaError, match="nothing in its video stream .* and audio stream .* can be decoded"):
        load_clip(path)


def test_the_sound_track_can_be_chosen(tmp_path, caplog):
    path = write_tracks(tmp_path / "two.mkv", sounds=[(0,), (0,)])
    for number in (0, 1):
        check_clip(path, number)
        loudness = np.median(load_clip(path, audio_track=number).audio)
        assert loudness == pytest.approx(0.1 * (number + 1), abs=0.01)
    assert caplog.text == ""
    assert np.array_equal(load_clip(path).audio, load_clip(path, audio_track=0).audio)
    assert "has 2 sound tracks, the first is heard: audio_track chooses another" in caplog.text


@pytest.mark.parametrize("number", [1, -1])
def test_a_sound_track_that_is_not_there(tmp_path, number):
    path = write_tracks(tmp_path / "one.mkv")
    for read in (check_clip, load_clip):
        with pytest.raises(MediaError, match=f"has 1 sound tracks, counted from 0; there is no track {number}"):
            read(path, audio_track=number)


def test_what_is_missing_within_the_sound_is_silent(tmp_path):
    """What comes behind a gap stays beside its picture."""
    audio = load_clip(write_tracks(tmp_path / "gap.mkv", sounds=[(0, 3)])).audio
    assert len(audio) == 4 * 16000
    assert np.abs(audio[16400:47600]).max() == 0
    assert np.median(audio[:16000]) == pytest.approx(0.1, abs=0.01) == np.median(audio[48100:])


def test_surround_sound_is_averaged_and_that_is_said(tmp_path, caplog):
    audio = load_clip(write_tracks(tmp_path / "surround.mkv", channels=6)).audio
    assert np.median(audio) == pytest.approx(0.1 / 6, rel=0.01)
    assert "the mean of its 6 channels of sound is heard" in caplog.text
    caplog.clear()
    load_clip(write_tracks(tmp_path / "stereo.mkv", channels=2))
    assert caplog.text == ""
