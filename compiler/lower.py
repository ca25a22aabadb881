"""Lowering: operators of a Graph become tasks, one loop nest on one unit each, over packed buffers.

Decides which unit computes what and in which lane every channel lives; knows nothing of addresses or time.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import numpy as np

from weft.arch.config import EngineConfig
from weft.arch.errors import ModelError
from weft.arch.isa import Sampling, Unit, VectorOp
from weft.arch.program import InputTensor, Layer
from weft.compiler.graph import (
    Add,
    Channels,
    Conv,
    DeformConv,
    DeformDepthwise,
    Depthwise,
    Graph,
    MaxPool,
    Op,
    Requantize,
    Tensor,
    Upsample,
    Window,
)
from weft.compiler.placement import Region, Tile, place

Origin = tuple[str, int]  # (tensor computed by an arithmetic operator, channel)
POINT = Window(kernel=(1, 1))


@dataclass(eq=False)
class Buffer:
    """A tensor as tasks see it: `blocks` of height x width words; lane i of the blocks holds origin `lanes[i]`."""

    name: str
    height: int
    width: int
    lanes: list[Origin | None]
    word: int  # lanes in a word
    unsigned: bool
    image: InputTensor | None = None  # raw input rows instead of blocks
    is_output: bool = False

    @property
    def blocks(self) -> int:
        return 1 if self.image else -(-len(self.lanes) // self.word)

    @property
    def row_words(self) -> int:
        """Words of a row of one block in memory."""
        return self.image.row_bytes // self.word if self.image else self.width


@dataclass(frozen=True, eq=False)
class Source:
    """What a task reads: output rows [a, b) need the buffer's rows [a*stride + first, (b-1)*stride + first + span)."""

    buffer: Buffer
    stride: int
    first: int
    span: int
    blocks: range

    def rows(self, a: int, b: int) -> tuple[int, int]:
        """First and one past the last image row needed, clipped to the image (empty when first == last)."""
        low = min(max(0, a * self.stride + self.first), self.buffer.height)
        return low, max(low, min(self.buffer.height, (b - 1) * self.stride + self.first + self.span))


@dataclass(frozen=True, eq=False)
class Target:
    """What a task writes: output row r becomes rows r*factor .. r*factor + factor - 1 of these blocks."""

    buffer: Buffer
    factor: int
    blocks: range


@dataclass(eq=False)
class Task:
    """One loop nest on one unit over `rows` x `columns` output pixels."""

    name: str
    tag: int
    unit: Unit
    rows: int
    columns: int
    sources: list[Source]
    targets: list[Target]
    is_piece: bool = field(default=False, kw_only=True)  # some tiles or blocks of a layer too large to do at once

    @property
    def operands(self) -> list[Source | Target]:
        return [*self.sources, *self.targets]

    @property
    def parts(self) -> int:
        """Output tiles or blocks that the task can be cut into."""
        return 1


@dataclass(eq=False)
class MatrixTask(Task):
    """Convolution on the matrix unit. `weight` int [tiles*C, kernel_y, kernel_x, source lanes], zero where padded."""

    window: Window
    tiles: list[Tile]
    weight: np.ndarray
    wide: bool
    requantize: Requantize  # arrays of length tiles*C
    regions: dict[Hashable, Buffer]  # region of a Write -> its buffer
    upsample: int
    first_tile: int = 0  # position of tiles[0] in the whole layer

    @property
    def parts(self) -> int:
        return len(self.tiles)


@dataclass(eq=False)
class VectorTask(Task):
    """Depthwise work on the vector unit. `weight` int [blocks*L, kernel_y, kernel_x]."""

    operation: VectorOp
    window: Window
    weight: np.ndarray | None = None
    requantize: Requantize | None = None
    sampling: Sampling = Sampling.GRID
    fraction: int = 0
    step_to: Buffer | None = None  # second operand of an elementwise operation
    phase: tuple[int, int] = (0, 0)  # row and column within an enlarged pixel
    first_block: int = 0

    @property
    def parts(self) -> int:
        return len(self.sources[0].blocks)


@dataclass
class Lowered:
    """The whole network as tasks in execution order, with its layers and host-visible tensors."""

    tasks: list[Task] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    image: Buffer | None = None
    outputs: dict[str, tuple[Buffer, tuple[int, ...]]] = field(default_factory=dict)  # name -> buffer, lane of channel


class _Lowering:
    def __init__(self, graph: Graph, config: EngineConfig) -> None:
        self.graph, self.config, self.result = graph, config, Lowered()
        self.upsampled: dict[str, str] = {}  # conv output -> the tensor it is written as
        self.origins: dict[str, list[Origin]] = {}
        self.regions: dict[Hashable, Region] = {}
        self.buffers: dict[Hashable, Buffer] = {}
        self.demands: dict[tuple[str, int], Hashable] = {}  # (operator output, operand) -> region key
        self.readers: dict[Origin, list[Hashable]] = {}

    def run(self) -> Lowered:
        self._find_fused_upsampling()
        self._trace_origins()
        self._collect_demands()
        for op in self.graph.ops:
            if not isinstance(op, Channels):
                self._lower(op)
        self._finish_outputs()
        return self.result

    # -- which channels come from where, and who reads them together

    def _find_fused_upsampling(self) -> None:
        for op in self.graph.ops:
            if isinstance(op, Upsample) and op.factor == 2:
                source = op.inputs[0]
                producer = self.graph.producer(source)
                if (
                    type(producer) in (Conv, DeformConv)
                    and len(self.graph.consumers(source)) == 1
                    and source not in self.graph.outputs
                ):
                    self.upsampled[source] = op.output

    def _trace_origins(self) -> None:
        for name in self.graph.inputs:
            self.origins[name] = [(name, c) for c in range(self.graph.tensors[name].channels)]
        for op in self.graph.ops:
            if isinstance(op, Channels):
                self.origins[op.output] = [
                    self.origins[op.inputs[s]][i] for s, i in zip(op.source, op.index, strict=True)
                ]
            else:
                self.origins[op.output] = [(op.output, c) for c in range(self.graph.tensors[op.output].channels)]

    def _collect_demands(self) -> None:
        """Gives every operand a region key: its channels, and their order where lanes are addressed by number."""
        outputs: dict[tuple[int, int, bool], list[Origin]] = {}
        for name in self.graph.outputs:
            tensor = self.graph.tensors[name]
            if self._on_vector(name):
                key = self._demand((name, -1), name, ordered=False)
                self.buffers[key].is_output = True
            else:  # results of one size share their words
                outputs.setdefault((tensor.height, tensor.width, tensor.unsigned), []).extend(self.origins[name])
        for key, channels in outputs.items():
            self._register(("outputs", *key), channels, None, key[2], channels[0][0])
            self.buffers["outputs", *key].is_output = True
        for op in reversed(self.graph.ops):
            if isinstance(op, Channels) or self._is_fused(op):
                continue
            for operand, name in enumerate(op.inputs):
                if name in self.graph.inputs:
                    continue
                deform_offsets = isinstance(op, (DeformConv, DeformDepthwise)) and operand == 1
                ordered = deform_offsets or isinstance(op, Add) or self._order_of(op) is not None
                self._demand((op.output, operand), name, ordered)

    def _on_vector(self, name: str) -> bool:
        return (
            isinstance(self.graph.producer(name), (Depthwise, MaxPool, Add, Upsample))
            and name not in self.upsampled.values()
        )

    def _is_fused(self, op: Op) -> bool:
        return isinstance(op, Upsample) and op.output in self.upsampled.values()

    def _order_of(self, op: Op) -> object | None:
        """The region of `op`'s output whose readers address lanes by number, if there is one."""
        if not self._on_vector(op.output):
            return None
        keys = {key for channel in self.origins[op.output] for key in self.readers.get(channel, [])}
        return next((key for key in keys if self.regions[key].order is not None), None)

    def _demand(self, consumer: tuple[str, int], name: str, ordered: bool) -> Hashable:
        channels = self.origins[name]
        if len(set(channels)) != len(channels):
            raise ModelError(f"'{consumer[0]}' reads a channel of '{name}' twice; duplicate it by a convolution")
        key = (frozenset(channels), tuple(channels) if ordered else None)
        self.demands[consumer] = key
        if key not in self.regions:
            tensor = self.graph.tensors[name]
            self._register(key, channels, channels if ordered else None, tensor.unsigned, name)
        return key

    def _register(
        self, key: Hashable, channels: list[Origin], order: list[Origin] | None, unsigned: bool, name: str
    ) -> None:
        word = self.config.lanes
        tensor = self.graph.tensors[channels[0][0]]
        region = Region(self.config.columns, -(-len(channels) // word) * word, order)
        self.regions[key] = region
        self.buffers[key] = Buffer(name, tensor.height, tensor.width, region.lanes, word, unsigned)
        for channel in channels:
            self.readers.setdefault(channel, []).append(key)

    # -- one operator at a time

    def _lower(self, op: Op) -> None:
        if isinstance(op, DeformConv):
            self._full_deformable(op)
        elif isinstance(op, Conv):
            if op.inputs[0] in self.graph.inputs:
                self._stem(op)
            else:
                source = self._operand(op, 0)
                self._matrix(op, source, op.window, self._arrange(op.weight, source, op.inputs[0]))
        elif isinstance(op, Upsample):
            if not self._is_fused(op):
                self._copy_enlarged(op)
        elif isinstance(op, (Depthwise, MaxPool, Add)):
            self._vector(op)
        else:
            raise ModelError(f"operator '{op.name}' ({type(op).__name__}) has no lowering")

    def _operand(self, op: Op, operand: int) -> Buffer:
        if op.inputs[operand] in self.graph.inputs:
            raise ModelError(f"'{op.name}': the image must first go through a convolution; put one before it")
        return self.buffers[self.demands[op.output, operand]]

    def _arrange(self, weight: np.ndarray, source: Buffer, name: str) -> np.ndarray:
        """Weights [O, ky, kx, I] with I permuted and padded to the lanes of the source buffer."""
        arranged = np.zeros((*weight.shape[:3], source.blocks * source.word), np.int64)
        at = {origin: lane for lane, origin in enumerate(source.lanes) if origin is not None}
        arranged[..., [at[origin] for origin in self.origins[name]]] = weight
        return arranged

    def _layer(
        self, op: Op, operation: str, unit: Unit, output: str, channel_of: list[int], upsample: int = 1, **extra: int
    ) -> int:
        """Registers a layer and returns its tag."""
        tensor = self.graph.tensors[op.output]
        self.result.layers.append(
            Layer(
                op.name,
                operation,
                output,
                unit.name.lower(),
                tensor.height,
                tensor.width,
                len([c for c in channel_of if c >= 0]),
                tuple(channel_of),
                tensor.unsigned,
                upsample,
                **extra,
            )
        )
        return len(self.result.layers) - 1

    def _matrix(self, op: Conv, source: Buffer, window: Window, weight: np.ndarray) -> None:
        written = self.upsampled.get(op.output, op.output)
        factor = 2 if written != op.output else 1
        channels = self.origins[written]
        readers = {channel: tuple(self.readers.get(channel, ())) for channel in channels}
        if unread := [c for c in channels if not readers[c]]:
            raise ModelError(
                f"'{op.name}': channel {unread[0][1]} of its output is never read; remove it from the model"
            )
        tiles = place(readers, self.regions, self.config.columns, self.config.max_writes // factor**2)
        order = [-1 if channel is None else channel[1] for tile in tiles for channel in tile.channels]
        picked, real = np.array(order), np.array(order) >= 0
        req = op.requantize
        regions = {key: self.buffers[key] for keys in readers.values() for key in keys}
        tensor = self.graph.tensors[op.output]
        tag = self._layer(
            op, _operation(op), Unit.MATRIX, op.output, order, factor, macs=self.graph.macs(op), weight_bits=op.bits
        )
        word = self.config.lanes
        targets = []
        for key, buffer in regions.items():
            slots = [w.slot for tile in tiles for w in tile.writes if w.region == key]
            low, high = (s * self.config.columns // word for s in (min(slots), max(slots)))
            targets.append(Target(buffer, factor, range(low, high + 1)))
        self.result.tasks.append(
            MatrixTask(
                op.name,
                tag,
                Unit.MATRIX,
                tensor.height,
                tensor.width,
                [_grid_source(source, window)],
                targets,
                window,
                tiles,
                np.where(real[:, None, None, None], weight[picked], 0),
                op.bits == 8,
                replace(
                    req,
                    bias=np.where(real, req.bias[picked], 0),
                    mult=np.where(real, req.mult[picked], 0),
                    shift=np.where(real, req.shift[picked], 0),
                ),
                regions,
                factor,
            )
        )

    def _stem(self, op: Conv) -> None:
        """A convolution on the raw image: the vector unit packs each window into one word for the matrix unit."""
        image = self.graph.tensors[op.inputs[0]]
        (ky, kx), word = op.window.kernel, self.config.lanes
        depth = ky * kx * image.channels
        if depth > word or op.window.dilation[1] != 1:
            raise ModelError(
                f"'{op.name}': a window of the image ({ky}x{kx}x{image.channels}) must fit one word of "
                f"{word} bytes, undilated; use a smaller kernel or an engine with more lanes"
            )
        raw = self._image_buffer(image, op.window)
        out = self.graph.tensors[op.output]
        packed = Buffer(
            f"{op.output}/packed",
            out.height,
            out.width,
            [(f"{op.output}/packed", i) for i in range(depth)],
            word,
            image.unsigned,
        )
        tag = self._layer(op, "pack", Unit.VECTOR, packed.name, [*range(depth), *([-1] * (word - depth))])
        window = replace(op.window, kernel=(ky, 1))
        self.result.tasks.append(
            VectorTask(
                f"{op.name}/pack",
                tag,
                Unit.VECTOR,
                out.height,
                out.width,
                [_grid_source(raw, window)],
                [Target(packed, 1, range(1))],
                VectorOp.PACK,
                op.window,
            )
        )
        weight = np.zeros((len(op.weight), 1, 1, word), np.int64)
        weight[:, 0, 0, :depth] = op.weight.reshape(len(op.weight), -1)
        self._matrix(op, packed, POINT, weight)

    def _image_buffer(self, image: Tensor, window: Window) -> Buffer:
        out_width = window.output_size(image.height, image.width)[1]
        border = window.padding[1]
        columns = max(image.width + border, (out_width - 1) * window.stride[1] + window.kernel[1])
        row_bytes = -(-columns * image.channels // self.config.lanes) * self.config.lanes
        tensor = InputTensor(
            image.name, 0, image.height, image.width, image.channels, row_bytes, border, image.unsigned, image.scale
        )
        if self.result.image is None:
            self.result.image = Buffer(
                image.name, image.height, image.width, [], self.config.lanes, image.unsigned, tensor
            )
        elif self.result.image.image != tensor:
            raise ModelError("two convolutions read the image with different padding; give them the same")
        return self.result.image

    def _full_deformable(self, op: DeformConv) -> None:
        """The vector unit writes the sampled columns, the matrix unit multiplies them as a 1x1 convolution."""
        source, out = self._operand(op, 0), self.graph.tensors[op.output]
        ky, kx = op.window.kernel
        taps, lanes = ky * kx, source.blocks * source.word
        name = f"{op.output}/columns"
        columns = Buffer(
            name, out.height, out.width, [(name, i) for i in range(taps * lanes)], source.word, source.unsigned
        )
        tag = self._layer(op, "deform columns", Unit.VECTOR, name, list(range(taps * lanes)))
        self.result.tasks.append(
            VectorTask(
                f"{op.name}/columns",
                tag,
                Unit.VECTOR,
                out.height,
                out.width,
                self._deform_sources(op, source),
                [Target(columns, 1, range(columns.blocks))],
                VectorOp.COLUMNS,
                op.window,
                sampling=op.deformable.sampling,
                fraction=op.deformable.fraction,
            )
        )
        arranged = self._arrange(op.weight, source, op.inputs[0]).reshape(
            len(op.weight), taps, source.blocks, source.word
        )
        # Taps of a block stand together, so that the sampling can be cut by blocks.
        self._matrix(op, columns, POINT, arranged.transpose(0, 2, 1, 3).reshape(len(arranged), 1, 1, taps * lanes))

    def _deform_sources(self, op: DeformConv | DeformDepthwise, source: Buffer) -> list[Source]:
        window, deform = op.window, op.deformable
        if window.stride != (1, 1):
            raise ModelError(f"'{op.name}': deformable convolution with stride {window.stride}; only stride 1 runs")
        offsets = self._operand(op, 1)
        first = -window.padding[0] - deform.reach
        span = 2 * deform.reach + (window.kernel[0] - 1) * window.dilation[0] + 1
        if deform.sampling == Sampling.OFFSETS:
            span += 1  # the lower neighbours of a bilinear sample
        return [Source(source, 1, first, span, range(source.blocks)), Source(offsets, 1, 0, 1, range(1))]

    def _vector(self, op: Depthwise | MaxPool | Add) -> None:
        source, tensor = self._operand(op, 0), self.graph.tensors[op.output]
        channel_at = {origin: c for c, origin in enumerate(self.origins[op.inputs[0]])}
        # A lane computes the channel whose input it holds.
        order = [-1 if origin is None else channel_at[origin] for origin in source.lanes]
        order += [-1] * (source.blocks * source.word - len(order))
        target = self._vector_target(op, order)
        picked, real = np.array(order), np.array(order) >= 0
        task = VectorTask(
            op.name,
            self._layer(
                op,
                _operation(op),
                Unit.VECTOR,
                op.output,
                order,
                macs=self.graph.macs(op),
                weight_bits=getattr(op, "bits", 0),
            ),
            Unit.VECTOR,
            tensor.height,
            tensor.width,
            [],
            [Target(target, 1, range(target.blocks))],
            VectorOp.MULTIPLY,
            POINT,
        )
        if isinstance(op, MaxPool):
            task.operation, task.window = VectorOp.MAXIMUM, op.window
        else:
            req = op.requantize
            task.requantize = replace(
                req,
                bias=np.where(real, req.bias[picked], 0),
                mult=np.where(real, req.mult[picked], 0),
                shift=np.where(real, req.shift[picked], 0),
            )
        if isinstance(op, Depthwise):
            task.window = op.window
            task.weight = np.where(real[:, None, None], op.weight[picked].astype(np.int64), 0)
        if isinstance(op, Add):
            task.window, task.step_to = Window(kernel=(1, 2)), self._operand(op, 1)
            task.weight = np.where(real[:, None, None], np.asarray(op.weight, np.int64)[None, None, :], 0)
            task.sources = [_grid_source(source, POINT), _grid_source(task.step_to, POINT)]
        elif isinstance(op, DeformDepthwise):
            task.sampling, task.fraction = op.deformable.sampling, op.deformable.fraction
            task.sources = self._deform_sources(op, source)
        else:
            task.sources = [_grid_source(source, task.window)]
        self.result.tasks.append(task)

    def _vector_target(self, op: Op, order: list[int]) -> Buffer:
        """The one buffer that a vector operator fills, its lanes decided by the operator's source."""
        keys = list(dict.fromkeys(key for channel in self.origins[op.output] for key in self.readers.get(channel, [])))
        if len(keys) != 1 or any(len(self.readers.get(channel, [])) != 1 for channel in self.origins[op.output]):
            raise ModelError(
                f"'{op.name}': its output is read in different selections of channels; "
                "insert a 1x1 convolution after it"
            )
        buffer, region = self.buffers[keys[0]], self.regions[keys[0]]
        if region.order is not None and [self.origins[op.output][c] for c in order if c >= 0] != list(region.order):
            raise ModelError(
                f"'{op.name}': a reader of its output wants the channels in another order; "
                "insert a 1x1 convolution after it"
            )
        buffer.lanes[:] = [None if c < 0 else (op.output, c) for c in order]
        return buffer

    def _copy_enlarged(self, op: Upsample) -> None:
        """Nearest enlargement by itself: one copy for each of the four positions in an enlarged pixel."""
        if op.factor != 2:
            raise ModelError(f"'{op.name}': enlargement by {op.factor}; only 2 runs, use it repeatedly")
        source, tensor = self._operand(op, 0), self.graph.tensors[op.inputs[0]]
        channel_at = {origin: c for c, origin in enumerate(self.origins[op.inputs[0]])}
        order = [-1 if origin is None else channel_at[origin] for origin in source.lanes]
        order += [-1] * (source.blocks * source.word - len(order))
        target = self._vector_target(op, order)
        small = replace(op, output=op.inputs[0])
        for phase in ((0, 0), (0, 1), (1, 0), (1, 1)):
            tag = self._layer(small, "upsample", Unit.VECTOR, f"{op.output}/{phase[0]}{phase[1]}", order)
            self.result.tasks.append(
                VectorTask(
                    f"{op.name}/{phase[0]}{phase[1]}",
                    tag,
                    Unit.VECTOR,
                    tensor.height,
                    tensor.width,
                    [_grid_source(source, POINT)],
                    [Target(target, 2, range(target.blocks))],
                    VectorOp.MAXIMUM,
                    POINT,
                    phase=phase,
                )
            )

    def _finish_outputs(self) -> None:
        for name in self.graph.outputs:
            buffer = next(
                buffer for buffer in self.buffers.values() if buffer.is_output and self.origins[name][0] in buffer.lanes
            )
            at = {origin: lane for lane, origin in enumerate(buffer.lanes) if origin is not None}
            self.result.outputs[name] = (buffer, tuple(at[origin] for origin in self.origins[name]))


def _grid_source(buffer: Buffer, window: Window) -> Source:
    return Source(
        buffer,
        window.stride[0],
        -window.padding[0],
        (window.kernel[0] - 1) * window.dilation[0] + 1,
        range(buffer.blocks),
    )


def _operation(op: Op) -> str:
    """A layer's kind, as reports print it."""
    if isinstance(op, (Conv, Depthwise)):
        ky, kx = op.window.kernel
        kind = "deform " if isinstance(op, (DeformConv, DeformDepthwise)) else ""
        kind += "dw" if isinstance(op, Depthwise) else "conv"
        return f"{kind} {ky}x{kx}" + (f"/{op.window.stride[0]}" if op.window.stride[0] > 1 else "")
    return {MaxPool: "max-pool", Add: "add", Upsample: "upsample"}[type(op)]


def lower(graph: Graph, config: EngineConfig) -> Lowered:
    """Tasks of `graph` for `config`. Raises ModelError for what the engine cannot express."""
    return _Lowering(graph, config).run()
