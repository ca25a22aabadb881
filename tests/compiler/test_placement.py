"""Placement of channels: complete, without collisions, in few tiles."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weft.compiler.placement import Region, place


def shuffled_stage(half: int, blocks: int) -> tuple[list[list[tuple]], dict[str, set[tuple]]]:
    """Producers in order, and the channels that each reader of a ShuffleNetV2 stage wants."""
    producers = [[(p, c) for c in range(half)] for p in ("left", "right")]
    mixed = [channel for pair in zip(*producers, strict=True) for channel in pair]
    readers = {}
    for block in range(blocks):
        readers[f"block{block}"] = set(mixed[half:])
        producers.append([(block, c) for c in range(half)])
        mixed = [channel for pair in zip(mixed[:half], producers[-1], strict=True) for channel in pair]
    return producers, readers | {"end": set(mixed)}


@given(half=st.integers(1, 130), blocks=st.integers(1, 8), columns=st.sampled_from([4, 8, 16]),
       word=st.sampled_from([32, 64]))
def test_every_channel_reaches_its_readers(half, blocks, columns, word):
    producers, readers = shuffled_stage(half, blocks)
    regions = {name: Region(columns, -(-len(wanted) // word) * word) for name, wanted in readers.items()}
    for channels in producers:
        wanted = {c: tuple(name for name, members in readers.items() if c in members) for c in channels}
        tiles = place(wanted, regions, columns, max_writes=4)
        assert sorted(c for tile in tiles for c in tile.channels if c is not None) == sorted(channels)
        assert len(tiles) <= -(-len(channels) // columns) + 1
        for tile in tiles:
            assert len(tile.writes) <= 4
            for write in tile.writes:
                for column in range(columns):
                    if write.mask >> column & 1:
                        assert regions[write.region].lanes[write.slot * columns + column] == tile.channels[column]
    for name, members in readers.items():
        held = [c for c in regions[name].lanes if c is not None]
        assert len(held) == len(set(held)) and set(held) == members


def test_codenet_stages_pack_without_loss():
    for half, blocks in ((58, 3), (116, 7), (232, 3), (122, 3), (244, 7), (488, 3)):
        producers, readers = shuffled_stage(half, blocks)
        regions = {name: Region(8, -(-len(wanted) // 32) * 32) for name, wanted in readers.items()}
        words = {name: len(region.lanes) for name, region in regions.items()}
        for channels in producers:
            wanted = {c: tuple(name for name, members in readers.items() if c in members) for c in channels}
            assert len(place(wanted, regions, 8, 4)) == -(-half // 8)
        assert words == {name: len(region.lanes) for name, region in regions.items()}


def test_ordered_region_keeps_lane_numbers():
    order = [("offset", c) for c in range(18)]
    region = Region(8, 32, order)
    tiles = place(dict.fromkeys(order, ("r",)), {"r": region}, 8, 4)
    assert region.lanes[:18] == order and len(tiles) == 3
