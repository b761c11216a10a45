"""Images to the normalised pixels that a ViT reads, by the settings that its checkpoint brings.

Legend: C channels, S side of the square result in pixels.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from qkv.config import from_dict
from qkv.errors import InputError
from qkv.files import blame, read_json, write_json

Resample = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]

FILE = "preprocessor_config.json"

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels."""


class Region(NamedTuple):
    """A rectangle in an image of any size. It lies wholly in the image: what is too long is cut."""

    area: float
    """Share of the image's area."""
    ratio: float
    """Width / height in pixels."""
    across: float
    """Share of the room beside it that is on its left."""
    down: float
    """Share of the room above and below it that is above."""

    def box(self, width: int, height: int) -> Box:
        """Its edges in an image of that many pixels."""
        left, top, right, bottom = edges(np.array(self), width, height).tolist()
        return left, top, right, bottom


def edges(regions: np.ndarray, width: int, height: int) -> np.ndarray:
    """A Region's values, or those of many (..., 4) -> its edges in an image of that many pixels (..., 4)."""
    area, ratio, across, down = np.moveaxis(regions, -1, 0)
    w = np.minimum(np.sqrt(area * width * height * ratio), width)
    h = np.minimum(np.sqrt(area * width * height / ratio), height)
    left, top = across * (width - w), down * (height - h)
    return np.stack([left, top, np.minimum(left + w, width), np.minimum(top + h, height)], -1)


@dataclass(frozen=True)
class ImageProcessor:
    """Resize to size x size pixels, scale to [0, 1], subtract a channel's mean, divide by its deviation."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Resample = "bilinear"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InputError(
                f"image mean has {len(self.mean)} values, std {len(self.std)}; both need 1 (grey) or 3 (RGB)"
            )
        if self.size < 1 or min(self.std) <= 0:
            raise InputError(f"image size {self.size} and std {self.std} must be positive")

    @property
    def channels(self) -> int:
        """C: 1 for grey images, 3 for RGB."""
        return len(self.mean)

    def __call__(self, source: Image.Image | str | Path | bytes) -> Tensor:
        """An image, its path or its file's bytes -> float32 (C, S, S). Raises InputError if it is broken."""
        return self.normalize(self.pixels(source))

    def pixels(self, source: Image.Image | str | Path | bytes, region: Region | None = None) -> Tensor:
        """What `normalize` takes, and data sets keep: uint8 (C, S, S) of the image or a region of it.

        Raises InputError as a call does.
        """
        image = source if isinstance(source, Image.Image) else open_image(source)
        with readable_image("an image"):
            image.load()  # one that was given may not have been read to its end
        name = str(source) if isinstance(source, str | Path) else "an image"
        image = _convert(image, "L" if self.channels == 1 else "RGB", name)
        box = None if region is None else region.box(*image.size)
        image = image.resize((self.size, self.size), Image.Resampling[self.resample.upper()], box)
        pixels = torch.from_numpy(np.array(image)).view(self.size, self.size, self.channels)
        return pixels.permute(2, 0, 1).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Values from 0 to 255 (..., C, S, S) -> float32 of that shape."""
        mean, std = (
            torch.tensor(values).view(-1, 1, 1).to(pixels.device, non_blocking=True)
            for values in (self.mean, self.std)
        )  # (C, 1, 1)
        return (pixels / 255 - mean) / std

    def save(self, folder: str | Path) -> None:
        """Write the settings where `load` and transformers' AutoImageProcessor find them."""
        values = {
            "image_processor_type": "ViTImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": int(Image.Resampling[self.resample.upper()]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        write_json(Path(folder) / FILE, values)

    @staticmethod
    def load(folder: str | Path) -> ImageProcessor:
        """A checkpoint's settings. Raises InputError if they are missing or ask for what is not done here."""
        path = Path(folder) / FILE
        values: dict[str, Any] = read_json(path)
        with blame(path):
            return ImageProcessor._of(values)

    @staticmethod
    def _of(values: dict[str, Any]) -> ImageProcessor:
        """The settings of transformers' file."""
        fixed = {"do_resize": True, "do_rescale": True, "do_center_crop": False, "do_pad": False}
        for key, wanted in fixed.items():
            if (given := values.get(key)) not in (None, wanted):
                raise InputError(f"{key} is {given}; only {wanted} is supported")
        if abs((factor := values.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-9:
            raise InputError(f"rescale_factor is {factor}; only 1/255 is supported")
        size = values.get("size", 224)
        sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
        if len(sides) != 1 or None in sides:
            raise InputError(f"size is {size}; only a square is supported")
        number = values.get("resample", 2)
        names = {int(Image.Resampling[name.upper()]): name for name in get_args(Resample)}
        if number not in names:
            raise InputError(f"resample is {number}; it must be one of {sorted(names)}")
        mean, std = values.get("image_mean", [0.5] * 3), values.get("image_std", [0.5] * 3)
        if not values.get("do_normalize", True):
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        ours = {"size": sides.pop(), "mean": mean, "std": std, "resample": names[number]}
        return from_dict(ImageProcessor, ours)


def open_image(source: str | Path | bytes) -> Image.Image:
    """An image file or its bytes, decoded, and turned upright as its EXIF data say.

    Raises InputError, naming the file, if it is missing or broken.
    """
    name = f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with readable_image(name), Image.open(file) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        return image if turn is None else image.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by the orientation of its EXIF data."""


_BROKEN = (
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise at broken files."""


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except _BROKEN:  # its pixels may be good
        return None


@contextmanager
def readable_image(name: str) -> Iterator[None]:
    """Around what Pillow reads: its errors as an InputError that names the image."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"no image file {name}") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder, not an image") from None
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that can be read") from None
    except _BROKEN as error:
        raise InputError(f"{name} is broken: {error}") from None


def _convert(image: Image.Image, mode: Literal["L", "RGB"], name: str) -> Image.Image:
    """To grey or RGB; what is transparent becomes white. Raises InputError for more than 8 bits a channel."""
    if image.mode[0] in "IF":
        raise InputError(
            f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits first"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
