import json
import re

import pytest
from tokenizers import AddedToken

from slora_jax.errors import BadAdapter
from slora_jax.text.adapters import AdapterTokenizers
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.small_tokenizers import byte_level, byte_level_folder, write_folder


@pytest.fixture
def check(tmp_path):
    return AdapterTokenizers(Tokenizer.from_folder(byte_level_folder(tmp_path / "base"))).tokenizer_of


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
        folder = write_folder(tmp_path / name, backend)
        with pytest.raises(BadAdapter) as refusal:
            check(folder)
        assert str(refusal.value).startswith(f"adapter {folder}: its tokenizer")
        assert 'the token "<tool>" (id 266), which the base model\'s tokenizer does not have' in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "content", "token"),
    [
        ("added_tokens.json", {"<tool>": 266}, "<tool>"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"266": {"content": "<tool>"}}}, '"<tool>" (id 266)'),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<|end|>"}}}, "which is 262 there"),
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "[PAD]"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<call>"]}, "<call>"),
        ("special_tokens_map.json", [], "a JSON object"),
        ("added_tokens.json", [1], "added_tokens.json: the whole file must be a JSON object"),
        ("added_tokens.json", {"<tool>": "266"}, "added_tokens.json"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<tool>"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": 3}, "added_tokens_decoder must be"),
        ("tokenizer.json", {"added_tokens": [{"id": None, "content": "<tool>"}]}, "tokenizer.json cannot be read"),
    ],
)
def test_a_new_token_in_another_file(check, tmp_path, file, content, token):
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(BadAdapter, match=re.escape(token)):
        check(tmp_path)


def test_files_that_change_are_looked_at_again(check, tmp_path):
    folder = byte_level_folder(tmp_path / "same")
    assert check(folder) is None
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadAdapter, match=r"tokenizer_config\.json is not valid JSON"):
        check(folder)
