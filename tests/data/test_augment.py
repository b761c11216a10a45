"""Augmentation: randomness that belongs to the sample, labels that say what is seen, Pillow as the judge."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import fields, replace

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
    Looks,
    Mixes,
    crop_and_flip,
    inside,
    rand_augment,
)
from qkv.data.batches import ImageBatch
from qkv.data.images import ImageDataset
from qkv.data.raw import ImageFile
from qkv.errors import InputError
from qkv.images import ImageProcessor, Region, edges
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


def draw(config: AugmentConfig, samples: int, epoch: int = 0) -> tuple[Looks, Mixes | None]:
    return data(config).augmentation.draw(epoch, samples)


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


@given(
    rows=st.lists(st.integers(0, 19), min_size=1, max_size=8),
    before=st.lists(st.integers(0, 3), max_size=3),
    epoch=st.integers(0, 3),
)
@settings(deadline=None)
def test_what_is_drawn_depends_on_neither_the_batch_nor_what_was_drawn_before(rows, before, epoch):
    fresh, used = (data(replace(ALL, crop_area=1 - 0.7 * (epoch % 2))).augmentation for _ in range(2))
    for other in before:
        used.draw(other, 20)
    for drawn, again in zip(fresh.draw(epoch, 20), used.draw(epoch, 20), strict=True):
        together = again.take(np.array(rows))
        for field in fields(drawn):
            values, taken = getattr(drawn, field.name), getattr(together, field.name)
            if values is None:
                assert taken is None and field.name == "regions" and epoch % 2 == 0
            else:
                assert all(np.array_equal(values[row], taken[i]) for i, row in enumerate(rows))
                assert len(taken) == len(rows) and len(values) == 20


def test_a_partner_looks_as_it_does_by_itself():
    config, indices = replace(ALL, mixup=0.0), list(range(20))
    alone = batch(data(replace(config, cutmix=0.0)), indices, epoch=2).images
    dataset = data(config)
    mixed, mixes = batch(dataset, indices, epoch=2).images, dataset.augmentation.draw(2, 20)[1]
    for i, (partner, (left, top, right, bottom)) in enumerate(zip(mixes.partners, mixes.boxes, strict=True)):
        expected = alone[i].clone()
        expected[:, top:bottom, left:right] = alone[partner, :, top:bottom, left:right]
        torch.testing.assert_close(mixed[i], expected)


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    """By the test of Kolmogorov and Smirnov: 1 in 3,000 that are uniform fails."""
    expected = (np.sort(values) - low) / (high - low)
    return np.abs(expected - np.linspace(0, 1, len(values))).max() < 2.1 / len(values) ** 0.5


def is_even(values: np.ndarray, kinds: int) -> bool:
    """Whether all whole numbers below `kinds`, and no others, are about equally frequent."""
    counts, expected = np.bincount(values, minlength=kinds), len(values) / kinds
    return len(counts) == kinds and np.abs(counts - expected).max() < 4 * expected**0.5


def test_all_that_is_drawn_has_its_distribution_and_is_independent():
    N = 50_000
    looks, mixes = draw(ALL, N)
    areas, ratios, across, down = looks.regions.T
    assert is_uniform(areas, 0.3, 1)
    assert is_uniform(np.log(ratios), math.log(3 / 4), math.log(4 / 3))
    assert is_uniform(across, 0, 1) and is_uniform(down, 0, 1)
    ways = looks.strengths > 0
    assert set(np.abs(looks.strengths).ravel()) == {np.float32(0.9)}
    for i in range(2):
        assert is_even(looks.shifts[:, i], 5) and is_even(looks.operations[:, i], 14)
        assert is_even(ways[:, i].astype(int), 2)
    assert is_even(looks.mirrored.astype(int), 2)
    erased, cut = looks.erased.any(1), mixes.own == 0
    assert is_even(erased.astype(int), 2) and is_even(cut.astype(int), 2)
    assert is_uniform(mixes.partners, 0, N - 1)
    assert (mixes.boxes[~cut] == (0, 0, S, S)).all()
    blended = mixes.own[~cut]
    assert blended.mean() == pytest.approx(0.5, abs=0.01)
    assert blended.var() == pytest.approx(1 / (4 * (2 * ALL.mixup + 1)), rel=0.03)

    rng = np.random.default_rng(1)
    places = [rng.random(4) for _ in range(20_000)]
    erasing = [Region(0.02 + 0.38 * a, 0.3 ** (2 * b - 1), c, d) for a, b, c, d in places]
    cutting = [Region(1 - a, 1.0, c, d) for a, _, c, d in places]  # Beta(1, 1) is uniform
    for found, regions in ((looks.erased[erased], erasing), (mixes.boxes[cut], cutting)):
        expected = np.array([region.box(S, S) for region in regions]).round()
        assert found.mean(0) == pytest.approx(expected.mean(0), abs=0.1)
        assert np.cov(found.T) == pytest.approx(np.cov(expected.T), abs=0.3)  # of up to 11

    drawn = [np.arange(N), *looks.regions.T, *looks.shifts.T, looks.mirrored, *looks.operations.T, *ways.T]
    together = np.corrcoef([*drawn, erased, mixes.partners, cut])
    assert np.abs(together - np.eye(len(together))).max() < 4.5 / N**0.5


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
    mixes = dataset.augmentation.draw(0, 20)[1]
    for i, (j, share) in enumerate(zip(mixes.partners.tolist(), mixes.shares(S).tolist(), strict=True)):
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
        shares = draw(AugmentConfig(mixup=alpha), 2000)[1].shares(S).numpy()
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
    still, where = np.zeros((4, 2), np.int64), np.array([True, False, True, True])
    once = crop_and_flip(pixels, still, where, 0, (0.5,) * 3)
    assert torch.equal(once[where], pixels[where].flip(-1)) and torch.equal(once[1], pixels[1])
    assert torch.equal(crop_and_flip(once, still, where, 0, (0.5,) * 3), pixels)


@given(left=st.integers(0, 6), top=st.integers(0, 6), mirrored=st.booleans())
def test_crops_are_pillows(left: int, top: int, mirrored: bool):
    image = picture()
    padded = ImageOps.expand(image, 3, (26, 128, 255)).crop((left, top, left + 32, top + 32))
    ours = crop_and_flip(tensor(image), np.array([[left, top]]), np.array([mirrored]), 3, (0.1, 0.5, 1.0))
    assert torch.equal(ours, tensor(ImageOps.mirror(padded) if mirrored else padded))


def test_crops_and_flips_are_spread_evenly():
    looks, _ = draw(AugmentConfig(crop_padding=1, flip=True), 1800)
    kinds, counts = np.unique(np.c_[looks.shifts, looks.mirrored], axis=0, return_counts=True)
    assert kinds.tolist() == [[x, y, m] for x in range(3) for y in range(3) for m in range(2)]
    assert counts.min() > 60  # of 100 expected


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


@given(st.lists(st.tuples(st.floats(1e-4, 1), st.floats(0.1, 10), SHARES, SHARES), min_size=1, max_size=5))
def test_many_regions_have_the_edges_that_each_has(regions):
    assert edges(np.array(regions), 30, 40).tolist() == [list(Region(*r).box(30, 40)) for r in regions]


def test_parts_of_files_are_cut_before_they_are_resized():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8))
    processor = ImageProcessor(20, (0.5,) * 3, (0.5,) * 3)
    cut = processor.pixels(image, Region(area=1 / 6, ratio=1.0, across=0.25, down=1.0))
    expected = processor.pixels(image.crop((20, 40, 60, 80)))
    inner = (..., slice(1, -1), slice(1, -1))  # at its edges, the filter sees what is beyond them
    assert torch.equal(cut[inner], expected[inner])
    dataset = data(AugmentConfig(crop_area=0.3))
    regions = dataset.augmentation.draw(5, 20)[0].regions
    expected = [RANDOM[i].pixels(dataset.processor, Region(*regions[i])) for i in (0, 1)]
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
    some, _ = draw(AugmentConfig(erasing=0.25), 2000)
    assert some.erased.any(1).sum() == pytest.approx(500, abs=80)


def test_boxes_hold_the_pixels_that_slicing_takes():
    boxes = np.array([(0, 0, 0, 0), (1, 2, 5, 4), (0, 0, S, S)])
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


def altered(pixels: Tensor, operations: list[list[tuple[str, float]]], colour: tuple[float, ...]) -> Tensor:
    """`rand_augment` with each image's operations by name."""
    places = np.array([[OPERATIONS.index(name) for name, _ in row] for row in operations])
    strengths = np.array([[strength for _, strength in row] for row in operations], np.float32)
    return rand_augment(pixels, places, strengths, colour)


def moved(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrix, Image.Resampling.BILINEAR, fillcolor=GREY)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_pillows(name: str):
    assert len(OPERATIONS) == 14 and tuple(PILLOWS) == OPERATIONS
    cases = [(picture(i), strength) for i, strength in enumerate((-1.0, -0.9, -0.3, 0.3, 0.6, 0.9, 1.0))]
    pixels = torch.cat([tensor(image) for image, _ in cases])
    ours = altered(pixels, [[(name, strength)] for _, strength in cases], (128 / 255,) * 3)
    assert ours.min() >= 0 and ours.max() <= 255
    for (image, strength), made in zip(cases, ours, strict=True):
        difference = (made - tensor(PILLOWS[name](image, strength))[0]).abs()
        # Pillow cuts to whole levels in between. Its mirror of a level at a threshold may differ by all.
        assert difference.mean() < 1 and difference.quantile(0.99) <= 2, (strength, difference.max())


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize")])
def test_no_strength_is_no_change(name: str):
    pixels = tensor(picture())
    torch.testing.assert_close(altered(pixels, [[(name, 0.0)]], (0.5,) * 3), pixels.float())


def test_operations_follow_each_other_in_the_order_drawn():
    pixels = torch.cat([tensor(picture(0)), tensor(picture(1))])
    names = [[("rotate", 0.5), ("solarize", 0.9)], [("solarize", 0.9), ("shear_x", -0.5)]]
    together = altered(pixels, names, (0.2,) * 3)
    for row, (first, second) in enumerate(names):
        once = altered(pixels[row : row + 1], [[first]], (0.2,) * 3)
        twice = altered(once, [[second]], (0.2,) * 3)
        torch.testing.assert_close(together[row], twice[0], atol=1e-3, rtol=0)


def test_every_operation_is_drawn_in_both_ways_with_the_magnitude():
    looks, _ = draw(AugmentConfig(randaugment=2, magnitude=7), 1400)
    operations = np.c_[looks.operations.ravel(), looks.strengths.ravel()]
    kinds, counts = np.unique(operations, axis=0, return_counts=True)
    assert kinds == pytest.approx(np.array([(i, s) for i in range(len(OPERATIONS)) for s in (-0.7, 0.7)]))
    assert counts.min() > 60  # of 100 expected


def test_grey_images_are_varied_too():
    made = batch(data(replace(ALL, randaugment=6), FLAT), list(range(20)))
    assert made.images.shape == (20, 1, S, S) and made.images.isfinite().all()


def test_affine_operations_keep_the_middle():
    pixels = torch.zeros(1, 3, 33, 33, dtype=torch.uint8)
    pixels[..., 16, 16] = 200
    for name in AFFINE:
        if not name.startswith("translate"):
            out = altered(pixels, [[(name, 0.7)]], (0.0,) * 3)
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
    areas, ratios, _, _ = draw(AugmentConfig(crop_area=0.08), 1000)[0].regions.T
    assert 0.08 <= areas.min() < 0.1 and 0.98 < areas.max() <= 1
    assert 3 / 4 <= ratios.min() < 0.77 and 1.31 < ratios.max() <= 4 / 3
    assert abs(np.mean(np.log(ratios))) < 0.02 and math.isclose(np.mean(areas), 0.54, abs_tol=0.03)
