"""Translation by a model of Marian's base size: qkv beside transformers and CTranslate2.

usage: python benchmarks/translate.py [greedy | beam] [--passes N] [--only NAME ...]

64 sources of 12 to 28 tokens, 20 new tokens each, greedily or with 4 beams; no end token stops them. 6
and 6 layers, 512 wide, a vocabulary of 58,101 pieces, random weights. Agreement is the share of tokens
that are those of transformers in fp32, up to the first that is not. The limit is the time of all products
at the measured peak. CTranslate2 gets all sources at once, and for each thread a part of them. On a GPU the
peer is transformers, greedily also with a static cache and compiled.
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
from torch import nn

VOCAB, D, F, DEPTH = 58101, 512, 2048, 6
SENTENCES, NEW = 64, 20
END, START = 0, VOCAB - 1


def job(folder: Path, _: str, beams: int) -> Job:
    """All variants with so many beams."""
    model, sources = _prepared(folder), _sources()
    variants: dict[str, Callable[[], Work]] = {
        "transformers fp32": partial(transformers, model, sources, beams, torch.float32),
        "transformers bf16": partial(transformers, model, sources, beams, torch.bfloat16),
    }
    on_gpu = {
        "transformers, compiled, bf16": partial(
            transformers, model, sources, beams, torch.bfloat16, compiled=True
        )
    }
    on_cpu: dict[str, Callable[[], Work]] = {}
    for how, at_once in engines.arrangements().items():
        on_cpu |= {
            f"CTranslate2{how} fp32": partial(ctranslate2, model, sources, beams, "float32", at_once),
            f"CTranslate2{how} int8": partial(ctranslate2, model, sources, beams, "int8", at_once),
        }
    variants |= on_cpu if not ON_GPU else on_gpu if beams == 1 else {}
    variants |= {f"qkv {p}": partial(qkv, model, sources, beams, p) for p in interleaved.PRECISIONS}
    encoder, decoder = DEPTH * (4 * D * D + 2 * D * F), DEPTH * (6 * D * D + 2 * D * F) + VOCAB * D
    work = sum(map(len, sources)) * (encoder + DEPTH * 2 * D * D) + SENTENCES * beams * NEW * decoder
    how = "greedy" if beams == 1 else f"{beams} beams"
    title = f"Marian base, {SENTENCES} sentences, {how}"
    return Job(
        title, "sentences", SENTENCES, variants, interleaved.same_tokens, partial(interleaved.products, work)
    )


def _sources() -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(12, 29, SENTENCES)
    return [[*rng.integers(10, VOCAB - 10, length - 1).tolist(), END] for length in lengths]


def _prepared(folder: Path) -> Path:
    """The checkpoint in both formats; made once."""
    where = folder / "marian"
    if (where / ("config.json" if ON_GPU else "ctranslate2")).exists():
        return where
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(0)
    config = MarianConfig(
        vocab_size=VOCAB, decoder_vocab_size=VOCAB, d_model=D, encoder_layers=DEPTH, decoder_layers=DEPTH,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=F, decoder_ffn_dim=F,
        activation_function="swish", scale_embedding=True, static_position_embeddings=True,
        max_position_embeddings=512, pad_token_id=START, eos_token_id=END, decoder_start_token_id=START,
        forced_eos_token_id=END, share_encoder_decoder_embeddings=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = MarianMTModel(config).eval()
    model.save_pretrained(where)
    if ON_GPU:
        return where
    from ctranslate2.converters.transformers import MarianMTLoader

    for name in ("normalize_before", "normalize_embedding", "add_final_layer_norm"):
        setattr(
            model.config, name, False
        )  # the converter asks for these, and transformers knows them no more
    model.config.bos_token_id = None
    spec = MarianMTLoader().get_model_spec(model)
    names = ["</s>", *(f"t{i}" for i in range(1, VOCAB - 1)), "<pad>"]
    # The converter leaves out the row of the padding where it can.
    rows = spec.encoder.embeddings[0].weight.shape[0], spec.decoder.projection.weight.shape[0]
    spec.register_source_vocabulary(names[: rows[0]])
    spec.register_target_vocabulary(names[: rows[1]])
    start = "<pad>" if rows[1] == VOCAB else "</s>"
    spec.config.bos_token = spec.config.decoder_start_token = start
    spec.config.eos_token, spec.config.unk_token = "</s>", "t1"
    spec.validate()
    spec.optimize()
    (where / "ctranslate2").mkdir()
    spec.save(str(where / "ctranslate2"))
    return where


def transformers(
    model: Path, sources: list[list[int]], beams: int, dtype: torch.dtype, compiled: bool = False
) -> Work:
    from transformers import MarianMTModel

    net = MarianMTModel.from_pretrained(model, dtype=dtype).eval().to(DEVICE)
    rows = [torch.tensor(source, device=DEVICE) for source in sources]
    cache = {"cache_implementation": "static"} if compiled else {}
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=START)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)

    def work() -> Answer:
        with torch.inference_mode():
            found = net.generate(
                input_ids=ids, attention_mask=mask, num_beams=beams, do_sample=False, min_new_tokens=NEW,
                max_new_tokens=NEW, forced_eos_token_id=None, **cache,
            )  # fmt: skip
        answer: Answer = found[:, 1:].cpu().numpy()
        return answer

    return work


def ctranslate2(model: Path, sources: list[list[int]], beams: int, precision: str, at_once: int) -> Work:
    import ctranslate2 as theirs

    where, threads = str(model / "ctranslate2"), torch.get_num_threads() // at_once
    translator = theirs.Translator(
        where, compute_type=precision, intra_threads=threads, inter_threads=at_once
    )
    tokens = [["</s>" if i == END else f"t{i}" for i in source] for source in sources]

    def work() -> Answer:
        found = translator.translate_batch(
            tokens,
            beam_size=beams,
            min_decoding_length=NEW,
            max_decoding_length=NEW,
            disable_unk=False,
            max_batch_size=-(-SENTENCES // at_once),
        )
        return np.array(
            [[int(t.strip("t")) if t[0] == "t" else END for t in one.hypotheses[0]] for one in found]
        )

    return work


def qkv(model: Path, sources: list[list[int]], beams: int, precision: str) -> Work:
    import qkv as ours
    from qkv.decode import Decoding, generate
    from qkv.pipelines import Translator

    translator = ours.from_pretrained(model, precision=precision)  # type: ignore[arg-type]
    assert isinstance(translator, Translator)
    temperature = 0.0 if beams == 1 else 1.0
    decoding = Decoding(max_new_tokens=NEW, num_beams=beams, temperature=temperature)

    def work() -> Answer:
        return np.array([answers[0].ids for answers in generate(translator.model, sources, decoding)])

    return work


if __name__ == "__main__":
    interleaved.main(__doc__, {name: partial(job, beams=k) for name, k in (("greedy", 1), ("beam", 4))})
