"""Short windows and small images first."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import samples
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qkv.config import BertConfig, DataConfig, GPTConfig, RunConfig, TokenizerConfig, TrainConfig, ViTConfig
from qkv.data.batches import ImageBatch, LanguageBatch
from qkv.errors import InputError
from qkv.growth import check, share_at, shrunk
from qkv.job import new_job
from qkv.models import build
from qkv.objectives import Objective, item_counts
from qkv.ragged import pack
from qkv.trainer import Trainer

SIZES = {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8, "dropout": 0.0, "attention_dropout": 0.0}


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]),
)
def test_cut_windows_hold_every_token_once_and_in_order(lengths: list[int], share: float):
    values = torch.arange(sum(lengths))
    batch = LanguageBatch(pack(list(values.split(lengths))), values + 1)
    cut, left = shrunk(batch, share)
    assert left == 1.0
    assert torch.equal(cut.ids.values, values)
    assert torch.equal(cut.labels, values + 1)
    ends = np.cumsum(cut.ids.layout.lengths)
    assert set(np.cumsum(lengths)) <= set(ends)  # no window crosses the end of one that it was cut from
    assert max(cut.ids.layout.lengths) <= max(round(max(lengths) * share), 1)


@given(st.integers(1, 50), st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=1, max_size=5))
def test_every_share_has_its_equal_part_of_the_run(steps: int, growth: list[float]):
    config = TrainConfig(max_steps=steps * len(growth), growth=tuple(growth))
    shares = [share_at(step, config) for step in range(1, config.max_steps + 1)]
    assert shares == [share for share in growth for _ in range(steps)]


def test_without_growth_samples_are_whole():
    batch = ImageBatch(torch.zeros(1, 1, 4, 4), torch.tensor([0]))
    assert shrunk(batch, share_at(1, TrainConfig())) == (batch, 1.0)


def test_images_are_scaled_as_pillow_scales_them():
    picture = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    small, left = shrunk(ImageBatch(picture[None, None], torch.tensor([0])), 0.5)
    expected = Image.fromarray(picture.numpy(), mode="F").resize((8, 8), Image.Resampling.BILINEAR)
    torch.testing.assert_close(small.images[0, 0], torch.from_numpy(np.array(expected)), atol=1e-5, rtol=0)
    assert left == 0.25


def test_a_cut_batch_has_the_loss_of_its_windows_alone():
    model = build(GPTConfig(**SIZES, vocab_size=9, context=12)).double().eval()
    values = torch.randint(9, (25,), generator=torch.Generator().manual_seed(0))
    cut, _ = shrunk(LanguageBatch(pack([values[:12], values[12:24]]), values[1:]), 0.5)
    alone = [
        torch.nn.functional.cross_entropy(
            model(pack([values[i : i + 6]])).logits.values, values[i + 1 : i + 7], reduction="sum"
        )
        for i in range(0, 24, 6)
    ]
    loss = Objective(model)(cut, item_counts(cut))
    torch.testing.assert_close(loss, sum(alone).float() / 24)


@pytest.mark.parametrize(
    ("model", "growth", "message"),
    [
        (GPTConfig(context=10), (0.25, 1.0), "0.25 of model.context 10 is not a multiple of 1"),
        (ViTConfig(image_size=32, patch_size=8), (0.6,), "0.6 of model.image_size 32 is not a multiple of 8"),
        (BertConfig(), (0.5,), "not for a bert"),
    ],
)
def test_sizes_that_samples_cannot_have_are_refused(model, growth, message: str):
    with pytest.raises(InputError, match=message):
        check(TrainConfig(growth=growth), model)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_shares_are_above_0_and_at_most_1(share: float):
    with pytest.raises(InputError, match=r"train\.growth"):
        TrainConfig(growth=(share,))


@pytest.mark.parametrize(
    ("family", "model", "tokens"),
    [
        ("gpt", GPTConfig(**SIZES, context=8), [64, 64]),
        ("vit", ViTConfig(**SIZES, image_size=8, patch_size=2), [16, 64]),
        ("vit", ViTConfig(**SIZES, image_size=8, patch_size=2, position="rotary"), [16, 64]),
    ],
)
def test_steps_report_the_tokens_that_they_read(family: str, model, tokens: list[int], tmp_path):
    train = TrainConfig(max_steps=2, batch_tokens=64, growth=(0.5, 1.0), precision="fp32")
    data = DataConfig(path=samples.write(tmp_path, family))
    config = RunConfig(model=model, tokenizer=TokenizerConfig(kind="char"), data=data, train=train)
    job = new_job(config)
    trainer = Trainer(job.config.train, job.checkpoint, job.train)
    count = 64 // int(job.train.costs[0])
    records = [trainer.step(trainer.data(0, range(count)), step) for step in (1, 2)]
    assert [record["tokens"] for record in records] == tokens
    with pytest.raises(InputError, match="not a multiple"):
        new_job(dataclasses.replace(config, train=dataclasses.replace(train, growth=(0.3,))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growth": (0.5, 0.75)}, "train.growth ends with 0.75: it must end with 1"),
        ({"growth": (0.75, 1.0), "torch_compile": True}, "windows of equal length, and train.growth 0.75"),
    ],
)
def test_growth_ends_at_full_size_and_compiled_windows_are_alike(settings: dict, message: str):
    model = GPTConfig(**SIZES, context=32)
    check(TrainConfig(growth=(0.5, 1.0), torch_compile=True), model)
    with pytest.raises(InputError, match=message):
        check(TrainConfig(**settings), model)
