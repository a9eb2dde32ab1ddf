"""Baselines against full recomputes: one sample, every step anew, attention as whole matrices. And prompts for them."""

from __future__ import annotations

import torch

from fmd_ext.adapters import TEXT, find_adapter
from fmd_ext.lab.baselines.prompts import closing_ids
from fmd_ext.lab.interception import intercepting
from fmd_ext.lab.tiny import TOKEN_IDS
from omni_inputs import AUDIO_VIDEO, INTERLEAVED, TEXT_ONLY, VIDEO_AUDIO, VIDEO_ONLY, build_inputs

STEPS = 5
BATCHES = {
    "one": [VIDEO_AUDIO],
    "interleaved": [INTERLEAVED],
    "mixed": [VIDEO_AUDIO, TEXT_ONLY, AUDIO_VIDEO, VIDEO_ONLY],
}
WORDS_ONLY = {"suppress_tokens": list(TOKEN_IDS.values())}
OPTIONS = {"eos_token_id": None, "output_logits": True, "return_dict_in_generate": True, **WORDS_ONLY}


class Oracle:
    """One sample without padding: every step a full recompute, attention weights as whole matrices."""

    def __init__(self, model, given, index):
        keep = given["labels"][index] >= 0
        self.model, self.decoder = model, find_adapter(model).find_decoder(model)
        self.embeds = given["inputs_embeds"][index : index + 1, keep]
        self.positions = given["position_ids"][..., index : index + 1, keep]
        self.labels = given["labels"][index, keep]
        self.prompt = len(self.labels)

    def logits(self, weights_of, tokens=(), changed=None):
        """Of the position after ``tokens``; ``weights_of(layer, scores [heads, n, n])`` gives the attention.

        ``changed(layer, out [heads, n, head_dim], scores without a mask, value [heads, n, head_dim])`` gives another
        attention output.
        """
        embeds, positions, labels = self.embeds, self.positions, self.labels
        for token in tokens:
            embeds = torch.cat([embeds, self.decoder.get_input_embeddings()(torch.tensor([[token]]))], 1)
            positions = torch.cat([positions, positions[..., -1:] + 1], -1)
            labels = torch.cat([labels, torch.tensor([TEXT])])
        self.now = labels

        def attention(attend, module, query, key, value, mask, scale, **kwargs):
            groups = query.shape[1] // key.shape[1]
            key, value = key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)
            all_scores = query[0] @ key.transpose(-1, -2) * scale
            scores = all_scores.masked_fill(~torch.ones(all_scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
            out = weights_of(module.layer_idx, scores) @ value
            if changed is not None:
                out = changed(module.layer_idx, out, all_scores, value)
            return out.transpose(0, 1)[None], None

        with intercepting(self.decoder, "self_attn", attention):
            hidden = self.decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden)[0, -1]


def softmax(layer, scores):
    return scores.softmax(-1)


def check(model, inputs, context, expected_logits, *, atol=1e-4, **options):
    """Logits of every step, with the method's own tokens fed back. Returns the context's value."""
    with context as method:
        out = model.generate(**inputs, max_new_tokens=STEPS, **OPTIONS, **options)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    for sample in range(len(new)):
        for step in range(STEPS):
            expected = expected_logits(sample, new[sample, :step].tolist())
            torch.testing.assert_close(out.logits[step][sample], expected, atol=atol, rtol=0)
    return method


def build_questions(batch, processor, **options):
    """`build_inputs`, with the end of the turn and the opening of the answer behind every sample."""
    inputs = build_inputs(batch, **options)
    closing = torch.tensor(closing_ids(processor)).expand(len(batch), -1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], closing], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(closing)], 1)
    return inputs


def lacking(inputs, batch, index, kinds):
    """The inputs of sample ``index`` of a batch of `build_inputs` alone, without clips of ``kinds``: video, audio."""
    ids = inputs["input_ids"][index][inputs["attention_mask"][index] == 1]
    wraps = {"video": "vision", "audio": "audio"}
    gone = [TOKEN_IDS[name] for kind in kinds
            for name in (f"{kind}_token", f"{wraps[kind]}_bos_token", f"{wraps[kind]}_eos_token")]  # fmt: skip
    ids = ids[~torch.isin(ids, torch.tensor(gone, dtype=torch.long))][None]
    own = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def clips(kind, samples):
        return sum(piece[0] in (kind, "both") for sample in samples for piece in sample)

    for kind, names in (("video", ("video_grid_thw", "video_second_per_grid")),
                        ("audio", ("input_features", "feature_attention_mask"))):  # fmt: skip
        first, count = clips(kind, batch[:index]), clips(kind, [batch[index]])
        if kind in kinds or not count:
            continue
        own |= {name: inputs[name][first : first + count] for name in names}
        if kind == "video":
            sizes = inputs["video_grid_thw"].prod(-1)
            start = int(sizes[:first].sum())
            patches = int(sizes[first : first + count].sum())
            own["pixel_values_videos"] = inputs["pixel_values_videos"][start : start + patches]
    if inputs.get("use_audio_in_video") and not kinds:
        own["use_audio_in_video"] = True
    return own
