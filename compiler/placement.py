"""Placement: where each output channel of a matrix layer is computed and where it is written.

A reader of channels (a convolution behind a split and a shuffle, say) owns a packed region; every producer
writes its channels straight into the regions of their readers, so that split, concatenation and shuffle cost
nothing. The hardware writes column c of a tile only to lanes that are c modulo `columns`, with at most
`max_writes` descriptors a tile; otherwise the order of channels is free on both sides, because weights are
permuted to suit. A slot is the group of `columns` lanes that one descriptor reaches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

Channel = tuple  # (tensor, number)


@dataclass
class Region:
    """Lanes of one packed region: `lanes[i]` is the channel in lane i, or None. Grows by whole slots.

    With `order` given, channel order[i] must be in lane i (a consumer that addresses lanes by number).
    """

    columns: int
    capacity: int  # lanes that need no further word
    order: Sequence[Channel] | None = None
    lanes: list[Channel | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        slots = -(-self.capacity // self.columns)
        self.lanes = [None] * (slots * self.columns)

    def free_in_column(self, column: int) -> int:
        return sum(lane is None for lane in self.lanes[column :: self.columns])

    def slot_for(self, columns: set[int]) -> tuple[int, set[int]]:
        """The slot where most of `columns` are free (the fullest such slot, then the first), and which they are."""
        best: tuple[tuple[int, int], int, set[int]] | None = None
        for slot in range(len(self.lanes) // self.columns):
            lanes = self.lanes[slot * self.columns : (slot + 1) * self.columns]
            fits = {c for c in columns if lanes[c] is None}
            rank = (len(fits), sum(lane is not None for lane in lanes))
            if fits and (best is None or rank > best[0]):
                best = (rank, slot, fits)
        if best is None:
            self.lanes += [None] * self.columns
            return len(self.lanes) // self.columns - 1, set(columns)
        return best[1], best[2]


@dataclass(frozen=True)
class Write:
    """One descriptor: the columns in `mask` go to slot `slot` of region `region`."""

    region: Hashable
    slot: int
    mask: int


@dataclass
class Tile:
    """One output tile: `channels[c]` is computed in column c (None: nothing)."""

    channels: list[Channel | None]
    writes: list[Write]


def place(
    readers: dict[Channel, tuple[Hashable, ...]], regions: dict[Hashable, Region], columns: int, max_writes: int
) -> list[Tile]:
    """Tiles of one producer. `readers` maps its channels, in order, to the regions each must reach."""
    column_of = _choose_columns(readers, regions, columns)
    waiting: dict[tuple[Hashable, ...], list[list[Channel]]] = {}
    for channel, group in readers.items():
        waiting.setdefault(group, [[] for _ in range(columns)])[column_of[channel]].append(channel)
    tiles = []
    while waiting:
        tiles.append(_fill_tile(waiting, regions, columns, max_writes))
    return tiles


def _choose_columns(
    readers: dict[Channel, tuple[Hashable, ...]], regions: dict[Hashable, Region], columns: int
) -> dict[Channel, int]:
    """A column for every channel: pinned ones as their region demands, the rest where there is most room."""
    column_of: dict[Channel, int] = {}
    load = [0] * columns  # channels of this producer in each column: the tallest column is the number of tiles
    claimed: dict[tuple[Hashable, int], int] = {}  # lanes of a region's column spoken for by this producer
    for channel, group in readers.items():
        orders = [order for r in group if (order := regions[r].order) is not None]
        pinned = {list(order).index(channel) % columns for order in orders}
        if len(pinned) > 1:
            raise ValueError(f"channel {channel} is wanted in lanes of different columns")
        if pinned:
            column_of[channel] = pinned.pop()
            load[column_of[channel]] += 1
    tiles = max(-(-len(readers) // columns), max(load))
    for channel, group in readers.items():
        if channel in column_of:
            continue

        def room(column: int, group: tuple[Hashable, ...] = group) -> tuple[bool, int, int]:
            free = min((regions[r].free_in_column(column) - claimed.get((r, column), 0) for r in group), default=0)
            return load[column] < tiles, min(free, 1), -load[column] * columns + free

        column = max(range(columns), key=room)
        column_of[channel] = column
        load[column] += 1
        for region in group:
            claimed[region, column] = claimed.get((region, column), 0) + 1
    return column_of


def _fill_tile(
    waiting: dict[tuple[Hashable, ...], list[list[Channel]]],
    regions: dict[Hashable, Region],
    columns: int,
    max_writes: int,
) -> Tile:
    """One tile from the waiting channels: the group that fills most columns first, as long as descriptors last."""
    tile = Tile([None] * columns, [])
    while True:
        empty = {c for c in range(columns) if tile.channels[c] is None}
        offers = {group: {c for c in empty if stacks[c]} for group, stacks in waiting.items()}
        placed = False
        for group in sorted(offers, key=lambda g: -len(offers[g])):
            if offers[group] and (
                writes := _reserve(waiting[group], offers[group], group, regions, max_writes - len(tile.writes))
            ):
                for column, channel in writes.channels.items():
                    tile.channels[column] = channel
                    waiting[group][column].remove(channel)
                tile.writes += writes.writes
                placed = True
                break
        for group in [g for g, stacks in waiting.items() if not any(stacks)]:
            del waiting[group]
        if not placed:
            if not tile.writes and not any(channel is not None for channel in tile.channels):
                raise ValueError(f"a channel has more than {max_writes} readers of different order")
            return tile


@dataclass
class _Reservation:
    channels: dict[int, Channel]
    writes: list[Write]


def _reserve(
    stacks: list[list[Channel]],
    offer: set[int],
    group: tuple[Hashable, ...],
    regions: dict[Hashable, Region],
    budget: int,
) -> _Reservation | None:
    """Takes as many of the offered columns as one slot in every region of the group can hold."""
    if len(group) > budget:
        return None
    columns = set(offer)
    picked = {c: stacks[c][0] for c in columns}
    slots: dict[Hashable, int] = {}
    for name in group:
        region = regions[name]
        if region.order is not None:
            # The lane decides the slot: keep the columns whose next channel lies in the first one's slot.
            order = list(region.order)
            lanes = {c: min(order.index(ch) for ch in stacks[c]) for c in columns}
            slot = min(lanes.values()) // region.columns
            columns = {c for c in columns if lanes[c] // region.columns == slot}
            picked = {c: order[lanes[c]] for c in columns}
        else:
            slot, columns = region.slot_for(columns)
        slots[name] = slot
    writes = []
    for name in group:
        region = regions[name]
        for column in columns:
            region.lanes[slots[name] * region.columns + column] = picked[column]
        writes.append(Write(name, slots[name], sum(1 << c for c in columns)))
    return _Reservation({c: picked[c] for c in columns}, writes)
