"""Folders in the published form of each benchmark, with a few questions and clips of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import wavfile

from fmd_ext.inputs.sample_clip import write_clip

AVHBENCH = [
    ("00001", "Video-driven Audio Hallucination", "Is the dog making sound in the audio?", "Yes"),
    ("00001", "Video-driven Audio Hallucination", "Is the couch making sound in the audio?", "No"),
    ("00001", "Audio-driven Video Hallucination", "Is the dog visible in the video?", "Yes"),
    ("00001", "AV Matching", "Are the contexts of audio and visual content matching?", "Yes"),
    ("00001_swap", "AV Matching", "Are the contexts of audio and visual content matching?", "No"),
    ("00002", "Audio-driven Video Hallucination", "Is the car visible in the video?", "No"),
    ("00002", "AV Captioning", "Describe what you see and hear in a single sentence.", "A dog barks."),
]

MUSIC_AVQA = [
    ("00000093", '["Audio", "Counting"]', "How many musical instruments were heard throughout the video?", "[]", "one"),
    (
        "00000093",
        '["Visual", "Location"]',
        "What kind of instrument is the <LRer> instrument?",
        '["leftest"]',
        "acoustic_guitar",
    ),
    (
        "00000094",
        '["Audio-Visual", "Comparative"]',
        "Is the <Object> louder than the <Object>?",
        '["cello", "flute"]',
        "yes",
    ),
    (
        "00000094",
        '["Audio-Visual", "Temporal"]',
        "Which <Object> makes the sound <FL>?",
        '["instrument", "first"]',
        "Flute",
    ),
]

AVQA = [
    (11, "clip_a", "What makes the sound?", ["dog", "cat", "car", "horse"], 0, "Which"),
    (12, "clip_a", "Where is it?", ["street", "house"], 1, "Where"),
    (13, "clip_b", "What is happening?", None, 0, "Happening"),
]

VIDEO_MME = {
    "video_id": "001",
    "videoID": "fFjv93ACGo8",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "task_type": "Counting Problem",
    "question_id": "001-1",
    "question": "How many balls are there?",
    "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
    "answer": "C",
}

# As published: a record per video.
WORLDSENSE = {
    "video_id": "abcd",
    "duration": 61.5,
    "domain": "Daily Life",
    "audio_class": ["Speech", "Event"],
    "task0": {
        "task_domain": "Recognition",
        "task_type": "Audio Recognition",
        "question": "What is said?",
        "candidates": ["A. Hello", "B. Goodbye", "C. Nothing"],
        "answer": "A",
    },
    "task1": {
        "task_domain": "Reasoning",
        "task_type": "Causal Reasoning",
        "question": "Why?",
        "candidates": ["A. For joy", "B. In anger", "C. From habit", "D. By chance"],
        "answer": "D",
    },
}

# As derivatives have it: a record per question.
WORLDSENSE_FLAT = {
    "index": 7,
    "video_path": "./videos/abcd.mp4",
    "subtitle_path": "./subtitles/abcd.srt",
    "question": "What is said?",
    "candidates": ["A. Hello", "B. Goodbye", "C. Nothing"],
    "answer": "A",
    "task_type": "Audio Recognition",
    "task_domain": "Recognition",
    "domain": "Daily Life",
    "duration": "1-2min",
    "audio_class": ["Speech", "Event"],
}

# As published: what a sample has not is "None" or null.
CMM = [
    {
        "category": "over-reliance_unimodal_priors",
        "sub_category": "visual-language",
        "modality": "visual",
        "granularity": "object-level",
        "correlation_type": "visual dominance",
        "video_path": "./visual-language/a.mp4",
        "audio_path": "None",
        "question": "Did you see a dog in the video? Answer with yes or no.",
        "answer": "yes",
    },
    {
        "category": "inter-modality_spurious_correlation",
        "sub_category": "audio-language",
        "modality": "audio",
        "granularity": "event-level",
        "correlation_type": "",
        "video_path": None,
        "audio_path": "./audio-language/b.wav",
        "question": "Did you hear barking in the audio? Answer with yes or no.",
        "answer": "No",
    },
    {
        "category": "inter-modality_spurious_correlation",
        "sub_category": "visual-audio-language",
        "modality": "visual-audio",
        "granularity": "event-level",
        "correlation_type": "VAL",
        "video_path": "./visual-audio/c.mp4",
        "audio_path": "./visual-audio/c_sound.wav",
        "question": "Did you hear barking in the audio? Answer with yes or no.",
        "answer": "no",
    },
]

# As published: some records lack the content categories.
DAILY_OMNI = [
    {
        "video_id": "x1",
        "Question": "Which sound follows the red car?",
        "Choice": ["A. A horn", "B. A bell", "C. A voice", "D. Nothing"],
        "Answer": "B",
        "Type": "AV Event Alignment",
        "video_category": "Autos & Vehicles",
        "video_duration": "30s",
        "content_parent_category": "Life",
        "content_fine_category": "Traffic",
    },
    {
        "video_id": "x1",
        "Question": "Why does she laugh?",
        "Choice": ["A. For joy", "B. In anger", "C. From habit", "D. By chance"],
        "Answer": "A",
        "Type": "Reasoning",
        "video_category": "Autos & Vehicles",
        "video_duration": "60s",
    },
]

SUBTITLES = (
    '1\n00:00:00,000 --> 00:00:01,000\n<font color="white">hello</font>\n\n2\n00:00:01,000 --> 00:00:02,000\nworld 2\n'
)


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def records(name: str) -> list[dict[str, Any]]:
    if name.startswith("avhbench"):
        return [dict(zip(("video_id", "task", "text", "label"), row, strict=True)) for row in AVHBENCH]
    if name == "music-avqa":
        fields = ("video_id", "type", "question_content", "templ_values", "anser")
        rows = [dict(zip(fields, row, strict=True)) for row in MUSIC_AVQA]
        return [{"question_id": number, "question_deleted": 0, **row} for number, row in enumerate(rows)]
    if name == "avqa":
        fields = ("id", "video_name", "question_text", "multi_choice", "answer", "question_type")
        return [{"video_id": 1, **dict(zip(fields, row, strict=True))} for row in AVQA]
    if name == "cmm":
        return [dict(row) for row in CMM]
    if name.startswith("daily-omni"):
        return [dict(row) for row in DAILY_OMNI]
    return [dict(VIDEO_MME if name == "video-mme" else WORLDSENSE)]


FILES = {
    "avhbench": "json/qa.json",
    "music-avqa": "json_update/avqa-test.json",
    "avqa": "val_qa.json",
    "video-mme": "videomme.json",
    "worldsense": "worldsense_qa.json",
    "avhbench-deduplicated": "json/qa.json",
    "cmm": "all_data_final_reorg.json",
    **dict.fromkeys(("daily-omni", "daily-omni-picture", "daily-omni-sound"), "qa.json"),
}
VIDEOS = {
    "avhbench": ("video/00001.mp4", "video/00001_swap.mp4", "video/00002.mp4"),
    "music-avqa": ("MUSIC-AVQA-videos-Real/00000093.mp4", "MUSIC-AVQA-videos-Real/00000094.mp4"),
    "avqa": ("videos/clip_a.mp4", "videos/clip_b.mp4"),
    "video-mme": ("data/fFjv93ACGo8.mp4",),
    "worldsense": ("videos/abcd.mp4",),
    "avhbench-deduplicated": ("video/00001.mp4", "video/00001_swap.mp4", "video/00002.mp4"),
    "cmm": ("visual-language/a.mp4", "audio-language/b.wav", "visual-audio/c.mp4", "visual-audio/c_sound.wav"),
    **dict.fromkeys(
        ("daily-omni", "daily-omni-picture", "daily-omni-sound"), ("Videos/x1/x1_video.mp4", "Videos/x1/x1_audio.wav")
    ),
}


def write_benchmark(folder: Path, name: str) -> Path:
    """The benchmark's folder; Video-MME and WorldSense come with subtitles."""
    write_json(folder / FILES[name], records(name))
    for seed, video in enumerate(VIDEOS[name]):
        (folder / video).parent.mkdir(parents=True, exist_ok=True)
        if video.endswith(".wav"):
            sound = 0.1 * np.random.default_rng(seed).standard_normal(16000)
            wavfile.write(folder / video, 16000, sound.astype(np.float32))
        else:
            write_clip(folder / video, seconds=1.0, width=64, height=56, seed=seed)
    for place in ("subtitle/fFjv93ACGo8.srt", "subtitles/abcd.srt"):
        if name in ("video-mme", "worldsense"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(SUBTITLES)
    return folder
