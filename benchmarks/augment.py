"""Images a second of each augmentation, on one thread of the CPU.

usage: python benchmarks/augment.py [BATCH [SIDE]]   (default: batches of 128 RGB images of 32 x 32 pixels)

Times what training does with decoded images: drawing what happens to each sample, working on the pixels,
and normalising them. Medians of the thread's own CPU time, so that other work on the machine counts little;
the settings are interleaved, and the first, without any augmentation, is what the others add to. The last two
lines are kornia's own modules, whose RandAugment draws one operation for a whole batch.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable

import kornia.augmentation
import numpy as np
import torch
from PIL import Image

from qkv.config import AugmentConfig
from qkv.data.augment import Augmentation
from qkv.data.images import ImageDataset
from qkv.data.raw import ImageFile
from qkv.images import ImageProcessor

ROUNDS, CLASSES = 15, 10
SETTINGS = {
    "nothing": AugmentConfig(),
    "crop of padded image": AugmentConfig(crop_padding=4),
    "flip": AugmentConfig(flip=True),
    "crop of file's image": AugmentConfig(crop_area=0.08),
    "RandAugment, 1 operation": AugmentConfig(randaugment=1),
    "RandAugment, 2 operations": AugmentConfig(randaugment=2),
    "erasing": AugmentConfig(erasing=0.25),
    "mixup": AugmentConfig(mixup=0.8),
    "CutMix": AugmentConfig(cutmix=1.0),
    "crop, flip": AugmentConfig(crop_padding=4, flip=True),
    "crop, flip, RandAugment 2": AugmentConfig(crop_padding=4, flip=True, randaugment=2),
    "all but crop of file": AugmentConfig(
        crop_padding=4, flip=True, randaugment=2, erasing=0.25, mixup=0.8, cutmix=1.0
    ),
}


def main(batch: int = 128, side: int = 32) -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    files = []
    for i in range(batch):
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(png, "PNG")
        files.append(ImageFile(f"image {i}", png.getvalue()))
    processor = ImageProcessor(side, (0.5,) * 3, (0.5,) * 3)
    indices = rng.permutation(batch).tolist()

    def ours(config: AugmentConfig) -> Callable[[int], object]:
        made = None if config == AugmentConfig() else Augmentation(config, processor, CLASSES, seed=0)
        dataset = ImageDataset(files, [0] * batch, processor, side, augmentation=made)
        return lambda epoch: dataset.batch(indices, epoch).to("cpu")

    images = torch.rand(batch, 3, side, side)
    peers = {
        "kornia RandAugment(2)": kornia.augmentation.auto.RandAugment(n=2, m=9),
        "kornia crop, flip, RandAugment(2)": torch.nn.Sequential(
            kornia.augmentation.RandomCrop((side, side), padding=4),
            kornia.augmentation.RandomHorizontalFlip(),
            kornia.augmentation.auto.RandAugment(n=2, m=9),
        ),
    }
    jobs = {name: ours(config) for name, config in SETTINGS.items()}
    jobs |= {name: lambda epoch, peer=peer: peer(images) for name, peer in peers.items()}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for epoch in range(ROUNDS + 1):  # the first one warms up
        for name, job in jobs.items():
            start = time.thread_time()
            job(epoch)
            times[name].append(time.thread_time() - start)
    print(f"batches of {batch} RGB images of {side} x {side}, 1 thread, torch {torch.__version__}")
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        print(f"{name:34} {1e3 * median:7.2f} ms a batch  {batch / median:9,.0f} images a second")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
