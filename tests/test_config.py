"""Settings: what is accepted, what is refused and in which words, and the way to TOML and back."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkv.config import (
    FAMILIES,
    MODEL_CONFIGS,
    AugmentConfig,
    BertConfig,
    DataConfig,
    GPTConfig,
    LoraConfig,
    LoraTarget,
    ModelConfig,
    RunConfig,
    TokenizerConfig,
    TrackerName,
    TrainConfig,
    TransformerConfig,
    ViTConfig,
    from_dict,
    model_config,
    read_toml,
    run_config,
    write_toml,
)
from qkv.errors import InputError
from qkv.recipes import default_recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all of Unicode but lone surrogates
FRACTION = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
COUNT = st.integers(1, 2**40)


def changed(base: Any, **choices: st.SearchStrategy) -> st.SearchStrategy:
    """The config `base` with these fields drawn, the others as they are."""
    return st.builds(lambda values: replace(base, **values), st.fixed_dictionaries({}, optional=choices))


MODELS = st.one_of(
    changed(
        GPTConfig(),
        dropout=FRACTION,
        word_dropout=FRACTION,
        norm_eps=POSITIVE,
        norm_first=st.booleans(),
        depth=COUNT,
    ),
    changed(BertConfig(), labels=st.lists(TEXT).map(tuple), head=st.sampled_from(["tagging", "masked_lm"])),
    changed(
        TransformerConfig(),
        context=COUNT,
        word_dropout=FRACTION,
        activation=st.sampled_from(["relu", "silu"]),
    ),
    changed(ViTConfig(), labels=st.lists(TEXT).map(tuple), channels=COUNT, drop_path=FRACTION),
    changed(ViTConfig(), stem=st.sampled_from(["patches", "convolutions"])),
    changed(ViTConfig(), position=st.sampled_from(["learned", "rotary"]), qk_norm=st.booleans()),
)
RUNS = st.builds(
    RunConfig,
    model=MODELS,
    tokenizer=changed(
        TokenizerConfig(), kind=st.sampled_from(["char", "wordpiece"]), lowercase=st.booleans()
    ),
    data=changed(DataConfig(), path=TEXT, text=TEXT, label=TEXT, truncate=st.booleans()),
    train=changed(TrainConfig(), learning_rate=POSITIVE, adam_beta2=FRACTION, seed=st.integers(0, 2**31 - 1)),
    lora=changed(LoraConfig(), rank=COUNT, alpha=COUNT, dropout=FRACTION, targets=st.just(("up", "out"))),
    init=TEXT,
) | st.builds(
    RunConfig,
    model=st.just(ViTConfig()),
    augment=changed(AugmentConfig(), crop_padding=COUNT, flip=st.booleans(), mixup=POSITIVE),
)


# ---------------------------------------------------------------- TOML


@given(RUNS)
def test_what_is_written_is_read_back_equal(config: RunConfig):
    assert run_config(tomllib.loads(write_toml(config))) == config


@given(RUNS)
def test_a_file_keeps_every_character(tmp_path_factory, config: RunConfig):
    path = tmp_path_factory.getbasetemp() / "config.toml"
    path.write_text(write_toml(config), encoding="utf-8")
    assert read_toml(path) == config


def test_every_setting_is_written():
    written = tomllib.loads(write_toml(RunConfig(model=BertConfig(labels=('tab\t"quote"', "é\x7f\u2028")))))
    assert set(written) == {"init", "model", "tokenizer", "data", "augment", "train", "lora"}
    assert set(written["model"]) == {field.name for field in fields(BertConfig)}
    assert set(written["train"]) == {field.name for field in fields(TrainConfig)}
    assert written["model"]["labels"] == ['tab\t"quote"', "é\x7f\u2028"]


def test_absent_tables_and_settings_take_their_defaults():
    assert run_config({"model": {"family": "gpt", "depth": 3}}) == RunConfig(model=GPTConfig(depth=3))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_found_by_its_name(family):
    config = model_config({"family": family})
    assert type(config) is MODEL_CONFIGS[family]
    assert config.family == family


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"no config file .*absent\.toml"):
        read_toml(tmp_path / "absent.toml")
    for name, content in [("broken.toml", b"[model\n"), ("latin.toml", 'init = "é"'.encode("latin-1"))]:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is not valid TOML"):
            read_toml(path)


# ---------------------------------------------------------------- names and types


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"family": "gpt", "dimm": 3}}, "unknown setting model.dimm; did you mean model.dim?"),
        (
            {"train": {"learnin_rate": 1.0}},
            "unknown setting train.learnin_rate; did you mean train.learning_rate?",
        ),
        ({"data": {"zzzz": 1}}, "unknown setting data.zzzz; known: "),
        ({"trian": {}}, "unknown setting trian; "),
        ({"model": {}}, "model.family is None; it must be one of transformer, bert, gpt, vit"),
        ({"model": {"family": ["gpt"]}}, "model.family is ['gpt']; it must be one of"),
        ({"model": 3}, "model = 3: it must be a table"),
        ({"train": []}, "train = []: it must be a table"),
        ({"init": 3}, "init = 3: it must be a string"),
        ({"model": {"family": "bert", "segment": 1}}, "did you mean model.segments?"),
    ],
)
def test_unknown_names_and_tables_are_refused(values: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        run_config({"model": {"family": "gpt"}} | values)
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.sampled_from([f.name for f in fields(TrainConfig)]), st.data())
def test_a_misspelt_setting_names_the_nearest_one(name: str, data):
    at = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:at] + name[at + 1 :]
    # adam_beta is as near to adam_beta2 as to adam_beta1.
    near = name.replace("beta1", "beta[12]") if misspelt == "adam_beta" else name
    with pytest.raises(InputError, match=f"did you mean train.{near}\\?"):
        from_dict(TrainConfig, {misspelt: 1}, "train.")


SECTIONS = [*MODEL_CONFIGS.values(), TokenizerConfig, DataConfig, AugmentConfig, TrainConfig, LoraConfig]

WRONG: dict[Any, list[Any]] = {
    int: [1.5, "1", True, [], {}, None],
    float: ["1", True, [], {}, None],
    str: [1, 1.0, True, [], {}, None],
    bool: [1, 0.0, "true", [], {}, None],
    tuple[str, ...]: ["ab", 1, [1], [["a"]], {}, None],
    tuple[float, ...]: ["ab", 1.0, ["a"], [True], {}, None],
    tuple[LoraTarget, ...]: ["qkv", 1, ["no such choice"], {}, None],
    tuple[TrackerName, ...]: ["wandb", 1, ["no such choice"], {}, None],
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_value_of_the_wrong_type_is_refused(section: type):
    for name, hint in get_type_hints(section).items():
        wrong = WRONG.get(hint, ["no such choice", 1, True, [], None])
        assert hint in WRONG or all(isinstance(choice, str) for choice in get_args(hint)), name
        for value in wrong:
            with pytest.raises(InputError, match=f"setting x.{name} = ") as error:
                from_dict(section, {name: value}, "x.")
            assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text("\ufeff" + write_toml(default_recipe("gpt")), encoding="utf-8")
    assert read_toml(path) == default_recipe("gpt")


def test_what_toml_can_say_exactly_is_taken():
    assert from_dict(TrainConfig, {"learning_rate": 1}).learning_rate == 1.0
    assert from_dict(ViTConfig, {"labels": ["a", "b"]}).labels == ("a", "b")
    dated = tomllib.loads('labels = [2020-01-31, "x"]')  # TOML has dates, settings have not
    assert from_dict(ViTConfig, dated).labels == ("2020-01-31", "x")


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(InputError, match=r"setting data\.path"):
        run_config({"model": {"family": "gpt"}, "data": {"path": "caf\udce9"}})


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().dim = 3  # type: ignore[misc]


# ---------------------------------------------------------------- values

REFUSED: dict[str, float] = {
    "dim": 0, "depth": 0, "heads": 0, "mlp_dim": 0, "vocab_size": 0, "context": 0, "segments": 0,
    "patch_size": 0, "channels": 0, "image_size": -1, "norm_eps": 0.0, "dropout": -0.1,
    "attention_dropout": -0.1, "pad_id": -1, "eos_id": -1,
    "max_steps": 0, "batch_tokens": 0, "gradient_accumulation_steps": 0, "logging_steps": 0,
    "eval_steps": 0, "save_steps": 0, "learning_rate": 0.0, "adam_epsilon": 0.0, "max_grad_norm": 0.0,
    "warmup_steps": -1, "weight_decay": -0.1, "seed": 2**31, "adam_beta1": -0.1, "adam_beta2": -0.1,
    "label_smoothing_factor": -0.1, "valid_fraction": 0.0, "drop_path": -0.1, "crop_area": 0.0,
    "word_dropout": -0.1,
    "crop_padding": -1, "randaugment": -1, "magnitude": 10.1, "erasing": 1.1, "mixup": -0.1, "cutmix": -0.1,
    "rank": -1, "alpha": 0, "r_drop": -0.1, "layer_decay": 0.0, "ema_decay": -0.1,
    "average_checkpoints": 0, "save_total_limit": 0, "early_stopping_patience": -1, "shard_ranks": 0,
    "bpe_dropout": -0.1, "masked_share": 1.0, "candidates": 1, "temperature": 0.0,
}  # fmt: skip
BELOW_ONE = [
    "dropout",
    "attention_dropout",
    "word_dropout",
    "drop_path",
    "adam_beta1",
    "adam_beta2",
    "label_smoothing_factor",
    "valid_fraction",
    "bpe_dropout",
]


@pytest.mark.parametrize("section", SECTIONS)
def test_numbers_out_of_range_are_named(section: type):
    for name, hint in get_type_hints(section).items():
        if hint not in (int, float):
            continue
        bad = (
            [REFUSED[name]] + ([1.0] if name in BELOW_ONE else []) + ([float("nan")] if hint is float else [])
        )
        for value in bad:
            with pytest.raises(InputError, match=rf"\.{name} is {value}; it must be "):
                section(**{name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(dim=10, heads=4), "model.dim 10 is not divisible by model.heads 4"),
        (lambda: ViTConfig(image_size=30), "model.image_size 30 is not divisible by model.patch_size 16"),
        (
            lambda: ViTConfig(image_size=24, patch_size=6, dim=12, stem="convolutions"),
            "model.patch_size is 6; it must be a power of two from 2 up, as model.stem convolutions",
        ),
        (
            lambda: ViTConfig(patch_size=1, stem="convolutions"),
            "model.patch_size is 1; it must be a power of two",
        ),
        (
            lambda: ViTConfig(dim=36, patch_size=8, stem="convolutions"),
            "model.dim 36 is not divisible by model.patch_size 8, as model.stem convolutions needs it",
        ),
        (lambda: TransformerConfig(vocab_size=5, eos_id=5), "model.eos_id is 5; it must be an id below"),
        (lambda: GPTConfig(dim=12, heads=4, position="rotary"), "model.dim / model.heads is 3; rotary"),
        (
            lambda: ViTConfig(dim=12, heads=2, position="rotary"),
            "is 6; rotary positions need a multiple of 4",
        ),
        (
            lambda: RunConfig(model=GPTConfig(), augment=AugmentConfig(flip=True)),
            "augment varies images, but a gpt reads text: leave it out",
        ),
        (
            lambda: TrainConfig(learning_rate=float("inf")),
            "train.learning_rate is inf; it must be a positive",
        ),
        (lambda: LoraConfig(targets=()), "lora.targets is empty; choose some of qkv, out, up, down"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(make, message: str):
    with pytest.raises(InputError, match=message):
        make()


def test_reading_settings_does_not_import_torch():
    code = "import sys, qkv.config; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
