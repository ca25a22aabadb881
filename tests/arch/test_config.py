"""Engine configurations: presets, derived quantities and every refusal."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest

from weft.arch.config import EngineConfig, load_config, preset_names
from weft.arch.errors import ModelError

BASE = load_config("base")


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name):
    config = load_config(name)
    assert config.name == name and hash(config) == hash(load_config(name))
    assert len(config.fingerprint) == 16 and config.fingerprint == load_config(name).fingerprint
    assert config.pool_words == config.banks * config.bank_words


def test_presets_differ():
    assert {"base", "test"} <= set(preset_names())
    assert len({load_config(name).fingerprint for name in preset_names()}) == len(preset_names())


def test_derived_quantities():
    assert (BASE.macs, BASE.word_bytes, BASE.steps_per_word, BASE.weight_step_bytes) == (256, 32, 8, 16)
    assert (BASE.tile_parameter_words, BASE.block_parameter_words, BASE.max_writes) == (3, 8, 4)
    assert BASE.four_byte_words(9) == 2
    assert (BASE.group, BASE.scaled_words, BASE.plain_parameter_words) == (32, 4, 1)
    assert (BASE.weight_words(False), BASE.weight_words(True)) == (4, 8)
    assert BASE.tile_words(9) == 36 and BASE.tile_words(9, wide=True) == 72
    assert [BASE.tile_words(blocks, grouped=True) for blocks in (1, 4, 5)] == [5, 17, 22]


@pytest.mark.parametrize("item", [item.name for item in fields(EngineConfig) if item.name != "name"])
def test_every_field_counts_for_the_fingerprint_and_must_be_positive(item):
    for value in (0, -4, 1.5, "4"):
        with pytest.raises(ModelError, match=f"'base': {item} must be a positive integer"):
            replace(BASE, **{item: value})
    smaller = {"rows": 2, "columns": 4, "pixels": 4, "lanes": 64, "row_lanes": 4, "address_bits": 33}
    changed = smaller.get(item, getattr(BASE, item) * 2)
    if item == "bus_bytes":
        changed = 32
    assert replace(BASE, **{item: changed}).fingerprint != BASE.fingerprint


@pytest.mark.parametrize("changes, message", [
    *(({name: 12}, f"{name} must be a power of two, got 12") for name in
      ("rows", "columns", "pixels", "lanes", "post_lanes", "row_lanes", "banks", "bus_bytes", "burst_beats")),
    ({"rows": 1}, "rows must be at least 2"),
    ({"lanes": 16}, "lanes must be at least 32"),
    ({"lanes": 256}, "lanes must be at most 128"),
    ({"pixels": 16}, "lanes / rows = 8 must be at least pixels = 16"),
    ({"rows": 2, "columns": 64}, "columns must not exceed lanes"),
    ({"columns": 32}, "rows * columns / 2 must not exceed lanes"),
    ({"post_lanes": 64}, "post_lanes must not exceed lanes"),
    ({"banks": 2}, "banks must be at least 4"),
    ({"bank_words": 8193}, "scratchpad of 65544 words exceeds 16-bit word addresses"),
    ({"bus_bytes": 64}, "bus_bytes must not exceed lanes"),
    ({"burst_beats": 512}, "a burst must fit 256 beats and 4 KB"),
    ({"lanes": 64, "bus_bytes": 32, "burst_beats": 256}, "a burst must fit 256 beats and 4 KB"),
    ({"address_bits": 11}, "address_bits must be between 12 and 64"),
    ({"address_bits": 65}, "address_bits must be between 12 and 64"),
    ({"row_lanes": 16}, "row_lanes * columns must not exceed 2 * lanes"),
    ({"token_bits": 1}, "token_bits must be at least 2"),
])
def test_refusals(changes, message):
    with pytest.raises(ModelError) as error:
        replace(BASE, **changes)
    assert str(error.value).startswith(f"engine configuration 'base': {message}")


def toml(**values) -> str:
    return "\n".join(f"{key} = {value!r}" for key, value in values.items())


def test_a_toml_file_is_a_configuration(tmp_path):
    values = asdict(BASE)
    values.pop("name")
    path = tmp_path / "mine.toml"
    path.write_text(toml(**values))
    assert load_config(str(path)) == replace(BASE, name="mine")
    path.write_text(toml(**values, name="other"))
    assert load_config(str(path)).name == "other"


@pytest.mark.parametrize("text, message", [
    ("rows = ", "not a valid TOML file"),
    ("rows = 4\nrowz = 4", "unknown field 'rowz'; known are address_bits, bank_words"),
    ("rows = 4", "missing 7 required positional arguments: 'columns'"),
    (toml(rows=3, columns=8, pixels=8, lanes=32, post_lanes=8, banks=8, bank_words=16, bus_bytes=16),
     "'bad': rows must be a power of two"),
])
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ModelError) as error:
        load_config(str(path))
    assert message in str(error.value)


def test_files_that_are_not_text_or_not_there(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ModelError, match="not a valid TOML file"):
        load_config(str(path))
    with pytest.raises(ModelError, match="'nowhere' not found: give one of base, test"):
        load_config("nowhere")
