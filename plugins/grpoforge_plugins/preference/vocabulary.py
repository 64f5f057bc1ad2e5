"""A WordPiece tokenizer made from texts: equal texts give equal tokenizers, whatever the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from string import printable
from typing import Any

__all__ = ["make_tokenizer", "vocabulary_of"]

PAD, UNKNOWN, START, SEPARATOR, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary_of(texts: Sequence[str], max_words: int) -> list[str]:
    """The tokens for ``texts``: special ones, every character that occurs, and the ``max_words`` most frequent words.

    Other words are spelled, so that every text can be written; digits are tokens of their own. Ties go by the alphabet;
    the trainers of `tokenizers` break them as their hash tables have it.
    """
    splitter = _splitter()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text))
    letters = sorted({*filter(str.strip, printable), *(letter for word in counts for letter in word)})
    common = sorted((-count, word) for word, count in counts.items() if count > 1 and len(word) > 1)
    words = [word for _, word in common[:max_words]]
    return [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]


def make_tokenizer(vocabulary: Sequence[str]) -> Any:
    """A `PreTrainedTokenizerFast` over ``vocabulary`` that writes ``[CLS] prompt [SEP] completion [SEP]``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    numbers = {token: number for number, token in enumerate(vocabulary)}
    backend = Tokenizer(WordPiece(numbers, unk_token=UNKNOWN, max_input_chars_per_word=64))
    backend.pre_tokenizer = _splitter()
    backend.post_processor = TemplateProcessing(
        single=f"{START} $A {SEPARATOR}",
        pair=f"{START} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(START, numbers[START]), (SEPARATOR, numbers[SEPARATOR])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=SEPARATOR,
        mask_token=MASK,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _splitter() -> Any:
    """Words, punctuation marks and single digits."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
