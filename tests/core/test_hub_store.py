"""From a name to a folder, and pulling: from a small hub that speaks the routes of the real one."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from gesso_core.errors import Unavailable, UnknownModel, UnsafeFile, WeightsError
from gesso_core.hub import pull, resolve, resolve_parts, verify
from gesso_core.hub.store import SHIPPED, choose_files
from gesso_core.registry import find

NAME = "sana-0.6b-512"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": b"{}",
    "README.md": b"a card",
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"thirty-two bit",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"sixteen bit",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"autoencoder",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"overflows",
    "text_encoder/config.json": b"{}",
    "text_encoder/model.safetensors.index.json": b"{}",
    "text_encoder/model-00001-of-00002.safetensors": b"one",
    "text_encoder/model-00002-of-00002.safetensors": b"two",
    "text_encoder/model.safetensors.index.bf16.json": b"{}",
    "text_encoder/model.bf16-00001-of-00001.safetensors": b"both",
    "text_encoder/model.fp16-00001-of-00001.safetensors": b"overflows",
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/tokenizer.model": b"pieces",
    "asset/picture.png": b"png",
    "old.pth": b"\x80\x02",
}
EXPECTED = {
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.bf16.json",
    "text_encoder/model.bf16-00001-of-00001.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
}


class Hub(BaseHTTPRequestHandler):
    """Repository information and file contents, as huggingface_hub asks for them."""

    asked: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        repo = find(NAME).repo
        self.asked.append(path)
        if path == f"/api/models/{repo}/tree/{COMMIT}":
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in FILES.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path in {f"/api/models/{repo}/revision/{r}" for r in ("main", "v1", COMMIT)}:
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())
        elif (name := path.removeprefix(f"/{repo}/resolve/{COMMIT}/")) in FILES:
            self.answer(FILES[name])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Hub,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_pulled_model_is_complete_and_records_its_commit(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    folder = pull(NAME, store=tmp_path, endpoint=endpoint)
    manifest = json.loads((folder / "gesso_manifest.json").read_text())
    assert manifest["files"].keys() == EXPECTED
    about = {key: manifest[key] for key in ("model", "revision", "commit", "trained_dtype")}
    assert about == {
        "model": NAME,
        "revision": "main",
        "commit": COMMIT,
        "trained_dtype": "float16",
    }
    assert resolve(NAME, store=tmp_path) == folder
    before = len(asked)
    assert pull(NAME, store=tmp_path, endpoint=endpoint) == folder
    assert len(asked) == before


def test_a_pinned_revision_has_a_folder_of_its_own(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    folder = pull(NAME, "v1", tmp_path, endpoint=hub[0])
    assert folder.name == f"{NAME}@v1"
    assert resolve(NAME, "v1", tmp_path) == folder
    with pytest.raises(WeightsError, match="is not on this machine"):
        resolve(NAME, store=tmp_path)


def test_a_revision_that_does_not_exist_is_reported(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(Unavailable, match=r"cannot pull .* at 'v9'"):
        pull(NAME, "v9", tmp_path, endpoint=hub[0])


def test_a_hub_that_does_not_answer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="check the network"):
        pull(NAME, store=tmp_path, endpoint="http://127.0.0.1:9")


def test_the_parts_of_a_pulled_pipeline_lie_in_it(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    folder = pull(NAME, store=tmp_path, endpoint=hub[0])
    parts = resolve_parts(NAME, store=tmp_path)
    assert (parts.transformer, parts.autoencoder) == (folder / "transformer", folder / "vae")
    assert parts.text_encoder == folder
    assert resolve_parts(folder) == parts


def test_files_of_a_pulled_model_are_verified(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    folder = pull(NAME, store=tmp_path, endpoint=hub[0])
    (folder / "vae/config.json").write_text("{ }")
    problems = {r.name: r.problem for r in verify(folder) if r.name.endswith(".json")}
    assert [name for name, problem in problems.items() if problem] == ["vae/config.json"]


def test_a_text_encoder_is_two_folders_of_a_pipeline() -> None:
    chosen = choose_files(FILES, find("gemma-2-2b-it"))
    assert {name.partition("/")[0] for name in chosen} == {"text_encoder", "tokenizer"}


def test_a_text_encoder_with_a_repository_of_its_own_is_pulled_whole() -> None:
    files = ["config.json", "model.safetensors", "tokenizer.json", "README.md"]
    assert choose_files(files, find("qwen2-vl-1.5b-instruct")) == sorted(files[:3])


def test_an_interrupted_pull_is_not_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / NAME / "transformer").mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"not completely pulled.*gesso models pull"):
        resolve(NAME, store=tmp_path)


def test_shipped_weights_lie_inside_the_package() -> None:
    assert resolve("smollm2-l6") == SHIPPED / "smollm2-l6"
    assert pull("smollm2-l6") == SHIPPED / "smollm2-l6"


@pytest.mark.parametrize("name", ["../x", "/etc", "a\0b", "~/model", "sana-tiny/../.."])
def test_a_string_is_never_a_path(name: str) -> None:
    with pytest.raises(UnknownModel):
        resolve(name)


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a\0b", "", "-x"])
def test_a_revision_cannot_lead_out_of_the_store(tmp_path: Path, revision: str) -> None:
    with pytest.raises(UnsafeFile, match="not a revision"):
        resolve(NAME, revision, tmp_path)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    with pytest.raises(WeightsError, match="not a folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="complete pipeline folder"):
        resolve_parts(tmp_path)


def test_an_autoencoder_has_no_parts() -> None:
    with pytest.raises(WeightsError, match="expected a Sana"):
        resolve_parts("smollm2-l6")
