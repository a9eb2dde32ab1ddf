"""The model that lmms-eval asks: any model and any decoding method of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from fmd_ext.cli.models import load_model
from fmd_ext.inputs.chat import load_clip_for, prepare_batch, to_device
from fmd_ext.inputs.media import Clip
from fmd_ext.lab.eval.generation import Decoding, answer
from fmd_ext.lab.eval.methods import parse_methods
from fmd_ext.lab.eval.run import rank_and_size

KNOWN = {"max_new_tokens", "temperature", "top_p", "num_beams", "do_sample", "until"}


class FMDModel(lmms):
    """``--model fmd_ext --model_args pretrained=...,method=...``

    Args:
        pretrained: folder or hub name; None is the built-in model.
        method: one method as ``fmd-ext eval --method`` takes it, settings by colons.
        dtype, device: as for ``fmd-ext ask``; no device is "auto".
        fps, max_frames: of the clips; with their sound, always.
        interleaved: picture and sound in turn.
        batch_size: requests at a time (lmms-eval's --batch_size). Clips of unequal frame rate, or of which some lack
            sound, are asked about one by one.
        seed: of sampling.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        method: str = "fmd",
        dtype: str = "auto",
        device: str | None = None,
        fps: float = 2.0,
        max_frames: int = 128,
        interleaved: bool = False,
        batch_size: int | str = 1,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown.pop("max_batch_size", None)  # lmms-eval passes it to every model
        if unknown:
            raise TypeError(f"unknown model_args: {', '.join(unknown)}")
        (self._choice,) = parse_methods(method)
        self._rank, self._world_size = rank_and_size()
        loaded = load_model(pretrained, dtype, str(device or "auto"))
        self._model, self._processor = loaded.model, loaded.processor
        self._rates = {"fps": float(fps), "max_frames": int(max_frames)}
        self._interleaved, self._batch_size, self._seed = bool(interleaved), int(batch_size), int(seed)

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def device(self) -> Any:
        return self._model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers the requests in their order. A medium that is no file of a clip is an error, never left out."""
        results: list[GenerationResult | None] = [None] * len(requests)
        with tqdm(total=len(requests), desc="answering", disable=None if self.rank == 0 else True) as bar:
            for indices in self._batches(requests):
                for index, result in zip(indices, self._answer([requests[i] for i in indices]), strict=True):
                    results[index] = result
                bar.update(len(indices))
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("fmd_ext generates answers; it gives no log-likelihoods of given ones")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("fmd_ext has no tasks of several rounds")

    def _batches(self, requests: list[Instance]) -> list[list[int]]:
        """Neighbours with the same generation arguments."""
        batches: list[list[int]] = []
        for index, request in enumerate(requests):
            last = batches[-1] if batches else None
            if last and len(last) < self._batch_size and requests[last[0]].args[1] == request.args[1]:
                last.append(index)
            else:
                batches.append([index])
        return batches

    def _answer(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        conversations = []
        for request in requests:
            context, _, doc_to_visual, doc_id, task, split = request.args
            media = doc_to_visual(self.task_dict[task][split][doc_id])
            conversations.append(([self._clip(medium) for medium in media], context))
        every = [clip for clips, _ in conversations for clip in clips]
        if len(requests) > 1 and len({(clip.frames is not None and clip.fps, clip.missing) for clip in every}) > 1:
            return [result for request in requests for result in self._answer([request])]
        arguments = requests[0].args[1]
        if unknown := set(arguments) - KNOWN:
            raise ValueError(f"generation arguments that fmd_ext does not know: {', '.join(sorted(unknown))}")
        if (arguments.get("num_beams") or 1) != 1:
            raise ValueError(f"fmd_ext answers without beams here, got num_beams={arguments['num_beams']}")
        decoding = Decoding(
            temperature=float(arguments.get("temperature") or 0.0) if arguments.get("do_sample", True) else 0.0,
            top_p=float(arguments.get("top_p") or 1.0),
            seed=self._seed,
        )
        inputs = prepare_batch(self._processor, conversations, use_audio_in_video=self._interleaved)
        said = answer(
            self._model,
            self._processor,
            self._choice,
            to_device(inputs, self._model.device),
            decoding,
            max_new_tokens=int(arguments.get("max_new_tokens", 128)),
            random_key=[request.args[3] for request in requests],
        )
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(_until(text, arguments.get("until")), TokenCounts(length, tokens))
            for text, tokens, length in zip(said.texts, said.tokens, lengths, strict=True)
        ]

    def _clip(self, medium: Any) -> Clip:
        if isinstance(medium, dict):  # a sound, as `doc_to_visual` gives it
            medium = medium.get("path")
        if not isinstance(medium, str):
            raise ValueError(f"fmd_ext takes paths of video and audio files, the task gave {type(medium).__name__}")
        return load_clip_for(self._processor, medium, progress=False, **self._rates)


def _until(text: str, ends: str | Sequence[str] | None) -> str:
    for end in [ends] if isinstance(ends, str) else ends or ():
        text = text.split(end)[0] if end else text
    return text
