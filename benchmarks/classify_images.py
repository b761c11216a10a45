"""Images to classes: qkv beside transformers, ONNX Runtime and OpenVINO.

usage: python benchmarks/classify_images.py [ti-1 | ti-32 | b-1 | b-32] [--passes N] [--only NAME ...]

ViT-Ti/16 and ViT-B/16 (random weights) on one image and on 32 of 224 x 224 pixels. Agreement is the
cosine of the class token's vector to that of transformers in fp32, mean and smallest. The limit is the
time of the products with the blocks' weights at the measured peak. ONNX Runtime and OpenVINO get all images
at once, and for each thread a part of them. On a GPU the peer is transformers, also
compiled with CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import engines
import interleaved
import numpy as np
import torch
from interleaved import DEVICE, ON_GPU, Answer, Job, Work
from torch import Tensor, nn

SIZES = {"ti": (192, 3), "b": (768, 12)}
DEPTH, TOKENS = 12, 197


def job(folder: Path, _: str, size: str, images: int) -> Job:
    """All variants of one size on so many images."""
    model = _prepared(folder, size)
    pixels = torch.randn(images, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(DEVICE)
    variants: dict[str, Callable[[], Work]] = {
        "transformers fp32": partial(transformers, model, pixels, torch.float32),
        "transformers bf16": partial(transformers, model, pixels, torch.bfloat16),
        "transformers, compiled, bf16": partial(transformers, model, pixels, torch.bfloat16, compiled=True),
    }
    on_cpu: dict[str, Callable[[], Work]] = {}
    for how, at_once in engines.arrangements().items():
        if images >= at_once:
            on_cpu |= {
                f"ONNX Runtime{how} fp32": partial(onnx_runtime, model, pixels, "model.onnx", at_once),
                f"ONNX Runtime{how} int8": partial(onnx_runtime, model, pixels, "int8.onnx", at_once),
                f"OpenVINO{how} fp32": partial(openvino, model, pixels, "f32", at_once),
                f"OpenVINO{how} bf16": partial(openvino, model, pixels, "bf16", at_once),
            }
    variants |= {} if ON_GPU else on_cpu
    variants |= {f"qkv {p}": partial(qkv, model, pixels, p) for p in interleaved.PRECISIONS}
    limit = partial(interleaved.products, images * TOKENS * DEPTH * 12 * SIZES[size][0] ** 2)
    title = f"ViT-{size.title()}/16, {images} image{'s' if images > 1 else ''}"
    return Job(title, "images", images, variants, interleaved.cosines, limit)


def _prepared(folder: Path, size: str) -> Path:
    """The checkpoint in all formats; made once."""
    where = folder / f"vit-{size}"
    if (where / ("config.json" if ON_GPU else "int8.onnx")).exists():
        return where
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    dim, heads = SIZES[size]
    config = ViTConfig(hidden_size=dim, num_attention_heads=heads, intermediate_size=4 * dim)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(where)
    if ON_GPU:
        return where
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    model.set_attn_implementation("eager")

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            found: Tensor = self.model(pixels).last_hidden_state
            return found

    axes = {"pixels": {0: "batch"}, "hidden": {0: "batch"}}
    torch.onnx.export(
        Hidden(), (torch.zeros(2, 3, 224, 224),), where / "plain.onnx", input_names=["pixels"],
        output_names=["hidden"], dynamic_axes=axes, opset_version=17, dynamo=False,
    )  # fmt: skip
    fused = optimize_model(str(where / "plain.onnx"), "vit", num_heads=heads, hidden_size=dim)
    fused.save_model_to_file(str(where / "model.onnx"))
    quantize_dynamic(
        where / "model.onnx", where / "int8.onnx", weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=["Attention", "MatMul", "Gemm"], extra_options={"DefaultTensorType": 1},
    )  # fmt: skip
    return where


def transformers(model: Path, pixels: Tensor, dtype: torch.dtype, compiled: bool = False) -> Work:
    from transformers import ViTModel

    net: nn.Module = ViTModel.from_pretrained(model, dtype=dtype, add_pooling_layer=False).eval().to(DEVICE)
    images = pixels.to(dtype)
    run = torch.compile(net, mode="reduce-overhead" if ON_GPU else "default") if compiled else net

    def work() -> Answer:
        with torch.inference_mode():
            answer: Answer = run(images).last_hidden_state[:, 0].float().cpu().numpy()
        return answer

    return work


def onnx_runtime(model: Path, pixels: Tensor, file: str, at_once: int) -> Work:
    return _graph(engines.onnx_runtime(model / file, at_once), pixels, at_once)


def openvino(model: Path, pixels: Tensor, precision: str, at_once: int) -> Work:
    return _graph(engines.openvino(model / "plain.onnx", precision, at_once), pixels, at_once)


def _graph(run: engines.Graph, pixels: Tensor, at_once: int) -> Work:
    batches = [part.numpy() for part in pixels.chunk(at_once)]

    def first(images: Answer) -> Answer:
        return run({"pixels": images})[:, 0]

    return lambda: np.concatenate(engines.for_all(first, batches, at_once))


def qkv(model: Path, pixels: Tensor, precision: str) -> Work:
    import qkv as ours
    from qkv.pipelines import ImageClassifier

    classifier = ours.from_pretrained(model, precision=precision)  # type: ignore[arg-type]
    assert isinstance(classifier, ImageClassifier)

    def work() -> Answer:
        with torch.inference_mode():
            answer: Answer = classifier.model.features(pixels).first().float().cpu().numpy()
        return answer

    return work


if __name__ == "__main__":
    known = {f"{size}-{n}": partial(job, size=size, images=n) for size in SIZES for n in (1, 32)}
    interleaved.main(__doc__, known)
