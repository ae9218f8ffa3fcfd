"""Small vocabularies, trained on the documentation of the standard library, in the files that checkpoints have."""

import argparse
import collections
import decimal
import inspect
import io
import json
import logging
import string
import textwrap

import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

PROSE = [
    line.strip()
    for module in (argparse, collections, decimal, logging, string, textwrap)
    for line in inspect.getsource(module).splitlines()
    if line.strip()
]

ODD = [
    "a photo of a cat",
    "",
    "   ",
    "  Leading,  double   and\ttabbed\nlines \r\n trailing  ",
    "It's we're I'll o'clock 'S 'T can't!!! 1234 3.14159 x2",
    "naïve café Ångström straße ÇA İstanbul ﬁne ½ ①",
    "日本語のテキスト と 한국어, русский и العربية",
    "🐈‍⬛ cat 👩🏽‍🚀🚀 flag 🇫🇷 ❤️",
    "e\u0301 combining vs \u00e9, zero\u200bwidth, nbsp\u00a0here, ideographic\u3000space",
    "<|startoftext|> inside <|endoftext|> <|ENDOFTEXT|> of </s> text <extra_id_5> <pad> <unk>",
    "wow! such ! prompt!!",
    "\x00\x07 control \ufffd \U0001f9ff",
    "word " * 120,
    "unbrokenstringwithoutanyspaces" * 30,
    "(masterpiece:1.2), [best|quality] {hdr} #tag @user https://example.org/?q=a&b=c_d",
]
"""Prompts that tokenizers stumble over."""


def clip_folder(folder, vocab_size=600, pad="<|endoftext|>", **config):
    """CLIP's files: vocab.json, merges.txt and the configs of its tokens. The first id is "!"."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(PROSE, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    names = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(merge) for merge in merges)]
    names = [*dict.fromkeys(names), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    tokens = {
        "bos_token": {**token, "content": "<|startoftext|>"},
        "eos_token": {**token, "content": "<|endoftext|>"},
        "unk_token": {**token, "content": "<|endoftext|>"},
        "pad_token": pad,
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    kept = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kept, "pad_token": "<|endoftext|>", **config}))
    return folder


def t5_folder(folder, vocab_size=400, extra_ids=100, **options):
    """T5's files: spiece.model and its config."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "unigram", **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE), model_writer=model, vocab_size=vocab_size, minloglevel=2, **options
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": extra_ids}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
