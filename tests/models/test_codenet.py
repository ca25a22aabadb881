"""The CoDeNet family: published sizes, shared scales, exact forward of whole networks."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from tests.models.conftest import noise_images, tiny_config, tiny_model
from weft.arch.errors import ModelError
from weft.models.codenet import CONFIGS, CoDeNet, CoDeNetConfig, config, recorded, to_input
from weft.models.layers import OffsetConv
from weft.models.zoo import ENTRIES, entry, load


@pytest.mark.parametrize(
    ("name", "parameters", "gmac"),
    [("codenet-a", 1.570e6, 0.280), ("codenet-c", 1.570e6, 1.12), ("codenet-d", 6.05e6, 3.51)],
)
def test_published_sizes(name, parameters, gmac):
    """Weights, multiply-accumulates and layers of the deployed network (references/detection.md, section 1.4)."""
    model = CoDeNet(config(name)).fold()
    layers, _, macs = model.complexity()
    weights = sum(layer.conv.weight.numel() for layer in model.layers())
    assert layers == 74
    assert weights == pytest.approx(parameters, rel=1e-3)
    assert macs / 1e9 == pytest.approx(gmac, rel=2e-3)


def test_weight_bits_are_8_in_the_stem_and_4_elsewhere():
    for path, module in tiny_model().named_modules():
        if hasattr(module, "conv") and hasattr(module.conv, "quant_weight"):
            bits = 8 if path == "stem" else 4
            assert int(module.conv.weight_quant.bit_width()) == bits, path
            codes = module.conv.quant_weight().int(float_datatype=False)
            assert codes.abs().max() == 2 ** (bits - 1) - 1


@pytest.mark.parametrize("deform", ["none", "original", "bounded", "square"])
@pytest.mark.parametrize("depthwise", [True, False])
def test_every_variant_runs_and_varies(deform, depthwise):
    model = tiny_model(deform, depthwise=depthwise, size=64)
    with torch.no_grad(), recorded(model) as codes:
        hm, wh, reg = model(to_input(noise_images(64)))
    assert hm.shape == (2, 3, 16, 16) and wh.shape == reg.shape == (2, 2, 16, 16)
    for name, code in codes.items():
        assert len(code.unique()) > 2, name
        saturated = (code.abs() >= 127).float().mean() if code.min() < 0 else (code == 255).float().mean()
        assert name == "image.quant" or saturated < 0.25, name
    offsets = [layer for layer in model.layers() if isinstance(layer, OffsetConv)]
    assert len(offsets) == (0 if deform == "none" else 3)


def test_concatenated_tensors_share_one_scale():
    model = tiny_model()
    with torch.no_grad():
        x = model.pool(model.stem(model.image(to_input(noise_images(32)))))
        for stage in model.stages:
            x = stage(x)
            assert torch.equal(x.scale, stage.output.scale)
            assert torch.equal(x.code.float() * x.scale, x.value)


def test_shuffle_interleaves_the_halves():
    model = tiny_model()
    with torch.no_grad(), recorded(model) as codes:
        model(to_input(noise_images(32)))
    block = codes["stages.0.blocks.1"]
    before = codes["stages.0.blocks.0"]
    assert torch.equal(block[:, 0::2], before[:, : before.shape[1] // 2])
    assert torch.equal(block[:, 1::2], codes["stages.0.blocks.1.branch2.conv3"])


def test_input_codes_are_pixels_minus_128():
    pixels = np.arange(3 * 32 * 32).reshape(1, 32, 32, 3).astype(np.uint8)
    model = tiny_model()
    with torch.no_grad(), recorded(model) as codes:
        model(to_input(pixels))
    assert torch.equal(codes["image.quant"], torch.from_numpy(pixels).permute(0, 3, 1, 2).long() - 128)


def test_same_seed_same_model():
    images = to_input(noise_images(32))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(tiny_model()(images), tiny_model()(images), strict=True))


def test_benchmark_member_has_lively_activations():
    model = load("codenet-a")
    with torch.no_grad(), recorded(model) as codes:
        model(to_input(noise_images(256, 1)))
    assert len(codes) == 74 + 16 + 3 + 3 + 1  # layers, shuffled blocks, spread offsets, upsampled, image
    for name, code in codes.items():
        assert (code != 0).float().mean() > 0.02, name
    for level in range(3):
        s = codes[f"decoder.{level}.offset"]
        assert s.shape[1] == 1 and len(s.unique()) >= 5 and s.min() >= -7 and s.max() <= 8


def test_errors_say_what_to_do():
    with pytest.raises(ModelError, match="multiple of 32"):
        config("codenet-a", size=100)
    with pytest.raises(ModelError, match="must be one of none, original"):
        config("codenet-a", deform="round")
    with pytest.raises(ModelError, match="known: codenet-a"):
        config("codenet-z")
    with pytest.raises(ModelError, match="fold"):
        CoDeNet(tiny_config()).quantize()
    with pytest.raises(ModelError, match="no model named"):
        entry("resnet")
    with pytest.raises(ModelError, match="quantized only"):
        load("codenet-a", quantized=False)
    with pytest.raises(ModelError, match="not a CoDeNet configuration"):
        CoDeNetConfig.from_dict({"width": 3})


def test_config_survives_json_and_zoo_lists_all():
    for member in CONFIGS.values():
        assert CoDeNetConfig.from_dict(json.loads(json.dumps(asdict(member)))) == member
    assert set(ENTRIES) == set(CONFIGS)
