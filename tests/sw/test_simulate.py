"""Comparison: what equals and what differs; images in, results out."""

from dataclasses import replace

import numpy as np
import pytest

from weft.arch.isa import Unit
from weft.sw.images import load_images, to_codes
from weft.sw.reference import evaluate
from weft.sw.simulate import run_checked, to_result


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
