"""The tokenizer of the small VILA-U: byte-level pairs learned from its own questions and captions.

Any text can be written, since all bytes are in the vocabulary. The four markers of pictures and
videos are its last entries, as in the published models.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from gesso_core.models.vila_u.config import SPECIAL_TOKENS

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ENTRIES = 3072  # with the markers


def build_tokenizer(texts: Iterable[str], folder: Path, entries: int = ENTRIES) -> None:
    """Learn from texts and write what ``AutoTokenizer`` reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries - len(SPECIAL_TOKENS),
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "padding_side": "right",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a language model's folder; nothing is downloaded."""
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
