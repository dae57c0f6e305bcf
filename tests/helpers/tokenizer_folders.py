"""Random tokenizer folders, of all the kinds and with all the files that Llama models come with."""

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from tests.helpers.small_tokenizers import byte_level, sentencepiece

TOKENS = ["<s>", "</s>", "<unk>", "<pad>", "<|end|>", "<|im_start|>", "<|im_end|>", "<image>", "hello", "  x", "<|y|>"]


def texts(rng: random.Random) -> list[str]:
    """Texts in which the tokens of ``random_folder`` stand between words and spaces."""
    parts = [
        *TOKENS,
        " ",
        "  ",
        "h",
        "hello",
        " world",
        "w",
        "é",
        "e\u0301",
        "日本",
        "😀",
        "\n",
        "don't .",
        " ' ",
        "A",
        "\t",
    ]
    return ["", *("".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(12))]


def random_folder(rng: random.Random, folder: Path, **config: Any) -> Path:
    """Writes a folder. ``config`` goes into its ``tokenizer_config.json``."""
    folder.mkdir(parents=True)
    backend = rng.choice([byte_level, sentencepiece, _metaspace, _unigram, _word_level])()
    if rng.random() < 0.3:
        backend.add_tokens([_added(rng) for _ in range(3)])
    if rng.random() < 0.3:
        backend.post_processor = None
    if rng.random() < 0.2:
        backend.enable_padding(pad_token=rng.choice(TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", _config(rng) | config)
    if rng.random() < 0.4:
        _write(folder / "special_tokens_map.json", _special_tokens_map(rng))
    if rng.random() < 0.4:
        used = rng.sample(TOKENS, 3)
        _write(folder / "added_tokens.json", {text: 500 + i for i, text in enumerate(used)})
    _write(folder / "config.json", {"model_type": rng.choice(["llama", "llama", "mistral"])})
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _metaspace() -> tokenizers.Tokenizer:
    backend = sentencepiece()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return backend


def _unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁abcdehlorw.,'"), ("▁hello", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return backend


def _word_level() -> tokenizers.Tokenizer:
    words = ["<unk>", "▁hello", "▁world", "▁h", "▁.", "▁'"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _added(rng: random.Random) -> AddedToken:
    return AddedToken(rng.choice(TOKENS), **_flags(rng))


def _flags(rng: random.Random) -> dict[str, bool]:
    flags = {flag: rng.random() < 0.3 for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    return {flag: on for flag, on in flags.items() if rng.random() < 0.8}


def _token(rng: random.Random) -> Any:
    text = rng.choice(TOKENS)
    return text if rng.random() < 0.6 else {"__type": "AddedToken", "content": text, **_flags(rng)}


def _config(rng: random.Random) -> dict[str, Any]:
    fast, llama = "PreTrainedTokenizerFast", "LlamaTokenizerFast"
    classes = [None, fast, fast, llama, "LlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer", "Mine"]
    choices = {
        "tokenizer_class": lambda: rng.choice(classes),
        "bos_token": lambda: rng.choice([_token(rng), None]),
        "eos_token": lambda: _token(rng),
        "unk_token": lambda: _token(rng),
        "pad_token": lambda: rng.choice([_token(rng), None]),
        "image_token": lambda: _token(rng),
        "additional_special_tokens": lambda: [_token(rng) for _ in range(rng.randint(0, 1))],
        "extra_special_tokens": lambda: rng.choice(
            [[_token(rng)], {"boi_token": rng.choice(TOKENS), "eoi_token": rng.choice(TOKENS)}, []]
        ),
        "model_specific_special_tokens": lambda: {"aux_token": rng.choice(TOKENS)},
        "added_tokens_decoder": lambda: {
            str(rng.choice([0, 1, 5, 300, 301, 302])): {"content": rng.choice(TOKENS), **_flags(rng)} for _ in range(3)
        },
        "add_bos_token": lambda: rng.random() < 0.5,
        "add_eos_token": lambda: rng.random() < 0.5,
        "legacy": lambda: rng.choice([True, False]),
        "add_prefix_space": lambda: rng.choice([True, False]),
        "clean_up_tokenization_spaces": lambda: rng.choice([True, False]),
        "split_special_tokens": lambda: rng.random() < 0.2,
    }
    return {name: choose() for name, choose in choices.items() if rng.random() < 0.4}


def _special_tokens_map(rng: random.Random) -> dict[str, Any]:
    def token():
        text = rng.choice(TOKENS)
        return text if rng.random() < 0.5 else {"content": text, "lstrip": rng.random() < 0.3, "normalized": False}

    names = [name for name in ("bos_token", "eos_token", "pad_token", "image_token") if rng.random() < 0.5]
    extra = {"additional_special_tokens": [rng.choice(TOKENS)]} if rng.random() < 0.3 else {}
    return {name: token() for name in names} | extra
