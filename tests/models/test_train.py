"""Training in miniature, checkpoints, and the shipped model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.models.conftest import noise_images, tiny_model
from weft.arch.errors import ModelError
from weft.models.checkpoint import load_checkpoint, read_metadata, save_checkpoint, state
from weft.models.codenet import recorded, to_input
from weft.models.data import DigitScenes, Sample
from weft.models.decode import decode
from weft.models.train import Recipe, centernet_loss, evaluate, gaussian_radius, targets, train
from weft.models.zoo import entry, load

TINY = {"size": 32, "stages": (8, 8, 8), "repeats": (1, 1, 1), "conv5": 8, "decoder": (8, 8, 8), "head": 8}
MINUTE = Recipe(epochs=1, quantized_epochs=1, scenes=16, test_scenes=16, batch=8, calibration_scenes=8)


def test_gaussian_radius_keeps_the_overlap():
    radius = gaussian_radius(20, 30)
    kept = (20 - radius) * (30 - radius)
    assert kept / (2 * 600 - kept) == pytest.approx(0.7)


def test_targets_decode_to_their_boxes():
    sample = Sample(np.zeros((64, 64, 3), np.uint8), np.array([[10, 10, 30, 40], [40, 2, 63, 30]], np.float32),
                    np.array([1, 0]))  # fmt: skip
    heat, boxes, mask = targets([sample], 2, 64)
    assert mask.sum() == 2 and heat.max() == 1
    found = decode(torch.logit(heat[0], 1e-6).numpy(), boxes[0, :2].numpy(), boxes[0, 2:].numpy(), top=2)
    order = np.argsort(found.labels)[::-1]
    np.testing.assert_allclose(found.boxes[order], sample.boxes, atol=1e-4)
    perfect = (torch.logit(heat.eq(1).float(), 1e-6), boxes[:, :2], boxes[:, 2:])
    wrong = (torch.zeros_like(heat), boxes[:, :2] + 1, boxes[:, 2:])
    assert centernet_loss(perfect, (heat, boxes, mask)) < 0.01 < 1 < centernet_loss(wrong, (heat, boxes, mask))


def test_training_is_deterministic_and_its_checkpoint_complete(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    results = [train("codenet-nano", path, seed=1, progress=False, recipe=MINUTE, **TINY) for path in paths]
    assert results[0] == results[1]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    metadata = read_metadata(paths[0])
    assert metadata["accuracy"] == results[0] and metadata["recipe"]["seed"] == 1
    scenes = DigitScenes("test", 32, MINUTE.test_scenes)
    for quantized, key in ((False, "float"), (True, "quantized")):
        model = load_checkpoint(paths[0], quantized)
        assert model.quantized == quantized
        assert evaluate(model, list(scenes)) == results[0][key]
        assert not quantized or metadata["scales"]["conv5"] == float(model.conv5.output.scale)


def test_training_lowers_the_loss():
    from weft.models.codenet import CoDeNet, config
    from weft.models.train import fit

    torch.manual_seed(0)
    losses: list[float] = []
    model = CoDeNet(config("codenet-nano", **TINY))
    fit(model, list(DigitScenes("train", 32, 32)), 14, MINUTE, 1e-2, losses.append)
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])


def test_checkpoint_keeps_every_code(tmp_path):
    model = tiny_model()
    save_checkpoint(tmp_path / "tiny.safetensors", model, state(model), {}, {})
    again = load_checkpoint(tmp_path / "tiny.safetensors")
    images = to_input(noise_images(32))
    with torch.no_grad(), recorded(model) as expected, recorded(again) as got:
        model(images), again(images)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_checkpoint_errors(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(ModelError, match="cannot read checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"garbage")
    with pytest.raises(ModelError, match="cannot read checkpoint"):
        load_checkpoint(path)
    model = tiny_model()
    save_checkpoint(path, model, {}, {}, {})
    with pytest.raises(ModelError, match="does not fit"):
        load_checkpoint(path)
    tensors = state(model)
    tensors["quantized.conv5.conv.bias"].fill_(float("nan"))
    save_checkpoint(path, model, tensors, {}, {})
    with pytest.raises(ModelError, match="not finite"):
        load_checkpoint(path)


def test_training_errors():
    with pytest.raises(ModelError, match="classes=10"):
        train("codenet-a", progress=False)
    with pytest.raises(ModelError, match="nothing to train"):
        train("codenet-nano", epochs=0, progress=False)


def test_shipped_checkpoint_detects_digits():
    """On the first scenes of the test split the shipped model is about as good as its metadata says on all."""
    accuracy = entry("codenet-nano").accuracy()
    scenes = DigitScenes("test", 128, 100)
    samples = [scenes[index] for index in range(len(scenes))]
    for part, quantized in (("float", False), ("quantized", True)):
        measured = evaluate(load("codenet-nano", quantized), samples)["ap50"]
        assert measured == pytest.approx(accuracy[part]["ap50"], abs=0.06), part
