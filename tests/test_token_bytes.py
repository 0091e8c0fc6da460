"""How the bytes of a text are shared among its tokens, with real tokenizers of every kind."""

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from moeexp.model.token_bytes import token_bytes

TEXTS = [
    "Привет, мир! Это текст из двухбайтовых букв.",
    "你好世界，这是三字节的文字。",
    "emoji 😀 of 👨‍👩‍👧‍👦 several 🇩🇪 code points 👍🏽",
    "\ufeffa BOM,\r\nCRLF\r\n\r\n and  runs   of white space  \n ",
    "e\u0301 and \u212b and ﬁne ½ Ⅷ, a \ufffd of its own, \u2028 and \x85, zero \u200b width",
    "a",
    "п",
    "",
]
MIXED = " ".join(TEXTS)


def byte_level(trim, normalizer=None, prefix=False, merges=40):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([MIXED], trainer)
    return tokenizer


def with_fallback(kind):
    names = ["<unk>", "▁", "П", "ри", "你", "x", "e"] + [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bpe":
        vocab = {name: index for index, name in enumerate(names)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0, byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def word_pieces():
    """Drops accents, control characters and white space, and has no word for most of the text."""
    vocab = {"[UNK]": 0, "при": 1, "##вет": 2, "текст": 3, "e": 4, "a": 5}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return tokenizer


TOKENIZERS = {
    "byte level": lambda: byte_level(False),
    "byte level, trimmed": lambda: byte_level(True),
    "bytes alone": lambda: byte_level(True, merges=0),
    "a space before": lambda: byte_level(True, prefix=True),
    "NFC": lambda: byte_level(False, normalizers.NFC()),
    "NFKD, lower": lambda: byte_level(True, normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])),
    "stripped": lambda: byte_level(True, normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])),
    "BPE, fallback": lambda: with_fallback("bpe"),
    "unigram, fallback": lambda: with_fallback("unigram"),
    "word pieces": word_pieces,
}


def sizes_of(tokenizer, text):
    found = tokenizer.encode(text, add_special_tokens=False)
    return token_bytes(text, found.offsets, found.tokens), found.tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_byte_counts_once_with_every_tokenizer(name):
    tokenizer = TOKENIZERS[name]()
    for text in [*TEXTS, MIXED, *(MIXED[i : i + 9] for i in range(len(MIXED)))]:
        sizes, tokens = sizes_of(tokenizer, text)
        assert len(sizes) == len(tokens) and all(size >= 0 for size in sizes)
        assert sum(sizes) == (len(text.encode()) if tokens else 0), text


@pytest.mark.parametrize("name", ["byte level", "byte level, trimmed", "bytes alone"])
def test_of_a_split_character_each_token_counts_the_bytes_that_it_is(name):
    """A byte-level vocabulary writes each byte as one character, whatever the offsets say."""
    tokenizer, split = TOKENIZERS[name](), 0
    for text in [*TEXTS, MIXED]:
        sizes, tokens = sizes_of(tokenizer, text)
        assert sizes == [len(token) for token in tokens]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        split += sum(text.encode()[start] & 0xC0 == 0x80 for start in starts)
    assert split > 50, "these texts should have tokens that begin inside a character"


def test_bytes_of_fallback_tokens():
    for kind in ("bpe", "unigram"):
        sizes, tokens = sizes_of(with_fallback(kind), "x你я")
        assert tokens[-3:] == ["你", "<0xD1>", "<0x8F>"] and sizes[-3:] == [3, 1, 1] and sum(sizes) == 6


def test_what_a_normaliser_merges_counts_with_its_letter_and_white_space_with_the_word_it_leads():
    sizes, tokens = sizes_of(TOKENIZERS["stripped"](), "e\u0301 x")
    assert tokens == ["Ã", "©", "Ġ", "x"] and sizes == [1, 2, 1, 1]
    # A special token of which the text has nothing, and offsets that leave out a space.
    assert token_bytes("é x", [(0, 0), (0, 1), (2, 3)], ["<s>", "Ã©", "Ġx"]) == [0, 2, 2]


def test_tokens_that_share_a_character_without_being_bytes_share_it_in_whole_bytes():
    assert token_bytes("ﬁ", [(0, 1), (0, 1)], ["f", "i"]) == [1, 2]
    assert token_bytes("½", [(0, 1)] * 3, ["1", "⁄", "2"]) == [0, 1, 1]
