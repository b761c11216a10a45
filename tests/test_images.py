"""Image processing, with transformers' ViTImageProcessor as the independent judge."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import ViTImageProcessorPil

from qkv.errors import InputError
from qkv.images import ImageProcessor, open_image

IMAGENET = ImageProcessor(32, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def picture(mode: str = "RGB", width: int = 57, height: int = 41) -> Image.Image:
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if shape[2] == 1 else pixels, mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("resample", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "L"])
def test_transformers_opens_what_is_saved_and_gives_the_same(resample, mode: str, tmp_path: Path) -> None:
    ours = ImageProcessor(32, IMAGENET.mean, IMAGENET.std, resample)
    ours.save(tmp_path)
    theirs = ViTImageProcessorPil.from_pretrained(tmp_path)
    expected = theirs(picture(mode), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours(picture(mode)), expected, atol=1e-6, rtol=0)
    assert ImageProcessor.load(tmp_path) == ours


def test_grey_images(tmp_path: Path) -> None:
    ours = ImageProcessor(8, (0.3,), (0.25,))
    ours.save(tmp_path)
    theirs = ViTImageProcessorPil.from_pretrained(tmp_path)
    expected = theirs(picture("L"), return_tensors="pt")["pixel_values"][0]
    assert expected.shape == (1, 8, 8)
    torch.testing.assert_close(ours(picture("L")), expected, atol=1e-6, rtol=0)
    assert ImageProcessor.load(tmp_path) == ours
    assert ours(picture("RGB")).shape == (1, 8, 8)


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    theirs = ViTImageProcessorPil(size={"height": 20, "width": 20}, resample=3, image_mean=[0.1, 0.2, 0.3])
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.load(tmp_path)
    assert ours == ImageProcessor(20, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "bicubic")
    expected = theirs(picture(), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours(picture()), expected, atol=1e-6, rtol=0)


def test_old_settings_with_a_plain_size(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 16, "do_normalize": False}))
    assert ImageProcessor.load(tmp_path) == ImageProcessor(16, (0.0,) * 3, (1.0,) * 3, "bilinear")


def test_path_bytes_and_image_agree(tmp_path: Path) -> None:
    image = picture()
    data = encoded(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    expected = IMAGENET(image)
    for source in (data, tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(IMAGENET(source), expected)


def test_pixels_by_hand() -> None:
    image = Image.new("RGB", (2, 2))
    image.putpixel((1, 0), (255, 51, 0))
    pixels = ImageProcessor(2, (0.5, 0.5, 0.5), (0.5, 0.25, 1.0), "nearest")(image)
    torch.testing.assert_close(pixels[:, 0, 1], torch.tensor([1.0, -1.2, -0.5]))
    torch.testing.assert_close(pixels[:, 1, 1], torch.tensor([-1.0, -2.0, -0.5]))


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    palette = Image.new("P", (4, 4), 7)
    palette.info["transparency"] = 7
    for image in (clear, palette):
        assert (ImageProcessor(4, (0.0,) * 3, (1.0,) * 3)(image) == 1).all()


def test_photos_are_turned_upright() -> None:
    image = picture("RGB", 20, 10)
    exif = image.getexif()
    exif[0x0112] = 6  # a camera held on its side
    assert open_image(encoded(image, "PNG", exif=exif)).size == (10, 20)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0",
        b"Exif\0\0rubbish",
        b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # turn it
        b"\x1a\x01\x02\0\x03\0\0\0\x37\x32\0\0\0\0\0\0",  # XResolution in letters
    ],
)
def test_a_photo_is_good_whatever_its_exif_data_are(exif: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        size = open_image(encoded(picture("RGB", 20, 10), kind, exif=exif)).size
        assert size == ((10, 20) if b"\x12\x01" in exif else (20, 10))


def test_all_ways_to_turn_a_photo_are_pillows() -> None:
    image = picture("RGB", 6, 4)
    for orientation in range(1, 9):
        exif = image.getexif()
        exif[0x0112] = orientation
        content = encoded(image, "PNG", exif=exif)
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert np.array_equal(np.array(open_image(content)), np.array(expected)), orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damage_of_any_kind_is_named(kind: str) -> None:
    """Or is none: some formats do without the rest."""
    whole = encoded(picture("RGB", 40, 40), kind)
    for place in range(len(whole) // 4, len(whole), max(len(whole) // 40, 1)):
        spoilt = whole[:place] + bytes(200 - b % 200 for b in whole[place : place + 30]) + whole[place + 30 :]
        for content in (spoilt, whole[:place]):
            try:
                IMAGENET(content)
            except InputError as error:
                assert "an image of" in str(error)


@pytest.mark.parametrize("damage", ["missing", "text", "empty", "cut", "folder"])
def test_images_that_cannot_be_read(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    whole = encoded(picture(), "PNG")
    contents = {"text": b"not an image", "empty": b"", "cut": whole[: len(whole) // 2]}
    if damage in contents:
        path.write_bytes(contents[damage])
        with pytest.raises(InputError, match="bytes is"):
            IMAGENET(contents[damage])
        if damage == "cut":  # Pillow has read its size alone
            with pytest.raises(InputError, match="an image is broken"):
                IMAGENET(Image.open(path))
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(InputError, match=r"cat\.png") as error:
        IMAGENET(path)
    assert "\n" not in str(error.value)


def test_deep_colours_are_not_clipped() -> None:
    with pytest.raises(InputError, match="8 bits"):
        IMAGENET(Image.fromarray(np.full((4, 4), 3000, dtype=np.uint16)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"size": {"height": 10, "width": 20}}, "square"),
        ({"size": {"shortest_edge": 10}}, "square"),
        ({"resample": 9}, "resample"),
        ({"image_mean": [0.5]}, "mean"),
        ({"image_std": [0.0, 0.5, 0.5]}, "positive"),
        ({"image_mean": None}, "mean"),
        ({"image_mean": None, "do_normalize": False}, "malformed"),
        ({"image_mean": ["a", "b", "c"]}, "mean"),
        ({"image_std": 0.5}, "std"),
        ({"size": "16"}, "malformed"),
        ({"size": {"height": 2.5, "width": 2.5}}, "size"),
        ({"rescale_factor": "1"}, "malformed"),
        ({"resample": [2]}, "malformed"),
    ],
)
def test_settings_that_are_not_supported(values: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=rf"preprocessor_config\.json.*{message}"):
        ImageProcessor.load(tmp_path)


def test_settings_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no preprocessor_config"):
        ImageProcessor.load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        ImageProcessor.load(tmp_path)
