"""Pruning of a byte-level BPE vocabulary to the words of a domain.

Kept are special tokens, the 256 single bytes, the most frequent tokens (small ids), every token
of the given words, and with every token the two parents of its merge. Because the path to a kept
token stays complete and merges keep their order, covered text is cut exactly as before; other
words fall into more pieces, and nothing becomes unrepresentable.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders

BYTE_TOKENS = frozenset(pre_tokenizers.ByteLevel.alphabet())


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary: ``tokens`` by id, ``merges`` by rank, ids of specials."""

    tokens: Sequence[str]
    merges: Sequence[tuple[str, str]]
    special_ids: frozenset[int]

    def tokenizer(self) -> Tokenizer:
        """SmolLM2's tokenizer over this vocabulary: single digits, then the GPT-2 pattern."""
        ids = {token: index for index, token in enumerate(self.tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(self.merges), fuse_unk=False))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.decoder = token_decoders.ByteLevel()
        specials = [self.tokens[index] for index in sorted(self.special_ids)]
        tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
        return tokenizer


def surface_forms(texts: Iterable[str]) -> list[str]:
    """Every word of the texts bare and after a space, as written, lower, capitalized, plural."""
    forms: set[str] = set()
    for text in texts:
        for word in {text, *text.split(), *text.replace("-", " ").replace("’", " ").split()}:
            for cased in (word, word.lower(), word.capitalize(), word.lower() + "s"):
                forms |= {cased, " " + cased}
    return sorted(forms)


def prune(
    full: Vocabulary, texts: Iterable[str], smallest_ids: int
) -> tuple[Vocabulary, list[int]]:
    """The vocabulary for ``texts``, and for each of its ids the id in ``full``."""
    parents = {"".join(pair): pair for pair in reversed(full.merges)}
    ids = {token: index for index, token in enumerate(full.tokens)}
    tokenizer = full.tokenizer()
    used = {i for e in tokenizer.encode_batch(surface_forms(texts)) for i in e.ids}
    kept = used | set(full.special_ids) | set(range(smallest_ids))
    kept |= {index for token, index in ids.items() if token in BYTE_TOKENS}
    pending = list(kept)
    while pending:
        for parent in parents.get(full.tokens[pending.pop()], ()):
            if ids[parent] not in kept:
                kept.add(ids[parent])
                pending.append(ids[parent])
    return _restrict(full, sorted(kept)), sorted(kept)


def _restrict(full: Vocabulary, kept_ids: Sequence[int]) -> Vocabulary:
    tokens = [full.tokens[index] for index in kept_ids]
    known = set(tokens)
    merges = [(a, b) for a, b in full.merges if {a, b, a + b} <= known]
    specials = frozenset(i for i, old in enumerate(kept_ids) if old in full.special_ids)
    return Vocabulary(tokens, merges, specials)


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer file, compact."""
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
