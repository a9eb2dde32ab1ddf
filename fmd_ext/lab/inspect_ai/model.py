"""The model that inspect_ai asks: any model and any decoding method of this package."""

from __future__ import annotations

import asyncio
import base64
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from inspect_ai.model import (
    ChatMessage,
    ChatMessageUser,
    ContentAudio,
    ContentText,
    ContentVideo,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)

from fmd_ext.cli.models import load_model
from fmd_ext.inputs.chat import load_clip_for, prepare_batch, to_device
from fmd_ext.inputs.media import Clip
from fmd_ext.lab.eval.generation import Decoding, answer
from fmd_ext.lab.eval.methods import parse_methods

BUILT_IN = "built-in"  # the name of the small model of the package
MAX_TOKENS = 128  # where neither the task nor the user says how many


@modelapi(name="fmd_ext")
class FMDModel(ModelAPI):
    """``--model fmd_ext/NAME -M method=...``, NAME a folder, a hub name, or built-in.

    Args:
        model_name: of the model.
        method: one method as ``fmd-ext eval --method`` takes it, settings by colons.
        dtype, device: as for ``fmd-ext ask``.
        fps, max_frames: of the clips; with their sound, always.
        interleaved: picture and sound in turn.
        seed: of sampling.

    Raises ValueError for a conversation of several turns, for tools, and for media that are no clips.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  inspect_ai's own signature
        method: str = "fmd",
        dtype: str = "auto",
        device: str = "auto",
        fps: float = 2.0,
        max_frames: int = 128,
        interleaved: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        (self._choice,) = parse_methods(method)
        loaded = load_model(None if model_name == BUILT_IN else model_name, dtype, device)
        self._model, self._processor = loaded.model, loaded.processor
        self._rates = {"fps": float(fps), "max_frames": int(max_frames)}
        self._interleaved, self._seed = bool(interleaved), int(seed)
        self._one_at_a_time = threading.Lock()  # inspect_ai adapts its connections upwards, past max_connections

    def max_connections(self) -> int:
        """One model answers one question at a time."""
        return 1

    async def generate(
        self, input: list[ChatMessage], tools: Sequence[Any], tool_choice: Any, config: GenerateConfig
    ) -> ModelOutput:
        """Answers the user's only turn. A medium that is no clip is an error, never left out."""
        if tools:
            raise ValueError("fmd_ext answers questions about clips; it calls no tools")
        return await asyncio.to_thread(self._alone, input, config)

    def _alone(self, messages: Sequence[ChatMessage], config: GenerateConfig) -> ModelOutput:
        with self._one_at_a_time, torch.no_grad():
            return self._answer(messages, config)

    def _answer(self, messages: Sequence[ChatMessage], config: GenerateConfig) -> ModelOutput:
        turns = [message for message in messages if message.role != "system"]
        if len(turns) != 1 or not isinstance(turns[0], ChatMessageUser):
            raise ValueError(f"fmd_ext answers one turn of the user, got {[message.role for message in messages]}")
        content = turns[0].content
        parts = [ContentText(text=content)] if isinstance(content, str) else content
        question = "\n".join(part.text for part in parts if isinstance(part, ContentText))
        clips = [self._clip(part) for part in parts if not isinstance(part, ContentText)]
        system = next((message.text for message in messages if message.role == "system"), None)
        inputs = prepare_batch(
            self._processor, [(clips, question)], use_audio_in_video=self._interleaved, system_prompt=system
        )
        decoding = Decoding(temperature=config.temperature or 0.0, top_p=config.top_p or 1.0, seed=self._seed)
        most = config.max_tokens or MAX_TOKENS
        said = answer(
            self._model,
            self._processor,
            self._choice,
            to_device(inputs, self._model.device),
            decoding,
            max_new_tokens=most,
            random_key=(question, config.seed),
        )
        stop = "stop" if said.ended[0] else "max_tokens"
        output = ModelOutput.from_content(self.model_name, said.texts[0], stop_reason=stop)
        length, tokens = inputs["input_ids"].shape[1], said.tokens[0]
        output.usage = ModelUsage(input_tokens=length, output_tokens=tokens, total_tokens=length + tokens)
        return output

    def _clip(self, part: Any) -> Clip:
        if not isinstance(part, (ContentVideo, ContentAudio)):
            raise ValueError(f"fmd_ext takes video and audio files, the task gave {type(part).__name__}")
        place = part.video if isinstance(part, ContentVideo) else part.audio
        if not place.startswith("data:"):
            return load_clip_for(self._processor, place, progress=False, **self._rates)
        with tempfile.NamedTemporaryFile(suffix=f".{part.format}") as file:
            file.write(base64.b64decode(place.partition(",")[2]))
            file.flush()
            return load_clip_for(self._processor, Path(file.name), progress=False, **self._rates)
