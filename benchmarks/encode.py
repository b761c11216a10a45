"""Texts to vectors: qkv beside transformers, sentence-transformers, ONNX Runtime, OpenVINO and CTranslate2.

usage: [MINILM=FOLDER] python benchmarks/encode.py [minilm | bert-base] --texts FILE [--passes N]

256 sentences of mixed length, from FILE, to mean vectors. Peers pad, in batches of 32 sentences of
similar lengths, one after the other by all threads, or as many at once as there are threads; all are given
the same ids. minilm is trained, bert-base has random weights. Agreement is
the cosine to transformers in fp32, mean and smallest. The limit is the time of the products with the
blocks' weights at the best rate of large ones here, in the precision that the name says.
On a GPU there is transformers alone, compiled too, in batches of 128.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import engines
import interleaved
import numpy as np
import torch
from interleaved import DEVICE, ON_GPU, Answer, Job, Work
from torch import Tensor, nn

MINILM = os.environ.get("MINILM", "sentence-transformers/all-MiniLM-L6-v2")
SENTENCES, BATCH = 256, 128 if ON_GPU else 32


def job(folder: Path, texts: str, name: str) -> Job:
    """All variants of one model."""
    ids = _ids(texts)
    model = _prepared(folder, name)
    variants: dict[str, Callable[[], Work]] = {
        "transformers fp32": partial(transformers, model, ids, torch.float32),
        "transformers bf16": partial(transformers, model, ids, torch.bfloat16),
    }
    on_gpu = {
        "transformers, compiled, bf16": partial(transformers, model, ids, torch.bfloat16, compiled=True)
    }
    on_cpu: dict[str, Callable[[], Work]] = {}
    for how, at_once in engines.arrangements().items():
        on_cpu |= {
            f"ONNX Runtime{how} fp32": partial(onnx_runtime, model, ids, "model.onnx", at_once),
            f"ONNX Runtime{how} int8": partial(onnx_runtime, model, ids, "int8.onnx", at_once),
            f"OpenVINO{how} fp32": partial(openvino, model, ids, "f32", at_once),
            f"OpenVINO{how} bf16": partial(openvino, model, ids, "bf16", at_once),
            f"CTranslate2{how} fp32": partial(ctranslate2, model, ids, "float32", at_once),
            f"CTranslate2{how} int8": partial(ctranslate2, model, ids, "int8", at_once),
        }
    if name == "minilm":
        on_cpu["sentence-transformers, from text, fp32"] = partial(sentence_transformers, texts)
    variants |= on_gpu if ON_GPU else on_cpu
    variants |= {f"qkv {p}": partial(qkv, model, ids, p) for p in interleaved.PRECISIONS}
    tokens = sum(map(len, ids))
    D, depth = (384, 6) if name == "minilm" else (768, 12)
    limit = partial(interleaved.products, tokens * depth * 12 * D * D)
    title = f"{name}: {SENTENCES} sentences, {tokens} tokens"
    return Job(title, "sentences", SENTENCES, variants, interleaved.cosines, limit)


# ---------------------------------------------------------------- what is encoded


def _sentences(texts: str) -> list[str]:
    lines = [line for line in Path(texts).read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = np.random.default_rng(0).choice(len(lines), SENTENCES, replace=False)
    return [lines[i] for i in chosen]


def _ids(texts: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    found: list[list[int]] = tokenizer(_sentences(texts), truncation=True, max_length=256)["input_ids"]
    return found


def _batches(ids: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Indices, ids (N, L) and mask (N, L) of sentences of similar lengths."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(ids), BATCH):
        chosen = order[start : start + BATCH]
        rows = [torch.tensor(ids[i]) for i in chosen]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        yield chosen, padded.to(DEVICE), mask.to(DEVICE)


def _answer(ids: list[list[int]], encode: Callable[[Tensor, Tensor], Tensor], at_once: int = 1) -> Answer:
    """Mean vectors (N, D) of all sentences by what makes hidden vectors (n, L, D) of a padded batch."""
    rows: dict[int, Tensor] = {}
    batches = list(_batches(ids))
    found = engines.for_all(lambda batch: encode(batch[1], batch[2]), batches, at_once)
    for (chosen, _, mask), hidden in zip(batches, found, strict=True):
        weight = mask[..., None].float()
        rows |= zip(chosen, (hidden.float() * weight).sum(1) / weight.sum(1), strict=True)
    return torch.stack([rows[i] for i in range(len(ids))]).cpu().numpy()


# ---------------------------------------------------------------- models


def _prepared(folder: Path, name: str) -> Path:
    """The checkpoint in the formats of all peers; made once."""
    where = folder / name
    if (where / ("config.json" if ON_GPU else "int8.onnx")).exists():
        return where
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    model = AutoModel.from_pretrained(MINILM) if name == "minilm" else BertModel(BertConfig())
    model.config.position_embedding_type = "absolute"  # CTranslate2 asks for it
    model.eval().save_pretrained(where)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(where)
    if ON_GPU:
        return where
    _onnx(model, where)
    import ctranslate2 as theirs

    theirs.converters.TransformersConverter(str(where)).convert(str(where / "ctranslate2"))
    return where


def _onnx(model: nn.Module, where: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            found: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return found

    model.set_attn_implementation("eager")
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "length"} for name in [*names, "hidden"]}
    sample = torch.ones(2, 7, dtype=torch.long)
    torch.onnx.export(
        Hidden(), (sample, sample), where / "plain.onnx", input_names=names, output_names=["hidden"],
        dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    config = model.config
    fused = optimize_model(
        str(where / "plain.onnx"),
        "bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
    )
    fused.save_model_to_file(str(where / "model.onnx"))
    quantize_dynamic(
        where / "model.onnx", where / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True,
        extra_options={"DefaultTensorType": 1},
    )  # fmt: skip


def transformers(model: Path, ids: list[list[int]], dtype: torch.dtype, compiled: bool = False) -> Work:
    from transformers import AutoModel

    net = AutoModel.from_pretrained(model, dtype=dtype).eval().to(DEVICE)
    run = torch.compile(net, mode="reduce-overhead") if compiled else net

    def encode(padded: Tensor, mask: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = run(input_ids=padded, attention_mask=mask).last_hidden_state
        return found

    return lambda: _answer(ids, encode)


def sentence_transformers(texts: str) -> Work:
    from sentence_transformers import SentenceTransformer

    net = SentenceTransformer(MINILM, device="cpu")
    sentences = _sentences(texts)

    def work() -> Answer:
        found: Answer = net.encode(sentences, batch_size=BATCH, show_progress_bar=False)
        return found

    return work


def onnx_runtime(model: Path, ids: list[list[int]], file: str, at_once: int) -> Work:
    return _graph(engines.onnx_runtime(model / file, at_once), ids, at_once)


def openvino(model: Path, ids: list[list[int]], precision: str, at_once: int) -> Work:
    return _graph(engines.openvino(model / "plain.onnx", precision, at_once), ids, at_once)


def _graph(run: engines.Graph, ids: list[list[int]], at_once: int) -> Work:
    def encode(padded: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(run({"input_ids": padded.numpy(), "attention_mask": mask.numpy()}))

    return lambda: _answer(ids, encode, at_once)


def ctranslate2(model: Path, ids: list[list[int]], precision: str, at_once: int) -> Work:
    import ctranslate2 as theirs

    where, threads = str(model / "ctranslate2"), torch.get_num_threads() // at_once
    encoder = theirs.Encoder(where, compute_type=precision, intra_threads=threads, inter_threads=at_once)

    def encode(padded: Tensor, mask: Tensor) -> Tensor:
        rows = [row[: int(length)].tolist() for row, length in zip(padded, mask.sum(1), strict=True)]
        return torch.from_numpy(np.array(encoder.forward_batch(rows).last_hidden_state))

    return lambda: _answer(ids, encode, at_once)


def qkv(model: Path, ids: list[list[int]], precision: str) -> Work:
    import qkv as ours
    from qkv.pipelines import Encoder

    encoder = ours.from_pretrained(model, precision=precision)  # type: ignore[arg-type]
    assert isinstance(encoder, Encoder)

    def work() -> Answer:
        rows = np.empty((len(ids), encoder.model.config.dim), np.float32)
        order = np.argsort([len(one) for one in ids])
        with torch.inference_mode():
            batch = ours.pack([ids[i] for i in order], DEVICE)
            rows[order] = encoder.model.features(batch).mean().float().cpu().numpy()
        return rows

    return work


if __name__ == "__main__":
    jobs = {name: partial(job, name=name) for name in ("minilm", "bert-base")}
    interleaved.main(__doc__, jobs, texts=True)
