"""Whatever the files of a tokenizer's folder hold, it is read or refused in a sentence."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slora_jax.errors import BadAdapter, InvalidRequest, UnsupportedModel
from slora_jax.text.adapters import AdapterTokenizers
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.hostile import hostile_bytes, mutated
from tests.helpers.small_tokenizers import CHAT_TEMPLATE, byte_level, sentencepiece, write_folder

FILES = {
    "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "special": True},
        "image_token": "<image>",
        "additional_special_tokens": ["<x>", {"__type": "AddedToken", "content": "<y>", "special": True}],
        "extra_special_tokens": {"boi_token": "<boi>"},
        "model_specific_special_tokens": {"eoi_token": "<eoi>"},
        "added_tokens_decoder": {"300": {"content": "<z>", "normalized": False, "special": True}},
        "legacy": False,
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "chat_template": [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "tool_use", "template": "t"}],
    },
    "special_tokens_map.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "extra_special_tokens": ["<q>"],
        "additional_special_tokens": ["<w>"],
    },
    "added_tokens.json": {"<v>": 301, "<u>": 302},
    "config.json": {"model_type": "llama"},
}
TOKENIZERS = {
    "byte level": json.loads(byte_level().to_str()),
    "sentencepiece": json.loads(sentencepiece().to_str()),
}
GENERATED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
BASE = Tokenizer(sentencepiece(), special_tokens={"bos_token": "<s>"}, chat_templates={"default": CHAT_TEMPLATE})


def read_or_refused(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), sentencepiece())
        for file, raw in files.items():
            (folder / file).write_bytes(raw)
        for read in (lambda: Tokenizer.from_folder(folder), lambda: AdapterTokenizers(BASE).tokenizer_of(folder)):
            tokenizer, refusal = None, "tokenizer"
            try:
                tokenizer = read()
            except UnsupportedModel as e:
                refusal = str(e)
            except BadAdapter as e:
                refusal = str(e)
                assert refusal.startswith(f"adapter {folder}: its tokenizer")
            assert any(file in refusal for file in ("token", "config.json", "chat template", "chat_template"))
            assert len(refusal) < 1000
            if tokenizer is None:
                continue
            try:
                ids = tokenizer.encode("hello <s> world", max_tokens=1000)
                tokenizer.decode(ids)
                tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
            except InvalidRequest:
                pass  # it names what the tokenizer or the template does with this text


def as_json(document: object) -> bytes:
    return json.dumps(document).encode()


@pytest.mark.parametrize("file", FILES)
def test_any_value_in_any_place(file):
    others = {name: as_json(value) for name, value in FILES.items()}
    if file in ("special_tokens_map.json", "added_tokens.json"):
        # They are looked at where tokenizer_config.json lists no tokens.
        config = {k: v for k, v in FILES["tokenizer_config.json"].items() if k != "added_tokens_decoder"}
        others["tokenizer_config.json"] = as_json(config)

    @given(mutated(FILES[file]))
    @GENERATED
    def check(document):
        read_or_refused(others | {file: as_json(document)})

    check()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_value_in_any_place_of_the_tokenizer(kind):
    @given(mutated(TOKENIZERS[kind]), st.sampled_from(["LlamaTokenizer", "GPT2Tokenizer", None]))
    @GENERATED
    def check(document, class_name):
        config = as_json({"tokenizer_class": class_name, "eos_token": "</s>"})
        read_or_refused({"tokenizer.json": as_json(document), "tokenizer_config.json": config})

    check()


@pytest.mark.parametrize("file", [*FILES, "tokenizer.json", "chat_template.jinja"])
def test_any_bytes(file):
    raw = as_json(FILES.get(file, TOKENIZERS["sentencepiece"]))

    @given(hostile_bytes(raw))
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(changed):
        read_or_refused({file: changed})

    check()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_class": 1}, r"tokenizer_config\.json: tokenizer_class must be a name, got 1"),
        ({"eos_token": 2}, r"tokenizer_config\.json: eos_token must be a text, or an object"),
        (
            {"added_tokens_decoder": []},
            r"tokenizer_config\.json: added_tokens_decoder must be an object of tokens by id",
        ),
        (
            {"added_tokens_decoder": {"5": {"content": "a", "lstrip": 1}}},
            r"added_tokens_decoder\.5\.lstrip must be true",
        ),
        ({"extra_special_tokens": [1]}, r"extra_special_tokens\[0\] must be a text"),
        ({"chat_template": 3}, r"tokenizer_config\.json: chat_template must be a text, or a list"),
        ({"clean_up_tokenization_spaces": "yes"}, r"clean_up_tokenization_spaces must be true or false"),
        ({"fix_mistral_regex": True}, None),
    ],
)
def test_the_sentence_names_file_and_field(tmp_path, config, message):
    folder = write_folder(tmp_path, sentencepiece(), **config)
    if message is None:
        Tokenizer.from_folder(folder)  # a field for models of another type
        return
    with pytest.raises(UnsupportedModel, match=message):
        Tokenizer.from_folder(folder)
