"""Qwen2 as a text encoder: a tiny model of random weights in a folder like the published one."""

import logging
import shutil
import string
from pathlib import Path

import pytest
import torch
from gesso_core.errors import InvalidRequest, WeightsError
from gesso_core.models.hart.transformer import text_positions
from gesso_core.text.qwen2 import INSTRUCTION_FILE, MAX_TOKENS, Qwen2Encoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

# Every letter is a token; the library reads a Qwen2 folder with its byte-level tokenizer.
LETTERS = ["<pad>", "\u0120", "\u010a", *string.ascii_letters, *string.digits, ":"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(LETTERS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(place)  # with the head that nobody needs here
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", padding_side="left"
    )
    tokenizer.save_pretrained(place)
    return place


def encoder(folder: Path, **options: object) -> Qwen2Encoder:
    loaded = Qwen2Encoder.from_folder(folder)
    given = {"instruction": "say:", "max_tokens": 6, **options}
    return Qwen2Encoder(loaded.model, loaded.tokenizer, **given)  # type: ignore[arg-type]


def test_states_are_those_of_the_library_behind_the_instruction(folder: Path) -> None:
    states = encoder(folder).encode(["ox"])
    model = Qwen2Model.from_pretrained(folder).eval()
    instruction, prompt = ([LETTERS.index(letter) for letter in text] for text in ("say:", "ox"))
    padded = torch.tensor([[*instruction, 0, 0, 0, 0, *prompt]])
    mask = (torch.arange(10) < 4) | (torch.arange(10) >= 8)
    with torch.no_grad():
        expected = model(padded, attention_mask=mask[None].long()).last_hidden_state[:, 4:]
    torch.testing.assert_close(states.states_BLC, expected)
    assert states.mask_BL.tolist() == [[False] * 4 + [True] * 2]
    assert text_positions(states.mask_BL).tolist() == [[-1, -1, -1, -1, 0, 1]]


def test_the_padding_side_is_the_tokenizers_own_unless_asked(folder: Path) -> None:
    assert encoder(folder).padding_side == "left"
    right = encoder(folder, padding_side="right").encode(["ox"])
    assert right.mask_BL.tolist() == [[True] * 2 + [False] * 4]


def test_a_prompt_has_the_same_states_alone_and_among_others(folder: Path) -> None:
    made = encoder(folder)
    together = made.encode(["fox", "a cat", "9"])
    assert torch.equal(made.encode(["a cat"]).states_BLC[0], together.states_BLC[1])


def test_every_prompt_has_exactly_300_states(folder: Path) -> None:
    loaded = Qwen2Encoder.from_folder(folder)
    assert loaded.encode(["fox"]).states_BLC.shape == (1, MAX_TOKENS, 32)
    assert loaded.encode([""]).mask_BL.sum() == 0
    assert loaded.encode(["fox"]).states_BLC.isfinite().all()


def test_a_prompt_that_is_too_long_is_cut_and_says_so(folder: Path) -> None:
    states = encoder(folder).encode(["foxes in", "fox"])
    assert states.truncated == [True, False]
    assert len(encoder(folder).token_ids(["foxes in"])[0]) == 8


def test_a_missing_instruction_is_told_with_the_way_to_give_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = Qwen2Encoder.from_folder(folder)
    assert "without the instruction" in caplog.text
    assert str(folder / INSTRUCTION_FILE) in caplog.text
    assert loaded.instruction_hash == ""


def test_an_instruction_of_ones_own_is_used_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("ask:\n")
    with caplog.at_level(logging.WARNING):
        loaded = Qwen2Encoder.from_folder(folder, instruction_file=own)
    assert "not the published one" in caplog.text
    assert loaded.instruction == "ask:"
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.copy(own, copy / INSTRUCTION_FILE)
    found = Qwen2Encoder.from_folder(copy)
    assert found.instruction_hash == loaded.instruction_hash != ""
    assert not torch.equal(
        found.encode(["fox"]).states_BLC, found.encode_negative(["fox"]).states_BLC
    )


def test_an_instruction_over_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="has 7 tokens; at most 6 fit"):
        encoder(folder, instruction="explain")


def test_half_a_character_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="half a character"):
        encoder(folder).encode(["fox \ud83d"])


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot load Qwen2"):
        Qwen2Encoder.from_folder(tmp_path)


def test_a_tokenizer_without_padding_is_refused(folder: Path) -> None:
    loaded = Qwen2Encoder.from_folder(folder)
    bare = PreTrainedTokenizerFast(tokenizer_object=loaded.tokenizer.backend_tokenizer)
    with pytest.raises(WeightsError, match="no padding token"):
        Qwen2Encoder(loaded.model, bare)
