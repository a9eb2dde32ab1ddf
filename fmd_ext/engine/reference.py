"""Fork-merge decoding in plain PyTorch on an unpatched model: two full passes, no cache, one sample at a time.

Slow and obvious. Everything else in the package is tested against it; it imports nothing that it checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fmd_ext.adapters import find_adapter
from fmd_ext.config import FMDConfig
from fmd_ext.labels import AUDIO, JOINT, PADDING, TEXT, VISUAL

# The settings of all samples, or of each.
Configs = FMDConfig | Sequence[FMDConfig]


@torch.no_grad()
def reference_hidden(
    decoder: nn.Module,
    config: Configs,
    inputs_embeds: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    hidden_states: bool = False,
    branch_embeds: torch.Tensor | None = None,
    deepstack: torch.Tensor | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """The decoder's output, after the final norm, for a padded batch.

    Args:
        decoder: an unpatched text decoder (``layers``, ``norm``, ``rotary_emb``).
        config: resolved settings, the same for all samples or one for each.
        inputs_embeds: [batch, length, hidden].
        labels: [batch, length] of -1 padding, 0 text, 1 visual, 2 audio, 3 joint.
        position_ids: [batch, length], [3, batch, length] (M-RoPE) or [4, batch, length] (text positions first).
        hidden_states: return the embeddings and every layer's output instead, as `output_hidden_states` does: before
            the merge each position's own branch (text, joint: the visual branch), then the merged states; last the
            normed output. Deep-stack features added to an output are not part of it, nor is a merge that follows them.
        branch_embeds: [2, batch, length, hidden], embeddings of joint positions in the visual and the audio branch.
        deepstack: [layers, batch, length, hidden], added to the outputs of the first layers; zero where a position
            has no visual features.

    Returns:
        [batch, length, hidden], zero at padding; or a list of num_layers + 1 such tensors.
    """
    batch, length, _ = inputs_embeds.shape
    if position_ids is None:
        position_ids = torch.arange(length, device=inputs_embeds.device).expand(batch, length)
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[1:]
    if position_ids.dim() == 2 and hasattr(decoder.rotary_emb, "mrope_section"):
        position_ids = position_ids.expand(3, *position_ids.shape)
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, length)
    samples = []
    for b in range(batch):
        keep = labels[b] != PADDING
        branches = None if branch_embeds is None else branch_embeds[:, b : b + 1, keep]
        states = _sample(
            decoder,
            _settings(config, b),
            inputs_embeds[b : b + 1, keep],
            branches,
            labels[b, keep],
            position_ids[..., b : b + 1, keep],
            [] if deepstack is None else deepstack[:, b : b + 1, keep],
        )
        padded = inputs_embeds.new_zeros((len(states), length, inputs_embeds.shape[-1]))
        padded[:, keep] = torch.cat(states)
        samples.append(padded)
    stacked = torch.stack(samples, dim=1)  # [states, batch, length, hidden]
    return list(stacked) if hidden_states else stacked[-1]


def _settings(config: Configs, sample: int) -> FMDConfig:
    return config if isinstance(config, FMDConfig) else config[sample]


def _sample(
    decoder: nn.Module,
    config: FMDConfig,
    embeds: torch.Tensor,
    branch_embeds: torch.Tensor | None,
    labels: torch.Tensor,
    position_ids: torch.Tensor,
    deepstack: Sequence[torch.Tensor] | torch.Tensor,
) -> list[torch.Tensor]:
    """All hidden states [1, length, hidden] of one sample without padding."""
    assert isinstance(config.fork_layers, int)
    rotary = decoder.rotary_emb(embeds, position_ids)
    length = embeds.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()
    joint = labels == JOINT
    both = bool((labels == VISUAL).any() and (labels == AUDIO).any()) or bool(joint.any())
    forks = both and config.fork_layers > 0

    def layer(index: int, hidden: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(length, length, dtype=embeds.dtype, device=embeds.device)
        mask.masked_fill_(~visible, torch.finfo(embeds.dtype).min)
        return decoder.layers[index](hidden, attention_mask=mask[None, None], position_embeddings=rotary)

    def features(index: int, scale: float = 1.0) -> torch.Tensor | float:
        return scale * deepstack[index] if index < len(deepstack) else 0.0

    if not forks:
        states, hidden = [embeds], embeds
        for index in range(len(decoder.layers)):
            states.append(layer(index, hidden, causal))
            hidden = states[-1] + features(index)
        states[-1] = decoder.norm(hidden)
        return states

    visual_branch, audio_branch = embeds.clone(), embeds.clone()
    if joint.any():
        visual_branch[:, joint], audio_branch[:, joint] = branch_embeds[0][:, joint], branch_embeds[1][:, joint]
    sees_visual = sees_audio = causal
    if config.masking == "zero":
        visual_branch[:, labels == AUDIO] *= config.mask_scale
        audio_branch[:, labels == VISUAL] *= config.mask_scale
    else:
        sees_visual = causal & (labels != AUDIO)[None, :]
        sees_audio = causal & (labels != VISUAL)[None, :]
        # A masked position's own row is never used; it sees itself so that no row of the softmax is empty.
        eye = torch.eye(length, dtype=torch.bool, device=embeds.device)
        sees_visual, sees_audio = sees_visual | eye, sees_audio | eye

    def home(visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        return torch.where((labels == AUDIO)[None, :, None], audio, visual)

    states = [embeds]
    for index in range(config.fork_layers):
        visual_branch = layer(index, visual_branch, sees_visual)
        audio_branch = layer(index, audio_branch, sees_audio)
        states.append(home(visual_branch, audio_branch))
        visual_branch = visual_branch + features(index)
        audio_branch = audio_branch + features(index, config.mask_scale)

    hidden = merge(config, labels, visual_branch, audio_branch)
    if config.fork_layers > len(deepstack):
        states[-1] = hidden
    for index in range(config.fork_layers, len(decoder.layers)):
        states.append(layer(index, hidden, causal))
        hidden = states[-1] + features(index)
    states[-1] = decoder.norm(hidden)
    return states


def merge(config: FMDConfig, labels: torch.Tensor, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
    """Fusion of the branches' hidden states [1, length, hidden], position by position."""
    text_weight, alpha_visual, alpha_audio, joint_weight = config.merge_weights
    weight = torch.empty(labels.shape, dtype=torch.float32, device=visual.device)  # of the visual branch
    weight[labels == TEXT] = text_weight
    weight[labels == VISUAL] = 1.0 if config.masking == "attention" else alpha_visual
    weight[labels == AUDIO] = 0.0 if config.masking == "attention" else 1.0 - alpha_audio
    weight[labels == JOINT] = joint_weight
    first_av = int((labels != TEXT).nonzero()[0])
    weight[:first_av] = 1.0  # the prefix is the same in both branches
    weight = weight[None, :, None]
    return (weight * visual.float() + (1.0 - weight) * audio.float()).to(visual.dtype)


@torch.no_grad()
def decoder_inputs(model: nn.Module, adapter: Any = None, mask_scale: float = 0.0, **inputs: Any) -> dict[str, Any]:
    """What an unpatched model hands to its text decoder for ``inputs``, and the modality labels.

    Returns a dict with ``inputs_embeds``, ``position_ids`` (or None) and ``labels`` [batch, length]; where positions
    are joint also ``branch_embeds``, where the decoder adds features also ``deepstack``.
    """
    chosen = find_adapter(model, adapter)
    branch_embeds = None
    if chosen.branch_inputs:
        branched = getattr(chosen.find_entry(model), chosen.branch_inputs)(mask_scale, **inputs)
        branch_embeds = branched.get("branch_embeds")
    caught: dict[str, Any] = {}
    decoder = chosen.find_decoder(model)
    # The embeddings where every decoder has them, also one that makes them itself: at its first layer.
    hooks = [
        decoder.register_forward_pre_hook(lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True),
        decoder.layers[0].register_forward_pre_hook(lambda module, args: caught.update(first_layer=args[0])),
    ]
    try:
        chosen.find_entry(model)(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    embeds, mask = caught["first_layer"], inputs.get("attention_mask")
    labels = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    if inputs.get("input_ids") is not None:
        found = chosen.labels_of(model, inputs["input_ids"], inputs)
        labels = labels if found is None else found.long()
    if mask is not None:
        labels = labels.masked_fill(mask == 0, PADDING)
    given: dict[str, Any] = {"inputs_embeds": embeds, "position_ids": caught.get("position_ids"), "labels": labels}
    if branch_embeds is not None:
        given["branch_embeds"] = branch_embeds
    if caught.get("deepstack_visual_embeds") is not None:
        features, where = caught["deepstack_visual_embeds"], caught["visual_pos_masks"]
        given["deepstack"] = embeds.new_zeros((len(features), *embeds.shape))
        for layer, added in enumerate(features):
            given["deepstack"][layer, where] = added.to(embeds.dtype)
    return given


@torch.no_grad()
def reference_logits(model: nn.Module, config: Configs, *, adapter: Any = None, **inputs: Any) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of fork-merge decoding for the ``inputs`` of a plain forward call."""
    chosen = find_adapter(model, adapter)
    given = decoder_inputs(model, adapter, _settings(config, 0).mask_scale, **inputs)
    hidden = reference_hidden(chosen.find_decoder(model), config, **given)
    return chosen.find_entry(model).get_output_embeddings()(hidden)


@torch.no_grad()
def reference_generate(
    model: nn.Module,
    config: Configs,
    max_new_tokens: int,
    *,
    adapter: Any = None,
    **inputs: Any,
) -> torch.Tensor:
    """Greedy tokens [batch, max_new_tokens], every step a full recompute; no end-of-sequence handling.

    Left padding only: the last column must be a real position in every sample.
    """
    chosen = find_adapter(model, adapter)
    entry, decoder = chosen.find_entry(model), chosen.find_decoder(model)
    given = decoder_inputs(model, adapter, _settings(config, 0).mask_scale, **inputs)
    embeds, positions, labels = given["inputs_embeds"], given["position_ids"], given["labels"]
    branches, deepstack = given.get("branch_embeds"), given.get("deepstack")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
    tokens = []
    for _ in range(max_new_tokens):
        hidden: Any = reference_hidden(
            decoder, config, embeds, labels, positions, branch_embeds=branches, deepstack=deepstack
        )
        token = entry.get_output_embeddings()(hidden[:, -1]).argmax(-1)
        tokens.append(token)
        embeds = torch.cat([embeds, decoder.get_input_embeddings()(token)[:, None]], dim=1)
        if branches is not None:
            branches = torch.cat([branches, embeds[:, -1:].expand(2, -1, -1, -1)], dim=2)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        labels = torch.cat([labels, labels.new_full((labels.shape[0], 1), TEXT)], dim=1)
        if deepstack is not None:
            deepstack = nn.functional.pad(deepstack, (0, 0, 0, 1))
    return torch.stack(tokens, dim=1)
