"""The result record and the page made from it."""

import base64
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from weft.arch.errors import ModelError
from weft.arch.registers import Stall
from weft.reports.html import render, unit_table, waits
from weft.reports.schema import Box, LayerRow, Picture, Result, Span, load

PIXEL = base64.b64encode(b"\x89PNG").decode()


@pytest.fixture
def result():
    layers = [LayerRow(0, "stem", "conv 3x3", "matrix", 8, 8, 16, 1000, 8, 64, 0, 60, 0.5, {"matrix": 40, "load": 20}),
              LayerRow(1, "a<b", "dw 3x3", "vector", 8, 8, 16, 500, 4, 0, 128, 40, 0.0, {"vector": 30, "nobody": 10})]
    box = Box("7", 0.9, 1, 2, 10, 12)
    return Result(
        title="Two layers", model="small", engine={"name": "test", "rows": 4, "columns": 4, "pixels": 4}, device="rtl",
        memory="ideal", images=1, layers_compared=2, mismatches=0, macs=1500, cycles=100, array_macs=64,
        efficiency=0.23, fps_at_250mhz=2.5e6, simulated_cycles_per_s=1e5, wall_s=0.1,
        counters={"matrix_retired": 3, "matrix_busy": 40, "matrix_stall_token": 7}, layers=layers,
        timeline=[Span("matrix", 0, 0, 40), Span("vector", 1, 50, 80)], accuracy={"float": 90.0, "integer": 89.5},
        accuracy_images=10, pictures=[Picture("p", PIXEL, 16, 16, [box], [box], [box])])


def test_json_and_back(result):
    assert Result.from_json(result.to_json()) == result


@pytest.mark.parametrize("change", [
    {"version": 2}, {"cycles": "many"}, {"layers": [{"number": 1}]}, {"surprise": 1}, {"layers": {}},
    {"counters": {"a": "b"}}, {"pictures": [3]},
])  # fmt: skip
def test_malformed_records_are_refused(result, change):
    import json

    with pytest.raises(ModelError, match="file"):
        Result.from_json(json.dumps(json.loads(result.to_json()) | change), "file.json")


def test_a_missing_record_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_the_page_is_self_contained(result):
    page = render(result)
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert "<script" not in page


def test_the_page_says_everything(result):
    page = render(result)
    for text in ("Two layers", "89.50", "90.00", "stem", "conv 3x3 W8", "8×8×16", "50.0 %", "reading memory",
                 "fetch, tokens"):
        assert text in page, text
    assert "a&lt;b" in page and "a<b" not in page


def test_the_page_is_well_formed(result):
    body = re.search(r"<body>.*</body>", render(result), re.DOTALL)
    ElementTree.fromstring(re.sub(r"<img ([^>]*)>", r"<img \1/>", body[0]))


def test_the_first_difference_is_shown(result):
    assert "channel 3" in render(replace(result, mismatches=1, first_difference="layer 'stem', channel 3"))


def test_a_device_without_time(result):
    page = render(replace(result, cycles=0, timeline=[], counters={}, pictures=[], accuracy={},
                          layers=[replace(layer, cycles=0, working={}) for layer in result.layers]))
    assert "no notion of time" in page and "<img" not in page


def test_the_same_record_gives_the_same_page(result):
    assert render(result) == render(result)


def test_waits_are_what_the_own_unit_does_not_do(result):
    assert waits(result.layers[0]) == {"reading memory": 20}
    assert waits(result.layers[1]) == {"fetch, tokens": 10}


def test_unit_table(result):
    (row,) = unit_table(result)
    assert row == {"name": "matrix", "retired": 3, "busy": 40, "token": 7} | {
        cause.name.lower(): 0 for cause in Stall if cause is not Stall.TOKEN}
