from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qkv.data.images
from qkv.data.images import ImageDataset
from qkv.data.raw import ImageFile
from qkv.errors import InputError
from qkv.images import ImageProcessor


def _png(seed: int, mode: str = "L", size: int = 8) -> bytes:
    shape = (size, size) if mode == "L" else (size, size, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_images_are_what_the_processor_makes_of_them(
    keep: bool, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not keep:
        monkeypatch.setattr(qkv.data.images, "KEEP_BYTES", 0)
    channels = 1 if mode == "L" else 3
    processor = ImageProcessor(6, (0.4,) * channels, (0.3,) * channels)
    path = tmp_path / "file.png"
    path.write_bytes(_png(3, mode))
    sources = [_png(0, mode), _png(1, "L"), _png(2, mode, 20), path]
    files = [ImageFile(f"image {i}", source) for i, source in enumerate(sources)]
    dataset = ImageDataset(files, [1, 0, 2, 1], processor, patch_size=3)
    assert (dataset.pixels is not None) == keep
    batch = dataset.batch([3, 2, 1], epoch=0)
    assert batch.images.shape == (3, channels, 6, 6) and batch.images.dtype == torch.float32
    assert batch.labels.tolist() == [1, 2, 0]
    for row, i in enumerate([3, 2, 1]):
        torch.testing.assert_close(batch.images[row], processor(sources[i]))
    assert dataset.costs.tolist() == [4] * 4


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    processor = ImageProcessor(8, (0.5,), (0.5,))
    files = [ImageFile("row 1 of a.parquet", _png(0)), ImageFile("row 2 of a.parquet", _png(1)[:60])]
    with pytest.raises(InputError, match=r"row 2 of a\.parquet"):
        ImageDataset(files, [0, 1], processor, 4)
    with pytest.raises(InputError, match=r"cannot read gone\.png: No such file"):
        ImageDataset([ImageFile("gone.png", Path("gone.png"))], [0], processor, 4)
    with pytest.raises(InputError, match=r"deep\.png has more than 8 bits"):
        ImageDataset([ImageFile("deep.png", tmp_path / "deep.png")], [0], processor, 4)
