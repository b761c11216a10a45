"""Small samples first: a run may begin with short windows of text or small images, and grow them.

Legend: T tokens of the batch, N images, C channels, S side in pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from qkv.config import AnyModelConfig, TrainConfig
from qkv.data.batches import Batch, ImageBatch, LanguageBatch
from qkv.errors import InputError
from qkv.ragged import Layout, Ragged


def check(config: TrainConfig, model: AnyModelConfig) -> None:
    """Raise InputError if the model's samples cannot have all of the sizes."""
    if not config.growth:
        return
    if model.family == "gpt":
        name, whole, unit = "model.context", model.context, 1
    elif model.family == "vit":
        name, whole, unit = "model.image_size", model.image_size, model.patch_size
    else:
        raise InputError(f"train.growth is for gpt's windows and vit's images, not for a {model.family}")
    for share in config.growth:
        if config.torch_compile and model.family == "gpt" and round(1 / share, 6) % 1:
            raise InputError(
                f"train.torch_compile needs windows of equal length, and train.growth {share} cuts "
                "unequal ones: leave one of the two out"
            )
        if round(whole * share, 6) % unit:
            raise InputError(
                f"train.growth has {share}, but {share} of {name} {whole} is not a multiple of {unit}"
            )
    if config.growth[-1] != 1:
        raise InputError(f"train.growth ends with {config.growth[-1]}: it must end with 1, the full size")


def share_at(step: int, config: TrainConfig) -> float:
    """The size of samples in step 1, 2, ..., max_steps, as a share of their whole size."""
    if not config.growth:
        return 1.0
    return config.growth[min((step - 1) * len(config.growth) // config.max_steps, len(config.growth) - 1)]


def shrunk(batch: Batch, share: float) -> tuple[Batch, float]:
    """The batch with its samples at this share of their size, and the share of its tokens that is left.

    Windows are cut into shorter ones, of which none is lost (Li et al. 2022, "The Stability-Efficiency
    Dilemma", 3, drop the rest). Images are scaled down, as in progressive learning (Tan and Le 2021, 4).
    """
    if share == 1.0:
        return batch, 1.0
    if isinstance(batch, LanguageBatch):
        lengths: list[int] = []
        for length in batch.ids.layout.lengths:
            part = max(round(length * share), 1)
            lengths += [min(part, length - start) for start in range(0, length, part)]
        layout = Layout(tuple(lengths), batch.ids.values.device)
        return replace(batch, ids=Ragged(batch.ids.values, layout)), 1.0
    assert isinstance(batch, ImageBatch)
    size = [round(side * share) for side in batch.images.shape[-2:]]
    small = F.interpolate(batch.images, size=size, mode="bilinear", align_corners=False, antialias=True)
    return replace(batch, images=small), share**2  # (N, C, share S, share S)
