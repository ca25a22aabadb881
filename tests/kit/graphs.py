"""Random quantized networks as Graphs: every operator, odd channel counts, shuffles, several outputs."""

from __future__ import annotations

import numpy as np

from weft.arch.isa import Sampling
from weft.compiler.graph import (
    Add,
    Channels,
    Conv,
    Deformable,
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

POINT = Window((1, 1))
SAME = Window((3, 3), padding=(1, 1, 1, 1))
HALF = Window((3, 3), stride=(2, 2), padding=(1, 1, 1, 1))
SCALE = 2.0**-4


class NetworkBuilder:
    """Grows a Graph by one operator a call; each method returns the name of the new tensor."""

    def __init__(self, seed: int = 0, height: int = 16, width: int = 16) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = Graph(f"random-{seed}", inputs=["image"])
        self.graph.tensors["image"] = Tensor("image", height, width, 3, SCALE, False)

    def image(self) -> np.ndarray:
        return self.rng.integers(-128, 128, self.graph.tensors["image"].shape)

    def conv(self, source: str, channels: int, window: Window = POINT, bits: int = 4, unsigned: bool = True) -> str:
        depth = self.graph.tensors[source].channels
        weight = self._weight((channels, *window.kernel, depth), bits)
        return self._add(Conv, source, window, channels, unsigned, weight=weight, bits=bits,
                         requantize=self._requantize(weight, unsigned))

    def depthwise(self, source: str, window: Window = SAME, unsigned: bool = False) -> str:
        channels = self.graph.tensors[source].channels
        weight = self._weight((channels, *window.kernel), 4)
        return self._add(Depthwise, source, window, channels, unsigned, weight=weight, bits=4,
                         requantize=self._requantize(weight, unsigned))

    def deform(self, source: str, sampling: Sampling, channels: int | None = None, fraction: int = 4) -> str:
        """A depthwise deformable convolution, or a full one with `channels` outputs."""
        square = sampling == Sampling.SQUARE
        fraction = 0 if square else fraction
        offsets = self.conv(source, 1 if square else 18, unsigned=False)
        tensor = self.graph.tensors[offsets]
        self.graph.tensors[offsets] = Tensor(offsets, *tensor.shape, 2.0**-fraction, False)
        producer = self.graph.ops[-1]
        assert isinstance(producer, Conv)
        if square:
            producer.requantize.mult[:] //= 16
            object.__setattr__(producer.requantize, "low", -7)
            object.__setattr__(producer.requantize, "high", 8)
        depth = self.graph.tensors[source].channels
        weight = self._weight((depth, 3, 3) if channels is None else (channels, 3, 3, depth), 4)
        return self._add(DeformDepthwise if channels is None else DeformConv, source, SAME, channels or depth, False,
                         offsets, weight=weight, bits=4, requantize=self._requantize(weight, False),
                         deformable=Deformable(sampling, fraction, 8 if square else 128 >> fraction))

    def pool(self, source: str) -> str:
        tensor = self.graph.tensors[source]
        return self._add(MaxPool, source, HALF, tensor.channels, tensor.unsigned)

    def upsample(self, source: str) -> str:
        tensor = self.graph.tensors[source]
        name = f"t{len(self.graph.ops)}"
        self.graph.tensors[name] = Tensor(name, 2 * tensor.height, 2 * tensor.width, tensor.channels, SCALE,
                                          tensor.unsigned)
        self.graph.ops.append(Upsample(name, (source,), name, 2))
        return name

    def add(self, a: str, b: str) -> str:
        tensor = self.graph.tensors[a]
        weight = np.array([64, 37], np.int8)
        requantize = Requantize(np.zeros(tensor.channels, np.int32), np.full(tensor.channels, 1 << 15, np.uint16),
                                np.full(tensor.channels, 22, np.uint8), *tensor.limits)
        name = f"t{len(self.graph.ops)}"
        self.graph.tensors[name] = Tensor(name, *tensor.shape, SCALE, tensor.unsigned)
        self.graph.ops.append(Add(name, (a, b), name, weight, requantize))
        return name

    def select(self, *channels: tuple[str, int]) -> str:
        """A tensor made of the given channels of others."""
        inputs = tuple(dict.fromkeys(name for name, _ in channels))
        first, name = self.graph.tensors[inputs[0]], f"t{len(self.graph.ops)}"
        self.graph.tensors[name] = Tensor(name, first.height, first.width, len(channels), SCALE, first.unsigned)
        self.graph.ops.append(Channels(name, inputs, name, tuple(inputs.index(n) for n, _ in channels),
                                       tuple(c for _, c in channels)))
        return name

    def shuffle(self, a: str, b: str) -> tuple[str, str]:
        """Both halves of the two-group shuffle of a and b, which have equal channel counts."""
        count = self.graph.tensors[a].channels
        mixed = [(name, c) for c in range(count) for name in (a, b)]
        return self.select(*mixed[:count]), self.select(*mixed[count:])

    def output(self, *names: str) -> Graph:
        self.graph.outputs = list(names)
        return self.graph

    def _weight(self, shape: tuple[int, ...], bits: int) -> np.ndarray:
        limit = 1 << bits - 1
        return self.rng.integers(-limit, limit, shape).astype(np.int8)

    def _requantize(self, weight: np.ndarray, unsigned: bool) -> Requantize:
        """Scales under which outputs spread over their range."""
        spread = np.sqrt((weight.astype(float) ** 2).reshape(len(weight), -1).sum(1)) * 80 + 1
        ratio = self.rng.uniform(0.4, 1.2, len(weight)) * 90 / spread
        shift = np.clip(15 - np.floor(np.log2(ratio)), 1, 40).astype(int)
        low, high = (0, 255) if unsigned else (-128, 127)
        return Requantize(self.rng.integers(-500, 500, len(weight)).astype(np.int32),
                          (ratio * 2.0**shift).astype(np.uint16), shift.astype(np.uint8), low, high)

    def _add(self, kind: type[Op], source: str, window: Window, channels: int, unsigned: bool, *more: str,
             **fields: object) -> str:
        tensor, name = self.graph.tensors[source], f"t{len(self.graph.ops)}"
        height, width = window.output_size(tensor.height, tensor.width)
        self.graph.tensors[name] = Tensor(name, height, width, channels, SCALE, unsigned)
        self.graph.ops.append(kind(name, (source, *more), name, window=window, **fields))
        return name


def shuffle_network(seed: int = 0, side: int = 16, half: int = 29, blocks: int = 3) -> Graph:
    """A ShuffleNetV2 stage behind a strided stem, with a deformable decoder level and three outputs."""
    b = NetworkBuilder(seed, 2 * side, 2 * side)
    stem = b.conv("image", 20, HALF, bits=8)
    left = b.conv(b.depthwise(stem), half)
    right = b.conv(b.depthwise(b.conv(stem, half)), half)
    for _ in range(blocks):
        left, right = b.shuffle(left, right)
        right = b.conv(b.depthwise(b.conv(right, half)), half)
    joined = b.select(*((name, c) for name in (left, right) for c in range(half)))
    small = b.conv(b.pool(joined), 40)
    deep = b.upsample(b.conv(b.deform(small, Sampling.SQUARE), 24))
    free = b.conv(b.deform(deep, Sampling.OFFSETS), 33)
    full = b.deform(free, Sampling.OFFSETS, channels=18)
    head = b.conv(b.depthwise(b.conv(free, 32), unsigned=True), 5, unsigned=False)
    return b.output(head, b.conv(free, 2, unsigned=False), full)
