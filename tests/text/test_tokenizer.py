import json
import random
import threading
import time

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from slora_jax.errors import InvalidRequest, PromptTooLong, UnsupportedModel
from slora_jax.text.folder import read_files
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


def test_tokens_that_only_the_config_has(tmp_path):
    """transformers gives them the next ids, whatever the config says, and the flags that it says."""
    named = {str(300 + i): {"content": t, "special": True} for i, t in enumerate(["<s>", "</s>", "<|new|>"])}
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path, added_tokens_decoder=named, eos_token="<|late|>"))
    size = 256 + 6 + 4
    assert tokenizer.encode("<|new|>h<|late|>") == [size + 2, tokenizer.token_id("h"), size + 3]
    assert tokenizer.eos_token_ids == (size + 3,)
    assert tokenizer.decode([size + 2, tokenizer.token_id("h")]) == "h"


def test_tokens_of_the_older_files(tmp_path):
    folder = byte_level_folder(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": 301, "<a>": 300}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<c>", "image_token": "<a>"}))
    tokenizer = Tokenizer.from_folder(folder)
    size = 256 + 6 + 4
    assert tokenizer.encode("<a><b><c>") == [size, size + 1, size + 2]
    assert tokenizer.special_tokens["eos_token"] == "<c>"  # this file goes ahead of tokenizer_config.json
    assert tokenizer.special_tokens["image_token"] == "<a>"


def test_the_class_decides_what_is_made_of_the_file(tmp_path):
    """LlamaTokenizer of transformers 5 puts a space before the first word only, whatever the file's normalizer says."""
    text = "hello</s>hello"
    as_is = Tokenizer.from_folder(
        write_folder(tmp_path / "a", sentencepiece(), tokenizer_class="PreTrainedTokenizerFast")
    )
    first = Tokenizer.from_folder(write_folder(tmp_path / "b", sentencepiece(), tokenizer_class="LlamaTokenizer"))
    legacy = write_folder(tmp_path / "c", sentencepiece(), tokenizer_class="LlamaTokenizerFast", legacy=True)
    hello = [264, 266, 266, 267]
    assert as_is.encode(text, False) == [270, *hello, 2, 270, *hello]
    assert first.encode(text, False) == [270, *hello, 2, 265, *hello]
    assert Tokenizer.from_folder(legacy).encode(text, False) == [270, *hello, 2, 270, *hello]
    with pytest.raises(UnsupportedModel, match=r"tokenizer_config\.json: tokenizer_class 'BertTokenizer'"):
        Tokenizer.from_folder(write_folder(tmp_path / "d", sentencepiece(), tokenizer_class="BertTokenizerFast"))


def unigram() -> Backend:
    backend = Backend(models.Unigram([("<unk>", 0.0), *((c, -1.0) for c in "▁abn't.,?")], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def test_spaces_before_punctuation_are_cleaned_up_where_transformers_does(tmp_path):
    asks = {"clean_up_tokenization_spaces": True}
    cleaning = Tokenizer.from_folder(write_folder(tmp_path / "unigram", unigram(), **asks))
    bpe = Tokenizer.from_folder(write_folder(tmp_path / "bpe", sentencepiece(), **asks))
    assert cleaning.decode(cleaning.encode("a b . ab n't ' a ,")) == "a b. abn't'a,"
    assert bpe.decode(bpe.encode("a b .")) == "a b ."
    rng = random.Random(4)
    for _ in range(300):
        ids = [rng.randrange(1, cleaning.vocab_size) for _ in range(rng.randint(0, 14))]
        assert "".join(pieces(cleaning, ids, strip_leading_space=True)) == cleaning.decode(ids)


def test_a_prompt_that_cannot_fit_is_refused_by_its_length():
    tokenizer = Tokenizer(byte_level())
    longest = len("  two spaces")
    assert tokenizer.fewest_tokens("x" * (longest * 10 + 1)) == 11
    with pytest.raises(PromptTooLong, match=r"maximum context length is 10 tokens\. .* at least 11 tokens"):
        tokenizer.encode("x" * (longest * 10 + 1), max_tokens=10)
    with pytest.raises(PromptTooLong, match=r"maximum context length is 10 tokens\. .* resulted in 11 tokens") as error:
        tokenizer.encode("x" * 11, max_tokens=10)
    assert error.value.param == "prompt"
    assert len(tokenizer.encode("x" * 10, max_tokens=10)) == 10


SHRINKING = [
    ("normalizer", normalizers.Strip()),
    ("normalizer", normalizers.Replace("ab", "")),
    ("normalizer", normalizers.StripAccents()),
    ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
    ("pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
    ("pre_tokenizer", pre_tokenizers.Split(" ", "removed")),
]


@pytest.mark.parametrize(("part", "value"), SHRINKING)
def test_length_says_nothing_where_text_is_dropped(part, value):
    backend = byte_level()
    setattr(backend, part, value)
    assert Tokenizer(backend).fewest_tokens("x" * 1000) == 0
    greedy = byte_level()
    greedy.add_tokens([AddedToken("<x>", lstrip=True)])
    assert Tokenizer(greedy).fewest_tokens("x" * 1000) == 0


def without_bytes(*lacking: str) -> Backend:
    """Byte-level BPE whose vocabulary lacks bytes that hardly ever come, as SmolLM2's does."""
    state = json.loads(byte_level().to_str())
    for character in lacking:
        del state["model"]["vocab"][{"\x04": "\u0104", "\xf1": "\xf1"}[character]]
    return Backend.from_str(json.dumps(state))


def test_no_text_has_fewer_tokens_than_its_length_says():
    rng = random.Random(5)
    backends = [byte_level(), sentencepiece(), without_bytes("\x04", "\xf1")]
    for form in (normalizers.NFC(), normalizers.NFKC()):
        backends.append(byte_level())
        backends[-1].normalizer = form
    for backend in backends:
        tokenizer = Tokenizer(backend)
        assert tokenizer.fewest_tokens("x" * 1000) > 0
        for _ in range(200):
            text = "".join(
                rng.choices(
                    [" ", "  two spaces", "hello", "α\u0313\u0300\u0345", "ﬃ", "é", "</s>", "\x04", "\U00040000"], k=30
                )
            )
            assert len(tokenizer.encode(text, False)) >= tokenizer.fewest_tokens(text)


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer = Tokenizer(byte_level())
    tokenizer.encode("warm")
    text = "the moon is far " * 60_000
    encoding = threading.Thread(target=tokenizer.encode, args=(text,))
    started, gaps, last = time.perf_counter(), [], time.perf_counter()
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        gaps.append(time.perf_counter() - last)
        last = time.perf_counter()
    # With encode() there is one gap, as long as the whole.
    assert max(gaps) < 0.5 * (last - started)


def test_a_stop_string_that_is_a_special_token(tmp_path):
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path))
    im_end = tokenizer.token_id("<|im_end|>")
    assert tokenizer.stop_token_ids(["<|im_end|>", "hello", "  two spaces", "no such", "\ud800"]) == {im_end}


ADAPTERS_TEMPLATE = "{{ bos_token }}{{ eos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"


def test_an_adapters_own_template(tmp_path):
    base = Tokenizer.from_folder(byte_level_folder(tmp_path / "base"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert base.with_chat_template_of(read_files(adapter)) is None
    byte_level_folder(adapter)
    assert base.with_chat_template_of(read_files(adapter)) is None  # the same as the base's
    (adapter / "chat_template.jinja").write_text(ADAPTERS_TEMPLATE)
    (adapter / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    own = base.with_chat_template_of(read_files(adapter))
    assert own.apply_chat_template(MESSAGES[1:]) == "<|end|><|end|>[Hi <there>]"
    assert own.eos_token_ids == (base.token_id("<|end|>"),)
    assert own.encode("hello") == base.encode("hello")
    assert base.apply_chat_template(MESSAGES).startswith("<|im_start|>")
    (adapter / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UnsupportedModel, match="not valid Jinja"):
        base.with_chat_template_of(read_files(adapter))
