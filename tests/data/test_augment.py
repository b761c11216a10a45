"""Augmentation: randomness that belongs to the sample, labels that say what is seen, Pillow as the judge."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from qkv.config import AugmentConfig, RunConfig, ViTConfig
from qkv.data import Samples, build
from qkv.data.augment import (
    AFFINE,
    ERASED_AREAS,
    OPERATIONS,
    Augmentation,
    Operation,
    crop_and_flip,
    inside,
    rand_augment,
)
from qkv.data.batches import ImageBatch
from qkv.data.images import ImageDataset
from qkv.data.raw import ImageFile
from qkv.errors import InputError
from qkv.images import ImageProcessor, Region
from qkv.objectives import CrossEntropy

S, K = 16, 5
ALL = AugmentConfig(
    crop_area=0.3, crop_padding=2, flip=True, randaugment=2, erasing=0.5, mixup=0.8, cutmix=1.0
)
SHARES = st.floats(0, 1)


def file(pixels: np.ndarray) -> ImageFile:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return ImageFile("an image", out.getvalue())


RANDOM = [
    file(np.random.default_rng(i).integers(0, 256, (S + i % 3, S, 3), dtype=np.uint8)) for i in range(20)
]
FLAT = [file(np.full((S, S), 10 * i, dtype=np.uint8)) for i in range(20)]
"""Image i is grey level 10 i all over."""


def data(config: AugmentConfig, files: list[ImageFile] = RANDOM, seed: int = 0) -> ImageDataset:
    channels = 1 if files is FLAT else 3
    processor = ImageProcessor(S, (0.5,) * channels, (0.25,) * channels)
    labels = [i % K for i in range(len(files))]
    return ImageDataset(files, labels, processor, 4, augmentation=Augmentation(config, processor, K, seed))


def batch(dataset: ImageDataset, indices: list[int], epoch: int = 0) -> ImageBatch:
    made = dataset.batch(indices, epoch).to("cpu")
    assert isinstance(made, ImageBatch)
    return made


def picture(seed: int = 0, side: int = 32, frame: int = 6) -> Image.Image:
    """Smooth colours in a frame of middle grey."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    inner = Image.fromarray(rough).resize((side - 2 * frame,) * 2, Image.Resampling.BICUBIC)
    return ImageOps.expand(inner, frame, (128, 128, 128))


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


# ---------------------------------------------------------------- whose randomness it is


@given(indices=st.lists(st.integers(0, 19), min_size=1, max_size=8), epoch=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_sample_looks_the_same_whatever_is_beside_it(indices: list[int], epoch: int):
    dataset = data(ALL)
    together = batch(dataset, indices, epoch)
    torch.rand(1)  # the global generator has no part in it
    for row, index in enumerate(indices):
        alone = batch(dataset, [index], epoch)
        assert torch.equal(together.images[row], alone.images[0])
        assert torch.equal(together.labels[row], alone.labels[0])


@pytest.mark.parametrize("config", [replace(ALL, mixup=0, cutmix=0), AugmentConfig(mixup=1.0)])
def test_seed_and_epoch_decide_how_a_sample_looks(config: AugmentConfig):
    looks = [batch(data(config, seed=seed), [3], epoch).images for seed in (0, 1) for epoch in (0, 1)]
    for i, look in enumerate(looks):
        assert not any(torch.equal(look, other) for other in looks[:i])


def test_without_augmentation_images_stay_as_they_are():
    varied, plain = data(AugmentConfig()), ImageDataset(RANDOM, [0] * 20, data(ALL).processor, 4)
    assert torch.equal(batch(varied, [4, 2]).images, batch(plain, [4, 2]).images)
    assert torch.equal(batch(varied, [4, 2]).images, batch(varied, [4, 2], epoch=1).images)


def test_only_training_images_are_varied():
    config = RunConfig(model=ViTConfig(image_size=S, labels=tuple("abcde")), augment=ALL)
    samples = Samples("images", images=RANDOM, labels=[0] * 20)
    processor = data(ALL).processor
    plain = ImageDataset(RANDOM, [0] * 20, processor, 4)
    for training in (False, True):
        dataset = build(samples, config, None, processor, training)
        same = torch.equal(dataset.batch([1, 2], 0).to("cpu").images, batch(plain, [1, 2]).images)
        assert same != training


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("config", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0), ALL])
def test_labels_are_probabilities(config: AugmentConfig):
    labels = batch(data(config), list(range(20))).labels
    assert labels.shape == (20, K)
    torch.testing.assert_close(labels.sum(1), torch.ones(20))
    assert (labels >= 0).all() and (labels > 0).sum() > 20


@pytest.mark.parametrize(
    "config", [AugmentConfig(mixup=1.0), AugmentConfig(cutmix=1.0), AugmentConfig(mixup=1.0, cutmix=1.0)]
)
def test_labels_say_how_much_is_seen_of_each_image(config: AugmentConfig):
    """Mixup blends whole images by lambda, and CutMix's rectangle has the share 1 - lambda of the area."""
    dataset, indices = data(config, FLAT), list(range(20))
    mixed = batch(dataset, indices)
    levels = (mixed.images * 0.25 + 0.5) * 255 / 10  # (N, 1, S, S): i where image i is seen
    blended = 0
    for i, mix in enumerate(dataset.augmentation.mixes(indices, 0, 20)):
        j, share = mix.partner, mix.share(S)
        expected = share * F.one_hot(torch.tensor(i % K), K) + (1 - share) * F.one_hot(torch.tensor(j % K), K)
        torch.testing.assert_close(mixed.labels[i], expected)
        assert levels[i].mean().item() == pytest.approx(share * i + (1 - share) * j, abs=1e-4)
        cells = levels[i].round(decimals=3).unique().tolist()
        pure = all(min(abs(level - i), abs(level - j)) < 1e-3 for level in cells)
        blended += not pure
        assert pure or len(cells) == 1
    assert (blended > 0) == (config.mixup > 0)
    assert (blended < 15) == (config.cutmix > 0)  # a few blends are of one image with its like


def test_shares_follow_their_distribution():
    """Of Beta(a, a) the variance is 1 / (4 (2 a + 1))."""
    for alpha in (0.2, 1.0):
        made = data(AugmentConfig(mixup=alpha)).augmentation
        shares = np.array([mix.share(S) for mix in made.mixes(range(2000), 0, 2000)])
        assert shares.mean() == pytest.approx(0.5, abs=0.03)
        assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_probabilities_as_labels_weigh_the_classes_losses(smoothing: float):
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    shares = torch.tensor([[0.3, 0.0, 0.7], [0.5, 0.5, 0.0]])
    whole = CrossEntropy(logits, shares)
    by_class = [
        CrossEntropy(logits[row : row + 1], torch.tensor([k])).loss_sum(smoothing) * shares[row, k]
        for row in range(2)
        for k in range(3)
    ]
    torch.testing.assert_close(whole.loss_sum(smoothing), torch.stack(by_class).sum())
    total = math.log(1 + math.e + math.e**2)  # by hand, for the first row
    first = CrossEntropy(logits[:1], shares[:1]).loss_sum().item()
    assert first == pytest.approx(0.3 * total + 0.7 * (total - 2), rel=1e-6)


def test_the_likeliest_label_counts_as_the_right_one():
    logits = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    assert CrossEntropy(logits, torch.tensor([1, 0, 1])).correct() == 2
    assert CrossEntropy(logits, torch.tensor([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8]])).correct() == 2


# ---------------------------------------------------------------- crop, flip, erasing


def test_mirroring_twice_changes_nothing_and_once_is_what_torch_calls_flip():
    pixels = torch.randint(0, 256, (4, 3, S, S), dtype=torch.uint8)
    still, where = torch.zeros(4, 2, dtype=torch.long), torch.tensor([True, False, True, True])
    once = crop_and_flip(pixels, still, where, 0, (0.5,) * 3)
    assert torch.equal(once[where], pixels[where].flip(-1)) and torch.equal(once[1], pixels[1])
    assert torch.equal(crop_and_flip(once, still, where, 0, (0.5,) * 3), pixels)


@given(left=st.integers(0, 6), top=st.integers(0, 6), mirrored=st.booleans())
def test_crops_are_pillows(left: int, top: int, mirrored: bool):
    image = picture()
    padded = ImageOps.expand(image, 3, (26, 128, 255)).crop((left, top, left + 32, top + 32))
    ours = crop_and_flip(
        tensor(image), torch.tensor([[left, top]]), torch.tensor([mirrored]), 3, (0.1, 0.5, 1.0)
    )
    assert torch.equal(ours, tensor(ImageOps.mirror(padded) if mirrored else padded))


def test_crops_and_flips_are_spread_evenly():
    looks = data(AugmentConfig(crop_padding=1, flip=True)).augmentation.looks(range(1800), 0)
    counts = Counter((look.shift, look.mirrored) for look in looks)
    assert len(counts) == 18 and min(counts.values()) > 60  # of 100 expected


@given(
    area=st.floats(1e-4, 1), ratio=st.floats(0.1, 10), across=SHARES, down=SHARES, width=st.integers(1, 99)
)
def test_a_region_lies_in_the_image_and_has_its_area_if_it_fits(area, ratio, across, down, width):
    left, top, right, bottom = Region(area, ratio, across, down).box(width, 40)
    assert 0 <= left < right <= width and 0 <= top < bottom <= 40
    fits = area * width * 40 * ratio <= width**2 and area * width * 40 / ratio <= 40**2
    share = (right - left) * (bottom - top) / (width * 40)
    assert share == pytest.approx(area, rel=1e-6) if fits else share < area
    if fits:
        assert (right - left) / (bottom - top) == pytest.approx(ratio, rel=1e-6)


def test_parts_of_files_are_cut_before_they_are_resized():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
    processor = ImageProcessor(20, (0.5,) * 3, (0.5,) * 3)
    cut = processor.pixels(image, Region(area=1 / 6, ratio=1.0, across=0.25, down=1.0))
    expected = processor.pixels(image.crop((20, 40, 60, 80)))
    inner = (..., slice(1, -1), slice(1, -1))  # at its edges, the filter sees what is beyond them
    assert torch.equal(cut[inner], expected[inner])
    dataset = data(AugmentConfig(crop_area=0.3))
    looks = dataset.augmentation.looks([0, 1], epoch=5)
    expected = [RANDOM[i].pixels(dataset.processor, look.region) for i, look in enumerate(looks)]
    made = batch(dataset, [0, 1], epoch=5).images
    assert torch.equal(made, dataset.processor.normalize(torch.stack(expected)))


def test_erasing_takes_one_rectangle_to_the_mean_colour():
    indices = list(range(20))
    plain, erased = (
        batch(data(config), indices).images for config in (AugmentConfig(), AugmentConfig(erasing=1.0))
    )
    for before, after in zip(plain, erased, strict=True):
        gone = (after == 0).all(0)
        rows, columns = gone.any(1), gone.any(0)
        assert torch.equal(gone, rows[:, None] & columns)  # a rectangle
        assert torch.equal(after[:, ~gone], before[:, ~gone])
        low, high = ERASED_AREAS
        edge = (2 * S + 1) / S**2  # by rounding to whole pixels
        assert low - edge <= gone.float().mean() <= high + edge
    some = data(AugmentConfig(erasing=0.25)).augmentation.looks(range(2000), 0)
    assert sum(look.erased != (0, 0, 0, 0) for look in some) == pytest.approx(500, abs=80)


def test_boxes_hold_the_pixels_that_slicing_takes():
    boxes = [(0, 0, 0, 0), (1, 2, 5, 4), (0, 0, S, S)]
    expected = torch.zeros(3, 1, S, S, dtype=torch.bool)
    for row, (left, top, right, bottom) in enumerate(boxes):
        expected[row, :, top:bottom, left:right] = True
    assert torch.equal(inside(boxes, torch.zeros(3, 2, S, S)), expected)


# ---------------------------------------------------------------- RandAugment


def enhanced(kind: type) -> object:
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


PILLOWS = {
    "identity": lambda image, strength: image,
    "autocontrast": lambda image, strength: ImageOps.autocontrast(image),
    "equalize": lambda image, strength: ImageOps.equalize(image),
    "solarize": lambda image, strength: ImageOps.solarize(image, 256 * (1 - abs(strength))),
    "posterize": lambda image, strength: ImageOps.posterize(image, round(8 - 4 * abs(strength))),
    "color": enhanced(ImageEnhance.Color),
    "contrast": enhanced(ImageEnhance.Contrast),
    "brightness": enhanced(ImageEnhance.Brightness),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "rotate": lambda image, strength: image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=GREY),
    "shear_x": lambda image, s: moved(image, (1, 0.3 * s, -0.3 * s * 16, 0, 1, 0)),
    "shear_y": lambda image, s: moved(image, (1, 0, 0, 0.3 * s, 1, -0.3 * s * 16)),
    "translate_x": lambda image, s: moved(image, (1, 0, 150 / 331 * 32 * s, 0, 1, 0)),
    "translate_y": lambda image, s: moved(image, (1, 0, 0, 0, 1, 150 / 331 * 32 * s)),
}
GREY = (128, 128, 128)


def moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name: str):
    assert len(OPERATIONS) == 14 and tuple(PILLOWS) == OPERATIONS
    cases = [(picture(i), strength) for i, strength in enumerate((-1.0, -0.9, -0.3, 0.3, 0.6, 0.9, 1.0))]
    pixels = torch.cat([tensor(image) for image, _ in cases])
    ours = rand_augment(pixels, [((name, strength),) for _, strength in cases], [128 / 255] * 3)
    assert ours.min() >= 0 and ours.max() <= 255
    for (image, strength), made in zip(cases, ours, strict=True):
        difference = (made - tensor(PILLOWS[name](image, strength))[0]).abs()
        # Pillow cuts to whole levels in between. Its mirror of a level at a threshold may differ by all.
        assert difference.mean() < 1 and difference.quantile(0.99) <= 2, (strength, difference.max())


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_no_strength_is_no_change(name: str):
    pixels = tensor(picture())
    torch.testing.assert_close(rand_augment(pixels, [((name, 0.0),)], [0.5] * 3), pixels.float())


def test_operations_follow_each_other_in_the_order_drawn():
    pixels = torch.cat([tensor(picture(0)), tensor(picture(1))])
    names: list[tuple[Operation, ...]] = [
        (("rotate", 0.5), ("solarize", 0.9)),
        (("solarize", 0.9), ("shear_x", -0.5)),
    ]
    together = rand_augment(pixels, names, [0.2] * 3)
    for row, (first, second) in enumerate(names):
        once = rand_augment(pixels[row : row + 1], [(first,)], [0.2] * 3)
        twice = rand_augment(once, [(second,)], [0.2] * 3)
        torch.testing.assert_close(together[row], twice[0], atol=1e-3, rtol=0)


def test_every_operation_is_drawn_in_both_ways_with_the_magnitude():
    looks = data(AugmentConfig(randaugment=2, magnitude=7)).augmentation.looks(range(1400), 0)
    counts = Counter(operation for look in looks for operation in look.operations)
    assert counts.keys() == {(name, sign * 0.7) for name in OPERATIONS for sign in (1, -1)}
    assert min(counts.values()) > 60  # of 100 expected


def test_grey_images_are_varied_too():
    made = batch(data(replace(ALL, randaugment=6), FLAT), list(range(20)))
    assert made.images.shape == (20, 1, S, S) and made.images.isfinite().all()


def test_affine_operations_keep_the_middle():
    pixels = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    pixels[..., 16, 16] = 200
    for name in AFFINE:
        if not name.startswith("translate"):
            out = rand_augment(pixels, [((name, 0.7),)], [0.0] * 3)
            assert out[0, 0, 16, 16].item() == pytest.approx(200, abs=0.1), name


# ---------------------------------------------------------------- what cannot be


def test_without_kornia_randaugment_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    data(replace(ALL, randaugment=0))
    with pytest.raises(InputError, match=r"pip install 'qkv\[vision\]'"):
        data(ALL)


def test_a_padding_that_can_push_an_image_out_of_sight_is_refused():
    with pytest.raises(InputError, match="crop_padding is 16; the images have only 16 pixels"):
        data(AugmentConfig(crop_padding=S))


def test_regions_cover_photos_from_the_least_area_to_all_of_it():
    looks = data(AugmentConfig(crop_area=0.08)).augmentation.looks(range(1000), 0)
    areas, ratios = zip(*((look.region.area, look.region.ratio) for look in looks), strict=True)
    assert 0.08 <= min(areas) < 0.1 and 0.98 < max(areas) <= 1
    assert 3 / 4 <= min(ratios) < 0.77 and 1.31 < max(ratios) <= 4 / 3
    assert abs(np.mean(np.log(ratios))) < 0.02 and math.isclose(np.mean(areas), 0.54, abs_tol=0.03)
