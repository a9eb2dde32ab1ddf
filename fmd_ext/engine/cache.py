"""The KV cache of a patched model: a slot pool per layer, cut into segments per sample.

In the layers before the merge a sample has three segments: its prefix, shared by both branches, and one per branch. In
the layers after it, one. Segments are slot ranges with spare capacity, so that a decode step writes in place; when one
is full, all move to new pools with geometric headroom.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from fmd_ext import ops
from fmd_ext.engine.call import Call
from fmd_ext.engine.compiling import python_only
from fmd_ext.engine.packed_arrays import PackedArrays
from fmd_ext.engine.plan import LayerPlan, Plan, TextStep, growth_of
from fmd_ext.engine.planner import make_plan
from fmd_ext.engine.prompt import Prompt, modality_bits
from fmd_ext.engine.routes import Routes
from fmd_ext.engine.segments import SegmentTable
from fmd_ext.engine.session import Session

NUM_SEGMENTS = 3  # prefix, visual branch, audio branch
UNFORKED, PREFIX_OPEN, FORKED = 0, 1, 2
BOTH_MODALITIES = 0b11
# [unforked or forked, segments]: those that hold a key of a text position.
TEXT_SEGMENTS = np.array([[True, False, False], [False, True, True]])

Pools = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, each [num_kv_heads, num_slots, head_dim]


class BranchedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: pools [num_kv_heads, num_slots, head_dim]."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, state: BranchedState, layer_idx: int) -> None:
        super().__init__()
        self.state = state
        self.layer_idx = layer_idx

    @property
    def _leads(self) -> bool:
        # transformers calls such a method once per layer. All layers share one state, so only the first layer acts.
        return self.layer_idx == 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = value_states.dtype, value_states.device
        num_slots = self.state.table_of(self.layer_idx).num_slots
        shape = (key_states.shape[1], num_slots)
        self.keys = value_states.new_empty((*shape, key_states.shape[3]))
        self.values = value_states.new_empty((*shape, value_states.shape[3]))
        self.is_initialized = True

    @python_only
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends [1, num_kv_heads, rows, head_dim]; returns the pools.

        The dtype is that of the values: under autocast a rotation makes float32 of the keys.
        """
        call = self.state.session.call
        if call is None:
            raise RuntimeError(
                "this cache belongs to a model patched by fmd_ext; it cannot be used by another model or after unpatch"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = call.layer_plan(self.layer_idx).get("slots", key_states.device)
        k, v = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        rotation = call.rotation
        if rotation is None or rotation.k is not key_states:
            ops.append_(self.keys, self.values, k.to(v.dtype), v, slots)
        else:
            q_out, q, cos, sin = rotation.q_out, rotation.q, rotation.cos, rotation.sin
            ops.rope_append_(self.keys, self.values, q_out, q, k, v, cos, sin, slots)
            call.rotation, call.rotated = None, rotation
        return self.keys, self.values

    def move(self, source: torch.Tensor, destination: torch.Tensor, num_slots: int, into: Pools | None = None) -> None:
        """Copies ``source`` slots to ``destination`` slots of other pools, which become the layer's.

        Slots are int64 on the device of the pools. The other pools are ``into``, or new ones of ``num_slots`` slots.
        """
        pools = []
        for index, pool in enumerate((self.keys, self.values)):
            moved = pool.new_empty((pool.shape[0], num_slots, pool.shape[2])) if into is None else into[index]
            moved[:, destination] = pool[:, source]
            pools.append(moved)
        self.keys, self.values = pools

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.state.logical_length + query_length, 0

    def get_seq_length(self) -> int:
        return self.state.logical_length

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self._leads:
            self.state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._leads:
            self.state.select(np.repeat(np.arange(self.state.batch), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self._leads:
            self.state.select(torch.arange(self.state.batch)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of positions to remove, got {tokens_to_remove}")
        if self._leads:
            self.state.crop(-int(tokens_to_remove))

    def release(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def reset(self) -> None:
        self.release()
        if self._leads:
            self.state.clear()


class _Next(NamedTuple):
    """The state after a planned call, taken over when the call has succeeded."""

    phase: np.ndarray
    modalities: np.ndarray
    fork_length: np.ndarray
    trunk_length: np.ndarray
    labels: np.ndarray


class BranchedState:
    """What a cache knows of its samples: lengths, slots, and how far each is into the fork.

    Args:
        session: of the patch that the cache belongs to; its ``call`` is the one that runs.
        num_layers: of the decoder.

    Attributes:
        prompt: the prompt of the ``generate`` call whose positions the cache holds; None for other calls.
        fork_layers: layers before the merge; None until a first call has chosen them.
        home_weights: float32 [batch, 4], home row weights of the merge, where a call has chosen them by sample.
        routes: the routes that are in them, of the samples as they were when a call was told.
    """

    def __init__(self, session: Session, num_layers: int) -> None:
        self.session = session
        self.layers = [BranchedLayer(self, i) for i in range(num_layers)]
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> BranchedState:
        """A copy belongs to the same patch."""
        memo[id(self.session)] = self.session
        memo[id(self)] = copied = BranchedState.__new__(BranchedState)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def clear(self) -> None:
        self.prompt: Prompt | None = None
        self._last_step: TextStep | None = None  # the last call, where the plan of a next text step follows from it
        self.batch = 0
        self.logical_length = 0  # of the padded batch, as transformers counts

    def _start(self, batch: int) -> None:
        self.batch = batch
        self.phase = np.zeros(batch, np.int8)
        self.modalities = np.zeros(batch, np.int8)  # bits: 1 visual, 2 audio, cached or announced
        self.may_fork = np.ones(batch, bool)  # not those whose first question needs both modalities
        self.valid = np.zeros(batch, np.int64)  # positions without padding
        self.text_tail = np.zeros(batch, np.int64)  # trailing positions that are text: what crop can remove
        self.fork_table = SegmentTable(batch, NUM_SEGMENTS)
        self.trunk_table = SegmentTable(batch, 1)
        depth = self.session.config.fork_layers
        self.fork_layers = depth if isinstance(depth, int) else None
        self.home_weights: torch.Tensor | None = None
        self.routes: Routes | None = None

    def table_of(self, layer_idx: int) -> SegmentTable:
        call = self.session.call
        fork_layers = self.fork_layers if call is None else call.fork_layers
        is_forked = fork_layers is None or layer_idx < fork_layers
        return self.fork_table if is_forked else self.trunk_table

    def plan_call(
        self, labels: np.ndarray, announced: np.ndarray | None = None, forks: np.ndarray | None = None
    ) -> Plan:
        """The plan of a call that adds ``labels`` [batch, length] int8 (-1 padding, 0 text, 1 visual, 2 audio,
        3 joint).

        ``announced`` [batch] int8 holds modality bits of positions that later calls will bring: a prompt in chunks
        then forks as it does in one call. ``forks`` [batch] bool, of the first call on the cache, are the samples that
        may fork; None: all. Slots are reserved here; the rest of the state changes in `commit`.
        """
        self._open(len(labels))
        if forks is not None and self.logical_length == 0:
            self.may_fork = forks.copy()
        if self._last_step is not None and self._last_step.room and _is_text_step(labels, announced):
            self._next = None
            return self._last_step.plan_of_next()
        modalities = self.modalities | modality_bits(labels) | (0 if announced is None else announced)
        opens = (self.phase == UNFORKED) & (modalities == BOTH_MODALITIES) & self.may_fork
        phase = np.where(opens, PREFIX_OPEN, self.phase)
        masking = self.session.config.masking
        raw = make_plan(labels, self.fork_table.length, self.trunk_table.length[:, 0], phase.astype(np.int8), masking)
        fork_length = raw.seg_len.reshape(self.batch, NUM_SEGMENTS)
        trunk_length = self.trunk_table.length + (labels >= 0).sum(1, keepdims=True)
        self._reserve(fork_length, raw.phase, trunk_length)
        self._next = _Next(raw.phase, modalities.astype(np.int8), fork_length, trunk_length, labels)
        begins = (raw.phase == FORKED) & (self.phase != FORKED)
        return _frozen(raw, labels.shape, begins, (self.fork_table, fork_length), (self.trunk_table, trunk_length))

    def _open(self, batch: int) -> None:
        """Starts a batch in an empty cache. Raises ValueError where the cache holds another number of samples."""
        if self.logical_length == 0:
            # A call that failed may have left pools behind.
            for layer in self.layers:
                layer.release()
            self._start(batch)
        elif self.batch != batch:
            raise ValueError(f"the cache holds {self.batch} samples, the call has {batch}")

    def commit(self, call: Call) -> None:
        """Adds the rows of the last plan to the state; called after its forward call has succeeded."""
        self.fork_layers, self.home_weights = call.fork_layers, call.home_weights
        self.routes = call.routes or self.routes
        if self._next is None:
            step = self._last_step.followed_by(call.plan)
            self.extend(1)
            self._last_step = step
            return
        self.phase, self.modalities, self.fork_table.length, self.trunk_table.length, labels = self._next
        is_step = _is_text_step(labels)
        self._last_step = TextStep(call.plan, growth_of(call.plan), self.text_room) if is_step else None
        is_text = labels == 0
        tail = np.where(is_text.all(1), is_text.shape[1], np.argmin(is_text[:, ::-1], axis=1))
        self.text_tail = np.where(is_text.all(1), self.text_tail + tail, tail)
        self.valid = self.valid + (labels >= 0).sum(1)
        self.logical_length += labels.shape[1]

    def _reserve(self, fork_length: np.ndarray, phase: np.ndarray, trunk_length: np.ndarray) -> None:
        """Makes room for these lengths, with headroom for the segments that go on growing after ``phase``."""
        prefix_grows = (phase != FORKED)[:, None]
        growing = np.concatenate([prefix_grows, ~prefix_grows, ~prefix_grows], axis=1)
        needs = (("fork_table", fork_length, growing), ("trunk_table", trunk_length, np.ones_like(trunk_length, bool)))
        for name, needed, grows in needs:
            old = getattr(self, name)
            if (needed > old.capacity).any():
                new = old.resized(needed, grows)
                self._move(name, new, old.slots_in_use())

    def _move(self, name: str, new: SegmentTable, source: np.ndarray, into: list[Pools] | None = None) -> None:
        """Takes the table ``new``; its used slots get what the old slots ``source`` hold. ``into``: pools by layer."""
        self._last_step = None
        layers = [layer for layer in self.layers if self.table_of(layer.layer_idx) is getattr(self, name)]
        indices = PackedArrays(source=source, destination=new.slots_in_use())
        for layer in layers:
            if layer.is_initialized:
                device = layer.keys.device
                pools = None if into is None else into[layer.layer_idx]
                layer.move(indices.get("source", device), indices.get("destination", device), new.num_slots, pools)
        setattr(self, name, new)

    def select(self, samples: torch.Tensor | np.ndarray) -> None:
        """Keeps ``samples`` [new batch] in that order, repeats allowed (beam search)."""
        if self.batch == 0:
            return
        index = samples.cpu().numpy() if isinstance(samples, torch.Tensor) else samples
        if len(index) == self.batch and (index == np.arange(self.batch)).all():
            return
        for name in ("fork_table", "trunk_table"):
            new, source = getattr(self, name).select(index)
            self._move(name, new, source)
        self.batch = len(index)
        for name in ("phase", "modalities", "may_fork", "valid", "text_tail"):
            setattr(self, name, getattr(self, name)[index])
        if self.home_weights is not None:
            self.home_weights = self.home_weights[torch.from_numpy(index).to(self.home_weights.device)]

    def crop(self, count: int) -> None:
        """Forgets the last ``count`` positions, which must be text after the last position of a branch modality."""
        if count == 0 or self.batch == 0:
            return
        if count > self.text_tail.min():
            raise ValueError(
                f"cannot crop {count} positions: only the last {self.text_tail.min()} are text in every sample, and a "
                "forked cache cannot give back positions of a branch modality or padding"
            )
        self.extend(-count)

    def extend(self, count: int) -> None:
        """Counts ``count`` more text positions per sample, whose keys are in their slots already; negative: fewer."""
        self._last_step = None
        self.fork_table.length = self.fork_table.length + count * self._text_segments
        self.trunk_table.length = self.trunk_table.length + count
        self.text_tail = self.text_tail + count
        self.valid = self.valid + count
        self.logical_length += count

    @property
    def has_forked(self) -> bool:
        """Whether the cache holds a sample in the fork."""
        return bool(self.batch) and bool((self.phase == FORKED).any())

    @property
    def _text_segments(self) -> np.ndarray:
        """[batch, segments] bool: the segments that hold a key of every text position."""
        return TEXT_SEGMENTS[(self.phase == FORKED).astype(np.int8)]

    def tables_with_room(self, count: int) -> tuple[SegmentTable, SegmentTable]:
        """Tables of the layers before and after the merge with room for at least ``count`` more text positions."""
        trunk = self.trunk_table
        return self.fork_table.with_room(self._text_segments, count), trunk.with_room(trunk.length >= 0, count)

    @property
    def text_room(self) -> int:
        """Number of text positions that still fit: the least room of the segments that store their keys."""
        fork, trunk = self.fork_table, self.trunk_table
        return int(min((fork.capacity - fork.length)[self._text_segments].min(), (trunk.capacity - trunk.length).min()))

    def move(self, fork_table: SegmentTable, trunk_table: SegmentTable, pools: list[Pools]) -> None:
        """Moves all keys to ``pools`` (by layer), laid out as the tables say, which hold the same lengths."""
        for name, table in (("fork_table", fork_table), ("trunk_table", trunk_table)):
            self._move(name, table, getattr(self, name).slots_in_use(), pools)

    def leave_pools(self) -> None:
        """Copies the keys out of pools that later calls use again."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def _is_text_step(labels: np.ndarray, announced: np.ndarray | None = None) -> bool:
    """Whether a call adds one text position to every sample, and nothing that follows is announced."""
    return labels.shape[1] == 1 and not labels.any() and (announced is None or not announced.any())


def _frozen(
    raw: Any,
    shape: tuple[int, int],
    begins: np.ndarray,
    fork: tuple[SegmentTable, np.ndarray],
    trunk: tuple[SegmentTable, np.ndarray],
) -> Plan:
    """The planner's rows ``raw`` as a `Plan`, over the slots of tables that will hold the given lengths."""
    tensors = PackedArrays(
        positions=raw.positions,
        home_rows=raw.home_rows,
        away_rows=np.arange(raw.num_home, len(raw.positions)),
        away_modality=raw.away_modality,
        **_attention_arrays("fork", raw.fork, fork[0].start, fork[1]),
        **_attention_arrays("trunk", raw.trunk, trunk[0].start, trunk[1]),
    )
    return Plan(
        *shape,
        num_home=raw.num_home,
        positions=raw.positions,
        home_rows=raw.home_rows,
        away_modality=raw.away_modality,
        forked=raw.phase == FORKED,
        begins=begins,
        tensors=tensors,
        fork=LayerPlan("fork", raw.fork.max_qo_len, tensors),
        trunk=LayerPlan("trunk", raw.trunk.max_qo_len, tensors),
    )


def _attention_arrays(kind: str, groups, start: np.ndarray, length: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a `LayerPlan`, their names behind ``kind``."""
    segment = groups.group_segment
    segments_per_sample = start.shape[1]
    first = segment - segment % segments_per_sample  # the prefix segment of the same sample
    start, length = start.ravel(), length.ravel()
    has_prefix = segment != first
    columns = (start[segment], length[segment], start[first] * has_prefix, length[first] * has_prefix)
    return {
        f"{kind}.qo_rows": groups.qo_rows,
        f"{kind}.cu_seqlens_q": groups.cu_seqlens_q,
        f"{kind}.key_ranges": np.stack(columns, axis=1),
        f"{kind}.slots": start[groups.row_segment] + groups.row_offset,
    }


def state_of(cache: Any) -> BranchedState | None:
    """The state of a cache that holds branched layers; None for any other, and for None."""
    layers = getattr(cache, "layers", None)
    return layers[0].state if layers and isinstance(layers[0], BranchedLayer) else None


def adopt(cache: Cache | None, session: Session, num_layers: int) -> tuple[Cache, BranchedState]:
    """Makes ``cache`` (a fresh DynamicCache, or one adopted before; None: a new one) hold branched layers.

    Raises:
        TypeError: a kind of cache that cannot hold branches (static, quantized, offloaded, ...).
        ValueError: a cache that another model, another patch or the unpatched model has filled.
    """
    if cache is None:
        cache = DynamicCache()
    if (state := state_of(cache)) is not None:
        if state.session is session:
            return cache, state
        if state.batch:
            raise ValueError("this cache was filled by another patched model, or before the model was patched again")
    elif type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        raise TypeError(
            f"a patched model keeps its branches in a DynamicCache; got {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}. Static, compiled, quantized and "
            "offloaded caches are not supported: leave cache_implementation unset"
        )
    elif cache.get_seq_length() > 0:
        raise ValueError(
            f"this cache already holds {cache.get_seq_length()} positions from an unpatched model; start with an empty "
            "one, or unpatch the model to go on with it"
        )
    state = BranchedState(session, num_layers)
    cache.layers = list(state.layers)
    cache.layer_class_to_replicate = None
    return cache, state
