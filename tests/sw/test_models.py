"""Models as the command line names them, and the fake-quantized forward pass."""

import pytest
import torch

from weft.models import zoo
from weft.models.codenet import to_input
from weft.models.layers import QuantLayer
from weft.sw.models import fake_quantized, load_model


def test_each_layer_computes_in_floats_what_it_computes_in_integers_within_one_step():
    """On equal inputs. Over a whole network single steps add up, which is why both accuracies are reported."""
    model = zoo.build("codenet-nano", size=64)
    image = to_input(zoo.calibration_images(64, 1, seed=3))
    steps, changed = [], []

    def both(layer, fake):
        def codes(*arguments):
            exact = QuantLayer.exact(layer, *arguments)
            difference = (fake(*arguments) - exact).abs()
            steps.append(float(difference.max()))
            changed.append(float((difference > 0).float().mean()))
            return exact

        return codes

    with torch.no_grad():
        before = model(image)
        with fake_quantized(model):
            for layer in model.layers():
                layer.exact = both(layer, layer.exact)
            model(image)
        after = model(image)
    assert len(steps) == len(model.layers())
    assert max(steps) == 1, "equal everywhere would mean that the integers were compared with themselves"
    assert max(changed) < 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # the block leaves no trace


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="codenet-nano"):
        load_model("nothing")
