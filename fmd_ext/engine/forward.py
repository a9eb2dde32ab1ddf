"""The forward call of a patched text decoder: rows in, branched layers, merge, padded batch out.

The model's own decoder code runs. It gets one packed sequence of rows instead of the padded batch; its attention
modules call `branched_attention`; a pre-hook on every layer after the fork merges the rows and drops the away rows.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from fmd_ext import ops
from fmd_ext.compat import cache_argument, name_cache
from fmd_ext.engine.cache import BranchedState, adopt
from fmd_ext.engine.call import Call
from fmd_ext.engine.compiling import python_only
from fmd_ext.engine.outputs import unpack_outputs
from fmd_ext.engine.plan import Plan
from fmd_ext.engine.prompt import UNREAD_BRANCHES, Prompt, check_labels, covering, modality_bits
from fmd_ext.engine.session import Session
from fmd_ext.labels import JOINT, PADDING, TEXT
from fmd_ext.ops import dispatch

ATTENTION_NAME = "fmd_ext"


@python_only
def branched_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    fmd_call: Call | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over slot pools.

    Args:
        query: [1, num_qo_heads, rows, head_dim].
        key, value: pools [num_kv_heads, num_slots, head_dim], as the cache's ``update`` returns them.
        scaling: softmax scale, default head_dim ** -0.5.

    Returns:
        [1, rows, num_qo_heads, head_dim], and None for the weights, which are never materialised.
    """
    call = fmd_call
    if call is None:
        raise RuntimeError(
            f"{type(module).__name__} did not pass its keyword arguments on to the attention function, so fmd_ext "
            "cannot run in it"
        )
    extras = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if kwargs.get("sliding_window") and is_window(kwargs["sliding_window"], module.config):
        extras.append("sliding_window")
    if extras:
        raise TypeError(
            f"{type(module).__name__} asks for {', '.join(extras)}, which fmd_ext's attention does not have"
        )
    if call.rotation is not None:
        raise RuntimeError(
            f"{type(module).__name__} changes its keys after their rotation, so that the append cannot rotate them: "
            "its adapter must not name `rotary`"
        )
    layer, rotated = call.layer_plan(module.layer_idx), call.rotated
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if rotated is not None and rotated.query is query:
        rows = rotated.q_out
    else:
        rows = query[0].transpose(0, 1).to(value.dtype)  # the same dtype, but for rotations under autocast
    if call.observer is not None and call.is_forked(module.layer_idx):
        call.observer.observe(rows, key, scale)
    if layer.max_qo_len > 1 and dispatch.prefill_path(rows.device, rows.dtype, rows.shape[-1]).name == "sdpa":
        runs = layer.causal_runs
        if runs is not None and runs.serves(rows.device):
            return runs.attend(rows, key, value, scale)[None], None
    qo_rows, key_ranges = layer.get("qo_rows", rows.device), layer.get("key_ranges", rows.device)
    if layer.max_qo_len == 1:
        out, _ = ops.branched_decode(rows, key, value, qo_rows, key_ranges, scale)
    else:
        cu_seqlens_q = layer.get("cu_seqlens_q", rows.device)
        out, _ = ops.branched_prefill(rows, key, value, qo_rows, cu_seqlens_q, key_ranges, layer.max_qo_len, scale)
    return out[None], None


AttentionInterface.register(ATTENTION_NAME, branched_attention)


class MergeHook:
    """Forward pre-hook of the layers after the fork: merges once, then keeps the home rows of every argument.

    Args:
        layer_idx: of the layer, or the number of layers for the final norm.
    """

    def __init__(self, session: Session, layer_idx: int) -> None:
        self.session = session
        self.layer_idx = layer_idx

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        call = self.session.call
        if call is None or call.plan.num_away == 0 or not call.reaches_merge(self.layer_idx):
            return None
        rows = call.plan.num_rows
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] == rows:
            self._merge(hidden, call)
            hidden = hidden.narrow(-2, 0, call.plan.num_home)
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        for name, dim in (("position_embeddings", -2), ("position_ids", -1)):
            if (given := kwargs.get(name)) is not None:
                kwargs[name] = call.once(name, given, _home_rows, dim, call.plan)
        return args, kwargs

    def _merge(self, hidden: torch.Tensor, call: Call) -> None:
        plan, device = call.plan, hidden.device
        weights = self.session.merge_weights(device)
        if call.observer is not None:
            call.home_weights = call.observer.home_weights(weights, call.home_weights)
        home_rows, away_modality = plan.tensors.get("home_rows", device), plan.tensors.get("away_modality", device)
        if call.home_weights is None:
            away_weights = weights[away_modality]
        else:
            samples = plan.tensors.get("positions", device)[home_rows] // plan.length
            away_weights = call.home_weights.to(device)[samples, away_modality]
        ops.merge_(hidden[0], home_rows, plan.tensors.get("away_rows", device), away_weights)


def _home_rows(value: Any, dim: int, plan: Plan) -> Any:
    """The home rows of a tensor with all rows in dimension ``dim``, or of each tensor of a tuple; else ``value``."""
    if isinstance(value, tuple):
        return tuple(_home_rows(item, dim, plan) for item in value)
    if isinstance(value, torch.Tensor) and value.dim() >= -dim and value.shape[dim] == plan.num_rows:
        return value.narrow(dim, 0, plan.num_home)
    return value


class ForkedDecoder:
    """Runs a text decoder's own forward on packed rows. One per patched decoder."""

    def __init__(self, session: Session, original: Any, embed: str = "") -> None:
        self.session = session
        self.original = original
        self.embed = embed  # see `Adapter.embed`
        self.signature = inspect.signature(original)
        self.cache_name = cache_argument(self.signature)

    def __call__(self, decoder: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = arguments_by_name(self.signature, args, kwargs)  # they become those of the decoder's own forward
        return_dict = given.pop("return_dict", None)
        use_cache = given.pop("use_cache", None)
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", True)
        self._refuse(decoder, given)
        embeds, mask = given["inputs_embeds"], given.pop("attention_mask", None)
        cache, labels = given.pop(self.cache_name, None), given.pop("modality_labels", None)
        branches, positions = given.pop("branch_embeds", None), given.get("position_ids")
        if mask is None and cache is None and not use_cache:
            _refuse_packed(positions)
        past = 0 if cache is None else cache.get_seq_length()
        cache, state = adopt(cache, self.session, len(decoder.layers))
        call = self.session.call  # set by the decode runner, which prepares the call of a static step
        is_prepared = call is not None
        if not is_prepared:
            check_length(decoder, past + embeds.shape[1])
            if labels is not None:
                prompt = Prompt(covering(check_labels(labels, len(embeds)), past + embeds.shape[1]))
            else:
                prompt = self._prompt(embeds, past, state)
            labels, announced = self._labels(embeds, past, prompt)
            if not _is_generated(prompt, state, mask, embeds.shape[1]):
                _apply_padding(labels, mask, past, state)
            branches = self._branches(embeds, labels, past, branches, prompt)
            call = self._open_call(state, labels, announced, prompt, embeds.device)
            if prompt is not None and prompt.is_one_with(self.session.generating):
                state.prompt = prompt
        given["inputs_embeds"] = self._pack_embeds(embeds, branches, call.plan)
        given["position_ids"] = self._pack_positions(positions, embeds, call.plan, past)
        given.update({self.cache_name: cache}, use_cache=True, attention_mask=None, return_dict=True)
        given["fmd_call"] = call  # attention modules may be copies, which have no session
        with self.session.running(call):
            out = self.original(**given)
        call.close()
        if not is_prepared:
            state.commit(call)
        self.session.last_call = call
        out = unpack_outputs(out, call.plan, cache if use_cache else None)
        return out.to_tuple() if return_dict is False else out

    def _prompt(self, embeds: torch.Tensor, past: int, state: BranchedState) -> Prompt | None:
        """The prompt of the entry's forward call; where the decoder is called directly, that of `generate`."""
        if self.session.incoming is not None:
            prompt, length = self.session.incoming
            prompt.check_positions(length, past + embeds.shape[1])
            return prompt
        generating = self.session.generating
        if generating is not None and (generating.is_one_with(state.prompt) if past else generating.fits(embeds)):
            return generating.begin()
        return self.session.labels_of_context

    def _open_call(
        self,
        state: BranchedState,
        labels: np.ndarray,
        announced: np.ndarray | None,
        prompt: Prompt | None,
        device: torch.device,
    ) -> Call:
        """The call that adds ``labels``; routes that its cache has not been told yet choose weights and who forks."""
        given = self.session.routes_of_context
        if given is None and prompt is not None:
            given = prompt.routes
        if given is None or (state.logical_length and given is state.routes):
            return self.session.open_call(state.plan_call(labels, announced), labels, state)
        routes = given.repeated(len(labels))
        call = self.session.open_call(state.plan_call(labels, announced, routes.forks), labels, state)
        call.routes = given
        weights = self.session.merge_weights(device)
        call.home_weights = routes.home_weights(self.session.config, weights, call.home_weights)
        return call

    def _refuse(self, decoder: nn.Module, call: dict[str, Any]) -> None:
        """Errors for what the method does not do; fills in ``inputs_embeds``."""
        input_ids, embeds = call.pop("input_ids", None), call.get("inputs_embeds")
        if (input_ids is None) == (embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if embeds is None:
            embeds = call["inputs_embeds"] = self._embed(decoder, input_ids, call)
        if embeds.dim() != 3:
            raise ValueError(f"inputs_embeds must be [batch, length, hidden], got {list(embeds.shape)}")
        refuse_gradients(decoder, embeds)
        if call.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
            raise ValueError(
                "a patched model has no attention weights to return (they are never materialised); leave "
                "output_attentions unset, or use fmd_ext.lab.diagnose.attention_share"
            )

    def _embed(self, decoder: nn.Module, input_ids: torch.Tensor, call: dict[str, Any]) -> torch.Tensor:
        embeds = decoder.get_input_embeddings()(input_ids)
        if not self.embed:
            return embeds
        put_features_in = getattr(decoder, self.embed)
        _, _, *names = inspect.signature(put_features_in.forward).parameters
        return put_features_in(input_ids, embeds, **{name: call.pop(name) for name in names if name in call})

    def _labels(self, embeds: torch.Tensor, past: int, prompt: Prompt | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Labels [batch, length] of this call's positions, and the modality bits of positions still to come."""
        batch, length = embeds.shape[:2]
        whole = None if prompt is None else prompt.labels_for(batch)
        labels = np.full((batch, length), TEXT, np.int8)
        if whole is None or whole.shape[1] <= past or not self.session.config.fork_layers:
            return labels, None
        here = whole[:, past : past + length]
        labels[:, : here.shape[1]] = here
        return labels, modality_bits(whole[:, past + length :])

    def _branches(
        self, embeds: torch.Tensor, labels: np.ndarray, past: int, given: Any, prompt: Prompt | None
    ) -> torch.Tensor | None:
        """Both branches' embeddings [2, batch, n <= length, hidden] up to the last joint position; None: no such."""
        batch, length, hidden = embeds.shape
        joint = (labels == JOINT).any(0)
        if not joint.any():
            if given is not None:
                raise ValueError(UNREAD_BRANCHES)
            return None
        needed = int(np.flatnonzero(joint)[-1]) + 1
        branches = given
        if given is None and prompt is not None:
            branches = prompt.branches_for(batch, past, length)
        shape = None if branches is None else list(branches.shape)
        if shape is None or len(shape) != 4 or [*shape[:2], shape[3]] != [2, batch, hidden] or shape[2] < needed:
            raise ValueError(
                f"joint positions (label 3) need branch_embeds [2, {batch}, {length}, {hidden}]: this call's "
                "embeddings with the audio masked (visual branch) and with the video masked (audio branch); "
                f"got {shape}"
            )
        return branches

    def _pack_embeds(self, embeds: torch.Tensor, branches: torch.Tensor | None, plan: Plan) -> torch.Tensor:
        """[batch, length, hidden] -> [1, rows, hidden], masked embeddings of away rows scaled, joint ones by branch."""
        flat = embeds.reshape(-1, embeds.shape[-1])
        if plan.num_away == 0 and plan.is_dense:
            return flat[None]
        packed = flat.index_select(0, plan.tensors.get("positions", flat.device))
        if plan.has_masked_rows:  # with masking="attention" none of them has a row
            masked = plan.tensors.get("away_modality", flat.device) != TEXT
            packed[plan.num_home :].mul_(torch.where(masked, self.session.config.mask_scale, 1.0)[:, None].to(packed))
        if branches is not None:
            joint = np.flatnonzero(plan.away_modality == JOINT)
            home = plan.home_rows[joint]
            place = tuple(torch.from_numpy(index) for index in np.divmod(plan.positions[home], plan.length))
            for branch, rows in zip(branches, (home, plan.num_home + joint), strict=True):
                packed[torch.from_numpy(rows)] = branch[place].to(packed)
        return packed[None]

    def _pack_positions(self, given: Any, embeds: torch.Tensor, plan: Plan, past: int) -> torch.Tensor:
        """Position ids [..., batch or 1, length] -> [..., 1, rows]; none: counted from ``past``, as vanilla does."""
        if given is None:
            given = torch.arange(past, past + plan.length, device=embeds.device)[None]
        if given.shape[-1] != plan.length:
            raise ValueError(f"position_ids are for {given.shape[-1]} positions, the call has {plan.length}")
        lead = given.shape[:-2]
        if given.dim() < 2 or given.shape[-2] != plan.batch:
            given = given.expand(*lead, plan.batch, plan.length)
        flat = given.reshape(*lead, 1, -1)
        if plan.num_away or not plan.is_dense:
            flat = flat.index_select(-1, plan.tensors.get("positions", flat.device))
        return flat


def arguments_by_name(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name, those of ``**kwargs`` among them; the cache under the function's own name."""
    call = dict(kwargs)
    call.update(zip(signature.parameters, args, strict=False))
    return name_cache(call, cache_argument(signature))


def check_length(decoder: nn.Module, length: int) -> None:
    """Raises ValueError where ``length`` positions are more than the decoder was made for."""
    limit = getattr(decoder.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"the context would be {length} positions long; the model's limit is {limit}")


def refuse_gradients(module: nn.Module, embeds: torch.Tensor | None = None) -> None:
    if torch.is_grad_enabled() and (module.training or (embeds is not None and embeds.requires_grad)):
        raise RuntimeError(
            "fork-merge decoding is inference-only: call model.eval() and use torch.no_grad(), or unpatch the model "
            "to train it"
        )


def _refuse_packed(position_ids: torch.Tensor | None) -> None:
    """Raises ValueError for sequences packed in one row, which transformers tells by positions that start again.

    It does so without a mask and a cache only; of four rows of M-RoPE the first one counts text positions.
    """
    if position_ids is None or (position_ids.dim() == 3 and position_ids.shape[0] != 4):
        return
    positions = position_ids[0] if position_ids.dim() == 3 else position_ids
    breaks = (positions.diff(dim=-1) != 1).nonzero()
    if len(breaks):
        sample, before = breaks[0].tolist()
        raise ValueError(
            f"position_ids of sample {sample} start again at position {before + 1}: a patched model does not keep "
            "sequences apart that are packed in one row; give them as a batch with an attention_mask"
        )


def _is_generated(prompt: Prompt | None, state: BranchedState, mask: torch.Tensor | None, length: int) -> bool:
    """Whether the new position of a cached call is a generated token, which is never padding.

    Decided without reading ``mask`` back from the device: ``generate`` has read the prompt's mask before.
    """
    if mask is None or length != 1 or mask.dim() != 2 or prompt is None or not prompt.is_one_with(state.prompt):
        return False
    return bool(state.logical_length) and prompt.mask_width is not None and mask.shape[1] >= prompt.mask_width


def _apply_padding(labels: np.ndarray, mask: Any, past: int, state: Any) -> None:
    """Marks positions that the 2D attention mask [batch, past + length] (or [batch, length]) leaves out."""
    if mask is None:
        return
    batch, length = labels.shape
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"a patched model takes a 2D attention_mask [batch, length], got {shape}")
    if mask.shape[0] != batch or mask.shape[1] not in (past + length, length):
        raise ValueError(
            f"attention_mask must be [{batch}, {past + length}] (cached positions included), got {list(mask.shape)}"
        )
    keep = mask.detach().cpu().numpy() != 0
    if past and length > 1 and mask.shape[1] == past + length and (keep[:, :past].sum(1) != state.valid).any():
        raise ValueError(
            "attention_mask hides or reveals positions that are cached already; what was cached cannot be changed"
        )
    labels[~keep[:, -length:]] = PADDING


def is_window(size: int | None, config: Any) -> bool:
    """Whether a sliding window hides anything within the model's context."""
    return bool(size) and size < (getattr(config, "max_position_embeddings", None) or math.inf)
