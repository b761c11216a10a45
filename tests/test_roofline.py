"""FLOPs against a count by hand; the peak is measured once and remembered."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from test_train import FAMILIES, run_config

from qkv import roofline
from qkv.data.text import LanguageDataset
from qkv.job import new_job

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "qkv"))
    monkeypatch.setattr(roofline, "SECONDS", 0.01)
    return tmp_path / "qkv" / "roofline.json"


def test_flops_of_gpt_are_those_counted_by_hand(tmp_path):
    job = new_job(run_config(tmp_path, "gpt"))
    model = job.config.model
    D, F, L, V = model.dim, model.mlp_dim, model.context, model.vocab_size
    products = model.depth * (4 * D * D + 2 * D * F) + D * V  # of a token with weights
    attention = model.depth * 2 * D * L  # of a token's query with keys, and of its weights with values
    # A product is a multiplication and an addition; backward has two for each one of forward.
    expected = 3 * 2 * (products + attention)
    assert roofline.flops_per_token(job.checkpoint.model, job.train) == expected
    assert roofline.flops_per_token(job.checkpoint.model, job.train, r_drop=1.0) == 2 * expected


@pytest.mark.parametrize("family", FAMILIES)
def test_counting_leaves_the_model_alone_and_grows_with_its_depth(family, tmp_path):
    config = run_config(tmp_path, family)
    job = new_job(config)
    model = job.checkpoint.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    counted = roofline.flops_per_token(model, job.train)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device == CPU for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=3))
    assert counted < roofline.flops_per_token(new_job(deeper).checkpoint.model, job.train) < 3 * counted
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    assert roofline.flops_per_token(model, job.train) < 0.8 * counted  # no gradients of matrices


def test_the_peak_is_measured_once_for_a_precision(cache, monkeypatch):
    first = roofline.peak(CPU, "fp32")
    assert first > 1e6
    assert list(json.loads(cache.read_text()).values()) == [first]
    monkeypatch.setattr(roofline, "_measure", lambda device, dtype: 5.0)
    assert roofline.peak(CPU, "fp32") == first
    assert roofline.peak(CPU, "bf16") == 5.0
    assert list(json.loads(cache.read_text()).values()) == [first, 5.0]


@pytest.mark.parametrize("damaged", ["", "[1]", '{"x": "y"'])
def test_a_damaged_file_is_written_anew(cache, damaged):
    cache.parent.mkdir()
    cache.write_text(damaged)
    assert roofline.peak(CPU, "fp32") in json.loads(cache.read_text()).values()


def test_without_a_cache_folder_it_is_measured_again(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(roofline, "_measure", lambda device, dtype: 5.0)
    assert roofline.peak(CPU, "fp32") == 5.0


def test_at_the_full_rate_all_flops_are_used(cache, tmp_path):
    job = new_job(run_config(tmp_path, "gpt"))
    assert isinstance(job.train, LanguageDataset)
    model = job.checkpoint.model
    rate = roofline.full_rate(model, job.train, job.config.train, CPU)
    flops = roofline.flops_per_token(model, job.train)
    assert rate * flops == pytest.approx(roofline.peak(CPU, "fp32"))
