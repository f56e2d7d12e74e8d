"""The small text encoder: its arithmetic, its feature recipe, the cache in front of it."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gesso_core.errors import ConfigError, InvalidRequest, UnsafeFile, WeightsError
from gesso_core.hub.store import SHIPPED
from gesso_core.text import CachedEncoder, SmolLM2Encoder, TextStates
from gesso_core.text.smollm2_model import SmolLM2, SmolLM2Config
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

FOLDER = SHIPPED / "smollm2-l6"
REFERENCE = json.loads(Path(__file__).with_name("smollm2_reference.json").read_text())
PROMPTS = ["a red apple, 3D style, on a blue background", "", "woman’s hat", "grinning face"]


@pytest.fixture(scope="module")
def encoder() -> SmolLM2Encoder:
    return SmolLM2Encoder.from_folder(FOLDER)


def test_the_stack_agrees_with_transformers() -> None:
    torch.manual_seed(0)
    peer_config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        attn_implementation="eager",
    )
    peer = LlamaModel(peer_config).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads")
    ours = SmolLM2(SmolLM2Config(**{name: getattr(peer_config, name) for name in names}))
    state = peer.state_dict()
    ours.load_state_dict({k: v for k, v in state.items() if k.startswith("layers.")}, strict=True)

    embeddings = torch.randn(2, 11, 48)
    seen: list[torch.Tensor] = []
    peer.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        peer(inputs_embeds=embeddings, use_cache=False)
        torch.testing.assert_close(ours(embeddings), seen[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prompt", REFERENCE["states"])
def test_states_are_those_of_the_complete_model_after_layer_6(
    encoder: SmolLM2Encoder, prompt: str
) -> None:
    want = torch.tensor(REFERENCE["states"][prompt])
    got = encoder.encode([prompt]).states_BLC[0, : len(want), : want.shape[1]]
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)


def test_the_pruned_vocabulary_cuts_captions_like_the_full_one(encoder: SmolLM2Encoder) -> None:
    original = load_file(FOLDER / "model.safetensors")["original_token_ids"].tolist()
    captions = list(REFERENCE["token_ids"])
    ids = [[original[i] for i in row] for row in encoder.token_ids(captions)]
    assert ids == list(REFERENCE["token_ids"].values())


@pytest.mark.parametrize("text", ["žluťoučký kůň", "🍎 und Äpfel", "漢字", "zygomorphic quokka"])
def test_no_text_is_unrepresentable(encoder: SmolLM2Encoder, text: str) -> None:
    (ids,) = encoder.token_ids([text])
    assert encoder.tokenizer.decode(ids) == text


def test_a_prompt_cannot_spell_a_control_token(encoder: SmolLM2Encoder) -> None:
    (ids,) = encoder.token_ids(["<|endoftext|>"])
    assert len(ids) > 1
    assert encoder.config.end_of_text_id not in ids


def test_half_a_character_is_refused(encoder: SmolLM2Encoder) -> None:
    with pytest.raises(InvalidRequest, match="position 6"):
        encoder.encode(["apple \ud800"])


def test_the_empty_caption_is_one_end_of_text_token(encoder: SmolLM2Encoder) -> None:
    assert encoder.token_ids([""]) == [[encoder.config.end_of_text_id]]
    assert encoder.encode([""]).mask_BL.sum() == 1


def test_states_have_unit_rms_and_padding_is_zero(encoder: SmolLM2Encoder) -> None:
    states = encoder.encode(PROMPTS)
    assert states.states_BLC.shape == (4, encoder.max_tokens, encoder.width) == (4, 20, 576)
    rms = states.states_BLC.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, states.mask_BL.float(), atol=1e-5, rtol=0)


def test_states_do_not_depend_on_the_neighbors(encoder: SmolLM2Encoder) -> None:
    together = encoder.encode(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        torch.testing.assert_close(
            together.states_BLC[index], alone.states_BLC[0], atol=1e-5, rtol=0
        )


def test_a_prompt_that_is_too_long_is_reported(encoder: SmolLM2Encoder) -> None:
    states = encoder.encode(["apple " * 30, "apple"])
    assert states.truncated == [True, False]
    assert states.mask_BL.sum(1).tolist() == [20, 1]


def test_states_may_be_trained_on(encoder: SmolLM2Encoder) -> None:
    layer = torch.nn.Linear(576, 2)
    layer(encoder.encode(["apple"]).states_BLC).sum().backward()
    assert layer.weight.grad is not None


def test_text_statistics_normalize_every_channel(encoder: SmolLM2Encoder, tmp_path: Path) -> None:
    mean, std = torch.randn(576), torch.rand(576) + 0.5
    save_file({"mean": mean, "std": std}, tmp_path / "text_stats.safetensors")
    normalized = SmolLM2Encoder.from_folder(FOLDER, tmp_path / "text_stats.safetensors")
    plain = encoder.encode(["apple"]).states_BLC[0, 0]
    torch.testing.assert_close(
        normalized.encode(["apple"]).states_BLC[0, 0], (plain - mean) / std, atol=1e-5, rtol=1e-5
    )


def test_text_statistics_of_another_encoder_are_refused(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(8), "std": torch.ones(8)}, tmp_path / "stats.safetensors")
    with pytest.raises(WeightsError, match=r"shape \(576,\)"):
        SmolLM2Encoder.from_folder(FOLDER, tmp_path / "stats.safetensors")


def test_an_incomplete_encoder_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        SmolLM2Encoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text((FOLDER / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"tokenizer\.json is missing"):
        SmolLM2Encoder.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text((FOLDER / "tokenizer.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 a renamed pickle")
    with pytest.raises(UnsafeFile, match="pickle"):
        SmolLM2Encoder.from_folder(tmp_path)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="5 heads"):
        SmolLM2Config(
            vocab_size=9,
            hidden_size=48,
            intermediate_size=9,
            num_hidden_layers=1,
            num_attention_heads=5,
            num_key_value_heads=1,
        )


def test_the_shipped_file_stays_within_its_budget() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size < 25_000_000


class CountingEncoder:
    """Four channels that hold the prompt's length; counts what it was asked."""

    width, max_tokens, instruction_hash = 4, 2, "chi"

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def encode(self, prompts: Sequence[str]) -> TextStates:
        self.asked.append(("positive", list(prompts)))
        return self._states(prompts, 1.0)

    def encode_negative(self, prompts: Sequence[str]) -> TextStates:
        self.asked.append(("negative", list(prompts)))
        return self._states(prompts, -1.0)

    def _states(self, prompts: Sequence[str], sign: float) -> TextStates:
        rows = [torch.full((2, 4), sign * len(prompt)) for prompt in prompts]
        mask = torch.ones(len(rows), 2, dtype=torch.bool)
        return TextStates(torch.stack(rows), mask, [len(prompt) > 9 for prompt in prompts])


def test_the_cache_asks_for_each_prompt_once() -> None:
    inner = CountingEncoder()
    cached = CachedEncoder(inner)
    first = cached.encode(["aa", "b", "aa"])
    again = cached.encode(["b", "cccccccccc"])
    assert inner.asked == [("positive", ["aa", "b"]), ("positive", ["cccccccccc"])]
    assert first.states_BLC[:, 0, 0].tolist() == [2, 1, 2]
    assert again.truncated == [False, True]


def test_the_cache_tells_negative_prompts_apart() -> None:
    cached = CachedEncoder(CountingEncoder())
    assert cached.encode(["aa"]).states_BLC[0, 0, 0] == 2
    assert cached.encode_negative(["aa"]).states_BLC[0, 0, 0] == -2


def test_the_cache_forgets_the_least_recently_used_beyond_its_capacity() -> None:
    inner = CountingEncoder()
    one = inner.encode(["x"]).nbytes
    inner.asked.clear()
    cached = CachedEncoder(inner, capacity=2 * one)
    for prompt in ("a", "bb", "a", "ccc", "a", "bb"):
        cached.encode([prompt])
    assert [prompts for _, prompts in inner.asked] == [["a"], ["bb"], ["ccc"], ["bb"]]
    assert cached.nbytes == 2 * one


def test_a_cache_without_room_still_answers() -> None:
    cached = CachedEncoder(CountingEncoder(), capacity=0)
    assert cached.encode(["aa", "b"]).states_BLC[:, 0, 0].tolist() == [2, 1]
    with pytest.raises(ConfigError, match="-1 bytes"):
        CachedEncoder(CountingEncoder(), capacity=-1)


def test_the_cache_serves_threads_that_ask_at_once() -> None:
    inner = CountingEncoder()
    cached = CachedEncoder(inner)
    barrier = threading.Barrier(8)
    lengths: list[float] = []

    def ask() -> None:
        barrier.wait()
        lengths.append(float(cached.encode(["same"]).states_BLC[0, 0, 0]))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [4.0] * 8
    assert len(inner.asked) == 1


def test_pooling_averages_the_real_tokens_only() -> None:
    states = torch.tensor([[[2.0], [4.0], [99.0]]])
    mask = torch.tensor([[True, True, False]])
    assert TextStates(states, mask, [False]).pooled().tolist() == [[3.0]]
