"""The short way of new tokens through a Llama against transformers' own forward."""

import pytest
import torch
from gesso_core.models.vila_u.llama_step import is_llama
from gesso_core.models.vila_u.rows import RowCache, RowRunner, use_row_attention
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

LENGTHS = (5, 9, 2)


def runner(heads: int = 4, dtype: torch.dtype = torch.float32) -> RowRunner:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=heads,
        initializer_range=0.3,
    )
    llm = LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)
    use_row_attention(llm)
    return RowRunner(llm)


def filled(rows: RowRunner, dtype: torch.dtype) -> list[RowCache]:
    generator = torch.Generator().manual_seed(1)
    like = torch.empty(0, dtype=dtype)
    caches = [rows.new_cache(12, like) for _ in LENGTHS]
    for cache, length in zip(caches, LENGTHS, strict=True):
        rows(torch.randn(1, length, 32, generator=generator).to(dtype), [cache], [0])
    return caches


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_bit_for_bit_what_transformers_computes(
    heads: int, tokens: int, dtype: torch.dtype
) -> None:
    rows = runner(heads, dtype)
    assert rows.is_llama
    new = torch.randn(3, tokens, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours, theirs = filled(rows, dtype), filled(rows, dtype)
    short_way = rows(new, ours, LENGTHS)
    rows.is_llama = False
    long_way = rows(new, theirs, LENGTHS)
    assert torch.equal(short_way, long_way)
    assert short_way.float().std() > 0.1
    for one, other, length in zip(ours, theirs, LENGTHS, strict=True):
        assert torch.equal(
            one.both_2LHTe[..., : length + tokens, :], other.both_2LHTe[..., : length + tokens, :]
        )


def test_another_decoder_goes_its_own_way() -> None:
    config = Qwen2Config(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    assert not is_llama(Qwen2ForCausalLM(config).get_decoder())
