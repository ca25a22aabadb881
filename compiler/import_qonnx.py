"""QONNX to Graph: one walk over the nodes gives each its verdict and, where it runs on the engine, its operator.

While walking, every ONNX tensor stands for a `Value`. A convolution becomes a `Sum`, to which biases, batch
normalization, ReLU and clips are added until a Quant turns it into an operator and a Tensor. Scales are float32
in the file; all arithmetic with them is float64, as in the models' own integer forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weft.arch.errors import ModelError
from weft.arch.isa import Sampling, Vector
from weft.arch.numerics import FRACTION_BITS, bias_code, requantize_parameters
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
    Requantize,
    Tensor,
    Upsample,
    Window,
)
from weft.compiler.onnx_model import Model, Node, load_model
from weft.compiler.onnx_values import Image, Square, Sum, Unknown, Value, View, Weights, kind_of
from weft.compiler.passes.fold_batchnorm import fold_batchnorm
from weft.compiler.verdict import Place, Unsupported, Verdict, require_supported, unsupported_operation

MAX_CHANNELS = 1 << 13  # what the tile and block counts of an instruction reach
_LIMIT = {name: (1 << Vector.__dataclass_fields__[name].metadata["width"]) - 1
          for name in ("height", "kernel_y", "stride_y", "dilation_y", "pad_x")}


def import_qonnx(path: str | Path) -> Graph:
    """The Graph of a QONNX file, as written by the user. Raises ModelError that names every node in the way."""
    model = load_model(path)
    try:
        graph, judged = _walk(model)
        require_supported(judged)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    return graph


def verdicts(model: Model) -> list[Verdict]:
    """What becomes of each node, in execution order. Raises ModelError for a malformed node."""
    return _walk(model)[1]


_Result = tuple[Place, str]
_UNQUANTIZED = "put a Quant (8 bit, scale per tensor, zero point 0) between the two"


def _walk(model: Model) -> tuple[Graph, list[Verdict]]:
    with np.errstate(all="ignore"):  # results that overflow are refused where they are used
        return _Importer(model).run()


class _Importer:
    """One walk over a Model. Handlers set `values` of a node's outputs; they raise Unsupported."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.graph = Graph(model.name)
        self.values: dict[str, Value] = dict(model.constants)
        self.quantizers: dict[str, str] = {}  # image -> node that quantizes it
        self.taken: set[str] = set()  # names of operators

    def run(self) -> tuple[Graph, list[Verdict]]:
        for name, (_, channels, height, width) in self.model.inputs.items():
            if max(height, width) > _LIMIT["height"] or channels > MAX_CHANNELS:
                raise ModelError(f"input '{name}' has shape {[1, channels, height, width]}; "
                                 f"stay within {_LIMIT['height']} rows and columns and {MAX_CHANNELS} channels")
            self.values[name] = Image(name, height, width, channels)
        judged = [self.judge(node) for node in self.model.nodes]
        for name in self.model.outputs:
            value = self.values[name]
            if isinstance(value, Tensor):
                self.graph.outputs.append(value.name)
            elif not any(name in node.outputs for node in self.model.nodes):
                raise ModelError(f"output '{name}' is computed by no node; take it out of the model")
        return self.graph, judged

    def judge(self, node: Node) -> Verdict:
        try:
            if node.operation not in _HANDLERS:
                raise unsupported_operation(node.operation)
            place, handler = _HANDLERS[node.operation]
            if any(isinstance(self.values.get(name), Unknown) for name in node.inputs):
                self.values.update(dict.fromkeys(node.outputs, Unknown()))
                return Verdict(node.name, node.operation, place, "once what it reads is possible")
            place, detail = handler(self, node)
            for name in filter(None, node.outputs):
                if name not in self.values:
                    raise Unsupported(f"its result '{name}' is not computed", "use the first result only")
                if name in self.model.outputs and not isinstance(self.values[name], Tensor):
                    raise Unsupported(f"output '{name}' of the model is {kind_of(self.values[name])}",
                                      "let outputs be results of a Quant, or of channel moves of such results")
            return Verdict(node.name, node.operation, place, detail)
        except Unsupported as reason:
            self.values.update(dict.fromkeys(node.outputs, Unknown()))
            return Verdict(node.name, node.operation, Place.IMPOSSIBLE, reason.reason, reason.rewrite)

    # --- operands ---

    def operand(self, node: Node, index: int) -> Value | None:
        """Input number `index`, None if it is left out."""
        return self.values[node.inputs[index]] if index < len(node.inputs) and node.inputs[index] else None

    def codes(self, node: Node, index: int = 0) -> Tensor:
        """A quantized tensor. Raises Unsupported for anything else."""
        value = self.operand(node, index)
        if not isinstance(value, Tensor):
            raise Unsupported(f"input {index} is {kind_of(value)}, not a quantized tensor", _UNQUANTIZED)
        return value

    def accumulator(self, node: Node, index: int = 0) -> Sum:
        """An accumulator; a quantized tensor is one after multiplication by 1 in a 1x1 depthwise convolution."""
        value = self.operand(node, index)
        if isinstance(value, Sum):
            return value
        tensor = self.codes(node, index)
        count = tensor.channels
        return Sum(Depthwise, node.name, (tensor.name,), tensor.height, tensor.width, np.ones((count, 1, 1), np.int64),
                    np.full(count, tensor.scale), np.zeros(count), {"window": Window((1, 1)), "bits": 4})

    def reals(self, node: Node, index: int, what: str) -> np.ndarray:
        """A constant as float64; quantized constants by their values."""
        value = self.operand(node, index)
        if isinstance(value, Weights):
            return value.codes * _per_channel(value.scale, value.codes.ndim)
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            return value.astype(np.float64)
        raise Unsupported(f"{what} is {kind_of(value)}, not a constant", "make it an initializer of the model")

    def scalar(self, node: Node, index: int, what: str) -> float:
        value = self.reals(node, index, what)
        if value.size != 1:
            raise Unsupported(f"{what} has shape {list(value.shape)}", "use one value for the whole tensor")
        return float(value.reshape(()))

    def integers(self, node: Node, index: int, what: str) -> list[int]:
        value = self.operand(node, index)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "i" or value.ndim > 1:
            raise Unsupported(f"{what} is {kind_of(value)}, not a list of constant integers",
                              "export with fixed sizes and constant folding")
        return np.atleast_1d(value).tolist()

    # --- results ---

    def tensor(self, name: str, height: int, width: int, channels: int, scale: float, unsigned: bool) -> Tensor:
        """Adds a Tensor to the graph as the value of ONNX tensor `name`."""
        if not (0 < height <= _LIMIT["height"] and 0 < width <= _LIMIT["height"] and 0 < channels <= MAX_CHANNELS):
            raise Unsupported(f"result of {height} x {width} pixels and {channels} channels",
                              f"stay within 1..{_LIMIT['height']} rows and columns and {MAX_CHANNELS} channels")
        value = Tensor(name, height, width, channels, scale, unsigned)
        self.graph.tensors[name] = self.values[name] = value
        return value

    def channels(self, node: Node, output: str, sources: list[Tensor], origin: list[tuple[int, int]]) -> _Result:
        """Adds a Channels operator; `origin` gives (source, channel) of each output channel."""
        first = sources[0]
        self.tensor(output, first.height, first.width, len(origin), first.scale, first.unsigned)
        name = node.name if len(node.outputs) == 1 else output
        source, index = zip(*origin, strict=True)
        self.graph.ops.append(Channels(name, tuple(item.name for item in sources), output, source, index))
        return Place.FOLDED, "into the addresses at which producers write their channels"

    def readers(self, node: Node) -> str:
        names = [f"'{reader}'" for output in node.outputs for reader in self.model.readers.get(output, ())]
        return ", ".join(names) or "nothing, its result is unused"

    # --- handlers ---

    def constant(self, node: Node) -> _Result:
        given = [node.attributes[name] for name in ("value", "value_float", "value_floats", "value_int", "value_ints")
                 if name in node.attributes]
        if len(given) != 1 or given[0] is None:
            raise Unsupported("a constant that is no number or tensor", "make it an initializer of the model")
        value = np.asarray(given[0])
        value = value.astype(np.float32) if value.dtype == np.float64 else value  # attributes are Python floats
        if value.dtype.kind not in "fiub" or not np.isfinite(value).all():
            raise Unsupported("a constant that is no number", "make it an initializer of the model")
        self.values[node.outputs[0]] = value
        return Place.FOLDED, f"into {self.readers(node)}"

    def identity(self, node: Node) -> _Result:
        value = self.operand(node, 0)
        if isinstance(value, Tensor):  # named anew, so that an output may be one
            return self.channels(node, node.outputs[0], [value], [(0, i) for i in range(value.channels)])
        if value is None:
            raise Unsupported("input 0 is left out", "export the model again")
        self.values[node.outputs[0]] = value
        return Place.FOLDED, f"into {self.readers(node)}"

    def quant(self, node: Node) -> _Result:
        output, value = node.outputs[0], self.operand(node, 0)
        low, high, bits, unsigned = self.quantizer(node)
        scale = self.reals(node, 1, "scale")
        if not (scale > 0).all() or not scale.size:
            raise Unsupported("a scale that is not positive", "calibrate the quantizer")
        if isinstance(value, np.ndarray):
            if unsigned or value.dtype != np.float32:
                raise Unsupported(f"{'unsigned' if unsigned else value.dtype} constant",
                                  "use signed quantizers of float32 weights")
            if scale.size != 1 and scale.shape != (*value.shape[:1], *(1,) * (value.ndim - 1)):
                raise Unsupported(f"scale of shape {list(scale.shape)} for weights of shape {list(value.shape)}",
                                  "use one scale, or one per output channel ([channels, 1, 1, 1])")
            codes = np.rint(value / scale.astype(np.float32)).clip(low, high).astype(np.int64)  # float32 as in training
            self.values[output] = Weights(codes, scale.ravel(), bits)
            return Place.FOLDED, f"into the integer weights of {self.readers(node)}"
        if bits > 8:
            raise Unsupported(f"activations of {bits} bits", "use 8 bits or fewer")
        if scale.size != 1:
            raise Unsupported(f"activation scale of shape {list(scale.shape)}", "use one scale for the whole tensor")
        s_out = float(scale.reshape(()))
        if isinstance(value, Image):
            return self.quantize_input(node, value, s_out, low, high, unsigned)
        if isinstance(value, Tensor) and value.scale == s_out and low <= value.limits[0] and value.limits[1] <= high:
            return self.identity(node)
        total = self.accumulator(node)
        try:
            pairs = [requantize_parameters(s / s_out) for s in total.scale.tolist()]
            bias = [bias_code(b, s) for b, s in zip(total.bias.tolist(), total.scale.tolist(), strict=True)]
        except (ValueError, OverflowError) as error:
            raise Unsupported(str(error),
                              "calibrate the quantizer: its scale does not fit the values it receives") from error
        mult, shift = np.array(pairs).T
        # Rounding is monotone, so a clip before the quantizer is a narrower clamp of its codes.
        low, high = (int(min(max(np.rint(limit / s_out), low), high)) for limit in (total.low, total.high))
        requantize = Requantize(np.array(bias, np.int32), mult.astype(np.uint16), shift.astype(np.uint8), low, high)
        self.tensor(output, total.height, total.width, len(bias), s_out, unsigned)
        name = node.name if total.name in self.taken else total.name  # read by a second quantizer
        self.taken.add(name)
        self.graph.ops.append(total.kind(name=name, inputs=total.inputs, output=output, requantize=requantize,
                                         weight=total.weight.astype(np.int8), **total.fields))
        if total.name == node.name:
            return Place.ENGINE, "vector unit: requantized by a 1x1 depthwise convolution"
        return Place.FOLDED, f"into the requantization of '{total.name}'"

    def quantizer(self, node: Node) -> tuple[int, int, int, bool]:
        """(low, high, 4 or 8 or more bits, unsigned) of a Quant node."""
        signed, narrow = node.attribute("signed", 1), node.attribute("narrow", 0)
        mode = node.attribute("rounding_mode", "ROUND").upper()
        if mode not in ("ROUND", "HALF_EVEN"):
            raise Unsupported(f"rounding mode {mode}", "use ROUND: half to even is what the engine does")
        if self.reals(node, 2, "zero point").any():
            raise Unsupported("a zero point other than 0",
                              "use symmetric quantizers (unsigned after ReLU, signed elsewhere)")
        width = self.scalar(node, 3, "bit width")
        if not 2 <= width <= 32 or width != int(width):
            raise Unsupported(f"{width:g} bits", "use whole bit widths from 2 to 8")
        bits = int(width)
        low, high = (-(1 << bits - 1) + narrow, (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1 - narrow)
        return low, high, 4 if bits <= 4 else max(bits, 8), not signed

    def quantize_input(self, node: Node, image: Image, scale: float, low: int, high: int, unsigned: bool) -> _Result:
        if (other := self.quantizers.setdefault(image.name, node.name)) != node.name:
            raise Unsupported(f"image '{image.name}' is quantized by '{other}' already",
                              "use one quantizer for the image")
        tensor = self.tensor(image.name, image.height, image.width, image.channels, scale, unsigned)
        if (low, high) != tensor.limits:
            raise Unsupported(f"image codes {low}..{high}",
                              f"quantize the image to {tensor.limits[0]}..{tensor.limits[1]} (8 bits)")
        # In the graph the image is its codes; in the model the float image keeps its name.
        self.values.update({image.name: image, node.outputs[0]: tensor})
        self.graph.inputs.append(image.name)
        return Place.HOST, "the host hands the image over as codes"

    def conv(self, node: Node) -> _Result:
        image = self.codes(node)
        return self.convolution(node, image, (image.name,), bias_input=2)

    def convolution(self, node: Node, image: Tensor, inputs: tuple[str, ...], bias_input: int,
                    deformable: Deformable | None = None) -> _Result:
        weights = self.operand(node, 1)
        if not isinstance(weights, Weights):
            raise Unsupported(f"weights are {kind_of(weights)}, not a quantized constant",
                              "quantize them (signed, 4 or 8 bits, scale per output channel)")
        codes, bits = weights.codes, weights.bits
        if bits > 8:
            raise Unsupported(f"weights of {bits} bits", "use 4 or 8 bits")
        if codes.ndim != 4 or not codes.size:
            raise Unsupported(f"weights of shape {list(codes.shape)}", "use a two-dimensional convolution")
        window = _window(node, codes.shape[2:])
        groups, (count, depth) = node.attribute("group", 1), codes.shape[:2]
        if groups < 1 or depth * groups != image.channels or count % groups:
            raise Unsupported(f"weights of shape {list(codes.shape)} in {groups} groups do not fit {image.channels} "
                              "input channels", "export the model again")
        full = groups == 1
        if not full and not groups == count == image.channels:
            raise Unsupported(f"{groups} groups for {image.channels} input and {count} output channels",
                              "use group=1, or a depthwise convolution (groups = input channels = output channels)")
        height, width = window.output_size(image.height, image.width)
        if min(height, width) < 1:
            raise Unsupported(f"the kernel is larger than the padded image of {image.height} x {image.width}",
                              "use a smaller one")
        bias = np.zeros(count)
        if self.operand(node, bias_input) is not None:
            bias = self.reals(node, bias_input, "bias").ravel()
            if len(bias) != count:
                raise Unsupported(f"{len(bias)} biases for {count} output channels", "export the model again")
        kind: type[Conv | Depthwise]  # or a deformable one of them
        fields: dict[str, Any] = {"window": window, "bits": bits}
        if deformable is None:
            kind = Conv if full else Depthwise
        else:
            kind, fields["deformable"] = DeformConv if full else DeformDepthwise, deformable
        weight = codes.transpose(0, 2, 3, 1) if full else codes[:, 0]
        scale = image.scale * np.broadcast_to(weights.scale, count)
        self.values[node.outputs[0]] = Sum(kind, node.name, inputs, height, width, weight, scale, bias, fields)
        if not full:
            return Place.ENGINE, "vector unit"
        return Place.ENGINE, "matrix unit, samples gathered by the vector unit" if deformable else "matrix unit"

    def deform_conv(self, node: Node) -> _Result:
        image, offsets = self.codes(node), self.operand(node, 2)
        if self.operand(node, 4) is not None:
            raise Unsupported("sample masks (deformable convolution version 2)", "use it without a mask")
        if node.attribute("offset_group", 1) != 1:
            raise Unsupported("several offset groups", "use offset_group=1: all channels share the offsets")
        weights = self.operand(node, 1)
        if not isinstance(weights, Weights) or weights.codes.ndim != 4:
            raise Unsupported("weights are not a quantized constant [outputs, inputs, kernel rows, kernel columns]",
                              "quantize them (signed, 4 or 8 bits, scale per output channel)")
        window = _window(node, weights.codes.shape[2:])
        if isinstance(offsets, Square):
            codes, deformable = offsets.dilation, self.square(offsets, window)
        else:
            codes = self.codes(node, 2)
            deformable = self.free(codes, window)
        if (codes.height, codes.width) != window.output_size(image.height, image.width):
            raise Unsupported(f"offsets of {codes.height} x {codes.width} pixels do not fit the result",
                              "give each output pixel its own")
        return self.convolution(node, image, (image.name, codes.name), 3, deformable)

    def square(self, offsets: Square, window: Window) -> Deformable:
        (ky, kx), grid = window.kernel, offsets.grid
        taps = np.array([[y - ky // 2, x - kx // 2] for y in range(ky) for x in range(kx)]).ravel()
        if grid is None or not np.array_equal(grid, taps) or not ky % 2 or not kx % 2 or window.dilation != (1, 1):
            raise Unsupported("offsets computed from the dilation are not those of the square operator",
                              "use offset = (dilation - 1) * (ky, kx), (dy, dx) interleaved, odd kernel, dilation 1")
        low, high = self.code_range(offsets.dilation)
        return Deformable(Sampling.SQUARE, 0, max(abs(low - 1), abs(high - 1)) * (max(ky, kx) // 2))

    def free(self, codes: Tensor, window: Window) -> Deformable:
        taps = window.kernel[0] * window.kernel[1]
        fraction = 1 - math.frexp(codes.scale)[1]
        if codes.scale != 2.0**-fraction or not 0 <= fraction <= FRACTION_BITS or codes.unsigned:
            raise Unsupported(f"offsets of scale {codes.scale:g}{', unsigned' * codes.unsigned}",
                              f"quantize offsets signed with scale 2**-f, f from 0 to {FRACTION_BITS}")
        if codes.channels != 2 * taps:
            raise Unsupported(f"{codes.channels} offsets per pixel for {taps} taps",
                              f"predict {2 * taps}, (dy, dx) for each tap")
        return Deformable(Sampling.OFFSETS, fraction, -(-max(map(abs, self.code_range(codes))) >> fraction))

    def code_range(self, tensor: Tensor) -> tuple[int, int]:
        """Smallest and largest code that the producer's clamp allows."""
        requantize = getattr(self.graph.producer(tensor.name), "requantize", None)
        return (requantize.low, requantize.high) if requantize else tensor.limits

    def batch_norm(self, node: Node) -> _Result:
        total = self.accumulator(node)
        gamma, beta, mean, variance = (self.reals(node, i, "parameter").ravel() for i in range(1, 5))
        if {len(item) for item in (gamma, beta, mean, variance)} != {len(total.scale)}:
            raise Unsupported(f"parameters do not fit {len(total.scale)} channels", "export the model again")
        if node.attribute("training_mode", 0):
            raise Unsupported("batch statistics at run time", "export in evaluation mode (model.eval())")
        if total.clamped or total.kind is Add:
            raise Unsupported("batch normalization that does not follow a convolution",
                              "move it directly behind the convolution")
        spread = variance + node.attribute("epsilon", 1e-5)
        if not (spread > 0).all():
            raise Unsupported("a variance that is not positive", "train the model further or export it again")
        gain = gamma / np.sqrt(spread)
        weight, scale, bias = fold_batchnorm(total.weight, total.scale, total.bias, gain, beta - mean * gain,
                                             total.fields["bits"])
        self.values[node.outputs[0]] = replace(total, weight=weight, scale=scale, bias=bias)
        return Place.FOLDED, f"into scales and biases of '{total.name}'"

    def relu(self, node: Node) -> _Result:
        return self.clamp(node, 0.0, math.inf)

    def clip(self, node: Node) -> _Result:
        low = -math.inf if self.operand(node, 1) is None else self.scalar(node, 1, "lower limit")
        high = math.inf if self.operand(node, 2) is None else self.scalar(node, 2, "upper limit")
        if low > high:
            raise Unsupported(f"lower limit {low:g} above upper limit {high:g}", "swap them")
        return self.clamp(node, low, high)

    def clamp(self, node: Node, low: float, high: float) -> _Result:
        total = self.accumulator(node)
        self.values[node.outputs[0]] = replace(total, low=min(max(total.low, low), high),
                                               high=min(max(total.high, low), high))
        return Place.FOLDED, "into its quantizer" if total.name == node.name else f"into the clamp of '{total.name}'"

    def add(self, node: Node) -> _Result:
        if len(node.inputs) != 2:
            raise Unsupported(f"{len(node.inputs)} operands", "add two tensors at a time")
        for constant, other in ((0, 1), (1, 0)):
            if isinstance(self.operand(node, constant), np.ndarray | Weights):
                return self.add_bias(node, constant, other)
        a, b = self.codes(node, 0), self.codes(node, 1)
        if a.shape != b.shape:
            raise Unsupported(f"operands of shapes {list(a.shape)} and {list(b.shape)}", "add tensors of equal shape")
        weight, scale = _add_weights(a.scale, b.scale)
        self.values[node.outputs[0]] = Sum(Add, node.name, (a.name, b.name), a.height, a.width, weight,
                                            np.full(a.channels, scale), np.zeros(a.channels))
        return Place.ENGINE, "vector unit"

    def add_bias(self, node: Node, constant: int, other: int) -> _Result:
        total, bias = self.accumulator(node, other), self.reals(node, constant, "addend")
        channels = len(total.scale)
        if bias.size != 1 and bias.shape not in ((1, channels, 1, 1), (channels, 1, 1)):
            raise Unsupported(f"a constant of shape {list(bias.shape)}", "add one value per channel")
        if total.clamped:
            raise Unsupported("a bias after the activation function", "add it before")
        self.values[node.outputs[0]] = replace(total, bias=total.bias + bias.ravel())
        return Place.FOLDED, f"into the bias of '{total.name}'"

    def subtract(self, node: Node) -> _Result:
        value, one = self.operand(node, 0), self.operand(node, 1)
        if not (isinstance(value, Tensor) and isinstance(one, np.ndarray) and one.size == 1 and one.ravel()[0] == 1
                and (value.channels, value.scale, value.unsigned) == (1, 1.0, False)):
            raise Unsupported("subtraction is only known as dilation - 1 of the square deformable operator",
                              "use Add, or a dilation of one channel, signed, scale 1")
        self.values[node.outputs[0]] = Square(value)
        return Place.FOLDED, "into the sampling of the deformable convolution"

    def multiply(self, node: Node) -> _Result:
        pair = [self.operand(node, 0), self.operand(node, 1)]
        if isinstance(pair[1], Square):
            pair.reverse()
        square, grid = pair
        if not (isinstance(square, Square) and square.grid is None and isinstance(grid, np.ndarray)
                and grid.shape == (1, grid.size, 1, 1)):
            raise Unsupported("multiplication is only known as (dilation - 1) * grid of the square deformable operator",
                              "use a convolution, or batch normalization behind one")
        self.values[node.outputs[0]] = replace(square, grid=grid.ravel())
        return Place.FOLDED, "into the sampling of the deformable convolution"

    def max_pool(self, node: Node) -> _Result:
        image = self.codes(node)
        if len(node.outputs) > 1 and node.outputs[1]:
            raise Unsupported("positions of the maxima are not kept", "use MaxPool with one output")
        window = _window(node, node.integers("kernel_shape", (0, 0)))
        (ky, kx), (top, left, bottom, right) = window.kernel, window.padding
        if window.dilation != (1, 1):
            raise Unsupported(f"dilation {list(window.dilation)} of a pooling window", "use dilation 1")
        if max(top, bottom) >= ky or max(left, right) >= kx:
            raise Unsupported(f"padding {list(window.padding)} leaves windows without a pixel",
                              "use padding below the kernel size")
        height, width = window.output_size(image.height, image.width)
        grown = replace(window, padding=(top, left, bottom + window.stride[0] - 1, right + window.stride[1] - 1))
        if node.attribute("ceil_mode", 0) and grown.output_size(image.height, image.width) != (height, width):
            raise Unsupported("ceil_mode changes the size of the result",
                              "use ceil_mode=0 with padding at the bottom and right")
        if min(height, width) < 1:
            raise Unsupported(f"the window is larger than the padded image of {image.height} x {image.width}",
                              "use a smaller one")
        self.tensor(node.outputs[0], height, width, image.channels, image.scale, image.unsigned)
        self.graph.ops.append(MaxPool(node.name, (image.name,), node.outputs[0], window))
        return Place.ENGINE, "vector unit"

    def resize(self, node: Node) -> _Result:
        image = self.codes(node)
        mode = node.attribute("mode", "nearest")
        coordinates = node.attribute("coordinate_transformation_mode", "half_pixel")
        rounding = node.attribute("nearest_mode", "round_prefer_floor")
        if mode != "nearest" or (coordinates, rounding) not in _FLOOR_MODES:
            raise Unsupported(f"interpolation {mode} ({coordinates}, {rounding})",
                              "use nearest-neighbour interpolation (torch.nn.Upsample(scale_factor=2))")
        if self.operand(node, 3) is not None:
            sizes = self.integers(node, 3, "sizes")
            factors = [size / old for size, old in zip(sizes, (1, image.channels, *image.shape[:2]), strict=False)]
        else:
            factors = self.reals(node, 2, "scales").ravel().tolist()
        if factors != [1, 1, 2, 2]:
            raise Unsupported(f"scales {[f'{factor:g}' for factor in factors]}",
                              "enlarge by 2 in both directions, twice for 4")
        self.tensor(node.outputs[0], 2 * image.height, 2 * image.width, image.channels, image.scale, image.unsigned)
        self.graph.ops.append(Upsample(node.name, (image.name,), node.outputs[0], 2))
        return Place.ENGINE, "nearest x2: its producer writes every pixel four times"

    def split(self, node: Node) -> _Result:
        image, count = self.codes(node), len(node.outputs)
        _require_channel_axis(node.attribute("axis", 0))
        if self.operand(node, 1) is not None:
            sizes = self.integers(node, 1, "sizes")
        else:
            size = -(-image.channels // count)
            sizes = list(node.integers("split", ())) or [min(size, image.channels - i * size) for i in range(count)]
        if len(sizes) != count or sum(sizes) != image.channels or min(sizes) < 1:
            raise Unsupported(f"sizes {sizes[:8]} do not split {image.channels} channels into {count}",
                              "export the model again")
        start = 0
        for output, size in zip(node.outputs, sizes, strict=True):
            result = self.channels(node, output, [image], [(0, start + i) for i in range(size)])
            start += size
        return result

    def slice(self, node: Node) -> _Result:
        image = self.codes(node)
        starts, ends = self.integers(node, 1, "starts"), self.integers(node, 2, "ends")
        axes = self.integers(node, 3, "axes") if self.operand(node, 3) is not None else list(range(len(starts)))
        steps = self.integers(node, 4, "steps") if self.operand(node, 4) is not None else [1] * len(starts)
        if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
            raise Unsupported("starts, ends, axes and steps do not fit each other", "export the model again")
        kept = range(image.channels)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            _require_channel_axis(axis)
            least = -(1 << 63) + 1  # exporters write the end of a downward slice as the smallest integer
            kept = kept[start : None if step < 0 and end <= least else end : step]
        return self.gathered(node, image, list(kept))

    def gather(self, node: Node) -> _Result:
        image = self.codes(node)
        _require_channel_axis(node.attribute("axis", 0))
        index = self.integers(node, 1, "indices")
        if not all(-image.channels <= i < image.channels for i in index):
            raise Unsupported(f"indices beyond the {image.channels} channels", "export the model again")
        return self.gathered(node, image, [i % image.channels for i in index])

    def gathered(self, node: Node, image: Tensor, index: list[int]) -> _Result:
        if not 0 < len(index) <= MAX_CHANNELS:
            raise Unsupported(f"{len(index)} channels remain", f"keep from 1 to {MAX_CHANNELS}")
        return self.channels(node, node.outputs[0], [image], [(0, i) for i in index])

    def concat(self, node: Node) -> _Result:
        _require_channel_axis(node.attribute("axis", 0))
        parts = [self.codes(node, i) for i in range(len(node.inputs))]
        if not parts or sum(part.channels for part in parts) > MAX_CHANNELS:
            raise Unsupported("no operands, or too many channels", f"stay within {MAX_CHANNELS} channels")
        first = parts[0]
        for part in parts[1:]:
            if (part.height, part.width) != (first.height, first.width):
                raise Unsupported(f"operands of {first.height} x {first.width} and {part.height} x {part.width} pixels",
                                  "concatenate tensors of equal size")
            if (part.scale, part.unsigned) != (first.scale, first.unsigned):
                raise Unsupported(f"'{first.name}' and '{part.name}' have different scales or signs "
                                  f"({first.scale:g}, {part.scale:g})",
                                  "share one quantizer: quantize the operands with the same scale")
        number = {part: i for i, part in enumerate(dict.fromkeys(parts))}
        origin = [(number[part], i) for part in parts for i in range(part.channels)]
        return self.channels(node, node.outputs[0], list(number), origin)

    def view(self, node: Node) -> View:
        value = self.operand(node, 0)
        if isinstance(value, View):
            return value
        tensor = self.codes(node)
        return View(tensor, np.arange(tensor.channels))

    def reshape(self, node: Node) -> _Result:
        view, shape = self.view(node), self.integers(node, 1, "shape")
        tensor, old = view.tensor, (1, *view.index.shape, view.tensor.height, view.tensor.width)
        if not node.attribute("allowzero", 0):
            shape = [old[i] if size == 0 and i < len(old) else size for i, size in enumerate(shape)]
        if shape.count(-1) == 1:
            rest = -math.prod(shape)
            shape[shape.index(-1)] = math.prod(old) // rest if rest else 0
        groups = shape[1:-2]
        same_pixels = shape[:1] == [1] and shape[-2:] == [tensor.height, tensor.width]
        if not same_pixels or min(shape) < 1 or math.prod(groups) != view.index.size:
            raise Unsupported(f"from {list(old)} to {shape}",
                              "reshape only channels into groups and back (channel shuffle)")
        return self.moved(node, tensor, view.index.reshape(groups))

    def transpose(self, node: Node) -> _Result:
        view = self.view(node)
        rank = view.index.ndim + 3
        permutation = node.integers("perm", ())
        if sorted(permutation) != list(range(rank)) or permutation[0] != 0 or permutation[-2:] != (rank - 2, rank - 1):
            raise Unsupported(f"permutation {list(permutation)}", "permute only groups of channels (channel shuffle)")
        return self.moved(node, view.tensor, view.index.transpose([axis - 1 for axis in permutation[1:-2]]))

    def moved(self, node: Node, tensor: Tensor, index: np.ndarray) -> _Result:
        """A view with one channel axis is a tensor again."""
        if index.ndim == 1:
            return self.gathered(node, tensor, index.tolist())
        self.values[node.outputs[0]] = View(tensor, index)
        return Place.FOLDED, "into the channel shuffle"


_FLOOR_MODES = {  # (coordinates, rounding) that map pixel i of a doubled image to i // 2
    ("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel", "round_prefer_ceil"),
    ("pytorch_half_pixel", "round_prefer_floor"), ("pytorch_half_pixel", "round_prefer_ceil"),
}  # fmt: skip

_Handler = Callable[[_Importer, Node], _Result]
_HANDLERS: dict[str, tuple[Place, _Handler]] = {
    "Add": (Place.ENGINE, _Importer.add),
    "BatchNormalization": (Place.FOLDED, _Importer.batch_norm),
    "Clip": (Place.FOLDED, _Importer.clip),
    "Concat": (Place.FOLDED, _Importer.concat),
    "Constant": (Place.FOLDED, _Importer.constant),
    "Conv": (Place.ENGINE, _Importer.conv),
    "DeformConv": (Place.ENGINE, _Importer.deform_conv),
    "Dropout": (Place.FOLDED, _Importer.identity),
    "Gather": (Place.FOLDED, _Importer.gather),
    "Identity": (Place.FOLDED, _Importer.identity),
    "IntQuant": (Place.FOLDED, _Importer.quant),
    "MaxPool": (Place.ENGINE, _Importer.max_pool),
    "Mul": (Place.FOLDED, _Importer.multiply),
    "Quant": (Place.FOLDED, _Importer.quant),
    "Relu": (Place.FOLDED, _Importer.relu),
    "Reshape": (Place.FOLDED, _Importer.reshape),
    "Resize": (Place.ENGINE, _Importer.resize),
    "Slice": (Place.FOLDED, _Importer.slice),
    "Split": (Place.FOLDED, _Importer.split),
    "Sub": (Place.FOLDED, _Importer.subtract),
    "Transpose": (Place.FOLDED, _Importer.transpose),
}


def _per_channel(values: np.ndarray, rank: int) -> np.ndarray:
    return values.reshape(-1, *(1,) * (rank - 1))


def _require_channel_axis(axis: int) -> None:
    if axis not in (1, -3):
        raise Unsupported(f"axis {axis}", "work on axis 1, the channels")


def _window(node: Node, kernel: tuple[int, ...]) -> Window:
    """Kernel geometry of a node. Raises Unsupported for what an instruction cannot hold."""
    if node.integers("kernel_shape", (0, 0)) not in ((0, 0), tuple(kernel)):
        raise Unsupported("kernel_shape differs from the weights' shape", "export the model again")
    if node.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unsupported(f"auto_pad {node.attribute('auto_pad', '')}", "export with explicit pads")
    ky, kx = kernel
    (sy, sx), (dy, dx) = node.integers("strides", (1, 1)), node.integers("dilations", (1, 1))
    top, left, bottom, right = node.integers("pads", (0, 0, 0, 0))
    for what, values, least, most in (
        ("kernel", (ky, kx), 1, _LIMIT["kernel_y"]),
        ("stride", (sy, sx), 1, _LIMIT["stride_y"]),
        ("dilation", (dy, dx), 1, _LIMIT["dilation_y"]),
        ("padding", (top, left, bottom, right), 0, _LIMIT["pad_x"]),
    ):
        if not all(least <= value <= most for value in values):
            raise Unsupported(f"{what} {list(values)}", f"keep it within {least}..{most}, what an instruction holds")
    return Window((ky, kx), (sy, sx), (dy, dx), (top, left, bottom, right))


def _add_weights(a: float, b: float) -> tuple[np.ndarray, float]:
    """Integer weights [2] up to 127 in the ratio of two scales, and the scale of their sum.

    The larger scale gets the smallest weight that represents the ratio best, so equal scales add exactly.
    """
    small, large = min(a, b), max(a, b)
    best = min(range(1, 128), key=lambda weight: (abs(round(weight * small / large) / weight - small / large), weight))
    other = round(best * small / large)
    if not other:
        raise Unsupported(f"operands whose scales differ more than 100-fold ({a:g}, {b:g})", "share one quantizer")
    return np.array([best, other] if a >= b else [other, best]), large / best
