"""Comparison and profile: what equals, what differs, where the cycles went."""

from dataclasses import replace

import numpy as np
import pytest

from weft.arch.device import RunResult
from weft.arch.isa import Unit
from weft.arch.trace import Trace
from weft.sw.bench import unit_cycles
from weft.sw.images import load_images, to_codes
from weft.sw.profile import layer_rows, ownership, timeline
from weft.sw.reference import evaluate
from weft.sw.simulate import run_checked, to_result


def instructions_of(program, unit):
    return [item for item in program.decoded() if item.unit is unit]


@pytest.fixture
def timed(program):
    """A trace in which every instruction takes ten cycles, one after the other."""
    trace, clock = Trace(start={unit: [] for unit in Unit}, retire={unit: [] for unit in Unit}), 5
    for item in program.decoded():
        if item.unit is not None:
            trace.start[item.unit].append(clock)
            trace.retire[item.unit].append(clock + 10)
            clock += 12
    return Trace(*({unit: np.array(times, np.uint64) for unit, times in part.items()}
                   for part in (trace.start, trace.retire))), clock


def test_golden_equals_functional(graph, functional, image):
    checked = run_checked(functional, functional, {"image": image}, evaluate(graph, {"image": image}))
    assert checked.mismatches == 0 and checked.first == ""
    assert checked.layers_compared == len(graph.ops)


def test_a_wrong_golden_value_is_found(graph, functional, image):
    golden = evaluate(graph, {"image": image})
    golden["y"] = golden["y"].copy()
    golden["y"][2, 3, 4] ^= 1
    checked = run_checked(functional, functional, {"image": image}, golden)
    assert checked.mismatches == 2  # the layer, and the stored result
    assert "operator" in checked.first or "'y'" in checked.first
    assert "y 2 x 3 channel 4" in checked.first


class Wrong:
    """Another Device, with one bit wrong in one scratchpad write."""

    def __init__(self, functional, unit, write):
        self.functional, self.unit, self.write = functional, unit, write

    def run(self, inputs):
        result = self.functional.run(inputs)
        log = result.trace.writes[self.unit]
        data = log.data.copy()
        lane = int(log.mask[self.write].argmax())
        data[self.write, lane] ^= 1
        result.trace.writes[self.unit] = replace(log, data=data)
        return result


@pytest.mark.parametrize("unit", [Unit.LOAD, Unit.MATRIX, Unit.VECTOR])
def test_one_wrong_bit_of_another_device_is_found(functional, image, unit):
    checked = run_checked(Wrong(functional, unit, 3), functional, {"image": image})
    assert checked.mismatches == 1
    assert "expected" in checked.first and "cycle" in checked.first


def test_every_cycle_belongs_to_one_layer(program, timed):
    trace, cycles = timed
    layer, worker = ownership(program, trace, cycles)
    assert len(layer) == len(worker) == cycles and layer.min() >= 0
    rows = layer_rows(program, RunResult({}, {"cycles": cycles}, trace))
    assert sum(row.cycles for row in rows) == cycles
    assert all(sum(row.working.values()) == row.cycles for row in rows)


def test_the_matrix_unit_owns_what_overlaps(program, timed):
    trace, cycles = timed
    trace.start[Unit.LOAD][:], trace.retire[Unit.LOAD][:] = 0, cycles
    _, worker = ownership(program, trace, cycles)
    assert (worker == Unit.MATRIX).sum() == 10 * len(instructions_of(program, Unit.MATRIX))
    assert Unit.STORE not in worker  # loads are looked at first


def test_neighbouring_instructions_of_a_layer_are_one_span(program, timed):
    trace, _ = timed
    spans = timeline(program, trace)
    assert {span.unit for span in spans} <= {unit.name.lower() for unit in Unit}
    assert all(span.start < span.end for span in spans)


def test_unit_cycles_of_a_layer(program, timed):
    trace, _ = timed
    tag = next(i for i, layer in enumerate(program.layers) if layer.name == "operator")
    mine = [item for item in instructions_of(program, Unit.VECTOR) if item.tag == tag]
    assert unit_cycles(program, trace, "operator") == 10 * len(mine)


def test_bytes_agree_with_the_devices_counters(program, functional, image):
    run = functional.run({"image": image})
    rows = layer_rows(program, run)
    assert sum(row.bytes_written for row in rows) == run.counters["bytes_written"]
    assert sum(row.bytes_read for row in rows) == run.counters["bytes_read"] - program.instructions.nbytes


def test_a_result_without_time(program, functional, image):
    result = to_result("t", program, "functional", "ideal", [run_checked(functional, functional, {"image": image})])
    assert result.cycles == 0 and result.efficiency == 0 and result.memory == "none" and not result.timeline


def test_pixels_to_codes(program):
    tensor = replace(program.inputs[0], scale=1 / 128, unsigned=False)
    assert to_codes(np.array([[[0, 128, 255]]], np.uint8), tensor).tolist() == [[[-128, 0, 127]]]


def test_images_of_a_folder(tmp_path):
    from PIL import Image

    for name in ("b.png", "a.jpg", "notes.txt"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("no image")
        else:
            Image.new("RGB", (20, 10), (200, 10, 10)).save(tmp_path / name)
    images = load_images(str(tmp_path), 5, (16, 16))
    assert [name for name, _ in images] == ["a.jpg", "b.png"]
    assert all(pixels.shape == (16, 16, 3) for _, pixels in images)
