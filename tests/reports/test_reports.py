"""The result records and the page made from them."""

import base64
import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from weft.arch.errors import ModelError
from weft.arch.registers import Stall
from weft.reports.html import grouped, ladder, operation_of, part_of, render, unit_table, visible, waits
from weft.reports.schema import Box, LanguageResult, LayerRow, Phase, Picture, Result, Span, load

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


@pytest.fixture
def language():
    def row(number, name, unit, cycles, **fields):
        values = {"operation": "op", "unit": unit, "height": 0, "width": 1, "channels": 8, "macs": 64, "weight_bits": 0,
                  "bytes_read": 32, "bytes_written": 16, "working": {unit: cycles}}
        return LayerRow(number, name, cycles=cycles, **values | fields)

    layers = [row(0, "embedding", "row", 10), row(1, "0.mixer.in_projection", "matrix", 40, array_use=0.5),
              row(2, "0.feed_forward.down", "matrix", 30, working={"matrix": 20, "load": 10}),
              row(3, "1.mixer.in_projection", "matrix", 60, array_use=1.0), row(4, "logits", "matrix", 0, working={})]
    phase = Phase(tokens=4, position=8, cycles=140, bytes_read=900, bytes_written=100, bytes_per_token=250.0,
                  bandwidth_utilization=0.44, port_bytes_per_cycle=16, macs=320, array_efficiency=0.125,
                  tokens_per_s=7142857.0, counters={"row_retired": 5, "row_busy": 10}, layers=layers)
    return LanguageResult(
        title="Four words", model="tiny", engine={"name": "test", "rows": 4, "columns": 4, "pixels": 4}, device="rtl",
        memory="ddr3", prompt="if a < b:", text="\n    c \x00& d", prompt_tokens=4, tokens=3, layers_compared=70,
        mismatches=0, clock_hz=250e6, prefill=phase, decode=replace(phase, tokens=1, position=12),
        perplexity={"float": 4.0, "weights": 4.2, "activations": 4.21, "cache": 4.21, "integer": 4.2},
        agreement={"cosine": 0.9991, "top1": 0.97}, held_out_bytes=5000, simulated_cycles_per_s=1e5, wall_s=0.1)


@pytest.fixture(params=["detector", "language", "both"])
def page(request, result, language):
    return {"detector": lambda: render(result), "language": lambda: render(language),
            "both": lambda: render(result, language)}[request.param]()


def test_json_and_back(result, language):
    assert Result.from_json(result.to_json()) == result
    assert LanguageResult.from_json(language.to_json()) == language
    without = replace(language, prefill=None)
    assert LanguageResult.from_json(without.to_json()) == without


def test_a_file_of_either_kind_is_read(result, language, tmp_path):
    for record in (result, language):
        (tmp_path / "record.json").write_text(record.to_json())
        assert load(tmp_path / "record.json") == record
    old = json.loads(result.to_json())
    del old["kind"]  # a record made before there were two
    (tmp_path / "record.json").write_text(json.dumps(old))
    assert load(tmp_path / "record.json") == result


@pytest.mark.parametrize("change", [
    {"version": 2}, {"prefill": {"tokens": 1}}, {"prefill": 3}, {"perplexity": {"float": "low"}}, {"surprise": 1},
    {"kind": "detector"}, {"prompt": 3}, {"decode": []},
])  # fmt: skip
def test_malformed_language_records_are_refused(language, change, tmp_path):
    text = json.dumps(json.loads(language.to_json()) | change)
    with pytest.raises(ModelError, match="file"):
        LanguageResult.from_json(text, "file.json")
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ModelError, match="file"):
        load(tmp_path / "file.json")


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{}", "[" * 100_000])
def test_what_is_no_record_is_refused(text, tmp_path):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ModelError, match="file"):
        load(tmp_path / "file.json")


@pytest.mark.parametrize("change", [
    {"version": 2}, {"cycles": "many"}, {"layers": [{"number": 1}]}, {"surprise": 1}, {"layers": {}},
    {"counters": {"a": "b"}}, {"pictures": [3]}, {"kind": "language"}, {"kind": "else"}, {"kind": 3},
])  # fmt: skip
def test_malformed_records_are_refused(result, change):
    with pytest.raises(ModelError, match="file"):
        Result.from_json(json.dumps(json.loads(result.to_json()) | change), "file.json")


def test_a_missing_record_is_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_the_page_is_self_contained(page):
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert "<script" not in page


def test_the_page_says_everything(result):
    page = render(result)
    for text in ("Two layers", "89.50", "90.00", "stem", "conv 3x3 W8", "8×8×16", "50.0 %", "reading memory",
                 "fetch, tokens"):
        assert text in page, text
    assert "a&lt;b" in page and "a<b" not in page


def test_the_page_of_a_language_model_says_everything(language):
    page = render(language)
    for text in ("Four words", "if a &lt; b:", "\n    c \N{REPLACEMENT CHARACTER}&amp; d", "4.000 → 4.200",
                 "int8 keys and values", "+5.00", "0.99910", "97.0 %", "12.5 %", "44.0 %", "simulated",
                 "mixer in_projection", "at 250 MHz", "Prefill", "Decode",
                 "7 142 857".replace(" ", "\N{NARROW NO-BREAK SPACE}")):
        assert text in page, text


def test_both_models_stand_on_one_page(result, language):
    page = render(result, language)
    assert page.index("Two layers") < page.index("Four words")
    assert page.count("<!doctype") == page.count("<footer>") == 1


def test_the_page_is_well_formed(page):
    body = re.search(r"<body>.*</body>", page, re.DOTALL)
    ElementTree.fromstring(re.sub(r"<img ([^>]*)>", r"<img \1/>", body[0]))


def test_a_language_model_on_a_device_without_time(language):
    still = replace(language.prefill, cycles=0, layers=[])
    for phase in (None, still):
        page = render(replace(language, prefill=phase, decode=phase, perplexity={}, agreement={}))
        assert "no notion of time" in page and "<img" not in page


def test_parts_and_operations_of_a_language_model(language):
    layers = language.prefill.layers
    assert [row.name for row in grouped(layers, part_of)] == [
        "embedding", "0 mixer", "0 feed-forward", "1 mixer", "logits"]
    found = {row.name: row for row in grouped(layers, operation_of)}
    assert list(found) == ["embedding", "mixer in_projection", "feed-forward down", "logits"]
    row = found["mixer in_projection"]
    assert (row.cycles, row.macs, row.bytes_read, row.working) == (100, 128, 64, {"matrix": 100})
    assert row.array_use == pytest.approx(0.8)  # 40 cycles at one half, 60 at one


def test_each_step_of_the_ladder_has_its_own_loss(language):
    rows = ladder(language.perplexity)
    assert [row["name"] for row in rows] == ["float", "int4 weights", "int8 activations", "int8 keys and values",
                                             "integer functions"]
    assert rows[0]["loss"] is None
    assert [row["loss"] for row in rows[1:]] == pytest.approx([0.05, 0.0025, 0.0, -0.0025])
    assert ladder({}) == []


def test_characters_that_a_page_cannot_show():
    assert visible("a\tb\nc\u00e9\U0001f600") == "a\tb\nc\u00e9\U0001f600"
    assert visible("\x00\x1b\x7f\ud800\ufffe") == "\ufffd" * 5


def test_the_first_difference_is_shown(result):
    assert "channel 3" in render(replace(result, mismatches=1, first_difference="layer 'stem', channel 3"))


def test_a_device_without_time(result):
    page = render(replace(result, cycles=0, timeline=[], counters={}, pictures=[], accuracy={},
                          layers=[replace(layer, cycles=0, working={}) for layer in result.layers]))
    assert "no notion of time" in page and "<img" not in page


def test_the_same_record_gives_the_same_page(result, language):
    assert render(result, language) == render(result, language)


def test_waits_are_what_the_own_unit_does_not_do(result):
    assert waits(result.layers[0]) == {"reading memory": 20}
    assert waits(result.layers[1]) == {"fetch, tokens": 10}


def test_unit_table(result):
    (row,) = unit_table(result.counters | {"row_retired": 0})
    assert row == {"name": "matrix", "retired": 3, "busy": 40, "token": 7} | {
        cause.name.lower(): 0 for cause in Stall if cause is not Stall.TOKEN}
