"""The files of a tokenizer's folder, read as transformers 5 reads them.

``tokenizer.json`` is a whole tokenizer, but not all of the truth: which class ``tokenizer_config.json`` names decides
whether it is taken as it stands or made anew from its vocabulary, and tokens come from up to four files.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from slora_jax.errors import UnsupportedModel, shown

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"
_TEMPLATE_FILE = "chat_template.jinja"
_TEMPLATE_FOLDER = "additional_chat_templates"

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_NOT_TOKENS = {"add_bos_token", "add_eos_token"}


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the text files beside ``tokenizer.json`` say.

    Attributes:
      config: ``tokenizer_config.json``.
      names: special tokens by name (``bos_token``, ..., ``image_token``); None where the file says null.
      added: tokens by id, in order; the ids that transformers gives them are those that come next, though.
      extra: special tokens without a name.
      templates: chat templates by name; the usual one is ``default``.
      model_type: of ``config.json``; None without one.
    """

    config: Mapping[str, Any]
    names: Mapping[str, AddedToken | None]
    added: tuple[AddedToken, ...]
    extra: tuple[AddedToken, ...]
    templates: Mapping[str, str]
    model_type: str | None

    @property
    def tokens(self) -> Iterable[str]:
        """The texts of all tokens that these files name."""
        named = (token for token in self.names.values() if token is not None)
        return [token.content for token in (*self.added, *named, *self.extra)]


def read_files(folder: Path, known: Mapping[int, AddedToken] | None = None) -> TokenizerFiles:
    """Reads what stands beside ``tokenizer.json``, whose own added tokens are ``known``.

    Raises:
      UnsupportedModel: a file cannot be read, or holds another kind of value than it must; file and field are named.
    """
    config = _object(folder / CONFIG_FILE)
    special = _SpecialTokens(config)
    if "added_tokens_decoder" in config:
        added = _numbered_tokens(config["added_tokens_decoder"])
    else:
        # transformers goes to the older files only where the newer one does not list the tokens.
        special.merge_map(_object(folder / _MAP_FILE))
        added = _legacy_added(_object(folder / _ADDED_FILE), special.texts) | dict(known or {})
    names, extra = special.read()
    by_text = {token.content: token for token in added.values()}
    names = {
        name: by_text.get(token.content, token) if token is not None and name in NAMED_TOKENS else token
        for name, token in names.items()
    }
    return TokenizerFiles(
        config=config,
        names=names,
        added=tuple(token for _, token in sorted(added.items(), key=lambda item: item[0])),
        extra=tuple(extra),
        templates=_templates(folder, config),
        model_type=_model_type(folder),
    )


def load_backend(folder: Path) -> tuple[tokenizers.Tokenizer, TokenizerFiles, dict[str, str]]:
    """The tokenizer of a folder, its files, and the texts of its named special tokens.

    Raises:
      UnsupportedModel: no ``tokenizer.json``; a file that cannot be read; a class of tokenizer that is not known here.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise UnsupportedModel(
            f"{file} not found; make it with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    backend = guarded(lambda: tokenizers.Tokenizer.from_str(_text(file)), f"{file} cannot be read")
    files = read_files(folder, backend.get_added_tokens_decoder())
    if files.config.get("fix_mistral_regex") and files.model_type == "mistral":
        raise UnsupportedModel(
            f"{CONFIG_FILE}: fix_mistral_regex changes how text is split, which is not done here; save the tokenizer "
            f"once it is fixed, so that {TOKENIZER_FILE} holds it"
        )
    kind = _kind(files, backend)
    padding = backend.padding
    names = dict.fromkeys(NAMED_TOKENS) | dict(files.names)
    if kind is not None:
        names |= {
            name: None if text is None else _token(text)
            for name, text in kind.defaults.items()
            if name not in files.names
        }
        backend = guarded(lambda: _rebuilt(kind, backend, files.config), f"{file} cannot be read")
    if padding and "pad_token" not in files.names and not (kind is not None and "pad_token" in kind.defaults):
        names["pad_token"] = _token(padding["pad_token"])
    guarded(lambda: _add(backend, files, names), f"{folder}: the added tokens are not understood")
    finish = None if kind is None else kind.finish
    if finish is not None:
        guarded(lambda: finish(backend, names), f"{folder}: the special tokens are not understood")
    split = files.config.get("split_special_tokens", False)
    if not isinstance(split, bool):
        raise _wrong(CONFIG_FILE, "split_special_tokens", "true or false", split)
    backend.encode_special_tokens = split
    return backend, files, {name: token.content for name, token in names.items() if token is not None}


def guarded[T](act: Callable[[], T], sentence: str) -> T:
    """Calls into the tokenizers library, whose errors are of many classes, a panic's not even an ``Exception``.

    Raises:
      UnsupportedModel: ``sentence`` and what the library said.
    """
    try:
        return act()
    except UnsupportedModel:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise UnsupportedModel(f"{sentence}: {type(e).__name__}: {str(e)[:300]}") from None


@dataclass(frozen=True, slots=True)
class _Kind:
    """A class of transformers that makes its tokenizer anew from the vocabulary and merges of ``tokenizer.json``.

    Attributes:
      defaults: special tokens that it has where the config names none.
      model: further arguments of its BPE.
      pipeline: sets normalizer, pre-tokenizer and decoder, by the config.
      finish: what it does when all tokens are there.
    """

    defaults: Mapping[str, str | None]
    model: Mapping[str, Any]
    pipeline: Callable[[tokenizers.Tokenizer, Mapping[str, Any]], None]
    finish: Callable[[tokenizers.Tokenizer, Mapping[str, AddedToken | None]], None] | None = None


def _llama(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    prefix = _flag(config, "add_prefix_space", True)
    scheme = "never" if not prefix else "always" if _flag(config, "legacy", False) else "first"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(content=" ", left=1)] * prefix)


def _gemma(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _gpt2(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=_flag(config, "add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()


def _gpt_neox(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    backend.normalizer = normalizers.NFC()
    _gpt2(backend, config)


def _without_additions(backend: tokenizers.Tokenizer, names: Mapping[str, AddedToken | None]) -> None:
    backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])


_END_OF_TEXT = "<|endoftext|>"
_BYTE_LEVEL_MODEL = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
_GPT_DEFAULTS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END_OF_TEXT)
_REBUILT = {
    "LlamaTokenizer": _Kind(
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        {"fuse_unk": True, "byte_fallback": True},
        _llama,
    ),
    "GemmaTokenizer": _Kind(
        {
            "unk_token": "<unk>",
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        {"fuse_unk": True, "byte_fallback": True, "unk_token": "unk_token"},
        _gemma,
    ),
    "GPT2Tokenizer": _Kind(_GPT_DEFAULTS | {"pad_token": None}, _BYTE_LEVEL_MODEL, _gpt2),
    "GPTNeoXTokenizer": _Kind(
        _GPT_DEFAULTS | {"pad_token": "<|padding|>"}, _BYTE_LEVEL_MODEL, _gpt_neox, _without_additions
    ),
}

# Classes of transformers that make another tokenizer than the file has, in ways that are not done here. A name that
# transformers does not know means the file as it stands.
_OTHER_CLASSES = frozenset(
    name + "Tokenizer"
    for name in [
        "Albert",
        "Bart",
        "Barthez",
        "Bartpho",
        "BertGeneration",
        "BertJapanese",
        "Bert",
        "Bertweet",
        "BigBird",
        "BioGpt",
        "BlenderbotSmall",
        "Blenderbot",
        "ByT5",
        "CLIP",
        "CTRL",
        "Camembert",
        "Canine",
        "Character",
        "Clvp",
        "CodeGen",
        "CodeLlama",
        "Cohere",
        "CpmAnt",
        "Cpm",
        "DPRContextEncoder",
        "DPRQuestionEncoder",
        "DPRReader",
        "Deberta",
        "DebertaV2",
        "Dia",
        "DistilBert",
        "Esm",
        "Esmc",
        "FSMT",
        "FastSpeech2Conformer",
        "Flaubert",
        "Funnel",
        "GPTNeoXJapanese",
        "GPTSw3",
        "Herbert",
        "LED",
        "Lasr",
        "LayoutLMv2",
        "LayoutLMv3",
        "LayoutXLM",
        "Luke",
        "Lxmert",
        "M2M100",
        "MBart50",
        "MBart",
        "MLuke",
        "MPNet",
        "Marian",
        "MarkupLM",
        "Mecab",
        "Mgpstr",
        "MobileBert",
        "Mvp",
        "MyT5",
        "Nllb",
        "Nougat",
        "OpenAIGPT",
        "PLBart",
        "Parakeet",
        "Pegasus",
        "Perceiver",
        "Phobert",
        "Pop2Piano",
        "ProphetNet",
        "Qwen2",
        "Qwen3_5",
        "Rag",
        "Reformer",
        "RemBert",
        "RoCBert",
        "RoFormer",
        "Roberta",
        "SeamlessM4T",
        "Siglip2",
        "Siglip",
        "Speech2Text",
        "SpeechT5",
        "Splinter",
        "SqueezeBert",
        "T5",
        "Tapas",
        "Tipsv2",
        "Udop",
        "VideoPrism",
        "Vits",
        "Wav2Vec2CTC",
        "Wav2Vec2PhonemeCTC",
        "Whisper",
        "Wordpiece",
        "XGLM",
        "XLMRoberta",
        "XLM",
        "XLNet",
    ]
)


def _kind(files: TokenizerFiles, backend: tokenizers.Tokenizer) -> _Kind | None:
    """Which class transformers would take; None for the one that takes ``tokenizer.json`` as it stands."""
    name = files.config.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise _wrong(CONFIG_FILE, "tokenizer_class", "a name", name)
    if name is None or files.model_type == "mistral":
        return None
    name = name.removesuffix("Fast")
    if name in _OTHER_CLASSES:
        raise UnsupportedModel(
            f"{CONFIG_FILE}: tokenizer_class {name!r} makes a tokenizer other than that of {TOKENIZER_FILE} in "
            "transformers, in a way that is not done here; save the tokenizer as PreTrainedTokenizerFast"
        )
    if name == "LlamaTokenizer" and '"ByteLevel"' in _pipeline(backend):
        return None
    return _REBUILT.get(name)


def _pipeline(backend: tokenizers.Tokenizer) -> str:
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder)
    return " ".join(json.dumps(json.loads(part.__getstate__())) for part in parts if part is not None)


def _rebuilt(kind: _Kind, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    model = json.loads(backend.to_str())["model"]
    vocabulary = model["vocab"]
    if not isinstance(vocabulary, dict):  # Unigram's pieces with their scores
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    merges: list[Any] = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges", [])]
    arguments = dict(kind.model)
    if "unk_token" in arguments:
        arguments["unk_token"] = _unknown(kind, config)
    rebuilt = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, dropout=None, **arguments))
    kind.pipeline(rebuilt, config)
    # A file without one gets one that adds nothing.
    rebuilt.post_processor = backend.post_processor or processors.TemplateProcessing(
        single="$A:0", pair="$A:0 $B:1", special_tokens=[]
    )
    return rebuilt


def _unknown(kind: _Kind, config: Mapping[str, Any]) -> str:
    value = config.get("unk_token", kind.defaults["unk_token"])
    return str(value.get("content")) if isinstance(value, Mapping) else str(value)


def _add(backend: tokenizers.Tokenizer, files: TokenizerFiles, names: Mapping[str, AddedToken | None]) -> None:
    """Adds what the backend does not have yet, in transformers' order, which gives each its id."""
    tokens = list(files.added)
    there = {token.content for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    named = [token for token in names.values() if token is not None]
    for token in (*named, *files.extra):
        # The same text with other flags is added again: the last flags hold.
        if token.content not in there and token not in tokens:
            tokens.append(token)
    texts = {token.content for token in named}
    for token in tokens:
        if not token.special and token.content in texts:
            # In place, for a token whose file does not say whether it is normalized then is not.
            token.special = True
    backend.add_tokens(tokens)


_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_OWN = "model_specific_special_tokens"


class _SpecialTokens:
    """Special tokens, with and without names, of ``tokenizer_config.json`` and then ``special_tokens_map.json``.

    The order of things is transformers', and decides where the files contradict each other or themselves.
    """

    def __init__(self, config: Mapping[str, Any]):
        self._values = dict(config)
        self._sources = dict.fromkeys([*config, _EXTRA], CONFIG_FILE)
        if _OLD_EXTRA in self._values and not self._values.get(_EXTRA):
            self._values[_EXTRA] = self._values.pop(_OLD_EXTRA)
        # Names of the model's own. Those found later, in the map, do not replace these.
        self._own = {
            name: _read_token(CONFIG_FILE, name, value) for name, value in config.items() if _is_own(name, value, str)
        }
        self._take_named_extra()
        declared = self._values.get(_OWN)
        if declared is not None and not isinstance(declared, Mapping):
            raise _wrong(CONFIG_FILE, _OWN, "an object of tokens by name", declared)
        self._own = self._own or _read_tokens(CONFIG_FILE, _OWN, declared or {})

    def merge_map(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name == _EXTRA and isinstance(value, list):
                before = self._values.get(name) or []
                value = (before if isinstance(before, list) else []) + value
            self._values[name] = value
            self._sources[name] = _MAP_FILE
        self._take_named_extra()

    @property
    def texts(self) -> set[str]:
        """Special tokens that are written as texts, or in the map."""
        extra = self._values.get(_EXTRA)
        found = [value for value in (extra if isinstance(extra, list) else []) if isinstance(value, str)]
        for name in NAMED_TOKENS:
            value = self._values.get(name)
            if isinstance(value, Mapping) and self._sources[name] == _MAP_FILE:
                value = value.get("content")
            found += [value] if isinstance(value, str) else []
        return set(found)

    def read(self) -> tuple[dict[str, AddedToken | None], list[AddedToken]]:
        """Tokens by name, and those without."""
        names: dict[str, AddedToken | None] = {}
        for name, value in self._values.items():
            source = self._sources[name]
            if name in NAMED_TOKENS:
                names[name] = None if value is None else _read_token(source, name, value)
            elif _is_own(name, value, (str, Mapping)) and (source == _MAP_FILE or _is_marked(value)):
                names[name] = _read_token(source, name, value)
        if _OLD_EXTRA in self._values and _EXTRA not in self._values:
            self._values[_EXTRA] = self._values.pop(_OLD_EXTRA)
            self._sources[_EXTRA] = self._sources[_OLD_EXTRA]
        extra, source = self._values.get(_EXTRA), self._sources[_EXTRA]
        if extra is not None and not isinstance(extra, list):
            raise _wrong(source, _EXTRA, "a list of tokens, or an object of tokens by name", extra)
        return names | self._own, [_read_token(source, f"{_EXTRA}[{i}]", t) for i, t in enumerate(extra or [])]

    def _take_named_extra(self) -> None:
        if isinstance(self._values.get(_EXTRA), Mapping):
            self._own |= _read_tokens(self._sources[_EXTRA], _EXTRA, self._values.pop(_EXTRA))


def _is_own(name: str, value: Any, kinds: type | tuple[type, ...]) -> bool:
    return name.endswith("_token") and name not in NAMED_TOKENS and name not in _NOT_TOKENS and isinstance(value, kinds)


def _is_marked(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("__type") == "AddedToken"


def _legacy_added(numbers: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    """``added_tokens.json``: ids by text."""
    added = {}
    for text, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise _wrong(_ADDED_FILE, text, "a token id", number)
        # As transformers has it, ordinary tokens are looked for in the normalized text.
        is_special = text in special
        added[number] = _added_token(_ADDED_FILE, text, text, normalized=not is_special, special=is_special)
    return added


def _numbered_tokens(value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, Mapping):
        raise _wrong(CONFIG_FILE, "added_tokens_decoder", "an object of tokens by id", value)
    tokens = {}
    for number, token in value.items():
        if not (number.isascii() and number.isdigit() and len(number) <= 10):
            raise _wrong(CONFIG_FILE, "added_tokens_decoder", "an object of tokens by id", number)
        if not isinstance(token, Mapping):
            raise _wrong(CONFIG_FILE, f"added_tokens_decoder.{number}", 'an object with a "content"', token)
        tokens[int(number)] = _read_token(CONFIG_FILE, f"added_tokens_decoder.{number}", token)
    return tokens


def _read_token(file: str, field: str, value: Any) -> AddedToken:
    """A token is written as its text, or as an object with its text in ``content``."""
    if isinstance(value, str):
        return _added_token(file, field, value, special=True)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise _wrong(file, field, 'a text, or an object with a text as "content"', value)
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    if file == _MAP_FILE:
        flags["special"] = True
    for flag, on in flags.items():
        if not isinstance(on, bool):
            raise _wrong(file, f"{field}.{flag}", "true or false", on)
    return _added_token(file, field, value["content"], **flags)


def _read_tokens(file: str, field: str, tokens: Mapping[str, Any]) -> dict[str, AddedToken]:
    return {name: _read_token(file, f"{field}.{name}", token) for name, token in tokens.items()}


def _token(text: str) -> AddedToken:
    return AddedToken(text, special=True)


def _added_token(file: str, field: str, text: str, **flags: bool) -> AddedToken:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _wrong(file, field, "valid Unicode", text) from None
    return AddedToken(text, **flags)


def _flag(config: Mapping[str, Any], field: str, default: bool) -> bool:
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(CONFIG_FILE, field, "true or false", value)
    return value


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The folder's chat templates by name; files of their own go ahead of those in ``tokenizer_config.json``."""
    from_files = {}
    if (folder / _TEMPLATE_FILE).is_file():
        from_files["default"] = _text(folder / _TEMPLATE_FILE)
    if (folder / _TEMPLATE_FOLDER).is_dir():
        from_files |= {
            file.name.removesuffix(".jinja"): _text(file)
            for file in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja"))
        }
    if from_files:
        return from_files
    value = config.get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        if not all(isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in value):
            raise _wrong(CONFIG_FILE, "chat_template", 'a text, or a list of {"name": ..., "template": ...}', value)
        value = {entry["name"]: entry["template"] for entry in value if isinstance(entry["name"], str)}
    if not isinstance(value, Mapping) or not all(isinstance(template, str) for template in value.values()):
        raise _wrong(CONFIG_FILE, "chat_template", 'a text, or a list of {"name": ..., "template": ...}', value)
    return dict(value)


def _model_type(folder: Path) -> str | None:
    value = _object(folder / "config.json").get("model_type")
    return value if isinstance(value, str) else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_text(path))
    except (ValueError, RecursionError) as e:
        raise UnsupportedModel(f"{path} is not valid JSON: {type(e).__name__}: {str(e)[:300]}") from None
    if not isinstance(value, dict):
        raise _wrong(path.name, "the whole file", "a JSON object", value)
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise UnsupportedModel(f"{path} cannot be read: {e}") from None


def _wrong(file: str, field: str, wanted: str, got: Any) -> UnsupportedModel:
    return UnsupportedModel(f"{file}: {ascii(field)[1:-1][:80]} must be {wanted}, got {shown(got)}")
