"""Folders are replaced whole or not at all, and found on disk or on the Hub."""

import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path

import pytest
import torch

from qkv import hub
from qkv.config import GPTConfig, TokenizerConfig, TransformerConfig
from qkv.errors import InputError
from qkv.hub.folder import open_tensors
from qkv.images import ImageProcessor
from qkv.models import build
from qkv.tokenizers import Tokenizer, train_tokenizer

from . import theirs

TEXTS = ["one two three", "four five six"]


def checkpoint(seed: int = 0, dim: int = 12) -> hub.Checkpoint:
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=300), "gpt", TEXTS)
    sizes = {"dim": dim, "depth": 1, "heads": 2, "mlp_dim": 4 * dim}
    config = GPTConfig(vocab_size=tokenizer.vocab_size, context=16, **sizes)
    return hub.Checkpoint(build(config).eval(), tokenizer)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ---------------------------------------------------------------- saving


def test_text_models_come_back_with_their_tokenizer(tmp_path: Path) -> None:
    saved = checkpoint()
    hub.save(tmp_path / "deep" / "er", saved)
    loaded = hub.load(str(tmp_path / "deep" / "er"))
    assert loaded.tokenizer is not None and saved.tokenizer is not None
    assert loaded.tokenizer.encode("two four") == saved.tokenizer.encode("two four")
    assert loaded.images is None and loaded.pooling is None
    config = json.loads((tmp_path / "deep" / "er" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 0, None)
    tokenizer = json.loads((tmp_path / "deep" / "er" / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 16
    assert len({file.stat().st_mode for file in (tmp_path / "deep" / "er").iterdir()}) == 1


def test_a_setting_of_training_alone_stays_out_of_the_folder(tmp_path: Path) -> None:
    saved = checkpoint()
    config = saved.model.config
    saved.model.config = replace(config, drop_path=0.3)
    hub.save(tmp_path, saved)
    assert "drop_path" not in (tmp_path / "config.json").read_text()
    assert hub.load(str(tmp_path)).model.config == config


def test_image_models_come_back_with_their_settings(tmp_path: Path) -> None:
    theirs.make("vit-classification").save_pretrained(tmp_path / "theirs")
    assert hub.load(tmp_path / "theirs").images is None
    images = ImageProcessor(8, (0.5,), (0.25,))
    hub.save(tmp_path, hub.Checkpoint(hub.load(tmp_path / "theirs").model, images=images))
    assert hub.load(tmp_path).images == images


def test_saving_leaves_nothing_of_an_earlier_checkpoint_and_everything_else(tmp_path: Path) -> None:
    theirs.make("bert").save_pretrained(tmp_path, max_shard_size="2KB")
    for name in ("vocab.txt", "special_tokens_map.json", "modules.json", "modeling_theirs.py"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.toml").write_text("mine")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "last.safetensors").write_text("mine too")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    hub.save(tmp_path, checkpoint())
    assert set(contents(tmp_path)) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.toml",
        "state/last.safetensors",
    }
    hub.load(tmp_path)


def test_files_of_a_folder_that_is_no_checkpoint_stay(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a list of mine")
    hub.save(tmp_path, checkpoint())
    assert (tmp_path / "vocab.txt").read_text() == "a list of mine"


@pytest.fixture(params=["disk", "writer"])
def full(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk that fills up: a small tmpfs where one may be mounted, and a writer that fails."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    mounted = (
        request.param == "disk"
        and shutil.which("mount")
        and subprocess.run(mount, check=False).returncode == 0
    )
    if not mounted:
        original = Path.write_text

        def write_text(self: Path, text: str, *args, **kwargs) -> int:
            if self.name == "config.json" and json.loads(text).get("n_embd", 0) > 100:
                raise OSError(ENOSPC, os.strerror(ENOSPC), str(self))
            return original(self, text, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", write_text)
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_what_was_there(full: Path) -> None:
    hub.save(full / "model", checkpoint())
    before = contents(full)
    for target in ("model", "new"):
        with pytest.raises(InputError, match=r"cannot save to .*the disk is full") as error:
            hub.save(full / target, checkpoint(dim=200))
        assert "\n" not in str(error.value)
        assert ("is kept" in str(error.value)) == (target == "model")
        assert contents(full) == before
    assert [path.name for path in full.iterdir()] == ["model"]
    hub.load(full / "model")


@pytest.mark.parametrize("step", ["tokenizer", "rename"])
def test_a_failure_half_way_leaves_what_was_there(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.save(tmp_path, checkpoint(seed=1))
    before = contents(tmp_path)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    if step == "tokenizer":
        monkeypatch.setattr(Tokenizer, "save", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InputError, match="is kept"):
        hub.save(tmp_path, checkpoint(seed=2))
    assert contents(tmp_path) == before


def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.save(tmp_path, checkpoint(seed=1))
    before = contents(tmp_path)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.save(tmp_path, checkpoint(seed=2))
    assert contents(tmp_path) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from qkv import hub
from qkv.tokenizers import Tokenizer

folder, step = sys.argv[1:]
checkpoint = hub.load(folder)
checkpoint.model.tokens.weight.data.fill_(1.0)
def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)
replace = Path.replace
if step == "writing":
    Tokenizer.save = die
else:
    Path.replace = lambda path, to: die() if path.name == "model.safetensors" else replace(path, to)
hub.save(folder, checkpoint)
"""


@pytest.mark.parametrize("step", ["writing", "weights"])
def test_what_a_killed_process_leaves_goes_with_the_next_save(step: str, tmp_path: Path) -> None:
    """And until then the folder is the checkpoint that it was, although one step ends at the last rename."""
    saved = checkpoint(seed=1)
    hub.save(tmp_path, saved)
    names = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", KILLED, str(tmp_path), step]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    stale = [path.name for path in tmp_path.iterdir() if path.name not in names]
    assert len(stale) == 1 and stale[0].startswith(".saving-")
    if step == "weights":  # are the last to be moved
        assert list(contents(tmp_path / stale[0])) == ["model.safetensors"]
    left = hub.load(tmp_path).model.state_dict()
    assert all(torch.equal(value, left[key]) for key, value in saved.model.state_dict().items())
    hub.save(tmp_path, saved)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_kill_between_new_weights_and_old_ones_of_another_name_loses_neither(tmp_path: Path) -> None:
    saved = checkpoint(seed=1)
    hub.save(tmp_path, saved)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    with open_tensors([tmp_path / "model-00001-of-00001.safetensors"]) as tensors:
        names = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    program = KILLED.split("replace = Path.replace")[0] + "Path.unlink = die\nhub.save(folder, checkpoint)\n"
    command = [sys.executable, "-c", program, str(tmp_path), "leftovers"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "model.safetensors").is_file() and hub.load(tmp_path).model.tokens.weight.eq(1).all()


def test_two_that_save_at_once_leave_each_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = checkpoint(seed=1), checkpoint(seed=2)
    original = Tokenizer.save

    def save_another(self: Tokenizer, *args, **kwargs) -> None:
        monkeypatch.setattr(Tokenizer, "save", original)
        hub.save(tmp_path, second)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Tokenizer, "save", save_another)
    hub.save(tmp_path, first)
    assert torch.equal(hub.load(tmp_path).model.tokens.weight, first.model.tokens.weight)
    assert not list(tmp_path.glob(".saving-*"))


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(InputError, match="cannot save to") as error:
            hub.save(target, checkpoint())
        assert "\n" not in str(error.value)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    root = os.geteuid() == 0
    model = checkpoint()
    if root:
        os.seteuid(65534)  # nobody: root may write anywhere
    try:
        with pytest.raises(InputError, match=r"cannot save to .*Permission denied"):
            hub.save(locked / "model", model)
        with pytest.raises(InputError, match=r"cannot be read: Permission denied"):
            hub.load(locked / "model")
    finally:
        if root:
            os.seteuid(0)


# ---------------------------------------------------------------- finding


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for source, message in (
        (tmp_path / "absent", "no folder"),
        ("./absent/model", "no folder"),
        ("a/b/c", "no folder"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(InputError, match=message):
            hub.load(source)
    hub.save(tmp_path / "model", checkpoint())
    with pytest.raises(InputError, match="revision belongs to a Hub id"):
        hub.load(tmp_path / "model", revision="main")


class Server(http.server.ThreadingHTTPServer):
    """The part of the Hub's protocol that a download needs: model info, file tree, and files by commit."""

    def __init__(self, models: dict[str, dict[str, Path]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = models
        """Name -> revision -> folder."""
        self.requests: Counter[str] = Counter()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        for name, revisions in self.server.models.items():
            commits = {commit(folder): folder for folder in revisions.values()}
            wanted = {**revisions, **commits}
            api, files = f"/api/models/{name}", f"/{name}/resolve/"
            if path.startswith(files):
                revision, _, file = path.removeprefix(files).partition("/")
                target = wanted.get(revision, Path("absent")) / file
                if not target.is_file():
                    return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
                self.server.requests[file] += self.command == "GET"
                data = target.read_bytes()
                etag = hashlib.sha256(data).hexdigest()
                return self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit(wanted[revision])})
            if path in (api, f"{api}/revision/main") or path.startswith((f"{api}/revision/", f"{api}/tree/")):
                revision = path.removeprefix(api).rpartition("/")[2] or "main"
                if revision not in wanted:
                    return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
                folder = wanted[revision]
                names = sorted(contents(folder))
                if "/tree/" in path:
                    return self.json([entry(folder, file) for file in names])
                siblings = [{"rfilename": file} for file in names]
                return self.json({"id": name, "modelId": name, "sha": commit(folder), "siblings": siblings})
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def commit(folder: Path) -> str:
    """What stands for the hash of a revision."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def entry(folder: Path, file: str) -> dict[str, object]:
    """A file in the Hub's listing."""
    data = (folder / file).read_bytes()
    return {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


CLIENT = """
import json, sys
from qkv import hub
from qkv.errors import InputError
answers = []
for name, revision in json.loads(sys.argv[1]):
    try:
        checkpoint = hub.load(name, revision=revision)
        answers.append([checkpoint.model.tokens.weight.sum().item(), checkpoint.tokenizer.plain("two four")])
    except InputError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(endpoint: str, cache: Path, wanted: list[tuple[str, str | None]], **environment: str) -> list:
    """What another process, with an empty home, loads from that endpoint."""
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"):
        variables.pop(name, None)
    command = [sys.executable, "-c", CLIENT, json.dumps(wanted)]
    done = subprocess.run(
        command, env={**variables, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_models_on_the_hub(tmp_path: Path) -> None:
    one, two = checkpoint(seed=1), checkpoint(seed=2)
    for name, model in (("one", one), ("two", two)):
        hub.save(tmp_path / name, model)
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"not wanted")
        (tmp_path / name / "README.md").write_text("not wanted")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"not wanted")
    server = Server(
        {
            "someone/gpt": {"main": tmp_path / "one", "v2": tmp_path / "two"},
            "someone/pickled": {"main": pickled},
        }
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "home"
    expected = [
        [pytest.approx(model.model.tokens.weight.sum().item()), model.tokenizer.plain("two four")]
        for model in (one, two)
    ]
    wanted = [("someone/gpt", None), ("someone/gpt", "v2"), ("someone/gpt", commit(tmp_path / "one"))]
    try:
        bad = [("someone/absent", None), ("absent", None), ("someone/gpt", "v3"), ("someone/pickled", None)]
        found = ask(endpoint, cache, [*wanted, *bad])
        assert found[:3] == [*expected, expected[0]]
        absent, also_absent, revision, pickle = found[3:]
        assert absent == "someone/absent is neither a folder nor a model on the Hub that you may see"
        assert also_absent.startswith("absent is neither a folder")
        assert revision == "someone/gpt has no revision v3"
        assert "pickled weights such as pytorch_model.bin are never loaded" in pickle
        assert server.requests["model.safetensors"] == 2  # each revision once: the third was in the cache
        assert server.requests["pytorch_model.bin"] == server.requests["README.md"] == 0
        before = server.requests.total()
    finally:
        server.shutdown()
        server.server_close()
    offline = ask(endpoint, cache, [*wanted, ("someone/absent", None)], HF_HUB_OFFLINE="1")
    assert offline[:3] == [*expected, expected[0]]
    assert offline[3].startswith("someone/absent is not a folder, not in the cache")
    assert server.requests.total() == before
    assert all("\n" not in answer for answer in (*found[3:], offline[3]))


def test_a_transformer_folder_says_how_to_generate(tmp_path: Path) -> None:
    sizes = {"dim": 12, "depth": 1, "heads": 2, "mlp_dim": 12, "vocab_size": 9, "context": 5}
    hub.save(tmp_path, hub.Checkpoint(build(TransformerConfig(**sizes))))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["decoder_start_token_id"], generation["eos_token_id"]) == (0, 1)
    assert generation["bad_words_ids"] == [[0]]


def test_an_index_of_earlier_weights_is_passed_over(tmp_path: Path) -> None:
    """As transformers leaves it, which saves a model once in shards and then in one file."""
    model = theirs.make("bert")
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    theirs.compare(hub.load(tmp_path).model, model)


def test_labels_json_of_a_whole_model_is_the_users(tmp_path: Path) -> None:
    theirs.make("bert").save_pretrained(tmp_path)
    (tmp_path / "labels.json").write_text("[1]")
    hub.save(tmp_path, hub.load(tmp_path))
    assert (tmp_path / "labels.json").read_text() == "[1]"
