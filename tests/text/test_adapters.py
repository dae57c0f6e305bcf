import json

import pytest
from tokenizers import AddedToken

from slora_jax.text.adapters import AdapterTokenizers
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.small_tokenizers import byte_level, byte_level_folder, write_folder


@pytest.fixture
def check(tmp_path):
    return AdapterTokenizers(Tokenizer.from_folder(byte_level_folder(tmp_path / "base"))).problem


def test_no_files_and_the_bases_own_are_no_problem(check, tmp_path):
    assert check(tmp_path) is None
    assert check(byte_level_folder(tmp_path / "same")) is None
    changed = byte_level()
    changed.enable_padding(pad_token="<|end|>")  # another file, the same tokens
    assert check(write_folder(tmp_path / "saved", changed, eos_token="<|end|>")) is None


def test_a_new_token_in_tokenizer_json(check, tmp_path):
    backend = byte_level()
    backend.add_tokens([AddedToken("<tool>")])
    for name in ("one", "the same file again"):
        problem = check(write_folder(tmp_path / name, backend))
        assert 'the token "<tool>" (id 266), which the base model\'s tokenizer does not have' in problem


@pytest.mark.parametrize(
    ("file", "content", "token"),
    [
        ("added_tokens.json", {"<tool>": 266}, "<tool>"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"266": {"content": "<tool>"}}}, '"<tool>" (id 266)'),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<|end|>"}}}, "which is 262 there"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "[PAD]"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<call>"]}, "<call>"),
        ("special_tokens_map.json", [], "a JSON object"),
    ],
)
def test_a_new_token_in_another_file(check, tmp_path, file, content, token):
    (tmp_path / file).write_text(json.dumps(content))
    assert token in check(tmp_path)
