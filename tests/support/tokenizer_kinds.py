"""Small trained tokenizers of the kinds that language models come with."""

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The sea was calm , and the boat didn't move . Nobody said a word !",
    "Über den Wellen zog ein Vogel seine Kreise; naïve café — déjà vu.",
    "He's seen it: 12 birds, 3 boats and a dog's head. I'm sure we've been here ?",
    "漢字かな交じり文。 Здравствуй, мир! 👩‍👩‍👧‍👦 🦜🦜 🇫🇷",
] * 8
SIZE = 420


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one of KINDS, trained on TEXT, with the special tokens <s> and </s>."""
    made, trainer, options = _KINDS[kind]()
    made.train_from_iterator(TEXT, trainer)
    state = json.loads(made.to_str())  # the trainer wrongly marks the bytes as special tokens
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **options)


def _byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return (
        made,
        trainers.BpeTrainer(
            vocab_size=SIZE, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
        ),
        {},
    )


def _sentencepiece_bpe():
    """Return one like Llama 2's: spaces as an underline, other letters as bytes, no space before a text."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = sorted({letter for text in TEXT for letter in text if letter.isascii()} - {" "} | set("▁éв。"))
    options = {"initial_alphabet": letters, "limit_alphabet": len(letters)}  # of equally frequent ones it keeps any
    return made, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False, **options), {}


def _unigram():
    """Return one like T5's and XLNet's, with transformers' clean-up of spaces before punctuation."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    return made, trainer, {"clean_up_tokenization_spaces": True}


def _word_level():
    """Return one of whole words with spaces between them, cleaned up."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex(r"n't|'\w+|[.,!?]"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    return made, trainer, {"clean_up_tokenization_spaces": True}


def _word_piece():
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    return (
        made,
        trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
        {},
    )


_KINDS = {
    "byte-level BPE": _byte_level,
    "BPE with byte fallback": _sentencepiece_bpe,
    "Unigram": _unigram,
    "WordLevel": _word_level,
    "WordPiece": _word_piece,
}
KINDS = tuple(_KINDS)
