"""Memory plan: what is in the scratchpad when, and at which address.

Tasks are grouped into segments, executed one after the other. A buffer is either

    pool    whole in the scratchpad from its first producer to its last reader;
    ring    inside one segment only, a sliding window of rows: the tasks of the segment take turns by strips;
    memory  in external memory; a segment that touches it holds a window of rows and loads or stores strips.

Everything starts in the pool with one task a segment. As long as that does not fit, the plan fuses the
segments around a buffer, so that it becomes a ring, or moves buffers to external memory, cheapest traffic
first. Weights are loaded one segment ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.isa import Sampling, Unit, VectorOp
from weft.arch.program import Segment as MemorySegment
from weft.compiler.lower import Buffer, Lowered, MatrixTask, Source, Target, Task, VectorTask

NO_WRAP = 4095  # ring field of a buffer that is held whole
STRIP_PIXELS = 128  # output pixels of a strip in a streaming segment: long enough to hide latencies
RESIDENT_STRIPS = 6  # strips of a layer held whole: fewer than the unit queues are deep, so that dispatch runs ahead
SHORT_STRIP_PIXELS = 64  # shorter strips only when nothing else helps
FUSE_SPAN = 5  # most segments fused at once


@dataclass(eq=False)
class LoadTask(Task):
    """Rows of a buffer from memory to the scratchpad."""


@dataclass(eq=False)
class StoreTask(Task):
    """Rows of a buffer from the scratchpad to memory; `masks[i]` selects the lanes of block blocks[i]."""

    masks: tuple[int, ...] = ()


@dataclass(eq=False)
class Storage:
    """Scratchpad words of some blocks of a buffer, `rows` of its rows at a time."""

    buffer: Buffer
    blocks: range
    pitch: int
    rows: int
    base: int = -1

    @property
    def whole(self) -> bool:
        return self.rows >= self.buffer.height

    @property
    def ring(self) -> int:
        return NO_WRAP if self.whole else self.rows

    @property
    def plane(self) -> int:
        return self.rows * self.pitch

    @property
    def words(self) -> int:
        # The pack unit looks one word past the last byte of an image row.
        return len(self.blocks) * self.plane + (self.buffer.image is not None)

    def anchor(self, row: int) -> int:
        """Slot of a row; rows above the image have one too, never accessed."""
        return row % self.ring

    def block_base(self, block: int) -> int:
        return self.base + (block - self.blocks.start) * self.plane


@dataclass(eq=False)
class WeightStorage:
    """Scratchpad words of one task's parameters and weights."""

    task: MatrixTask | VectorTask
    words: int
    base: int = -1


@dataclass
class Segment:
    """Tasks that take turns by strips, with the storage of every buffer they touch."""

    tasks: list[Task]
    storage: dict[Buffer, Storage] = field(default_factory=dict)
    strip: dict[Task, int] = field(default_factory=dict)  # output rows at a time
    prefetch: bool = True  # its weights are loaded during the segment before
    weights: list[WeightStorage] = field(default_factory=list)


@dataclass
class MemoryPlan:
    """Segments in order, and where buffers that live in external memory are: (segment, byte offset)."""

    segments: list[Segment]
    memory: dict[Buffer, tuple[MemorySegment, int]]
    arena_bytes: int
    output_bytes: int


@dataclass(eq=False)
class _Group:
    """A segment in the making."""

    tasks: list[Task]
    strip_pixels: int = STRIP_PIXELS
    slack: int = 3  # strips that a producer may run ahead
    prefetch: bool = True  # load the weights one segment early


@dataclass(frozen=True)
class _Use:
    """First and last segment that produces and that reads a buffer."""

    produced: tuple[int, ...]
    read: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        return min(self.produced + self.read), max(self.produced + self.read)


class _Planner:
    def __init__(self, lowered: Lowered, config: EngineConfig, weight_words: dict[Task, int]) -> None:
        self.config, self.weight_words = config, weight_words
        self.groups = _initial_groups(_with_output_stores(lowered))
        self.in_memory: set[Buffer] = set()
        self.apart: set[Buffer] = set()  # buffers that are not to become rings (again)
        self.component = _components(task for group in self.groups for task in group.tasks)
        self.gathered = {
            task.sources[0].buffer
            for group in self.groups
            for task in group.tasks
            if isinstance(task, VectorTask) and task.sampling == Sampling.OFFSETS
        }

    def run(self) -> MemoryPlan:
        while True:
            segments, items = self._build()
            crowded = _allocate(items, self.config.pool_words)
            if crowded is None:
                return self._finish(segments)
            self._relieve(crowded)

    # -- storage for one choice of groups and homes

    @cached_property
    def _pitch(self) -> dict[Buffer, int]:
        """Words from row to row: equal within a component, free of conflicts where four neighbours are read."""
        pitch = {}
        for members in self.component.values():
            width = max(buffer.row_words for buffer in members)
            if any(buffer in self.gathered for buffer in members):
                banks = self.config.banks
                while not 2 <= width % banks <= banks - 2:
                    width += 1
            for buffer in members:
                pitch[buffer] = width
        return pitch

    def _uses(self) -> dict[Buffer, _Use]:
        produced: dict[Buffer, list[int]] = {}
        read: dict[Buffer, list[int]] = {}
        for index, group in enumerate(self.groups):
            for task in group.tasks:
                if isinstance(task, StoreTask) and task.sources[0].buffer in self.in_memory:
                    continue  # its producers store it
                for target in task.targets:
                    produced.setdefault(target.buffer, []).append(index)
                for source in task.sources:
                    read.setdefault(source.buffer, []).append(index)
        return {b: _Use(tuple(produced.get(b, ())), tuple(read.get(b, ()))) for b in {**produced, **read}}

    def _build(self) -> tuple[list[Segment], list[tuple[Storage | WeightStorage, int, int]]]:
        uses, segments = self._uses(), []
        items: list[tuple[Storage | WeightStorage, int, int]] = []
        pool: dict[Buffer, Storage] = {}
        for index, group in enumerate(self.groups):
            segment = Segment([], prefetch=group.prefetch)
            for task in group.tasks:
                if not (isinstance(task, StoreTask) and task.sources[0].buffer in self.in_memory):
                    segment.tasks.append(task)
            transfers = self._transfers(segment.tasks)
            segment.tasks = (
                [t for t in transfers if isinstance(t, LoadTask)]
                + segment.tasks
                + [t for t in transfers if isinstance(t, StoreTask)]
            )
            streaming = bool(transfers) or len(group.tasks) > 1
            for task in segment.tasks:
                segment.strip[task] = self._strip(task, streaming, group.strip_pixels)
            for buffer in _touched(segment.tasks):
                if buffer in self.in_memory or buffer.image or self._internal(buffer, uses, index, group):
                    storage = self._window(buffer, segment, group.slack)
                    items.append((storage, index, index))
                else:
                    if buffer not in pool:
                        pool[buffer] = Storage(buffer, range(buffer.blocks), self._pitch[buffer], buffer.height)
                        items.append((pool[buffer], *uses[buffer].span))
                    storage = pool[buffer]
                segment.storage[buffer] = storage
            for buffer, storage in segment.storage.items():  # one address serves all writes of a producer
                storage.rows = max(segment.storage[b].rows for b in self.component[buffer] if b in segment.storage)
            for task in segment.tasks:
                if (words := self.weight_words.get(task)) and isinstance(task, MatrixTask | VectorTask):
                    weight = WeightStorage(task, words)
                    segment.weights.append(weight)
                    items.append((weight, max(0, index - group.prefetch), index))
            segments.append(segment)
        return segments, items

    def _internal(self, buffer: Buffer, uses: dict[Buffer, _Use], index: int, group: _Group) -> bool:
        return len(group.tasks) > 1 and all(uses[b].span == (index, index) for b in self.component[buffer])

    def _transfers(self, tasks: Sequence[Task]) -> list[Task]:
        """Loads and stores that a segment's tasks need for buffers in external memory."""
        transfers: list[Task] = []
        tag_of = {source.buffer: task.tag for task in reversed(tasks) for source in task.sources}
        written = {target.buffer for task in tasks for target in task.targets}
        wanted: dict[Buffer, range] = {}
        for task in tasks:
            for source in task.sources:
                if (source.buffer in self.in_memory or source.buffer.image) and source.buffer not in written:
                    have = wanted.get(source.buffer, source.blocks)
                    wanted[source.buffer] = range(
                        min(have.start, source.blocks.start), max(have.stop, source.blocks.stop)
                    )
            for target in task.targets:
                if target.buffer in self.in_memory:
                    transfers.append(self._store(task, target))
        loads: list[Task] = [
            LoadTask(
                f"load {buffer.name}",
                tag_of[buffer],
                Unit.LOAD,
                buffer.height,
                buffer.row_words,
                [],
                [Target(buffer, 1, blocks)],
            )
            for buffer, blocks in wanted.items()
        ]
        return loads + transfers

    def _store(self, task: Task, target: Target) -> StoreTask:
        masks = []
        for block in target.blocks:
            mask = (1 << self.config.lanes) - 1
            if isinstance(task, MatrixTask):
                mask = 0
                per_word = self.config.lanes // self.config.columns
                for tile in task.tiles:
                    for write in tile.writes:
                        if task.regions[write.region] is target.buffer and write.slot // per_word == block:
                            mask |= write.mask << write.slot % per_word * self.config.columns
            masks.append(mask)
        return StoreTask(
            f"store {target.buffer.name}",
            task.tag,
            Unit.STORE,
            target.buffer.height,
            target.buffer.width,
            [Source(target.buffer, 1, 0, 1, target.blocks)],
            [],
            tuple(masks),
        )

    def _strip(self, task: Task, streaming: bool, pixels: int) -> int:
        """Rows that a task does at a time."""
        rows = -(-pixels // task.columns)
        if not streaming:
            rows = max(rows, -(-task.rows // RESIDENT_STRIPS))
        return min(rows, task.rows)

    def _window(self, buffer: Buffer, segment: Segment, slack: int) -> Storage:
        """A sliding window with room for the widest reader and `slack` strips of its producer."""
        reads = [
            (source, segment.strip[task])
            for task in segment.tasks
            for source in task.sources
            if source.buffer is buffer
        ]
        writes = [
            (target, segment.strip[task])
            for task in segment.tasks
            for target in task.targets
            if target.buffer is buffer
        ]
        window = max((source.stride * (strip - 1) + source.span for source, strip in reads), default=0)
        factor = max(target.factor for target, _ in writes)
        rows = window + max(slack * strip * target.factor for target, strip in writes)
        rows = min(-(-rows // factor) * factor, buffer.height)
        blocks = [source.blocks for source, _ in reads] + [target.blocks for target, _ in writes]
        return Storage(
            buffer, range(min(b.start for b in blocks), max(b.stop for b in blocks)), self._pitch[buffer], rows
        )

    # -- making it fit

    def _relieve(self, crowded: int) -> None:
        """Changes one thing for the better at a segment that does not fit, or raises ModelError."""
        uses = self._uses()
        live = [
            b
            for b, use in uses.items()
            if b not in self.in_memory and not b.image and use.span[0] <= crowded <= use.span[1]
        ]
        if self._fuse(live, uses) or self._move_out(live, uses):
            return
        group = self.groups[crowded]
        shorter = any(self._strip(task, True, group.strip_pixels) > 1 for task in group.tasks)
        if shorter and group.strip_pixels > SHORT_STRIP_PIXELS:
            group.strip_pixels //= 2
            return
        if len(group.tasks) > 1:
            self._split(crowded)
            return
        if shorter:
            group.strip_pixels //= 2
            return
        neighbour = self.groups[min(crowded + 1, len(self.groups) - 1)]  # its weights are loaded in the crowded segment
        for tight in (group, neighbour):
            if tight.slack > 1:
                tight.slack -= 1
                return
            if tight.prefetch:
                tight.prefetch = False
                return
        names = ", ".join(task.name for task in group.tasks)
        raise ModelError(
            f"'{names}' does not fit the scratchpad of {self.config.pool_words} words of engine '{self.config.name}', "
            "not even row by row; use a narrower image, fewer channels or an engine with a larger scratchpad"
        )

    def _fuse(self, live: list[Buffer], uses: dict[Buffer, _Use]) -> bool:
        """Joins the segments around the largest buffer that then needs a few rows only."""
        best: tuple[int, int, int] | None = None
        for buffer in live:
            members = self.component[buffer]
            first = min(uses[b].span[0] for b in members)
            last = max(uses[b].span[1] for b in members)
            tasks = [task for group in self.groups[first : last + 1] for task in group.tasks]
            weights = sum(self.weight_words.get(task, 0) for task in tasks)
            if (
                self.apart.intersection(members)
                or any(task.is_piece for task in tasks)
                or first == last
                or last - first >= FUSE_SPAN
                or weights > self.config.pool_words // 3
                or any(isinstance(task, StoreTask) for task in tasks)
                or _reads_own_memory(tasks, self.in_memory)
            ):
                continue
            gain = len(members) * buffer.blocks * buffer.height * self._pitch[buffer]
            rows = max(
                (self._strip(t, True, STRIP_PIXELS) - 1) * s.stride + s.span + 2 * self._strip(t, True, STRIP_PIXELS)
                for t in tasks
                for s in t.sources
                if s.buffer in members
            )
            if rows * 4 > buffer.height * 3:
                continue
            if best is None or gain > best[0]:
                best = (gain, first, last)
        if best is None:
            return False
        _, first, last = best
        tasks = [task for group in self.groups[first : last + 1] for task in group.tasks]
        self.groups[first : last + 1] = [_Group(tasks)]
        return True

    def _split(self, index: int) -> None:
        """Cuts a fused segment in the middle; what crosses the cut stays whole or goes to memory."""
        tasks = self.groups[index].tasks
        halves = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
        self.apart |= {b for b in _touched(halves[0]) if b in _touched(halves[1])}
        self.groups[index : index + 1] = [_Group(half) for half in halves]

    def _move_out(self, live: list[Buffer], uses: dict[Buffer, _Use]) -> bool:
        """Moves to memory the component with least traffic for the words it frees."""
        best: tuple[float, int, Buffer] | None = None
        for buffer in live:
            members = self.component[buffer]
            tasks = [
                task
                for b in members
                for i in range(uses[b].span[0], uses[b].span[1] + 1)
                for task in self.groups[i].tasks
            ]
            if any(uses[b].span[0] == uses[b].span[1] for b in members) or _reads_own_memory(
                tasks, self.in_memory | set(members), self.groups
            ):
                continue
            words = {b: b.blocks * b.height * self._pitch[b] for b in members}
            traffic = sum(words[b] * (len(uses[b].produced) + len(uses[b].read) - 2 * b.is_output) for b in members)
            freed = sum(words[b] for b in members if b in live)
            rank = (traffic / freed, -freed, buffer)
            if best is None or rank[:2] < best[:2]:
                best = rank
        if best is None:
            return False
        self.in_memory |= set(self.component[best[2]])
        return True

    def _finish(self, segments: list[Segment]) -> MemoryPlan:
        memory: dict[Buffer, tuple[MemorySegment, int]] = {}
        arena = output = 0
        buffers = dict.fromkeys(b for s in segments for b in s.storage)
        for buffer in buffers:
            size = buffer.blocks * buffer.height * buffer.row_words * buffer.word
            if buffer.image:
                memory[buffer] = (MemorySegment.INPUT, 0)
            elif buffer.is_output:
                memory[buffer] = (MemorySegment.OUTPUT, output)
                output += size
            elif buffer in self.in_memory:
                memory[buffer] = (MemorySegment.ARENA, arena)
                arena += size
        return MemoryPlan(segments, memory, arena, output)


def _with_output_stores(lowered: Lowered) -> list[Task]:
    """The tasks, with the store of every output after its last producer."""
    outputs = list(dict.fromkeys(buffer for buffer, _ in lowered.outputs.values()))
    tasks = list(lowered.tasks)
    for buffer in outputs:
        last = max(i for i, task in enumerate(tasks) if any(t.buffer is buffer for t in task.targets))
        masks = ((1 << buffer.word) - 1,) * buffer.blocks
        tasks.insert(
            last + 1,
            StoreTask(
                f"store {buffer.name}",
                tasks[last].tag,
                Unit.STORE,
                buffer.height,
                buffer.width,
                [Source(buffer, 1, 0, 1, range(buffer.blocks))],
                [],
                masks,
            ),
        )
    return tasks


def _initial_groups(tasks: list[Task]) -> list[_Group]:
    """One task a segment, but an image that streams in is packed and convolved by turns."""
    groups: list[_Group] = []
    for task in tasks:
        before = groups[-1].tasks[-1] if groups else None
        if isinstance(before, VectorTask) and before.operation == VectorOp.PACK and not task.is_piece:
            groups[-1].tasks.append(task)
        else:
            groups.append(_Group([task]))
    return groups


def _components(tasks: Iterable[Task]) -> dict[Buffer, list[Buffer]]:
    """Buffers with a common producer, or added to each other, share pitch and window: one address serves them."""
    component: dict[Buffer, list[Buffer]] = {}
    for task in tasks:
        touched = [item.buffer for item in task.targets]
        together = [touched]
        if isinstance(task, VectorTask) and task.step_to:
            together.append([source.buffer for source in task.sources])
        for touched in together:
            members = list(dict.fromkeys(b for buffer in touched for b in component.get(buffer, [buffer])))
            for buffer in members:
                component[buffer] = members
        for source in task.sources:
            component.setdefault(source.buffer, [source.buffer])
    return component


def _touched(tasks: Sequence[Task]) -> list[Buffer]:
    return list(dict.fromkeys(item.buffer for task in tasks for item in task.operands))


def _reads_own_memory(tasks: Sequence[Task], in_memory: set[Buffer], groups: Sequence[_Group] | None = None) -> bool:
    """Whether one segment would both fill and read a buffer in memory: it could read lanes not yet stored."""
    pools = [tasks] if groups is None else [g.tasks for g in groups if any(t in g.tasks for t in tasks)]
    for members in pools:
        written = {t.buffer for task in members for t in task.targets}
        if any(s.buffer in written and s.buffer in in_memory for task in members for s in task.sources):
            return True
    return False


def _allocate(items: list[tuple[Storage | WeightStorage, int, int]], words: int) -> int | None:
    """Gives every item an address. Returns None, or the segment that is most crowded when something does not fit."""
    placed: list[tuple[Storage | WeightStorage, int, int]] = []
    failed = False
    for item, first, last in sorted(items, key=lambda entry: (-entry[0].words, entry[1])):
        busy = sorted((other.base, other.base + other.words) for other, a, b in placed if a <= last and first <= b)
        address = 0
        for start, stop in busy:
            if address + item.words <= start:
                break
            address = max(address, stop)
        if address + item.words > words:
            failed = True
            break
        item.base = address
        placed.append((item, first, last))
    if not failed:
        return None
    load: dict[int, int] = {}
    for item, first, last in items:
        for index in range(first, last + 1):
            load[index] = load.get(index, 0) + item.words
    return max(load, key=lambda index: load[index])


def chunked(lowered: Lowered, config: EngineConfig, words_per_tile: Mapping[MatrixTask, int]) -> Lowered:
    """Cuts tasks whose weights, or whose whole maps, are too large to stand beside their neighbours'."""
    limit = config.pool_words // 4
    tasks: list[Task] = []
    for task in lowered.tasks:
        if isinstance(task, MatrixTask):
            per_word = config.lanes // config.columns  # tiles that fill a word
            count = max(1, limit // words_per_tile[task])
            if count > per_word:  # whole words where possible
                count -= count % per_word
            tasks += [
                _tiles(task, start, min(start + count, task.parts), config) for start in range(0, task.parts, count)
            ]
        elif isinstance(task, VectorTask) and task.sampling != Sampling.GRID:
            source = task.sources[0].buffer
            count = max(1, limit // (source.height * (source.width + 2)))
            tasks += [_blocks(task, start, min(start + count, task.parts)) for start in range(0, task.parts, count)]
        else:
            tasks.append(task)
    return replace(lowered, tasks=tasks)


def _tiles(task: MatrixTask, start: int, stop: int, config: EngineConfig) -> MatrixTask:
    if (start, stop) == (0, task.parts):
        return task
    part = slice(start * config.columns, stop * config.columns)
    req = task.requantize
    per_word = config.lanes // config.columns
    tiles, targets = task.tiles[start:stop], []
    for target in task.targets:
        blocks = [w.slot // per_word for tile in tiles for w in tile.writes if task.regions[w.region] is target.buffer]
        if blocks:
            targets.append(replace(target, blocks=range(min(blocks), max(blocks) + 1)))
    return replace(
        task,
        name=f"{task.name}[{start}:{stop}]",
        tiles=tiles,
        targets=targets,
        weight=task.weight[part],
        requantize=replace(req, bias=req.bias[part], mult=req.mult[part], shift=req.shift[part]),
        first_tile=start,
        is_piece=True,
    )


def _blocks(task: VectorTask, start: int, stop: int) -> VectorTask:
    if (start, stop) == (0, task.parts):
        return task
    source, target = task.sources[0], task.targets[0]
    per_block = len(target.blocks) // len(source.blocks)  # a word for each tap in COLUMNS
    part, req = slice(start * source.buffer.word, stop * source.buffer.word), task.requantize
    return replace(
        task,
        name=f"{task.name}[{start}:{stop}]",
        sources=[replace(source, blocks=range(start, stop)), *task.sources[1:]],
        targets=[replace(target, blocks=range(start * per_block, stop * per_block))],
        weight=None if task.weight is None else task.weight[part],
        requantize=req and replace(req, bias=req.bias[part], mult=req.mult[part], shift=req.shift[part]),
        first_block=start,
        is_piece=True,
    )


def plan_memory(lowered: Lowered, config: EngineConfig, weight_words: dict[Task, int]) -> MemoryPlan:
    """Segments and addresses. `weight_words`: scratchpad words of each task's parameters and weights."""
    return _Planner(lowered, config, weight_words).run()
