import json
import random

import pytest
from tokenizers import decoders, processors

from slora_jax.errors import InvalidRequest, UnsupportedModel
from slora_jax.text.tokenizer import IncrementalDecoder, Tokenizer
from tests.helpers.small_tokenizers import CHAT_TEMPLATE, byte_level, byte_level_folder, sentencepiece, write_folder

TEXTS = [
    "hello world",
    "",
    " leading",
    "naïve — ‘quotes’",
    "a👩‍👩‍👧‍👦b 🏴‍☠️!",
    "日本語\n\ttabs",
    "x  two spaces y",
    "\x00\x7f",
]


@pytest.fixture(params=[byte_level, sentencepiece])
def tokenizer(request):
    return Tokenizer(request.param())


def pieces(tokenizer, ids, **kwargs):
    decoder = IncrementalDecoder(tokenizer, **kwargs)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces(tokenizer, ids, strip_leading_space=True)) == text


def test_a_character_is_never_split():
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a😀b")
    out = pieces(tokenizer, ids)
    assert len(ids) > 3  # the emoji takes more than one token
    assert [p for p in out if p] == ["a", "😀", "b"]


def test_byte_level_pieces_equal_decode_for_random_tokens():
    """Random tokens are mostly broken UTF-8; the library and the decoder put U+FFFD at the same places."""
    tokenizer = Tokenizer(byte_level())
    rng = random.Random(1)
    for _ in range(500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 12))]
        for skip in (True, False):
            assert "".join(pieces(tokenizer, ids, skip_special_tokens=skip)) == tokenizer.decode(ids, skip)


def test_sentencepiece_pieces_equal_decode_for_random_whole_characters():
    tokenizer = Tokenizer(sentencepiece())
    rng = random.Random(2)
    for _ in range(300):
        ids = tokenizer.encode("".join(rng.choices("ab hw é😀", k=8)))
        assert "".join(pieces(tokenizer, ids, strip_leading_space=True)) == tokenizer.decode(ids)


def test_a_generated_text_keeps_its_first_space():
    tokenizer = Tokenizer(sentencepiece())
    ids = tokenizer.encode("world", add_special_tokens=False)
    assert "".join(pieces(tokenizer, ids)) == " world"
    assert "".join(pieces(tokenizer, ids, strip_leading_space=True)) == "world"


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokenizer = Tokenizer(byte_level())
    first_byte_of_an_emoji = tokenizer.encode("😀")[:1]
    assert pieces(tokenizer, first_byte_of_an_emoji) == ["", "�"]


def test_token_bytes_and_text(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == text.lstrip()
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_text(tokenizer.encode("h", add_special_tokens=False)[-1]).strip() == "h"


def test_the_post_processor_alone_says_what_is_added(tmp_path):
    """transformers 5 drops add_bos_token and add_eos_token where there is a tokenizer.json."""
    backend = sentencepiece()
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    asks = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    config_only = Tokenizer.from_folder(write_folder(tmp_path / "config", backend, **asks))
    file_says = Tokenizer.from_folder(
        write_folder(tmp_path / "file", sentencepiece(), **asks | {"add_bos_token": False})
    )
    plain = config_only.encode("hello")
    assert plain == [270, 264, 266, 266, 267]
    assert file_says.encode("hello") == [1, *plain]
    assert file_says.encode("hello", add_special_tokens=False) == plain
    assert file_says.bos_token_id == 1


def test_folder(tmp_path):
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path))
    assert tokenizer.special_tokens == {"bos_token": "<|end|>", "eos_token": "<|im_end|>"}
    assert tokenizer.vocab_size == 256 + 6 + 4
    (eos,) = tokenizer.eos_token_ids
    assert tokenizer.is_special(eos)
    assert tokenizer.decode([eos]) == ""
    assert tokenizer.decode([eos], skip_special_tokens=False) == "<|im_end|>"


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"
    assert len(tokenizer.encode("ab")) == 2


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("\ud800")


def test_missing_and_unsupported_files(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json not found"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer(backend)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <there>"}]


def test_chat_template(tmp_path):
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path))
    chat = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <there><|im_end|>\n"
    assert tokenizer.apply_chat_template(MESSAGES) == chat + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == chat
    ids = tokenizer.encode_chat(MESSAGES)
    assert tokenizer.decode(ids, skip_special_tokens=False) == chat + "<|im_start|>assistant\n"
    assert sum(map(tokenizer.is_special, ids)) == 5


def test_chat_template_functions(tmp_path):
    template = (
        "{{ bos_token }}{{ messages[0] | tojson }}|{{ messages | tojson(indent=1) | length }}|"
        "{{ strftime_now('%Y') | length }}|{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}|{{ mode }}"
    )
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path, chat_template=template))
    first, length, year, content, mode = (
        tokenizer.apply_chat_template([{"role": "user", "content": "<é>"}, {"role": "x", "content": "y"}], mode="m")
        .split("|end|>", 1)[1]
        .split("|")
    )
    assert first == '{"role": "user", "content": "<é>"}'
    assert (int(length) > 60, year, content, mode) == (True, "4", "<é>", "m")


def test_where_the_template_comes_from(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    folder = byte_level_folder(tmp_path, chat_template=named)
    assert Tokenizer.from_folder(folder).apply_chat_template(MESSAGES) == "the default"
    (folder / "chat_template.jinja").write_text("the file")
    assert Tokenizer.from_folder(folder).apply_chat_template(MESSAGES) == "the file"


def test_special_tokens_from_the_map_file(tmp_path):
    folder = write_folder(tmp_path, sentencepiece())
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert Tokenizer.from_folder(folder).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHAT_TEMPLATE, [{"role": "tool", "content": "x"}], "no such role: tool"),
        (CHAT_TEMPLATE, [{"content": "x"}], "Undefined"),
        ("{{ messages.append(1) }}", MESSAGES, "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", MESSAGES, "SecurityError"),
        ("{% if %}", MESSAGES, "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", MESSAGES, "TypeError"),
        (None, MESSAGES, r"no chat template.*/v1/completions"),
    ],
)
def test_what_a_template_cannot_do_is_the_callers_error(tmp_path, template, messages, message):
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path, chat_template=template))
    assert tokenizer.has_chat_template == (template is not None)
    with pytest.raises(InvalidRequest, match=message) as error:
        tokenizer.apply_chat_template(messages)
    assert error.value.param == "messages"
