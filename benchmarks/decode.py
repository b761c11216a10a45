"""Greedy decoding by GPT-2 (124 M): qkv beside transformers, CTranslate2 and llama.cpp.

usage: [GPT=FOLDER] python benchmarks/decode.py [one | sixteen] [--passes N] [--only NAME ...]

128 new tokens after a prompt of 64, for one stream or for sixteen at once; no end token stops them.
Without FOLDER the weights are random. Agreement is the share of tokens that are those of transformers in
fp32, up to the first that is not. The limit is the time in which memory gives all weights once for each
step, in the precision that the name says. On a GPU the peer is transformers, also with a static cache and
compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import interleaved
import numpy as np
import torch
from interleaved import DEVICE, ON_GPU, Answer, Job, Work

GPT = os.environ.get("GPT", "")
"""A checkpoint of GPT-2's format; none: random weights of the 124 M model."""
PROMPT, NEW = 64, 128


def job(folder: Path, _: str, streams: int) -> Job:
    """All variants for so many streams."""
    model = _prepared(folder)
    prompts = torch.randint(
        1000, 40000, (streams, PROMPT), generator=torch.Generator().manual_seed(1)
    ).tolist()
    variants: dict[str, Callable[[], Work]] = {
        "transformers fp32": partial(transformers, model, prompts, torch.float32),
        "transformers bf16": partial(transformers, model, prompts, torch.bfloat16),
    }
    on_gpu = {
        "transformers, compiled, bf16": partial(transformers, model, prompts, torch.bfloat16, compiled=True)
    }
    on_cpu = {
        "CTranslate2 fp32": partial(ctranslate2, model, prompts, "float32"),
        "CTranslate2 int8": partial(ctranslate2, model, prompts, "int8"),
        "llama.cpp bf16": partial(llama_cpp, model, prompts, "BF16"),
        "llama.cpp int8": partial(llama_cpp, model, prompts, "Q8_0"),
    }
    variants |= on_gpu if ON_GPU else on_cpu
    variants |= {f"qkv {p}": partial(qkv, model, prompts, p) for p in interleaved.PRECISIONS}
    weights = 12 * 12 * 768**2 + 50257 * 768
    limit = partial(interleaved.reading, NEW * weights)
    title = f"GPT-2 124 M, {streams} stream{'s' if streams > 1 else ''}"
    return Job(title, "tokens", streams * NEW, variants, interleaved.same_tokens, limit)


def _prepared(folder: Path) -> Path:
    """The checkpoint in both formats; made once."""
    where = folder / "gpt2"
    if (where / ("tokenizer.json" if ON_GPU else "ctranslate2")).exists():
        return where
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(GPT) if GPT else GPT2LMHeadModel(GPT2Config())
    model.save_pretrained(where)
    # CTranslate2 takes tokens, not ids: t17 stands for id 17.
    last = model.config.vocab_size - 1
    names = {**{f"t{i}": i for i in range(last)}, "<|endoftext|>": last}
    backend = Tokenizer(models.WordLevel(names, unk_token="<|endoftext|>"))
    ends = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **ends).save_pretrained(where)
    if ON_GPU:
        return where
    import ctranslate2 as theirs

    theirs.converters.TransformersConverter(str(where)).convert(str(where / "ctranslate2"))
    return where


def transformers(model: Path, prompts: list[list[int]], dtype: torch.dtype, compiled: bool = False) -> Work:
    from transformers import GPT2LMHeadModel

    net = GPT2LMHeadModel.from_pretrained(model, dtype=dtype).eval().to(DEVICE)
    ids = torch.tensor(prompts, device=DEVICE)
    # On a GPU its steps over a static cache are compiled, with CUDA graphs.
    cache = {"cache_implementation": "static"} if compiled else {}

    def work() -> Answer:
        with torch.inference_mode():
            found = net.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                min_new_tokens=NEW, pad_token_id=0, **cache,
            )  # fmt: skip
        answer: Answer = found[:, PROMPT:].cpu().numpy()
        return answer

    return work


def ctranslate2(model: Path, prompts: list[list[int]], precision: str) -> Work:
    import ctranslate2 as theirs

    where, threads = str(model / "ctranslate2"), torch.get_num_threads()
    generator = theirs.Generator(where, compute_type=precision, intra_threads=threads, inter_threads=1)
    tokens = [[f"t{i}" for i in prompt] for prompt in prompts]

    def work() -> Answer:
        found = generator.generate_batch(
            tokens,
            max_length=NEW,
            min_length=NEW,
            sampling_topk=1,
            beam_size=1,
            include_prompt_in_result=False,
        )
        return np.array([one.sequences_ids[0] for one in found])

    return work


def llama_cpp(model: Path, prompts: list[list[int]], kind: str) -> Work:
    """By its C interface, which decodes all streams at once; matrices are of that type of its GGUF files."""
    import llama_cpp as theirs

    file, threads = _gguf(model, kind), torch.get_num_threads()
    theirs.llama_backend_init()
    how = theirs.llama_model_default_params()
    if kind == "Q8_0" and torch.cpu.get_capabilities().get("amx_int8"):
        how.use_extra_bufts = False  # 0.3.36 dies of its AMX
    net = theirs.llama_model_load_from_file(str(file).encode(), how)
    settings = theirs.llama_context_default_params()
    settings.n_ctx = len(prompts) * (PROMPT + NEW)
    settings.n_seq_max = len(prompts)
    settings.n_batch = settings.n_ubatch = len(prompts) * PROMPT
    settings.n_threads = settings.n_threads_batch = threads
    context = theirs.llama_init_from_model(net, settings)
    vocabulary = theirs.llama_vocab_n_tokens(theirs.llama_model_get_vocab(net))

    def read(batch: list[tuple[int, int, int, bool]]) -> list[int]:
        """Tokens, each with its position, its stream and whether its successor is wanted -> the likeliest."""
        given = theirs.llama_batch_init(len(batch), 0, 1)
        given.n_tokens = len(batch)
        for i, (token, position, stream, wanted) in enumerate(batch):
            given.token[i], given.pos[i], given.logits[i] = token, position, wanted
            given.n_seq_id[i], given.seq_id[i][0] = 1, stream
        assert theirs.llama_decode(context, given) == 0
        rows = [i for i, (*_, wanted) in enumerate(batch) if wanted]
        logits = [np.ctypeslib.as_array(theirs.llama_get_logits_ith(context, i), (vocabulary,)) for i in rows]
        theirs.llama_batch_free(given)
        return [int(row.argmax()) for row in logits]

    def work() -> Answer:
        theirs.llama_memory_clear(theirs.llama_get_memory(context), True)
        told = [
            (token, n, stream, n + 1 == PROMPT)
            for stream, prompt in enumerate(prompts)
            for n, token in enumerate(prompt)
        ]
        found = [read(told)]
        for n in range(PROMPT, PROMPT + NEW - 1):
            found.append(read([(token, n, stream, True) for stream, token in enumerate(found[-1])]))
        return np.array(found).T

    return work


def _gguf(model: Path, kind: str) -> Path:
    """The checkpoint as llama.cpp reads it; made once."""
    file = model / f"{kind}.gguf"
    if file.exists():
        return file
    import gguf
    from transformers import GPT2LMHeadModel

    net = GPT2LMHeadModel.from_pretrained(model, dtype=torch.float32)
    config, part = net.config, model / f"{kind}.part"
    writer = gguf.GGUFWriter(part, "gpt2")
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in net.transformer.state_dict().items():
        values = tensor.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor
        array = values.contiguous().numpy()
        matrix = array.ndim == 2 and not name.startswith("wpe")
        type = gguf.GGMLQuantizationType[kind if matrix else "F32"]
        told = names.get_name(name, (".weight", ".bias"))
        writer.add_tensor(told, gguf.quants.quantize(array, type), raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.rename(file)


def qkv(model: Path, prompts: list[list[int]], precision: str) -> Work:
    import qkv as ours
    from qkv.decode import Decoding, generate
    from qkv.pipelines import TextGenerator

    generator = ours.from_pretrained(model, precision=precision)  # type: ignore[arg-type]
    assert isinstance(generator, TextGenerator)
    decoding = Decoding(max_new_tokens=NEW, temperature=0.0)

    def work() -> Answer:
        return np.array([answers[0].ids for answers in generate(generator.model, prompts, decoding)])

    return work


if __name__ == "__main__":
    jobs = {name: partial(job, streams=streams) for name, streams in (("one", 1), ("sixteen", 16))}
    interleaved.main(__doc__, jobs)
