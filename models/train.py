"""CenterNet training: float with batch norm, then quantization-aware fine-tuning of the folded network."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from weft.arch.errors import ModelError
from weft.models.accuracy import average_precision
from weft.models.checkpoint import save_checkpoint, state
from weft.models.codenet import CoDeNet, config, to_input
from weft.models.data import DigitScenes, Sample
from weft.models.decode import DOWN_RATIO, Detections, decode
from weft.models.layers import ActivationQuantizer

WH_WEIGHT, REG_WEIGHT = 0.1, 1.0


@dataclass(frozen=True)
class Recipe:
    """What determines a training run, together with the software versions."""

    plain_epochs: int = 12  # float, every sample on the grid: half the time of a deformable epoch
    epochs: int = 1  # float, deformable
    quantized_epochs: int = 2
    scenes: int = 6000
    test_scenes: int = 500
    batch: int = 16
    plain_learning_rate: float = 4e-3
    learning_rate: float = 1e-3
    quantized_learning_rate: float = 5e-4
    weight_decay: float = 1e-4
    calibration_scenes: int = 128
    seed: int = 0


# --- targets and losses -------------------------------------------------------------------------------------


def gaussian_radius(height: float, width: float, overlap: float = 0.7) -> float:
    """Largest centre error, in cells, at which a box of the same size keeps IoU >= `overlap` (both axes displaced)."""
    # (h - r)(w - r) = 2 * overlap / (1 + overlap) * h * w, the smaller root
    b, c = height + width, height * width * (1 - overlap) / (1 + overlap)
    return (b - np.sqrt(b * b - 4 * c)) / 2


def targets(samples: list[Sample], classes: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(heat [N, classes, S/4, S/4] in [0, 1], boxes [N, 4, S/4, S/4] as (w, h, dx, dy), mask [N, 1, S/4, S/4])."""
    side = size // DOWN_RATIO
    heat = np.zeros((len(samples), classes, side, side), np.float32)
    boxes = np.zeros((len(samples), 4, side, side), np.float32)
    mask = np.zeros((len(samples), 1, side, side), np.float32)
    cells = np.arange(side, dtype=np.float32)
    for n, sample in enumerate(samples):
        for box, label in zip(sample.boxes / DOWN_RATIO, sample.labels, strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            centre_x, centre_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            x, y = min(int(centre_x), side - 1), min(int(centre_y), side - 1)
            sigma = (2 * max(1, int(gaussian_radius(height, width))) + 1) / 6
            bump = np.exp(-((cells[:, None] - y) ** 2 + (cells[None, :] - x) ** 2) / (2 * sigma**2))
            np.maximum(heat[n, label], bump, out=heat[n, label])
            boxes[n, :, y, x] = width, height, centre_x - x, centre_y - y
            mask[n, 0, y, x] = 1
    return torch.from_numpy(heat), torch.from_numpy(boxes), torch.from_numpy(mask)


def centernet_loss(outputs: tuple[Tensor, ...], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Penalty-reduced focal loss on the heat map plus L1 on size and sub-cell offset at the centres."""
    (hm, wh, reg), (heat, boxes, mask) = outputs, target
    objects = mask.sum().clamp(min=1)
    # log sigmoid(x) and log(1 - sigmoid(x)) without overflow
    log_p, log_q = F.logsigmoid(hm), F.logsigmoid(-hm)
    positive = heat.eq(1).float()
    focal = positive * log_q.exp() ** 2 * log_p + (1 - positive) * (1 - heat) ** 4 * log_p.exp() ** 2 * log_q
    size_error = ((wh - boxes[:, :2]).abs() * mask).sum()
    offset_error = ((reg - boxes[:, 2:]).abs() * mask).sum()
    return (-focal.sum() + WH_WEIGHT * size_error + REG_WEIGHT * offset_error) / objects


# --- evaluation ---------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: CoDeNet, images: np.ndarray, batch: int = 32) -> list[Detections]:
    """Detections for uint8 RGB images [N, S, S, 3]."""
    training = model.training
    model.eval()
    found = []
    for start in range(0, len(images), batch):
        heads = (head.numpy() for head in model(to_input(images[start : start + batch])))
        found += [decode(*maps) for maps in zip(*heads, strict=True)]
    model.train(training)
    return found


def evaluate(model: CoDeNet, samples: list[Sample]) -> dict[str, float]:
    """{'ap', 'ap50', 'ap75'} on samples of the model's input size."""
    found = predict(model, np.stack([sample.image for sample in samples]))
    return average_precision(found, samples, model.config.classes)


# --- training -----------------------------------------------------------------------------------------------


def fit(model: CoDeNet, samples: list[Sample], epochs: int, recipe: Recipe, learning_rate: float,
        advance: Callable[[float], None]) -> None:  # fmt: skip
    """Train in whatever mode the model is in; one-cycle AdamW. `advance(loss)` is called after every step."""
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.freeze()
    rng = np.random.default_rng([recipe.seed, int(model.quantized)])
    images = np.stack([sample.image for sample in samples])
    target = targets(samples, model.config.classes, model.config.size)
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW([
        {"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0},
    ], lr=learning_rate)  # fmt: skip
    steps = len(samples) // recipe.batch
    if epochs <= 0 or steps == 0:
        return
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * steps, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        order = rng.permutation(len(samples))
        for step in range(steps):
            chosen = order[step * recipe.batch : (step + 1) * recipe.batch]
            outputs = model(to_input(images[chosen]))
            loss = centernet_loss(outputs, tuple(maps[chosen] for maps in target))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
            optimizer.step()
            schedule.step()
            advance(float(loss))
    model.eval()


def train(name: str = "codenet-nano", out: str | os.PathLike | None = None, epochs: int | None = None, seed: int = 0,
          progress: bool = True, recipe: Recipe | None = None, **changes) -> dict[str, dict[str, float]]:  # fmt: skip
    """Train a digit detector, float then quantized, and write a checkpoint to `out` (nothing if None).

    The network learns first with every sample on the grid, then with deformable sampling, then quantized. `epochs`
    counts those of the first part; the last takes a quarter as many. `changes` replace fields of the model's
    configuration (deform="bounded", size=96, ...). Deterministic for a given seed and given library versions.
    Returns {'float': {...}, 'quantized': {...}} with ap, ap50, ap75 on the test split.
    """
    model_config = config(name, **changes)
    if model_config.classes != len(DigitScenes.classes):
        raise ModelError(f"{name} has {model_config.classes} classes, digits have 10: pass classes=10")
    recipe = recipe or Recipe()
    fields = asdict(recipe) | {"seed": seed}
    if epochs is not None:
        fields |= {"plain_epochs": epochs, "quantized_epochs": max(1, epochs // 4)}
    recipe = Recipe(**fields)
    if recipe.plain_epochs < 1 or recipe.scenes < recipe.batch:
        raise ModelError(f"nothing to train: {recipe.plain_epochs} epochs of {recipe.scenes} scenes")
    steps = recipe.scenes // recipe.batch
    torch.set_num_threads(1)  # sums in another order make another network; and small layers gain nothing from more
    with bars(progress) as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        scenes = _scenes("train", model_config.size, recipe.scenes, seed, bar)
        test = _scenes("test", model_config.size, recipe.test_scenes, 0, bar)
        plain, model = CoDeNet(replace(model_config, deform="none")), CoDeNet(model_config)
        fit(plain, scenes, recipe.plain_epochs, recipe, recipe.plain_learning_rate,
            bar("plain", recipe.plain_epochs * steps))  # fmt: skip
        model.load_state_dict(plain.state_dict(), strict=False)  # initial offsets are those of the plain network
        fit(model, scenes, recipe.epochs, recipe, recipe.learning_rate, bar("float", recipe.epochs * steps))
        tensors = state(model)
        accuracy = {"float": evaluate(model, test)}
        model.fold().calibrate(to_input(np.stack([scene.image for scene in scenes[: recipe.calibration_scenes]])))
        model.quantize()
        fit(model, scenes, recipe.quantized_epochs, recipe, recipe.quantized_learning_rate,
            bar("quantized", recipe.quantized_epochs * steps))  # fmt: skip
        tensors |= state(model)
        accuracy["quantized"] = evaluate(model, test)
    if out is not None:
        save_checkpoint(out, model, tensors, asdict(recipe), accuracy)
    return accuracy


def _scenes(split: str, size: int, count: int, seed: int, bar) -> list[Sample]:
    data, advance = DigitScenes(split, size, count, seed), bar(f"{split} scenes", count)
    samples = []
    for index in range(count):
        samples.append(data[index])
        advance(0.0)
    return samples


@contextmanager
def bars(enabled: bool):
    """A function (description, total) -> advance(loss) that draws progress bars, or does nothing."""
    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("loss {task.fields[loss]:.3f}"))  # fmt: skip
    with Progress(*columns, disable=not enabled) as progress:

        def bar(description: str, total: int):
            task, average = progress.add_task(description, total=total, loss=0.0), [0.0]

            def advance(loss: float) -> None:
                average[0] = 0.98 * average[0] + 0.02 * loss if average[0] else loss
                progress.update(task, advance=1, loss=average[0])

            return advance

        yield bar
