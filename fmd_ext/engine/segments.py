"""Where the keys of a cache lie: slot ranges with spare room, one per segment of a sample."""

from __future__ import annotations

import numpy as np


class SegmentTable:
    """Slot ranges: start, length and capacity [batch, segments] of every segment, int64."""

    def __init__(self, batch: int, segments: int) -> None:
        self.start = np.zeros((batch, segments), np.int64)
        self.length = np.zeros((batch, segments), np.int64)
        self.capacity = np.zeros((batch, segments), np.int64)

    @property
    def num_slots(self) -> int:
        return int(self.capacity.sum())

    def slots_in_use(self) -> np.ndarray:
        """Slots that hold keys, segment by segment."""
        return slots_of(self.start, self.length)

    def resized(self, needed: np.ndarray, growing: np.ndarray) -> SegmentTable:
        """The same lengths with room for ``needed`` keys; segments that are ``growing`` get a quarter more."""
        table = SegmentTable(*self.length.shape)
        table.length = self.length.copy()
        headroom = np.where(growing & (needed > 0), np.maximum(needed // 4, 64), 0)
        table.capacity = np.where(needed > self.capacity, needed + headroom, self.capacity)
        table._place()
        return table

    def with_room(self, growing: np.ndarray, count: int) -> SegmentTable:
        """The same lengths with room for ``count`` more keys in every ``growing`` segment, and none in the others.

        The number of slots is rounded up to one of few sizes (see `bucket`); what that adds is shared out evenly.
        """
        table = SegmentTable(*self.length.shape)
        table.length = self.length.copy()
        table.capacity = self.length + growing * count
        num_slots = bucket(table.num_slots)
        table.capacity += growing * ((num_slots - table.num_slots) // int(growing.sum()))
        table.capacity[tuple(np.argwhere(growing)[-1])] += num_slots - table.num_slots
        table._place()
        return table

    def select(self, samples: np.ndarray) -> tuple[SegmentTable, np.ndarray]:
        """The table of ``samples`` (repeats allowed), and for each used slot of it the old slot it comes from."""
        table = SegmentTable(len(samples), self.length.shape[1])
        table.length, table.capacity = self.length[samples], self.capacity[samples]
        table._place()
        return table, slots_of(self.start[samples], table.length)

    def _place(self) -> None:
        flat = self.capacity.ravel()
        self.start = (np.cumsum(flat) - flat).reshape(self.capacity.shape)


def slots_of(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The slots start .. start + length - 1 of every segment, one after the other."""
    length = length.ravel()
    first = np.repeat(start.ravel() - (np.cumsum(length) - length), length)
    return first + np.arange(len(first))


def bucket(count: int, least: int = 256) -> int:
    """``count`` rounded up to a power of two or one and a half times one, at least ``least``."""
    count = max(count, least)
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power
