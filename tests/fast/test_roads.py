"""An optimized model answers as the model itself does, as far as its precision goes."""

from __future__ import annotations

import gc
import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIGS, DECODERS, REQUESTS, answers, flat, ids, samples, tiny
from torch import nn

from qkv.attention import Attention, Pattern
from qkv.config import Decoding
from qkv.decode import generate
from qkv.engine import Engine
from qkv.errors import InputError
from qkv.fast import optimize, sample
from qkv.fast.native import (
    AT_ONCE,
    FLAGS,
    FLOORS,
    NativeEmbedding,
    NativeLinear,
    NativeOutput,
    UnavailableError,
    library,
)
from qkv.fast.packed import PackedEmbedding
from qkv.fast.roads import Road, _fastest, _seconds
from qkv.hub import Checkpoint, save
from qkv.hub.table import Stored
from qkv.layers import ACTIVATIONS, Output, Stack
from qkv.models import Model
from qkv.models.transformer import Transformer
from qkv.pipelines import from_pretrained
from qkv.ragged import pack
from qkv.recording import record
from qkv.runtime import multiplies_bfloat16
from qkv.search import Request
from qkv.slots import Decoder

try:
    library()
    REASON = ""
except UnavailableError as error:
    REASON = str(error)
native_code = pytest.mark.skipif(bool(REASON), reason=REASON)

SAVABLE = [
    "gpt-pre-norm",
    "gpt-qk-norm",
    "transformer-post-norm",
    "transformer-rotary",
    "bert-pretraining",
    "vit-convolutions",
    "vit-rotary",
]

DEEP = 1024
"""Numbers of an inner layer that are made at a time, in bfloat16; half as many in float32."""
TOLERANCE = {"fp32": 1e-4, "bf16": 0.04, "int8": 0.08}
"""Largest error of a vector, relative to its length, that the precisions leave in a model of three blocks."""


def wide(name: str, head_dim: int = 32, mlp_dim: int = 160) -> Model:
    """A tiny model of widths that the compiled code takes, and weights as large as trained ones are."""
    config = replace(CONFIGS[name], dim=2 * head_dim, heads=2, mlp_dim=mlp_dim, depth=3)
    model = tiny(config, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.3)
    return model


def native(name: str, precision: str) -> Model:
    """The same one, compiled."""
    return compiled(wide(name), precision)


def compiled(model: Model, precision: str) -> Model:
    """A model made so in place, whatever a trial might say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkv.fast.roads._fastest", lambda roads, config: roads[0])
        assert optimize(model, precision) == Road("native", precision)
    return model


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        error = (a.float() - b).norm() / b.norm().clamp(min=1)
        assert error <= tolerance, f"{error:.4f} of {tuple(b.shape)}"


def assert_own_answers(name: str, precision: str, lengths: list[tuple[int, int]]) -> None:
    """The compiled model answers as the model itself."""
    with torch.inference_mode():
        batch = samples(wide(name), lengths)
        expected, found = flat(answers(wide(name), batch)), flat(answers(native(name, precision), batch))
    assert_near(found, expected, TOLERANCE[precision])


def assert_interrupted() -> None:
    """A model whose packing is interrupted neither answers nor is packed again."""
    model = wide("gpt-pre-norm")
    with pytest.raises(KeyboardInterrupt):
        compiled(model, "int8")
    with pytest.raises(InputError, match="was interrupted: load it anew"):
        generate(model, [[3, 4]], Decoding(max_new_tokens=1))
    with pytest.raises(InputError, match="load it anew"):
        optimize(model, "int8")


# ---------------------------------------------------------------- answers


@native_code
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_the_models_own(name: str, precision: str):
    # One sequence, few, and more than a thread takes through the layers at once.
    for lengths in ([(1, 1)], [(7, 3), (1, 9), (20, 2)], [(40 + i, 70 - i) for i in range(12)]):
        assert_own_answers(name, precision, lengths)


@native_code
@pytest.mark.parametrize("precision", TOLERANCE)
def test_nothing_is_told_of_an_empty_source(precision: str):
    assert_own_answers("transformer-post-norm", precision, [(0, 6), (5, 3)])


@native_code
@pytest.mark.parametrize("name", DECODERS)
def test_decoding_reads_the_cache_as_the_model_does(name: str):
    inputs = [ids(length, length).tolist() for length in (5, 1, 9, 30)]
    for decoding in (
        Decoding(max_new_tokens=20, temperature=0.0),
        Decoding(max_new_tokens=20, num_beams=3),
        Decoding(max_new_tokens=20, temperature=0.9, seed=3, num_return_sequences=2),
    ):
        expected, found = (generate(m, inputs, decoding, [1]) for m in (wide(name), native(name, "fp32")))
        assert [[h.ids for h in one] for one in found] == [[h.ids for h in one] for one in expected]


@native_code
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 80])
@pytest.mark.parametrize("name", ["gpt-rotary", "transformer-post-norm"])
def test_heads_of_all_widths_read_the_cache(name: str, head_dim: int, precision: str):
    own, fast = wide(name, head_dim), compiled(wide(name, head_dim), precision)
    assert_near(step_by_step(fast), step_by_step(own), TOLERANCE[precision])


@torch.inference_mode()
def step_by_step(model: Decoder) -> list[torch.Tensor]:
    """Hidden states of texts that are read a token at a time."""
    texts, cache = [ids(40, 1), ids(40, 2)], model.start(2)
    if isinstance(model, Transformer):
        model.remember(pack([ids(35, 3), ids(5, 4)]), cache)
    return [model.next_hidden(pack([text[t : t + 1] for text in texts]), cache) for t in range(40)]


@native_code
@pytest.mark.parametrize("name", DECODERS)
def test_requests_of_all_kinds_share_the_cache_as_in_the_model(name: str):
    """Beams, samples, guesses and prompts in one step, some slots idle."""
    said = []
    for model in (wide(name), native(name, "fp32")):
        engine = Engine(model, 5)
        tokens = []
        for n, options in enumerate(REQUESTS):
            engine.submit(Request(ids(4 + 6 * n, n).tolist(), Decoding(**options), [1]))
            tokens += engine.step()
        tokens += engine.run()
        said.append([(token.request, token.answer, token.id, token.finish) for token in tokens])
    assert said[0] == said[1]


@native_code
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", ["gpt-rotary", "transformer-post-norm", "bert-masked-lm", "vit-pre-norm"])
def test_attention_is_recorded_as_the_kernel_computed_it(name: str, precision: str):
    batch = samples(wide(name), [(7, 3), (20, 5)])
    maps = []
    for model in (wide(name), native(name, precision)):
        with torch.inference_mode(), record(model, layers=[0, 2]) as seen:
            answers(model, batch)
        maps.append([call for key in sorted(seen.taps) for call in seen.taps[key].calls[-1]])
        assert seen.residual <= TOLERANCE[precision]
    assert_near(maps[1], maps[0], TOLERANCE[precision])


@native_code
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"num_beams": 3}])
def test_attention_is_recorded_over_a_cache(name: str, options: dict):
    prompt = ids(6, 1).tolist()
    seen = []
    for model in (wide(name), native(name, "fp32")):
        with record(model) as maps:
            generate(model, [prompt], Decoding(max_new_tokens=4, **options), [])
        seen.append([m for key in sorted(maps.taps) for call in maps.taps[key].calls for m in call])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@native_code
@pytest.mark.parametrize(
    ("name", "module"), [("vit-pre-norm", "patches.projection"), ("vit-convolutions", "patches.last")]
)
def test_pixels_become_tokens_by_the_compiled_product(name: str, module: str):
    assert isinstance(native(name, "int8").get_submodule(module), NativeLinear)


@native_code
def test_patches_of_a_width_that_the_code_does_not_take_are_embedded_by_torch(monkeypatch):
    config = replace(CONFIGS["vit-pre-norm"], patch_size=2, channels=3)
    monkeypatch.setitem(CONFIGS, "vit-odd", config)
    batch = samples(wide("vit-odd"), [(1, 1), (1, 1)])
    with torch.inference_mode():
        found, expected = (flat(answers(m, batch)) for m in (native("vit-odd", "fp32"), wide("vit-odd")))
    assert_near(found, expected, TOLERANCE["fp32"])


@native_code
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_go_once_they_are_packed(name: str):
    model = wide(name)
    weights = [weakref.ref(p) for key, p in model.named_parameters() if key.endswith("mlp.down.weight")]
    left: list[int] = []

    class Counting(NativeLinear):
        def __init__(self, *about: object) -> None:
            left.append(sum(weight() is not None for weight in weights))
            super().__init__(*about)  # type: ignore[arg-type]

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qkv.fast.native.NativeLinear", Counting)
            compiled(model, "int8")
        blocks = len(weights)
        assert sorted(set(left) - {0}, reverse=True) == list(range(blocks, 0, -1))  # an output comes last
        assert all(weight() is None for weight in weights)
    finally:
        gc.enable()


@native_code
@pytest.mark.parametrize("name", SAVABLE)
def test_blocks_are_packed_as_they_are_read(name: str, tmp_path, monkeypatch):
    """The model is the same as one that was read whole, and its file's tensors are each read once."""
    save(tmp_path, Checkpoint(wide(name)))
    monkeypatch.setattr("qkv.fast.roads._fastest", lambda roads, config: roads[0])
    read: list[str] = []

    def counted(stored: Stored) -> torch.Tensor:
        read.append(stored.name)
        return stored.file.get_tensor(stored.name)

    monkeypatch.setattr(Stored, "read", counted)
    found = from_pretrained(tmp_path, device="cpu", precision="int8")
    assert found.road == Road("native", "int8") and sorted(read) == sorted(set(read)) != []
    expected = from_pretrained(tmp_path, device="cpu").optimize("int8")
    batch = samples(wide(name), [(7, 3), (1, 9)])
    with torch.inference_mode():
        for one, other in zip(
            flat(answers(found.model, batch)), flat(answers(expected.model, batch)), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.*PyTorch's operators alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_of_any_type_are_read_block_by_block(dtype: torch.dtype, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "intermediate_size": 64, "num_attention_heads": 2}
    theirs = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes)).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    found, expected = (from_pretrained(tmp_path, device="cpu", precision=p) for p in ("fp32", None))
    batch = pack([ids(7, 0), ids(20, 1)])
    with torch.inference_mode():
        assert_near([found(batch).hidden.values], [expected(batch).hidden.values], 1e-4)


MEMORY = """
import sys
from pathlib import Path
from qkv import from_pretrained
def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
from_pretrained(sys.argv[1], device="cpu", precision="int8")  # what is imported once
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
kept = from_pretrained(sys.argv[2], device="cpu", precision="int8")
print(resident("VmHWM") - before)
"""


@native_code
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks of memory")
def test_all_weights_are_never_in_memory_in_fp32(tmp_path):
    for name, depth in (("small", 1), ("large", 24)):
        config = replace(CONFIGS["gpt-pre-norm"], dim=512, heads=8, mlp_dim=2048, depth=depth)
        save(tmp_path / name, Checkpoint(tiny(config, torch.float32)))
    weights = (tmp_path / "large" / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert weights / 4 < int(done.stdout) < weights / 2


# ---------------------------------------------------------------- products


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows of numbers in 8 bits, with a scale each."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


ROUNDED = {"fp32": lambda x: x, "bf16": lambda x: x.bfloat16().float(), "int8": rounded}
PRODUCTS = {
    "precision": st.sampled_from(sorted(ROUNDED)),
    "rows": st.integers(1, 300),
    "inputs": st.integers(1, 20).map(lambda n: 16 * n),
    "outputs": st.integers(1, 200),
}
"""Of all sizes."""


@native_code
@settings(deadline=None, max_examples=40)
@given(
    **PRODUCTS,
    seed=st.integers(0, 9),
    outlier=st.sampled_from([1.0, 100.0]),
)
def test_a_product_is_that_of_the_rounded_numbers(precision, rows, inputs, outputs, seed, outlier):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, inputs, generator=generator) for n in (rows, outputs))
    x[:, seed] *= outlier
    assert_product(precision, x, weight, torch.randn(outputs, generator=generator))


def assert_product(precision: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    expected = ROUNDED[precision](x).double() @ ROUNDED[precision](weight).double().T + bias
    found = NativeLinear(weight, bias, precision)(x)
    # A number halfway between two may be rounded to either.
    allowed = 0.02 * expected.norm() if precision == "int8" else 1e-5 * x.norm() * weight.norm()
    assert (found - expected).norm() <= allowed


@native_code
@settings(deadline=None, max_examples=40)
@given(rows=PRODUCTS["rows"], inputs=PRODUCTS["inputs"], outputs=PRODUCTS["outputs"], eased=st.booleans())
def test_inputs_above_a_floor_are_rounded_to_all_256_numbers(rows, inputs, outputs, eased):
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    x = torch.nn.functional.gelu(x)
    largest = x.abs().amax(0) if eased else None
    layer = NativeLinear(weight, bias, "int8", largest, -0.171)
    ease = layer.ease
    above = (x + 0.171) * ease
    scale = above.amax(1, keepdim=True) / 255
    numbers = ((above / scale).round() * scale / ease - 0.171).double()
    expected = numbers @ (rounded(weight / ease) * ease).double().T + bias
    assert (layer(x) - expected).norm() <= 0.01 * (expected - bias).norm() + 1e-3


@native_code
def test_inputs_that_are_always_large_do_not_cost_the_others_their_precision():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 512, generator=generator), torch.randn(64, 512, generator=generator)
    x[:, 7] *= 100
    weight[:, 7] /= 100
    expected = x @ weight.T
    plain, eased = (
        (NativeLinear(weight, None, "int8", largest)(x) - expected).norm() / expected.norm()
        for largest in (None, x.abs().amax(0))
    )
    assert eased < 0.01 < 0.1 < plain


@native_code
@pytest.mark.parametrize("precision", ROUNDED)
def test_a_vocabulary_is_packed_in_parts(precision: str):
    assert_product(precision, torch.randn(3, 16), torch.randn(AT_ONCE + 65, 16), torch.randn(AT_ONCE + 65))


@pytest.mark.parametrize("name", FLOORS)
def test_no_answer_of_an_activation_is_below_its_floor(name):
    least = ACTIVATIONS[name](torch.linspace(-20, 20, 100001)).min()
    assert FLOORS[name] <= least < FLOORS[name] + 0.002


@native_code
def test_an_input_that_a_sample_never_shows_may_still_come():
    largest = torch.ones(64)
    largest[3] = 0.0
    x, weight = torch.randn(20, 64), torch.randn(32, 64)
    error = NativeLinear(weight, None, "int8", largest)(x) - x @ weight.T
    assert error.norm() < 0.03 * (x @ weight.T).norm()


@native_code
@pytest.mark.parametrize("name", CONFIGS)
def test_how_large_inputs_become_is_seen_at_every_matrix(name: str):
    """By what each was eased, beside hooks on the model as it was, on the same sample."""
    model, packed = wide(name), native(name, "int8")
    kinds = (nn.Linear, Attention, Output)
    with sample.watched(module for module in model.modules() if isinstance(module, kinds)) as largest:
        sample.run(model)
    random = torch.random.get_rng_state()
    native(name, "int8")
    assert torch.equal(torch.random.get_rng_state(), random)
    for stack_name, stack in model.named_modules():
        if not isinstance(stack, Stack):
            continue
        matrices = iter(packed.get_submodule(stack_name).matrices)
        for block in stack:
            linears = [block.attention.qkv, block.attention.out, block.mlp.up, block.mlp.down]
            for linear, matrix in zip(linears, matrices, strict=False):
                expected = NativeLinear(linear.weight, linear.bias, "int8", largest[linear]).ease
                torch.testing.assert_close(matrix.ease, expected, atol=1e-5, rtol=0.02)
            if block.cross is not None:
                weight = block.cross.qkv.weight
                asked = NativeLinear(weight[: len(weight) // 3], None, "int8", largest[block.cross]).ease
                torch.testing.assert_close(next(matrices).ease, asked, atol=1e-5, rtol=0.02)
                out = NativeLinear(block.cross.out.weight, None, "int8", largest[block.cross.out]).ease
                torch.testing.assert_close(next(matrices).ease, out, atol=1e-5, rtol=0.02)
        assert next(matrices, None) is None


@native_code
@pytest.mark.parametrize("where", ["sample.run", "roads._output"])
def test_a_model_whose_sample_was_interrupted_says_so(where: str, monkeypatch):
    def interrupted(*about: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"qkv.fast.{where}", interrupted)
    assert_interrupted()


@native_code
@settings(deadline=None, max_examples=30)
@given(**PRODUCTS)
def test_a_row_has_the_same_product_in_all_company(precision, rows, inputs, outputs):
    layer = NativeLinear(torch.randn(outputs, inputs), torch.randn(outputs), precision)
    x = torch.randn(rows, inputs)
    assert torch.equal(layer(x), torch.cat([layer(row) for row in x.split(1)]))


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Code that is loaded anew in a test, and after it."""
    library.cache_clear()
    yield
    library.cache_clear()


OLDER = {"haswell": "avx2", "skylake-avx512": "avx512_bw", "cooperlake": "avx512_bf16"}
"""What compilers call CPUs, and what torch calls the last of their instructions that matter."""


@pytest.fixture(params=sorted(OLDER))
def older_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_library: None) -> None:
    """Code for a CPU with fewer instructions than this one may have."""
    if not torch.cpu.get_capabilities().get(OLDER[request.param]):
        pytest.skip(f"this CPU has no {OLDER[request.param]}")
    flags = [f"-march={request.param}" if flag == "-march=native" else flag for flag in FLAGS]
    monkeypatch.setattr("qkv.fast.native.FLAGS", flags)


@native_code
@pytest.mark.parametrize("precision", sorted(ROUNDED))
def test_older_cpus_multiply_the_same(precision: str, older_cpu: None):
    for rows, inputs, outputs in ((1, 16, 1), (7, 144, 65), (30, 320, 200)):
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        assert_product(precision, x, weight, bias)


@native_code
@pytest.mark.parametrize("precision", TOLERANCE)
def test_older_cpus_answer_the_same(precision: str, older_cpu: None):
    for name in CONFIGS:
        assert_own_answers(name, precision, [(7, 3), (1, 9), (40, 20)])


@native_code
@pytest.mark.parametrize("name", DECODERS)
def test_older_cpus_decode_the_same(name: str, older_cpu: None):
    decoding = Decoding(max_new_tokens=20, num_beams=3)
    inputs = [ids(length, length).tolist() for length in (5, 1, 30)]
    expected, found = (generate(m, inputs, decoding, [1]) for m in (wide(name), native(name, "fp32")))
    assert [[h.ids for h in one] for one in found] == [[h.ids for h in one] for one in expected]


@native_code
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", ["bert-masked-lm", "vit-pre-norm"])
def test_many_tokens_take_a_large_inner_layer_in_parts(name: str, precision: str):
    """Whose last part is no whole tile of AMX."""
    model, same = (wide(name, mlp_dim=2 * DEEP + 16) for _ in range(2))
    with torch.inference_mode():
        batch = samples(model, [(30, 3), (1, 9), (40, 20)])
        expected, found = flat(answers(model, batch)), flat(answers(compiled(same, precision), batch))
    assert_near(found, expected, TOLERANCE[precision])


# ---------------------------------------------------------------- roads


@native_code
def test_a_trial_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    trials = []

    def seconds(road, config):
        trials.append(road)
        return {"native": 2.0, "torch": 1.0}[road.engine] + (road.precision == "fp32")

    monkeypatch.setattr("qkv.fast.roads._seconds", seconds)
    roads = [Road(engine, precision) for engine in ("native", "torch") for precision in ("fp32", "bf16")]
    for _ in range(2):
        assert _fastest(roads, CONFIGS["gpt-pre-norm"]) == Road("torch", "bf16")
    assert trials == roads


@pytest.mark.parametrize("road", [Road("torch", "fp32"), Road("torch", "bf16"), Road("native", "int8")])
def test_a_trial_takes_time(road: Road):
    if road.engine == "native" and REASON:
        pytest.skip(REASON)
    config = replace(CONFIGS["transformer-post-norm"], dim=64, mlp_dim=128)
    assert _seconds(road, config, sequences=2, length=3, budget=0.0) > 0


@pytest.mark.parametrize(("name", "trials"), [("bert-masked-lm", 1), ("gpt-pre-norm", 1 + 32)])
def test_what_decodes_is_tried_with_few_tokens_too(name: str, trials: int, monkeypatch):
    monkeypatch.setattr("qkv.fast.roads.shortest", lambda call, device, budget: 1.0)
    assert _seconds(Road("torch", "fp32"), CONFIGS[name]) == trials


@pytest.mark.parametrize("name", CONFIGS)
def test_without_a_compiler_torch_computes_and_a_warning_says_so(
    name: str, tmp_path, monkeypatch, fresh_library
):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = wide(name)
    instead = "bf16" if multiplies_bfloat16(torch.device("cpu")) else "fp32"
    with pytest.warns(UserWarning, match=rf"PyTorch's operators alone: .*int8 needs more .* {instead}"):
        assert optimize(model, "int8") == Road("torch", instead)
    batch = samples(model, [(7, 3), (20, 5)])
    with torch.inference_mode():
        assert_near(flat(answers(model, batch)), flat(answers(wide(name), batch)), TOLERANCE["bf16"])


@pytest.mark.parametrize(
    ("compiler", "complaint"),
    [
        ("", None),
        (" ", None),
        ("'c++", "No closing quotation"),
        ("/usr/lib", "/usr/lib is no C\\+\\+ compiler"),
    ],
)
def test_a_compiler_that_is_named_badly(
    compiler: str, complaint: str | None, tmp_path, monkeypatch, fresh_library
):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler)
    if complaint is None:
        assert REASON or library()
    else:
        with pytest.raises(UnavailableError, match=REASON or complaint):
            library()


@native_code
@pytest.mark.parametrize("eased", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_where_it_is(precision: str, odd: float, eased: bool):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 320, generator=generator), torch.randn(40, 320, generator=generator)
    x[1, 5] = odd  # in the first vector of its row
    largest = x.abs().amax(0) if eased else None
    found = NativeLinear(weight, None, precision, largest)(x)
    assert found[[0, 2]].isfinite().all() and not found[1].isfinite().any()
    x[1, 5], weight[7, 200] = 0.0, odd
    found = NativeLinear(weight, None, precision, largest)(x)
    assert (~found.isfinite().all(0)).nonzero().tolist() == [[7]]


@native_code
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_tokens_that_are_banned_before_all_others_leave_the_rest_their_scores(precision: str):
    hidden, embeddings = torch.randn(2, 64), torch.randn(200, 64)
    bias = torch.zeros(200)
    bias[:96] = -math.inf
    output = NativeOutput(embeddings, precision)
    scores, found = output.likeliest(hidden, embeddings, bias, 5)
    theirs, same = output(hidden, embeddings, bias.clone()).log_softmax(-1).topk(5)
    assert torch.equal(found, same)
    torch.testing.assert_close(scores, theirs, atol=1e-4, rtol=1e-4)


@native_code
@pytest.mark.parametrize("name", ["gpt-pre-norm", "vit-pre-norm"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_of_tensors_changes_no_answer(default: torch.dtype, name: str):
    batch = samples(wide(name), [(9, 1)])
    expected = flat(answers(native(name, "int8"), batch))
    model = wide(name)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        found = flat(answers(compiled(model, "int8"), batch))
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("multiplies", [True, False])
def test_without_compiled_code_it_is_bf16_only_where_the_cpu_multiplies_it(
    precision: str, multiplies: bool, monkeypatch
):
    monkeypatch.setattr("qkv.fast.roads.multiplies_bfloat16", lambda device: multiplies)
    with pytest.warns(UserWarning, match=r"PyTorch's operators alone"):
        road = optimize(tiny("gpt-pre-norm", torch.float32), precision)
    assert road == Road("torch", "bf16" if multiplies else "fp32")


def test_widths_that_the_code_does_not_take_are_computed_by_torch():
    model = tiny("gpt-pre-norm", torch.float32)
    with pytest.warns(UserWarning, match=r"PyTorch's operators alone"):
        assert optimize(model, "fp32") == Road("torch", "fp32")


def on_torch(name: str) -> Model:
    """The model with weights packed for torch's operators, whatever a trial might say."""
    model = wide(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkv.fast.roads._fastest", lambda roads, config: roads[-1])
        patch.setattr("qkv.fast.roads.multiplies_bfloat16", lambda device: True)
        assert optimize(model, "bf16") == Road("torch", "bf16")
    return model


@pytest.mark.parametrize("name", SAVABLE)
def test_torchs_operators_take_weights_as_they_are_read(name: str, tmp_path, monkeypatch):
    save(tmp_path, Checkpoint(wide(name)))
    monkeypatch.setattr("qkv.fast.roads._fastest", lambda roads, config: roads[-1])
    monkeypatch.setattr("qkv.fast.roads.multiplies_bfloat16", lambda device: True)
    found = from_pretrained(tmp_path, device="cpu", precision="bf16")
    assert found.road == Road("torch", "bf16")
    batch = samples(wide(name), [(7, 3), (1, 9)])
    with torch.inference_mode():
        theirs, own = flat(answers(on_torch(name), batch)), flat(answers(found.model, batch))
        assert all(torch.equal(*pair) for pair in zip(own, theirs, strict=True))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"num_beams": 3, "num_return_sequences": 3}])
def test_torchs_operators_decode(name: str, options: dict):
    """Each answer's score is what the same model says of it without a cache."""
    model, prompt = on_torch(name), ids(5, 1).tolist()
    for answer in generate(model, [prompt], Decoding(max_new_tokens=6, logprobs=1, **options), [])[0]:
        begun = prompt if name.startswith("gpt") else [model.config.pad_id]
        read = pack([torch.tensor(begun + answer.ids)])
        with torch.inference_mode():
            said = model(read) if name.startswith("gpt") else model(pack([torch.tensor(prompt)]), read)
        scores = said.logits.values.float().log_softmax(-1)[len(begun) - 1 : -1]
        expected = scores.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert_near([torch.tensor([token.logprob for token in answer.tokens])], [expected], 0.05)
        if "num_beams" not in options:
            assert all(token.logprob == token.top[0][1] for token in answer.tokens)


def test_a_precision_that_there_is_not_is_named():
    with pytest.raises(InputError, match="no precision 'fp16'; there are fp32, bf16, int8 and auto"):
        optimize(tiny("gpt-pre-norm", torch.float32), "fp16")


@pytest.mark.parametrize("make", [partial(native, precision="int8"), on_torch])
def test_a_model_is_optimized_once(make: Callable[[str], Model]):
    if make is not on_torch and REASON:
        pytest.skip(REASON)
    model = make("gpt-pre-norm")
    with pytest.raises(InputError, match="optimized already: load it anew"):
        optimize(model)


@native_code
def test_a_model_that_was_half_optimized_says_so(monkeypatch):
    made = iter(range(100))

    class Interrupted(NativeLinear):
        def __init__(self, *about: object) -> None:
            if next(made) == 5:
                raise KeyboardInterrupt
            super().__init__(*about)  # type: ignore[arg-type]

    monkeypatch.setattr("qkv.fast.native.NativeLinear", Interrupted)
    assert_interrupted()


@native_code
def test_an_optimized_model_is_never_saved_without_its_blocks(tmp_path):
    model = wide("bert-masked-lm")
    checkpoint = Checkpoint(model)
    save(tmp_path / "kept", checkpoint)
    before = (tmp_path / "kept" / "model.safetensors").read_bytes()
    compiled(model, "int8")
    with pytest.raises(InputError, match="no weights to save"):
        save(tmp_path / "kept", checkpoint)
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == before


@native_code
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_packed_stays_where_a_model_is_converted(name: str):
    model, batch = native(name, "fp32"), samples(wide(name), [(7, 3), (1, 9)])
    with torch.inference_mode():
        expected = flat(answers(model, batch))
        model.double().float()
        _ = [torch.full((64,), torch.nan) for _ in range(100)]  # where freed weights were
        assert_near(flat(answers(model, batch)), expected, 1e-6)


@native_code
@pytest.mark.parametrize("name", ["gpt-pre-norm", "transformer-post-norm"])
def test_an_engine_may_be_older_than_the_packed_weights(name: str):
    """What it remembers was written in float32."""
    model = wide(name)
    engine = Engine(model, 1)
    first = Request([4, 9, 1, 12, 7], Decoding(temperature=0.0, max_new_tokens=6))
    engine.submit(first)
    _ = list(engine.run())
    compiled(model, "bf16")
    longer = Request([*first.ids, 3, 2], Decoding(temperature=0.0, max_new_tokens=6, logprobs=1))

    def logprobs(engine: Engine) -> list[float]:
        engine.submit(longer)
        return [token.logprob for token in engine.run()]

    assert logprobs(engine) == pytest.approx(logprobs(Engine(model, 1)), abs=0.05)


@native_code
def test_a_cache_folder_that_is_closed_leaves_torchs_operators(monkeypatch, fresh_library):
    monkeypatch.setenv("QKV_CACHE", "/proc/none")
    with pytest.warns(UserWarning, match=r"PyTorch's operators alone: cannot write /proc/none"):
        assert optimize(wide("gpt-pre-norm"), "fp32") == Road("torch", "fp32")


@native_code
def test_a_library_of_another_system_is_compiled_anew(tmp_path, monkeypatch, fresh_library):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkv.fast.native._compile", lambda compiler, out: out.write_bytes(b"no library"))
        with pytest.raises(UnavailableError, match="cannot load"):
            library()
    with pytest.warns(UserWarning, match="compiling for this CPU"):
        assert library()


@native_code
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("rows", [33, 200])
def test_an_output_gives_its_embeddings_back(precision: str, rows: int):
    embeddings = torch.randn(rows, 48) * torch.rand(rows, 1)
    largest = torch.rand(48) + 0.5 if precision == "int8" else None
    output = NativeOutput(embeddings, precision, largest)
    ids = torch.randint(rows, (3, 70))
    found = NativeEmbedding(output, torch.float32)(ids)
    if precision == "int8":  # half a step of the row's scale, by which inputs were eased
        ease = output.linear.ease
        most = (embeddings / ease).abs().amax(1, keepdim=True) / 127 * ease / 2
        assert ((found - embeddings[ids]).abs() <= most[ids] * 1.001).all()
    else:
        expected = embeddings.bfloat16().float() if precision == "bf16" else embeddings
        assert torch.equal(found, expected[ids])


@native_code
@pytest.mark.parametrize("id", [-1, 200])
def test_an_id_without_an_embedding_is_refused(id: int):
    with pytest.raises(IndexError, match="for 200 embeddings"):
        NativeEmbedding(NativeOutput(torch.randn(200, 64), "bf16"), torch.float32)(torch.tensor([3, id]))


@native_code
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("gpt-pre-norm", NativeEmbedding),
        ("transformer-post-norm", NativeEmbedding),
        ("bert-masked-lm", NativeEmbedding),
        ("bert-classification", PackedEmbedding),
    ],
)
def test_a_matrix_that_embeds_and_answers_is_kept_once(precision: str, name: str, kept: type[nn.Module]):
    assert isinstance(native(name, precision).tokens, kept)


@native_code
def test_tensors_of_other_sizes_than_the_weights_are_refused():
    """torch's operators refuse them too; compiled code would read what is behind them."""
    output, embeddings = NativeOutput(torch.randn(200, 64), "int8"), torch.randn(200, 64)
    for hidden in (torch.randn(3, 128), torch.randn(3, 32)):
        with pytest.raises(ValueError, match="values for a matrix with 64 inputs"):
            output(hidden, embeddings)
        with pytest.raises(ValueError, match="values for a matrix with 64 inputs"):
            output.likeliest(hidden, embeddings, None, 2)
    stack = native("gpt-pre-norm", "int8").blocks
    layout = pack([[1, 2, 3], [4]]).layout
    with pytest.raises(ValueError, match=r"\(3, 64\) for 4 tokens of 64 values"):
        stack(torch.randn(3, 64), Pattern(layout, layout))


def test_a_trial_is_of_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        assert _seconds(Road("torch", "bf16"), CONFIGS["gpt-pre-norm"], 2, 2, 0.0) > 0
        if not REASON:
            wide_enough = replace(CONFIGS["gpt-pre-norm"], dim=64, mlp_dim=128)
            assert _seconds(Road("native", "int8"), wide_enough, 2, 2, 0.0) > 0


@native_code
def test_a_library_that_may_not_be_loaded_leaves_torchs_operators(tmp_path, monkeypatch, fresh_library):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    monkeypatch.setattr("qkv.fast.native._compile", lambda compiler, out: out.write_bytes(b"no library"))
    with pytest.warns(UserWarning, match=r"PyTorch's operators alone: cannot load .*\.so"):
        assert optimize(wide("gpt-pre-norm"), "fp32") == Road("torch", "fp32")


@native_code
def test_several_processes_may_compile_at_once(tmp_path, monkeypatch, fresh_library):
    built = Path(library()._name)
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))

    outs: list[Path] = []

    def copy(compiler: list[str], out: Path) -> None:
        outs.append(out)
        shutil.copy(built, out)
        if len(outs) == 1:
            library.__wrapped__()  # another process, which is done before this one

    monkeypatch.setattr("qkv.fast.native._compile", copy)
    library.cache_clear()
    assert library().qkv_pack and len(outs) == 2
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]


@native_code
def test_code_that_does_not_compile_says_why(tmp_path, monkeypatch, fresh_library):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    broken = tmp_path / "cpp" / "blocks.cpp"
    broken.parent.mkdir()
    broken.write_text("int main() { return x; }")
    monkeypatch.setattr("qkv.fast.native.SOURCES", broken.parent)
    with pytest.raises(UnavailableError, match=r"cannot compile cpp/blocks.cpp: .*x.* was not declared"):
        library()
    assert not list((tmp_path / "native").glob("*"))


@native_code
def test_code_is_compiled_without_the_registers_that_a_system_keeps_back(
    tmp_path, monkeypatch, fresh_library
):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path))
    sources = tmp_path / "cpp"
    sources.mkdir()
    refuses = "#ifdef AMX\nbool allowed = true;\n#else\nbool allowed = false;\n#endif\n"
    doors = "int qkv_allowed() { return allowed; } void qkv_packed_bytes() {} void qkv_scales() {}"
    (sources / "blocks.cpp").write_text(f'{refuses}extern "C" {{ {doors} }}')
    monkeypatch.setattr("qkv.fast.native.SOURCES", sources)
    assert library().qkv_allowed()
    assert len(list((tmp_path / "native").iterdir())) == 2


def test_loading_a_model_imports_none_of_this():
    code = "import sys, qkv.pipelines; print([m for m in sys.modules if m.startswith('qkv.fast')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@native_code
@settings(deadline=None, max_examples=40)
@given(
    precision=st.sampled_from(sorted(ROUNDED)),
    rows=st.integers(1, 20),
    vocabulary=st.integers(20, 300),
    count=st.integers(1, 12),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_likeliest_tokens_are_those_of_all_logits(precision, rows, vocabulary, count, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, embeddings = (torch.randn(n, 32, generator=generator) for n in (rows, vocabulary))
    bias = torch.randn(vocabulary, generator=generator) if biased else None
    output = NativeOutput(embeddings, precision)
    logits = output(hidden, embeddings, bias)
    expected = logits.log_softmax(-1).topk(count)
    scores, found = output.likeliest(hidden, embeddings, bias, count)
    torch.testing.assert_close(scores, expected.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, expected.indices)
    assert torch.equal(output.best(hidden, embeddings, bias, count), found)
    theirs, same = Output().likeliest(hidden, embeddings, bias, count)
    assert torch.equal(Output().best(hidden, embeddings, bias, count), same)
    assert theirs.shape == scores.shape and (precision != "fp32" or torch.equal(same, found))


@native_code
@pytest.mark.parametrize("name", ["gpt-rotary", "transformer-rotary", "bert-masked-lm"])
def test_threads_share_the_work(name: str):
    """Few tokens are computed by all threads together, many sequences each by one."""
    for lengths in ([(5, 3)], [(40 + i, 70 - i) for i in range(12)]):
        model, said = native(name, "int8"), []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    said.append(flat(answers(model, samples(model, lengths))))
            finally:
                torch.set_num_threads(1)
        for one, three in zip(*said, strict=True):
            torch.testing.assert_close(three, one, atol=1e-5, rtol=1e-4)
