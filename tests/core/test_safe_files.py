"""A safetensors file may begin with the bytes of a pickle: the length of its header."""

from pathlib import Path

import pytest
import torch
from gesso_core.errors import UnsafeFile
from gesso_core.safe_files import read_tensors
from safetensors.torch import save_file


@pytest.mark.parametrize("second_byte", [2, 3, 4, 5])
def test_a_header_whose_length_looks_like_a_pickle_is_read(
    tmp_path: Path, second_byte: int
) -> None:
    path = tmp_path / "model.safetensors"
    length = second_byte * 256 + 0x80
    save_file({"x": torch.ones(2)}, path, {"note": ""})
    shortest = int.from_bytes(path.read_bytes()[:8], "little")  # a header is filled up to 8 bytes
    save_file({"x": torch.ones(2)}, path, {"note": "n" * (length - shortest)})
    assert path.read_bytes()[:2] == bytes((0x80, second_byte))
    assert read_tensors(path)["x"].tolist() == [1, 1]


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x80\x05\x95\x10"])
def test_a_pickle_under_the_name_of_a_safetensors_file_stays_shut(
    tmp_path: Path, start: bytes
) -> None:
    (tmp_path / "model.safetensors").write_bytes(start + bytes(64))
    with pytest.raises(UnsafeFile, match="is a pickle"):
        read_tensors(tmp_path / "model.safetensors")
