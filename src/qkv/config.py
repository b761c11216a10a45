"""What a run is made of: strict, frozen settings of models, tokenizers, data and training.

Every setting is a field of a dataclass here, so TOML files, command-line flags and Python share
one list of names, types and defaults. An unknown key is an error that names the nearest known one.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from qkv.errors import InputError

Family = Literal["transformer", "bert", "gpt", "vit"]
FAMILIES: tuple[Family, ...] = get_args(Family)

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
BertHead = Literal["none", "pooler", "pretraining", "masked_lm", "classification", "tagging"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the four families have in common: the sizes and the make of their blocks."""

    dim: int = 768
    """Width D of the residual stream."""
    depth: int = 12
    """Number of blocks (of the encoder and of the decoder each, where there are both)."""
    heads: int = 12
    """Attention heads H; each is D / H wide."""
    mlp_dim: int = 3072
    """Inner width F of the feed-forward network."""
    activation: Activation = "gelu"
    norm_first: bool = False
    """False: post-norm, norm(x + f(x)) (Vaswani et al. 2017). True: pre-norm, x + f(norm(x))."""
    norm_eps: float = 1e-5
    dropout: float = 0.1
    """After embeddings and after every sub-layer, before it joins the residual stream."""
    attention_dropout: float = 0.0
    """On attention probabilities."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.dim % self.heads:
            raise InputError(f"model.dim {self.dim} is not divisible by model.heads {self.heads}")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """The encoder-decoder Transformer of Vaswani et al. 2017; the defaults are its base model."""

    family: Literal["transformer"] = "transformer"
    vocab_size: int = 37000
    """One vocabulary for both languages: the paper's byte-pair encoding of English and German."""
    context: int = 512
    """Longest source or target in tokens."""
    dim: int = 512
    depth: int = 6
    heads: int = 8
    mlp_dim: int = 2048
    activation: Activation = "relu"
    pad_id: int = 0
    """Starts every target and is never produced; Marian folders call it `pad` and `decoder_start`."""
    eos_id: int = 1
    """Ends every source and target."""


@dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """BERT of Devlin et al. 2018; the defaults are bert-base."""

    family: Literal["bert"] = "bert"
    vocab_size: int = 30522
    context: int = 512
    segments: int = 2
    norm_eps: float = 1e-12
    attention_dropout: float = 0.1
    head: BertHead = "pretraining"
    labels: tuple[str, ...] = ()
    """Names of the classes of a classification or tagging head, in the order of its outputs."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelConfig):
    """GPT-1 (post-norm) and GPT-2 (pre-norm) of Radford et al. 2018, 2019; the defaults are GPT-2 124M."""

    family: Literal["gpt"] = "gpt"
    vocab_size: int = 50257
    context: int = 1024
    activation: Activation = "gelu_tanh"
    norm_first: bool = True
    attention_dropout: float = 0.1
    position: Literal["learned", "rotary"] = "learned"
    """Learned position vectors (GPT-1, GPT-2) or rotated queries and keys (Su et al. 2021)."""


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """ViT of Dosovitskiy et al. 2021; the defaults are ViT-B/16 at 224 pixels."""

    family: Literal["vit"] = "vit"
    image_size: int = 224
    """Side of the square training images in pixels; 0: that of the data, filled in when training starts."""
    patch_size: int = 16
    channels: int = 3
    norm_first: bool = True
    norm_eps: float = 1e-12
    dropout: float = 0.0
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of the head's outputs; empty: no head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise InputError(
                f"model.image_size {self.image_size} is not divisible by model.patch_size {self.patch_size}"
            )


AnyModelConfig = TransformerConfig | BertConfig | GPTConfig | ViTConfig
MODEL_CONFIGS: dict[Family, type[AnyModelConfig]] = {
    "transformer": TransformerConfig,
    "bert": BertConfig,
    "gpt": GPTConfig,
    "vit": ViTConfig,
}


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer to train on the training text. A loaded checkpoint brings its own instead."""

    kind: Literal["char", "bpe", "wordpiece"] = "bpe"
    vocab_size: int = 8000
    """Upper bound; small data may give fewer tokens. Characters take what occurs."""
    lowercase: bool = False


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples are and how they are read."""

    path: str = ""
    """A file or folder. Two aligned files are given as `source.en,target.de`."""
    valid: str = ""
    """Held-out data in the same form; empty: split off `valid_fraction` of the training data."""
    valid_fraction: float = 0.1
    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    source: str = "source"
    target: str = "target"
    image: str = "image"
    """Column names of tables."""
    truncate: bool = False
    """Cut samples longer than the context, and report how many. False: such a sample is an error."""

    def __post_init__(self) -> None:
        if not 0.0 < self.valid_fraction < 1.0:
            raise InputError(f"data.valid_fraction is {self.valid_fraction}; it must be between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Names are those of transformers' TrainingArguments where one exists."""

    max_steps: int = 1000
    batch_tokens: int = 4096
    """Tokens of one optimiser step (images count as their patches)."""
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    warmup_steps: int = 100
    weight_decay: float = 0.01
    """On matrices only: never on biases, norms, or vectors."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    label_smoothing_factor: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16 (autocast), weights and optimiser in float32."""
    logging_steps: int = 10
    eval_steps: int = 200
    save_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_tokens", "gradient_accumulation_steps", "logging_steps", "eval_steps",
                     "save_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0:
            raise InputError(f"train.learning_rate is {self.learning_rate}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run; a recipe file holds it as TOML."""

    model: AnyModelConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str = ""
    """A run folder or hub id to start from (fine-tuning); empty: fresh weights."""


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a config dataclass from plain values.

    Raises InputError for an unknown key (with the nearest known one) or a value of the wrong type.
    """
    from pydantic import TypeAdapter, ValidationError

    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {where}{near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
            raise InputError(f"unknown setting {where}{key}{hint}")
    hints = get_type_hints(cls)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        try:
            checked[key] = TypeAdapter(hints[key]).validate_json(_json(value), strict=True)
        except ValidationError as error:
            raise InputError(f"setting {where}{key} = {value!r}: {error.errors()[0]['msg']}") from None
    return cls(**checked)


def _json(value: Any) -> str:
    """JSON text, because pydantic's strict JSON mode accepts exactly what TOML and JSON can say (lists for tuples)."""
    import json

    return json.dumps(value, ensure_ascii=False)


def model_config(values: dict[str, Any]) -> AnyModelConfig:
    """The family's config from plain values with a `family` key."""
    family = values.get("family")
    if family not in MODEL_CONFIGS:
        raise InputError(f"model.family is {family!r}; it must be one of {', '.join(FAMILIES)}")
    return from_dict(MODEL_CONFIGS[family], values, "model.")


def run_config(values: dict[str, Any]) -> RunConfig:
    """A whole run from nested plain values: tables `model`, `tokenizer`, `data`, `train`, and `init`."""
    parts: dict[str, Any] = dict(values)
    parts["model"] = model_config(parts.get("model", {}))
    sections: dict[str, type] = {"tokenizer": TokenizerConfig, "data": DataConfig, "train": TrainConfig}
    for name, cls in sections.items():
        parts[name] = from_dict(cls, parts.get(name, {}), f"{name}.")
    for key in parts:
        if key not in {f.name for f in fields(RunConfig)}:
            raise InputError(f"unknown table [{key}]; a recipe has [model], [tokenizer], [data], [train] and init")
    return RunConfig(**parts)


def read_toml(path: Path) -> RunConfig:
    """Read a recipe or a run's resolved config. Raises InputError for a missing or malformed file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no config file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    return run_config(values)


def write_toml(config: RunConfig) -> str:
    """The resolved config as TOML text that `read_toml` reads back to an equal config."""
    lines = [f"init = {_toml(config.init)}"]
    for name in ("model", "tokenizer", "data", "train"):
        lines += ["", f"[{name}]"]
        section = dataclasses.asdict(getattr(config, name))
        lines += [f"{key} = {_toml(value)}" for key, value in section.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """JSON's scalars, strings and lists are also TOML's, but for the exponent form of floats, which Python shares."""
    return repr(value) if isinstance(value, float) else _json(value)
