#!/usr/bin/env bash
# What docs/performance.md says of inference on a GPU: bash benchmarks/gpu.sh TEXTS [PASSES]
#
# TEXTS has a sentence a line. MINILM names a local copy of the model. Each job is a process of its own: what one has
# compiled stands in the way of the next. With two passes it takes six to eight minutes on an H200, most of them to
# compile the peer.
set -u
texts=$1 passes=${2:-2}
cd "$(dirname "$0")/.."
export PYTHONPATH=src

python -m pytest -q tests/fast/test_graphs.py
for job in one sixteen; do python benchmarks/decode.py $job --passes "$passes"; done
for job in minilm bert-base; do python benchmarks/encode.py $job --texts "$texts" --passes "$passes"; done
for job in greedy beam; do python benchmarks/translate.py $job --passes "$passes"; done
for job in ti-1 ti-32 b-1 b-32; do python benchmarks/classify_images.py $job --passes "$passes"; done
