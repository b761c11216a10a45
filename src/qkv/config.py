"""What can be set: strict, frozen settings of models, tokenizers, data, training and decoding.

Every setting is a field of a dataclass here, so TOML files, command-line flags and Python share
one list of names, types and defaults. An unknown key is an error that names the nearest known one.
This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from qkv.errors import InputError

Family = Literal["transformer", "bert", "gpt", "vit"]
FAMILIES: tuple[Family, ...] = get_args(Family)

Activation = Literal["relu", "relu2", "gelu", "gelu_tanh", "silu"]
TrackerName = Literal["tensorboard", "trackio", "wandb"]
BertHead = Literal[
    "none", "pooler", "pretraining", "masked_lm", "classification", "multi_label", "regression", "tagging"
]
Task = Literal["classification", "multi_label", "regression", "tagging", "contrastive"]
BleuTokenizer = Literal["13a", "intl", "char", "none"]
"""How sacreBLEU splits texts into words; none: at spaces only, for texts that are tokenised already."""
InferencePrecision = Literal["fp32", "bf16", "int8"]
ExplanationMethod = Literal[
    "attention", "rollout", "flow", "relevance", "gradient_x_input", "integrated_gradients", "occlusion"
]
"""How to say what matters in an input."""

T = TypeVar("T")


def _check(where: str, config: object, accepts: Callable[[float], bool], rule: str, *names: str) -> None:
    """Raise InputError for the first of these settings that is not accepted (NaN never is).

    where: what stands before their names, as in train.max_steps.
    """
    for name in names:
        value = getattr(config, name)
        if not accepts(value):
            raise InputError(f"{where}{name} is {value}; it must be {rule}")


_COUNT = (lambda value: value >= 1, "at least 1")
_POSITIVE = (lambda value: 0.0 < value < math.inf, "a positive number")
_NOT_NEGATIVE = (lambda value: 0.0 <= value < math.inf, "0 or more")
_SEED = (lambda value: 0 <= value < 2**31, "0 or more and below 2147483648")
_FRACTION = (lambda value: 0.0 <= value < 1.0, "at least 0 and below 1")


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
    """Between the two layers of the feed-forward network; relu2: max(x, 0)² (So et al. 2021)."""
    norm_first: bool = False
    """False: post-norm, norm(x + f(x)) (Vaswani et al. 2017). True: pre-norm, x + f(norm(x))."""
    norm_eps: float = 1e-5
    """Added to the variance under the square root of layer normalisation."""
    dropout: float = 0.1
    """After embeddings and after every sub-layer, before it joins the residual stream."""
    attention_dropout: float = 0.0
    """On attention probabilities."""
    drop_path: float = 0.0
    """Share of sequences that skip a sub-layer in training (stochastic depth): 0 in the first block, rising
    linearly to this in the last."""

    def __post_init__(self) -> None:
        _check("model.", self, *_COUNT, "dim", "depth", "heads", "mlp_dim")
        _check("model.", self, *_POSITIVE, "norm_eps")
        _check("model.", self, *_FRACTION, *self.dropouts)
        if self.dim % self.heads:
            raise InputError(f"model.dim {self.dim} is not divisible by model.heads {self.heads}")

    @property
    def dropouts(self) -> dict[str, Any]:
        """All that a run may choose anew for a checkpoint that it begins from."""
        names = ("dropout", "attention_dropout", "word_dropout", "drop_path")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


@dataclass(frozen=True, kw_only=True)
class TextConfig(ModelConfig):
    """What the three families that read text have in common."""

    vocab_size: int
    """Tokens V of the vocabulary; in training the tokenizer's."""
    context: int
    """Longest text in tokens."""
    word_dropout: float = 0.0
    """Share of tokens whose embedding is 0 in training (Iyyer et al. 2015, 3.2; Sennrich and Zhang 2019)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("model.", self, *_COUNT, "vocab_size", "context")


def _check_rotary(config: GPTConfig | TransformerConfig | ViTConfig, multiple: int) -> None:
    width = config.dim // config.heads
    if config.position == "rotary" and width % multiple:
        raise InputError(
            f"model.dim / model.heads is {width}; rotary positions need a multiple of {multiple}"
        )


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(TextConfig):
    """The encoder-decoder Transformer of Vaswani et al. 2017; the defaults are its base model."""

    family: Literal["transformer"] = "transformer"
    """Which of the four models: the Transformer."""
    vocab_size: int = 37000
    """One vocabulary for both languages: the paper's byte-pair encoding of English and German."""
    context: int = 512
    """Longest source or target in tokens."""
    dim: int = 512
    depth: int = 6
    heads: int = 8
    mlp_dim: int = 2048
    activation: Activation = "relu"
    position: Literal["sinusoidal", "rotary"] = "sinusoidal"
    """Added vectors (Vaswani et al. 2017, 3.5), or rotated queries and keys in self-attention (Su et al.
    2021)."""
    qk_norm: bool = False
    """Layer normalisation of each head's queries and keys in self-attention (Dehghani et al. 2023, 2); with
    rotary position."""
    pad_id: int = 0
    """Starts every target and is never produced; Marian folders call it `pad` and `decoder_start`."""
    eos_id: int = 1
    """Ends every source and target."""

    def __post_init__(self) -> None:
        super().__post_init__()
        inside = (
            lambda value: 0 <= value < self.vocab_size,
            f"an id below model.vocab_size {self.vocab_size}",
        )
        _check("model.", self, *inside, "pad_id", "eos_id")
        _check_rotary(self, 2)


@dataclass(frozen=True, kw_only=True)
class BertConfig(TextConfig):
    """BERT of Devlin et al. 2018; the defaults are bert-base."""

    family: Literal["bert"] = "bert"
    """Which of the four models: BERT."""
    vocab_size: int = 30522
    context: int = 512
    """Longest text in tokens, special ones included."""
    segments: int = 2
    """Kinds of segments: 2 tell the first text of a pair from the second."""
    norm_eps: float = 1e-12
    attention_dropout: float = 0.1
    head: BertHead = "pretraining"
    """What the outputs are for; in training the data decide."""
    labels: tuple[str, ...] = ()
    """Names of the outputs of a classification, multi_label, regression or tagging head, in their order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("model.", self, *_COUNT, "segments")


@dataclass(frozen=True, kw_only=True)
class GPTConfig(TextConfig):
    """GPT-1 (post-norm) and GPT-2 (pre-norm) of Radford et al. 2018, 2019; the defaults are GPT-2 124M."""

    family: Literal["gpt"] = "gpt"
    """Which of the four models: GPT."""
    vocab_size: int = 50257
    context: int = 1024
    """Longest text in tokens; training windows have this length."""
    activation: Activation = "gelu_tanh"
    norm_first: bool = True
    attention_dropout: float = 0.1
    position: Literal["learned", "rotary"] = "learned"
    """Learned position vectors (GPT-1, GPT-2) or rotated queries and keys (Su et al. 2021)."""
    qk_norm: bool = False
    """Layer normalisation of each head's queries and keys (Dehghani et al. 2023, 2); with rotary position."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_rotary(self, 2)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
    """ViT of Dosovitskiy et al. 2021; the defaults are ViT-B/16 at 224 pixels."""

    family: Literal["vit"] = "vit"
    """Which of the four models: ViT."""
    image_size: int = 224
    """Side in pixels of the squares that images are resized to; 0: the shorter side of most of the data, but
    at most 16 patches, which with patches of 4 is 64."""
    patch_size: int = 16
    """Side of the square patches, a token each, in pixels."""
    stem: Literal["patches", "convolutions"] = "patches"
    """What makes tokens of pixels: a matrix that reads patches, or 3x3 convolutions (Xiao et al. 2021)."""
    channels: int = 3
    """1 for grey images, 3 for RGB; in training what most images are."""
    norm_first: bool = True
    norm_eps: float = 1e-12
    dropout: float = 0.0
    position: Literal["learned", "rotary"] = "learned"
    """Learned vectors added to patches, or rotated queries and keys, half of the pairs by row, half by column
    (Heo et al. 2024)."""
    qk_norm: bool = False
    """Layer normalisation of each head's queries and keys (Dehghani et al. 2023, 2); with rotary position."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the order of the head's outputs; empty: no head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("model.", self, *_COUNT, "patch_size", "channels")
        _check("model.", self, *_NOT_NEGATIVE, "image_size")
        _check_rotary(self, 4)
        if self.image_size % self.patch_size:
            raise InputError(
                f"model.image_size {self.image_size} is not divisible by model.patch_size {self.patch_size}"
            )
        if self.stem == "convolutions":
            power_of_two = (
                lambda value: value >= 2 and value.bit_count() == 1,
                "a power of two from 2 up, as model.stem convolutions halves images",
            )
            _check("model.", self, *power_of_two, "patch_size")
            if self.dim % self.patch_size:
                raise InputError(
                    f"model.dim {self.dim} is not divisible by model.patch_size {self.patch_size}, as "
                    "model.stem convolutions needs it"
                )

    @property
    def stem_depth(self) -> int:
        """3x3 convolutions of a convolutional stem: one, and one more for each time that it halves images."""
        return self.patch_size.bit_length()


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

    path: str = ""
    """A folder or hub id whose tokenizer fresh weights take as it is; empty: train one, as is said below."""
    kind: Literal["char", "bpe", "wordpiece"] = "bpe"
    """Characters, byte pairs of UTF-8 (GPT-2's way), or word pieces (BERT's way)."""
    vocab_size: int = 8000
    """Upper bound; small data may give fewer tokens. Characters take what occurs."""
    lowercase: bool = False
    """Read all text as lower case."""

    def __post_init__(self) -> None:
        _check("tokenizer.", self, *_COUNT, "vocab_size")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples are and how they are read."""

    path: str = ""
    """A file or folder. Two aligned files are given as `source.en,target.de`."""
    valid: str = ""
    """Held-out data in the same form; empty: split off `valid_fraction` of the training data."""
    valid_fraction: float = 0.1
    """Share of the training data to hold out where `valid` is empty."""
    task: Literal["auto", Task] = "auto"
    """What BERT learns from labelled or paired texts. auto: what the data tell; in the run's config.toml
    stands what that was."""
    text: str = "text"
    """Column of texts in a table."""
    text_pair: str = "text_pair"
    """Column of second texts, where a class belongs to two texts; optional, and in the config.toml of a run
    that had none empty: then none are read."""
    label: str = "label"
    """Column of classes, for texts and images; of lists of classes (in CSV and TSV with commas between
    them) for multi_label; of numbers for regression."""
    tokens: str = "tokens"
    """Column of lists of words, for tagging."""
    tags: str = "tags"
    """Column of lists of their tags."""
    source: str = "source"
    """Column of texts to translate."""
    target: str = "target"
    """Column of their translations."""
    image: str = "image"
    """Column of image files' bytes in a Parquet file."""
    truncate: bool = False
    """Cut samples longer than the context, and report how many. False: such a sample is an error."""
    whole_words: bool = False
    """Hide all pieces of a word together in masked language modelling; for WordPiece."""
    masked_share: float = 0.15
    """Share of a training text's tokens that masked language modelling predicts; more of them teach more in
    a step (Wettig et al. 2023). Held-out texts are always scored on BERT's 15 %."""
    bpe_dropout: float = 0.0
    """Probability of leaving out each merge of byte pairs in training texts, which gives a word other
    pieces in every epoch (Provilkov et al. 2020); for GPT and Transformer."""
    candidates: int = 64
    """Contrastive learning: texts among which the pair of each text is to be found, about so many."""

    def __post_init__(self) -> None:
        between = (lambda value: 0.0 < value < 1.0, "between 0 and 1")
        _check("data.", self, *between, "valid_fraction", "masked_share")
        _check("data.", self, *_FRACTION, "bpe_dropout")
        several = (lambda value: value >= 2, "at least 2")
        _check("data.", self, *several, "candidates")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How training images are varied at random; as it is, not at all. Held-out images never are."""

    crop_area: float = 1.0
    """Below 1: take a random part of the file's image, of this share of its area or more, and resize it
    (Szegedy et al. 2015). Photos: 0.08 from scratch."""
    crop_padding: int = 0
    """Pad images by so many pixels and cut a random square of their own size (32 pixels a side: 4)."""
    flip: bool = False
    """Mirror half of the images left to right."""
    randaugment: int = 0
    """Operations on each image, 2 as a rule, drawn from RandAugment's fourteen (Cubuk et al. 2020)."""
    magnitude: float = 9.0
    """Strength of these operations, up to 10."""
    erasing: float = 0.0
    """Share of images in which a random rectangle is erased (Zhong et al. 2020)."""
    mixup: float = 0.0
    """Above 0: blend each image and its label with another's, by a share from Beta(mixup, mixup)
    (Zhang et al. 2018)."""
    cutmix: float = 0.0
    """Above 0: replace a rectangle by another image's, of a share from Beta(cutmix, cutmix) (Yun et al.
    2019). With mixup, each image takes one of the two."""

    def __post_init__(self) -> None:
        _check("augment.", self, lambda value: 0.0 < value <= 1.0, "above 0 and at most 1", "crop_area")
        _check("augment.", self, *_NOT_NEGATIVE, "crop_padding", "randaugment", "mixup", "cutmix")
        _check("augment.", self, lambda value: 0.0 <= value <= 10.0, "from 0 to 10", "magnitude")
        _check("augment.", self, lambda value: 0.0 <= value <= 1.0, "from 0 to 1", "erasing")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Names are those of transformers' TrainingArguments where one exists."""

    max_steps: int = 1000
    """Optimiser steps of the whole run."""
    batch_tokens: int = 4096
    """Tokens of one optimiser step: sources with targets, both texts of a pair, the patches of images."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the blocks, those of queries, keys and values apart, and AdamW for the
    rest; one learning rate suits both."""
    learning_rate: float = 1e-3
    """Its highest value, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "inverse_sqrt", "constant"] = "cosine"
    """After the warm-up the rate falls as a cosine to a tenth, linearly to 0, as 1 / sqrt(step), or not."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """On matrices and kernels of convolutions only: never on biases, norms, or vectors."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = 0.98
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to AdamW's divisor."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this one."""
    growth: tuple[float, ...] = ()
    """Lengths of GPT's windows, or sides of ViT's images, in equal parts of the run, as shares of the whole:
    0.5, 0.75 and 1 are half of it in the first third, and so on."""
    gradient_accumulation_steps: int = 1
    """Parts that a step's batch is computed in: more need less memory."""
    label_smoothing_factor: float = 0.0
    """Share of probability that targets give to all classes (Szegedy et al. 2016)."""
    temperature: float = 0.05
    """Divides the cosines of contrastive learning: lower heeds the nearest wrong candidates more."""
    r_drop: float = 0.0
    """Weight of R-Drop: two passes under different dropout should agree (Liang et al. 2021). 0: one pass."""
    layer_decay: float = 1.0
    """Learning rate of each layer relative to the one above it, for fine-tuning (Clark et al. 2020, A.2)."""
    ema_decay: float = 0.0
    """Above 0, what is scored and kept is an exponential moving average of the weights with this decay."""
    average_checkpoints: int = 1
    """What is scored and kept is the mean of the present weights and those of the last saved states, so many
    in all (Vaswani et al. 2017, 6.1)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: matrix products in bfloat16 (autocast), weights and optimiser in float32. auto: where the
    processor has instructions for it; the run's config.toml says which it was."""
    logging_steps: int = 10
    """Steps between records of the training loss."""
    eval_steps: int = 200
    """Steps between scores of the held-out data."""
    save_steps: int = 200
    """Steps between saved states, from which a run can be resumed."""
    save_total_limit: int = 1
    """How many of the last states saved at `save_steps` stay; the newest one always does."""
    early_stopping_patience: int = 0
    """Stop after so many scores in a row without a new best; 0: never."""
    torch_compile: bool = False
    """Compile the blocks with torch.compile, for samples of equal length: GPT's windows, images. It takes its
    time at the first step of a run; torch keeps the result for the next."""
    gradient_checkpointing: bool = False
    """Compute blocks anew in the backward pass instead of keeping what is in them: less memory, more time."""
    shard_ranks: int = 1
    """Of several processes (torchrun), how many share one copy of the weights. 1: each has its own."""
    report_to: tuple[TrackerName, ...] = ()
    """Trackers that get the numbers of metrics.jsonl too; each needs its package."""
    seed: int = 0
    """Decides the initial weights, the order of samples and all that is random."""

    def __post_init__(self) -> None:
        _check("train.", self, *_COUNT, "max_steps", "batch_tokens", "gradient_accumulation_steps")
        _check("train.", self, *_COUNT, "logging_steps", "eval_steps", "save_steps", "save_total_limit")
        _check("train.", self, *_COUNT, "average_checkpoints", "shard_ranks")
        _check("train.", self, *_POSITIVE, "learning_rate", "adam_epsilon", "max_grad_norm", "temperature")
        _check("train.", self, *_NOT_NEGATIVE, "warmup_steps", "weight_decay", "r_drop")
        _check("train.", self, *_NOT_NEGATIVE, "early_stopping_patience")
        _check("train.", self, *_SEED, "seed")
        _check("train.", self, *_FRACTION, "adam_beta1", "adam_beta2", "label_smoothing_factor", "ema_decay")
        _check("train.", self, lambda value: 0.0 < value <= 1.0, "above 0 and at most 1", "layer_decay")
        if not all(0.0 < share <= 1.0 for share in self.growth):
            raise InputError(f"train.growth is {self.growth}; its shares must be above 0 and at most 1")
        if self.ema_decay and self.average_checkpoints > 1:
            raise InputError("set train.ema_decay or train.average_checkpoints, not both")

    def records(self, step: int) -> bool:
        """Whether the training loss of a step is recorded."""
        return step in (1, self.max_steps) or step % self.logging_steps == 0


LoraTarget = Literal["qkv", "out", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters beside the frozen matrices of a checkpoint (Hu et al. 2021), in peft's format."""

    rank: int = 0
    """Rank r of what is learned for each matrix; 0: no adapters, all weights are trained."""
    alpha: int = 16
    """What is learned is multiplied by alpha / r."""
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)
    """Which matrices of every block: those of queries, keys and values (qkv), of attention's output (out),
    and the two of the feed-forward network (up, down)."""
    dropout: float = 0.0
    """On the input of the adapters."""

    def __post_init__(self) -> None:
        _check("lora.", self, *_NOT_NEGATIVE, "rank")
        _check("lora.", self, *_COUNT, "alpha")
        _check("lora.", self, *_FRACTION, "dropout")
        if not self.targets:
            raise InputError(f"lora.targets is empty; choose some of {', '.join(get_args(LoraTarget))}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines a run; a recipe file holds it as TOML."""

    model: AnyModelConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tasks: dict[str, DataConfig] = field(default_factory=dict)
    """In place of data, for BERT: the data of several tasks by name, which one encoder learns with a head
    each (Liu et al. 2019)."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    init: str = ""
    """A run folder or hub id to start from (fine-tuning); empty: fresh weights."""

    def __post_init__(self) -> None:
        if self.model.family != "vit" and self.augment != AugmentConfig():
            raise InputError(f"augment varies images, but a {self.model.family} reads text: leave it out")
        if self.tasks:
            self._check_tasks()

    def _check_tasks(self) -> None:
        first = next(iter(self.tasks))
        if self.model.family != "bert":
            raise InputError(f"tasks are for bert: give a {self.model.family} its data with data.path")
        if self.data != DataConfig():
            raise InputError(f"data are those of tasks or of data, not both: set tasks.{first}, not data")
        if self.lora.rank:
            raise InputError("lora.rank adapts a model of one task: leave it out, or tasks")
        for name in self.tasks:
            # Names of folders beside `state`, where a run keeps what resuming needs.
            if not (name.isascii() and name.isidentifier()) or name == "state":
                raise InputError(
                    f"a task is called {name!r}; names have letters, digits and underscores, begin with no "
                    "digit, and are not 'state'"
                )

    def of_task(self, name: str) -> RunConfig:
        """One of several tasks as a run of its own."""
        return replace(self, data=self.tasks[name], tasks={})


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """What of an explanation a figure shows. Choices, layers and heads count from 0.

    Raises InputError for an option that the figure would ignore.
    """

    figure: Literal["relevance", "attention", "alignment"] = "relevance"
    """A map of relevance over the input, the attention of one head, or a translation's alignment."""
    choice: int = 0
    """Which choice a map of relevance is of: a token generated, a tag, a word hidden."""
    map: Literal["", ExplanationMethod] = ""
    """By which of the methods it is; "": relevance, or the first that the explanation has."""
    stack: Literal["", "encoder", "decoder", "cross"] = ""
    """Whose attention; "": the first that the explanation has."""
    layer: int = 0
    """Its layer in the stack."""
    head: int = 0
    """The head of that layer."""

    def __post_init__(self) -> None:
        for option in fields(self)[1:]:
            wanted = "relevance" if option.name in ("choice", "map") else "attention"
            if wanted != self.figure and getattr(self, option.name) != option.default:
                raise InputError(f"--{option.name} is of a figure of {wanted}: add --figure {wanted}")


BEAMS = 4
"""Beam width of translations if nothing is said, also when they are scored."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How to choose tokens; the names are those of transformers' `generate`.

    Raises InputError for values that are impossible, or that the chosen way of decoding would ignore.
    """

    max_new_tokens: int = 128
    """At most so many tokens, as far as the context has room for them."""
    min_new_tokens: int = 0
    """No end token among the first so many."""
    temperature: float = 1.0
    """Divides the logits: below 1 is surer, above 1 more varied. 0 is greedy: always the likeliest token."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0: from all (Fan et al. 2018)."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have this probability together (Holtzman et al. 2020), and from those
    as likely as the last of them."""
    min_p: float = 0.0
    """Draw from tokens at least this probable, relative to the likeliest (Nguyen et al. 2024)."""
    num_beams: int = 1
    """More than 1: beam search, which draws nothing."""
    length_penalty: float = 1.0
    """Beams are ranked by log-probability / length ** length_penalty: more favours longer sequences."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred already less likely (Keskar et al. 2019, 4.1)."""
    num_return_sequences: int = 1
    """Answers to each input."""
    speculate: int = 0
    """Guess so many tokens ahead at each step and check them at once: those that followed the last tokens
    where these occurred before (Saxena 2023), or a draft model's. Answers are as likely as without."""
    logprobs: int = 0
    """Tell each token's log-probability and so many of the likeliest tokens with theirs, as the model says
    before temperature and all else here; 0: of none."""
    seed: int = 0
    """Decides what is drawn."""

    def __post_init__(self) -> None:
        counts = ("max_new_tokens", "num_beams", "num_return_sequences")
        perhaps = ("top_k", "min_new_tokens", "speculate", "logprobs")
        for name in (*counts, *perhaps, "seed"):
            if not hasattr(getattr(self, name), "__index__"):  # NumPy's integers have it too
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"):
            if not hasattr(getattr(self, name), "__float__"):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a number")
        _check("", self, *_COUNT, *counts)
        _check("", self, lambda value: value >= 0, "at least 0", *perhaps)
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens}, but max_new_tokens only {self.max_new_tokens}; "
                "raise max_new_tokens"
            )
        temperate = (lambda value: value == 0 or 1e-6 <= value < math.inf, "0, or from 1e-6 up and finite")
        _check("", self, *temperate, "temperature")
        _check("", self, lambda value: 0 < value <= 1, "above 0 and at most 1", "top_p")
        _check("", self, lambda value: 0 <= value <= 1, "between 0 and 1", "min_p")
        _check("", self, lambda value: 1e-3 <= value <= 1e3, "between 0.001 and 1000", "repetition_penalty")
        _check("", self, lambda value: -10 <= value <= 10, "between -10 and 10", "length_penalty")
        beams = self.num_beams > 1
        filters = (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)
        if beams and (filters or self.temperature not in (0.0, 1.0)):
            raise InputError("beam search draws nothing: leave out temperature, top_k, top_p and min_p")
        if beams and self.speculate:
            raise InputError("beam search keeps several texts and guesses none ahead: leave out speculate")
        if not beams and self.length_penalty != 1.0:
            raise InputError("length_penalty ranks beams: give num_beams above 1, or leave it out")
        if beams and self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences is {self.num_return_sequences}, but num_beams only {self.num_beams}; "
                "raise num_beams"
            )
        if not beams and self.temperature == 0 and (filters or self.num_return_sequences > 1):
            raise InputError(
                "temperature 0 always takes the likeliest token: leave out top_k, top_p, min_p and "
                "num_return_sequences, or raise temperature"
            )


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build a config dataclass from plain values.

    Raises InputError for an unknown key (with the nearest known one) or a value of the wrong type.
    """
    # Imported here: the command line's help needs the dataclasses only. Strict JSON mode accepts what
    # TOML can say, so lists for tuples and integers for floats, and nothing else.
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
    """JSON text; dates, which TOML has and JSON has not, become strings."""
    import json

    return json.dumps(value, ensure_ascii=False, default=str)


def model_config(values: dict[str, Any]) -> AnyModelConfig:
    """The family's config from plain values with a `family` key."""
    family = values.get("family")
    if family not in FAMILIES:
        raise InputError(f"model.family is {family!r}; it must be one of {', '.join(FAMILIES)}")
    return from_dict(MODEL_CONFIGS[family], values, "model.")


_TABLES = ("model", "tokenizer", "data", "tasks", "augment", "train", "lora")


def run_config(values: dict[str, Any]) -> RunConfig:
    """A whole run from nested plain values: `init` and the tables of a recipe."""
    for key, value in values.items():
        if key not in (*_TABLES, "init"):
            raise InputError(f"unknown setting {key}; a recipe has init and the tables {', '.join(_TABLES)}")
        if not isinstance(value, str if key == "init" else dict):
            raise InputError(f"{key} = {value!r}: it must be {'a string' if key == 'init' else 'a table'}")
    for name, value in values.get("tasks", {}).items():
        if not isinstance(value, dict):
            raise InputError(f"tasks.{name} = {value!r}: it must be a table, [tasks.{name}], with its path")
    return RunConfig(
        model=model_config(values.get("model", {})),
        tokenizer=from_dict(TokenizerConfig, values.get("tokenizer", {}), "tokenizer."),
        data=from_dict(DataConfig, values.get("data", {}), "data."),
        tasks={
            name: from_dict(DataConfig, table, f"tasks.{name}.")
            for name, table in values.get("tasks", {}).items()
        },
        augment=from_dict(AugmentConfig, values.get("augment", {}), "augment."),
        train=from_dict(TrainConfig, values.get("train", {}), "train."),
        lora=from_dict(LoraConfig, values.get("lora", {}), "lora."),
        init=values.get("init", ""),
    )


def read_toml(path: Path) -> RunConfig:
    """Read a recipe or a run's resolved config. Raises InputError for a missing or malformed file."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"no config file {path}") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; name a recipe file, such as {path / 'config.toml'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    return run_config(values)


def write_toml(config: RunConfig) -> str:
    """The resolved config as TOML text that `read_toml` reads back to an equal config."""
    tables = dataclasses.asdict(config)
    lines = [f"init = {_toml(tables.pop('init'))}"]
    tasks = tables.pop("tasks")
    if tasks:
        del tables["data"]
    tables |= {f"tasks.{name}": data for name, data in tasks.items()}
    for name, section in tables.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in section.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """JSON is TOML too, but for floats (TOML has Python's form) and the character DEL, which TOML escapes."""
    return repr(value) if isinstance(value, float) else _json(value).replace("\x7f", "\\u007f")
