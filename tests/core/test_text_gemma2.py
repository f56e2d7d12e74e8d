"""Gemma-2 as a text encoder: a tiny model of random weights, saved as a pipeline has it."""

from pathlib import Path

import pytest
import torch
from gesso_core.errors import UnsafeFile, WeightsError
from gesso_core.text.from_folder import read_instruction
from gesso_core.text.gemma2 import INSTRUCTION, Gemma2Encoder
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"w{i}" for i in range(20)] + ["Fox", "fox"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=0.5,
        sliding_window=16,
    )
    Gemma2Model(config).save_pretrained(folder / "text_encoder")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def encoder(pipeline: Path, **options: object) -> Gemma2Encoder:
    loaded = Gemma2Encoder.from_folder(pipeline, dtype=torch.float32)
    given = {"instruction": "w1 w2 w3 w4 ", "max_tokens": 6, **options}
    return Gemma2Encoder(loaded.model, loaded.tokenizer, **given)


def peer_states(pipeline: Path, ids: list[int], total: int) -> torch.Tensor:
    """What transformers gives for a padded and masked prompt."""
    model = Gemma2Model.from_pretrained(pipeline / "text_encoder", attn_implementation="eager")
    padded = torch.tensor([ids + [0] * (total - len(ids))])
    mask = torch.tensor([[1] * len(ids) + [0] * (total - len(ids))])
    with torch.no_grad():
        return model.eval()(padded, attention_mask=mask).last_hidden_state[0]


def test_a_positive_prompt_keeps_bos_and_its_own_end_of_the_context(pipeline: Path) -> None:
    states = encoder(pipeline).encode(["fox w9"])
    # Five instruction tokens with bos, so T = 5 + 6 - 2 = 9; kept: 0 and 4..8.
    ids = [2, 5, 6, 7, 8, 25, 13]
    want = peer_states(pipeline, ids, total=9)[[0, 4, 5, 6, 7, 8]]
    assert states.mask_BL.tolist() == [[True, True, True, True, False, False]]
    torch.testing.assert_close(states.states_BLC[0, :4], want[:4], atol=1e-5, rtol=1e-4)
    assert states.states_BLC[0, 4:].abs().max() == 0


def test_a_negative_prompt_has_no_instruction(pipeline: Path) -> None:
    states = encoder(pipeline).encode_negative(["", "fox"])
    assert states.mask_BL.sum(1).tolist() == [1, 2]
    want = peer_states(pipeline, [2, 25], total=6)
    torch.testing.assert_close(states.states_BLC[1, :2], want[:2], atol=1e-5, rtol=1e-4)


def test_without_instruction_positive_and_negative_are_alike(pipeline: Path) -> None:
    plain = encoder(pipeline, instruction="")
    assert plain.instruction_hash == ""
    assert torch.equal(plain.encode(["fox"]).states_BLC, plain.encode_negative(["fox"]).states_BLC)


def test_a_prompt_beyond_the_length_is_cut_and_reported(pipeline: Path) -> None:
    states = encoder(pipeline).encode(["w5 " * 4, "w5 " * 5])
    assert states.mask_BL.all(dim=1).tolist() == [True, True]
    assert states.truncated == [False, True]
    assert states.states_BLC.shape == (2, 6, 32)


def test_states_do_not_depend_on_the_neighbors(pipeline: Path) -> None:
    gemma = encoder(pipeline)
    together = gemma.encode(["fox", "w7 w8 w9"])
    assert torch.equal(together.states_BLC[:1], gemma.encode(["fox"]).states_BLC)


def test_prompts_keep_their_case_unless_asked(pipeline: Path) -> None:
    exact, lower = encoder(pipeline), encoder(pipeline, lower_case=True)
    fox, small = exact.encode(["Fox"]), exact.encode(["fox"])
    assert not torch.equal(fox.states_BLC, small.states_BLC)
    assert torch.equal(lower.encode(["Fox "]).states_BLC, small.states_BLC)


def test_the_published_wording_comes_from_a_file(pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "instruction.txt"
    file.write_text("w1\nw2 \n")
    assert read_instruction(file) == "w1\nw2 "
    options = {"dtype": torch.float32, "instruction_file": file}
    assert Gemma2Encoder.from_folder(pipeline, **options).instruction == "w1\nw2 "
    file.write_text("\n")
    with pytest.raises(WeightsError, match="empty"):
        read_instruction(file)


def test_our_instruction_has_eight_lines_and_ends_with_a_label() -> None:
    lines = INSTRUCTION.split("\n")
    assert len(lines) == 8
    assert [line[:2] for line in lines].count("- ") == 4
    assert lines[-1].endswith(": ")


def test_float16_is_refused(pipeline: Path) -> None:
    with pytest.raises(WeightsError, match="bfloat16 or float32"):
        Gemma2Encoder.from_folder(pipeline, dtype=torch.float16)
    loaded = encoder(pipeline)
    with pytest.raises(WeightsError, match="float16"):
        Gemma2Encoder(loaded.model.half(), loaded.tokenizer)


def test_weights_that_do_not_fill_the_model_are_refused(pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text((pipeline / "text_encoder/config.json").read_text())
    state = load_file(pipeline / "text_encoder" / WEIGHTS)
    del state["norm.weight"]
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"norm\.weight"):
        Gemma2Encoder.from_folder(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("damage", [b"PK\x03\x04", b"\x80\x02}q\x00."], ids=["zip", "pickle"])
def test_a_pickle_under_another_name_stays_closed(
    pipeline: Path, tmp_path: Path, damage: bytes
) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_text((pipeline / "text_encoder/config.json").read_text())
    (folder / WEIGHTS).write_bytes(damage)
    with pytest.raises(UnsafeFile, match="pickle"):
        Gemma2Encoder.from_folder(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="text_encoder"):
        Gemma2Encoder.from_folder(tmp_path, dtype=torch.float32)
