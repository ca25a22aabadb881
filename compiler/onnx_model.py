"""Model: an ONNX file as plain Python values, read with distrust.

Everything that an ONNX file can get wrong before its operators are looked at is found here: cut or foreign files,
external data, absurd or dynamic sizes, NaN and infinity, undefined tensors, cycles.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, numpy_helper

from weft.arch.errors import ModelError

MAX_BYTES = 1 << 28  # of the file; CoDeNet-e has 24 MB of float weights
MAX_ELEMENTS = 1 << 28  # of one tensor
MAX_NODES = 1 << 14
OPSETS = range(11, onnx.defs.onnx_opset_version() + 1)  # older ones spell Clip, Slice and Resize differently

# Elsewhere a Conv need not be a convolution.
_DOMAINS = ("", "ai.onnx", "qonnx.custom_op.general", "onnx.brevitas", "finn.custom_op.general")
_CONSTANT_TYPES = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.INT8,
                   TensorProto.UINT8, TensorProto.BOOL)


@dataclass(frozen=True)
class Node:
    """One ONNX node; an input left out is ''. `operation` has its domain before it if that is foreign."""

    name: str
    operation: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def attribute(self, name: str, default: Any) -> Any:
        """An attribute's value, of the type of `default`. Raises ModelError if the file holds another type."""
        value = self.attributes.get(name, default)
        if type(value) is not type(default):
            raise ModelError(f"node '{self.name}': attribute '{name}' is {value!r}, "
                             f"expected something like {default!r}; export the model again")
        return value

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of integers as long as `default`, of any length if that is (). Raises ModelError for another."""
        value = self.attribute(name, default)
        if len(value) != len(default or value) or not all(isinstance(item, int) for item in value):
            raise ModelError(f"node '{self.name}': attribute '{name}' is {list(value)}, "
                             f"expected {len(default) or 'some'} integers; export a two-dimensional model")
        return value


@dataclass(frozen=True)
class Model:
    """An ONNX graph: nodes in execution order, constants, inputs with their static shapes, outputs."""

    name: str
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]
    inputs: dict[str, tuple[int, ...]]
    outputs: tuple[str, ...]

    @cached_property
    def readers(self) -> dict[str, list[str]]:
        """Names of the nodes that read each tensor."""
        names: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                names.setdefault(name, []).append(node.name)
        return names


def load_model(path: str | Path) -> Model:
    """Reads an ONNX file. Raises ModelError with what is wrong with it."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"{path}: larger than {MAX_BYTES} bytes; this engine's models are far smaller")
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return _model(path.stem, onnx.ModelProto.FromString(raw))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except (DecodeError, ValueError, TypeError, KeyError, OverflowError) as error:  # what protobuf and onnx raise
        raise ModelError(f"{path}: not an ONNX file, or cut short or damaged ({error}); export it again") from error


def _model(name: str, proto: onnx.ModelProto) -> Model:
    graph = proto.graph
    if not graph.node:
        raise ModelError("not an ONNX file, or one without nodes; export the model again")
    if len(graph.node) > MAX_NODES:
        raise ModelError(f"has {len(graph.node)} nodes, at most {MAX_NODES} are read; export a smaller model")
    if graph.sparse_initializer:
        raise ModelError("has sparse initializers; export dense ones")
    versions = [opset.version for opset in proto.opset_import if opset.domain in ("", "ai.onnx")]
    if len(versions) != 1 or versions[0] not in OPSETS:
        raise ModelError(f"uses ONNX opset {versions or 'none'}; export with one of {OPSETS[0]} to {OPSETS[-1]}")
    constants: dict[str, np.ndarray] = {}
    for item in graph.initializer:
        if item.name in constants:
            raise ModelError(f"initializer '{item.name}' is defined twice; export the model again")
        constants[item.name] = _array(item)
    inputs = {item.name: _shape(item) for item in graph.input if item.name not in constants}
    if not inputs:
        raise ModelError("has no input")
    outputs = tuple(dict.fromkeys(item.name for item in graph.output))
    if not outputs:
        raise ModelError("has no output")
    nodes = _ordered(list(_nodes(graph)), {"", *constants, *inputs})
    made = {*constants, *inputs}.union(*(node.outputs for node in nodes))
    for output in outputs:
        if output not in made:
            raise ModelError(f"output '{output}' is made by no node; export the model again")
    return Model(name, nodes, constants, inputs, outputs)


def _array(tensor: onnx.TensorProto) -> np.ndarray:
    """A constant's value; every size is checked before memory is taken."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise ModelError(f"constant '{tensor.name}' lies in another file, which is not opened; "
                         "save the model with its data inside (onnx.save without save_as_external_data)")
    if tensor.data_type not in _CONSTANT_TYPES:
        known = ", ".join(TensorProto.DataType.Name(item).lower() for item in _CONSTANT_TYPES)
        raise ModelError(f"constant '{tensor.name}' has data type {tensor.data_type}; use one of {known}")
    if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > MAX_ELEMENTS:
        raise ModelError(f"constant '{tensor.name}' has shape {list(tensor.dims)}, more than {MAX_ELEMENTS} elements "
                         "or negative; export the model again")
    try:
        value = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise ModelError(f"constant '{tensor.name}' of shape {list(tensor.dims)} has other data than its shape says "
                         f"({error}); export the model again") from error
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise ModelError(f"constant '{tensor.name}' holds NaN or infinity; the model diverged in training, "
                         "or a scale was never calibrated")
    return value


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    tensor = value.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        raise ModelError(f"input '{value.name}' is not a float32 tensor; export the float image as the input")
    sizes = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.WhichOneof("value") != "dim_value":
            raise ModelError(f"input '{value.name}' has a dynamic size '{dim.dim_param or '?'}' on axis {axis}; "
                             "export with fixed sizes (no dynamic_axes)")
        sizes.append(dim.dim_value)
    if len(sizes) != 4 or sizes[0] != 1 or min(sizes) < 1 or math.prod(sizes) > MAX_ELEMENTS:
        raise ModelError(f"input '{value.name}' has shape {sizes}; export with [1, channels, height, width]")
    return tuple(sizes)


def _nodes(graph: onnx.GraphProto) -> Iterator[Node]:
    """The nodes in file order; names made unique, nameless nodes called after their first output."""
    taken: set[str] = set()
    for proto in graph.node:
        if not proto.output:
            raise ModelError(f"node '{proto.name}' ({proto.op_type}) has no output")
        name = next(name for name in _names(proto) if name not in taken)
        taken.add(name)
        attributes = {item.name: _attribute(item) for item in proto.attribute}
        operation = proto.op_type if proto.domain in _DOMAINS else f"{proto.domain}.{proto.op_type}"
        yield Node(name, operation, tuple(proto.input), tuple(proto.output), attributes)


def _names(proto: onnx.NodeProto) -> Iterator[str]:
    base = proto.output[0] or proto.op_type
    yield from filter(None, (proto.name, base))
    count = 1
    while True:
        count += 1
        yield f"{base}.{count}"


def _attribute(attribute: onnx.AttributeProto) -> Any:
    match attribute.type:
        case AttributeProto.INT:
            return attribute.i
        case AttributeProto.FLOAT:
            return attribute.f
        case AttributeProto.STRING:
            return attribute.s.decode()
        case AttributeProto.INTS:
            return tuple(attribute.ints)
        case AttributeProto.FLOATS:
            return tuple(attribute.floats)
        case AttributeProto.STRINGS:
            return tuple(item.decode() for item in attribute.strings)
        case AttributeProto.TENSOR:
            return _array(attribute.t)
    return None  # a subgraph or another kind that no supported node has


def _ordered(nodes: list[Node], known: set[str]) -> tuple[Node, ...]:
    """The nodes sorted so that each follows the makers of its inputs."""
    maker: dict[str, Node] = {}
    for node in nodes:
        for output in filter(None, node.outputs):
            if output in maker or output in known:
                raise ModelError(f"tensor '{output}' is made twice, the second time by node '{node.name}'")
            maker[output] = node
    readers: dict[str, list[Node]] = {}
    missing: dict[str, int] = {}  # node name -> inputs not made yet
    for node in nodes:
        waits = {name for name in node.inputs if name not in known}
        for name in waits:
            if name not in maker:
                raise ModelError(f"node '{node.name}' reads '{name}', which nothing makes: "
                                 "an initializer or a node is missing; export the model again")
            readers.setdefault(name, []).append(node)
        missing[node.name] = len(waits)
    place = {node.name: index for index, node in enumerate(nodes)}
    ready = [place[node.name] for node in nodes if not missing[node.name]]  # a heap: the file's order where it is legal
    ordered = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        ordered.append(node)
        for output in node.outputs:
            for reader in readers.get(output, ()):
                missing[reader.name] -= 1
                if not missing[reader.name]:
                    heapq.heappush(ready, place[reader.name])
    if len(ordered) < len(nodes):
        stuck = next(node.name for node in nodes if missing[node.name])
        raise ModelError(f"node '{stuck}' depends on its own result; a model without loops is needed")
    return tuple(ordered)
