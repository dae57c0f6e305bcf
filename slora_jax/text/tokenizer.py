"""Text to token ids and back, and chat messages to a prompt.

Three ways from ids to text: ``Tokenizer.decode`` for a whole sequence, ``IncrementalDecoder`` for one that
grows, and ``token_text`` for a token by itself (log-probabilities).
"""

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from slora_jax.errors import InvalidRequest, PromptTooLong, UnsupportedModel, shown
from slora_jax.text.folder import TokenizerFiles, load_backend
from slora_jax.text.template import ChatTemplate, TemplateError, as_parts, as_text

_SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_COUNTED = 2**18
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Tokenizer:
    """The tokenizer of one model folder; safe to use from many threads.

    Attributes:
      special_tokens: ``bos_token``, ``eos_token``, ... as texts, those that the model names. Templates see them.
      chat_templates: by name; ``default``, and ``tool_use`` where tools have one of their own.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        clean_up: bool = False,
    ):
        # What tokenizer.json says about these is meant for training batches.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = {name: ChatTemplate(source) for name, source in (chat_templates or {}).items()}
        self._clean_up = clean_up
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._piece_bytes = _piece_decoder(backend)
        self._bytes: dict[int, bytes] = {}
        # Of decoders that leave special tokens out, and of those that do not: the texts of tokens that are whole texts.
        self._whole: dict[bool, dict[int, str]] = {True: {}, False: {}}

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a model folder as ``AutoTokenizer`` of transformers 5 does.

        ``tokenizer.json`` must be there. ``tokenizer_config.json``, ``added_tokens.json`` and
        ``special_tokens_map.json`` add tokens and names; templates come from ``chat_template.jinja`` and
        ``additional_chat_templates``, or else from ``tokenizer_config.json``. As in transformers, ``add_bos_token`` and
        ``add_eos_token`` mean nothing beside a ``tokenizer.json``, whose post-processor says what is added.

        Raises:
          UnsupportedModel: no ``tokenizer.json``, or a file or field that is not understood; the message names it.
        """
        folder = Path(path)
        backend, files, names = load_backend(folder)
        return cls(backend, special_tokens=names, chat_templates=files.templates, clean_up=_clean_up(files, backend))

    def with_chat_template_of(self, files: TokenizerFiles) -> "Tokenizer | None":
        """This tokenizer with the chat template in another folder's files, and the special tokens that they name.

        Returns None where they have no template, or nothing that differs. Vocabulary and text are shared.

        Raises:
          UnsupportedModel: the template is not valid; the message names it.
        """
        named = {name: None if token is None else token.content for name, token in files.names.items()}
        names = {name: text for name, text in (self.special_tokens | named).items() if text is not None}
        sources = {name: template.source for name, template in self.chat_templates.items()}
        if not files.templates or (sources, self.special_tokens) == (files.templates, names):
            return None
        mine = Tokenizer.__new__(Tokenizer)
        mine.__dict__ |= self.__dict__
        mine.special_tokens = names
        mine.chat_templates = {name: ChatTemplate(source) for name, source in files.templates.items()}
        for name, template in mine.chat_templates.items():
            try:
                template.content  # noqa: B018 (compiles it)
            except TemplateError as e:
                raise UnsupportedModel(f"chat template {name!r}: {e}") from None
        return mine

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence token named by the tokenizer; the model's config may know more."""
        eos = self._special_id("eos_token")
        return () if eos is None else (eos,)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def to_json(self) -> str:
        """What ``tokenizer.json`` would hold, tokens from other files included."""
        return self._backend.to_str()

    def template_source(self, with_tools: bool = False) -> str:
        """The chat template as it is written: the one for chats with tools, if that is another.

        Raises:
          InvalidRequest: the model has none.
        """
        return self._template([] if with_tools else None).source

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written so, special or not; None if there is none."""
        return self._backend.token_to_id(text)

    def stop_token_ids(self, stops: Iterable[str]) -> frozenset[int]:
        """The special tokens among stop strings. They leave no text, so no stop string can be found there."""
        ids = (self._backend.token_to_id(stop) for stop in stops if _is_unicode(stop))
        return frozenset(i for i in ids if i in self._special_ids)

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of ``text``, with what ``tokenizer.json`` adds to a text if ``add_special_tokens``.

        Other threads run meanwhile, however long the text is. With ``max_tokens`` (the model's context) a text that
        certainly has more is refused without being read, where that can be told from its length: see
        ``fewest_tokens``.

        Raises:
          PromptTooLong: more than ``max_tokens`` tokens.
          InvalidRequest: the text is not valid Unicode (a lone surrogate).
        """
        if max_tokens is not None and (fewest := self.fewest_tokens(text)) > max_tokens:
            raise _too_long(max_tokens, f"at least {fewest}")
        try:
            # encode() would keep the interpreter's lock; the batch does not, and the fast one makes no offsets.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequest("the text is not valid Unicode: it holds a lone surrogate", "prompt") from None
        except BaseException as e:
            raise _library_failure(e, "text") from None
        if max_tokens is not None and len(encoding) > max_tokens:
            raise _too_long(max_tokens, str(len(encoding)))
        return encoding.ids

    def fewest_tokens(self, text: str) -> int:
        """Tokens that the text has at least, told from its length; 0 where that says nothing.

        It says something if every character of the text, but for known ones, is in some token: no normalizer or
        pre-tokenizer drops any, no added token takes the spaces beside it, and what is not in the vocabulary is spelled
        in bytes. Then there are at least as many tokens as the longest one goes into the text. (NFC and NFKC make one
        character of at most four.)
        """
        longest, dropped = self._spelling
        if not longest:
            return 0
        # In pieces, between which other threads run.
        pieces = (text[start : start + _COUNTED] for start in range(0, len(text) if dropped else 0, _COUNTED))
        return -(-(len(text) - sum(piece.count(character) for piece in pieces for character in dropped)) // longest)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        try:
            text = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as e:
            raise _library_failure(e, "tokens") from None
        if self._clean_up:
            for old, new in _CLEAN_UPS:
                text = text.replace(old, new)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes this token stands for; they may be a part of a character."""
        known = self._bytes.get(token_id)
        if known is None:
            piece = self._backend.id_to_token(token_id)
            known = self._bytes[token_id] = b"" if piece is None else self._piece_bytes(piece)
        return known

    def token_text(self, token_id: int) -> str:
        """This token by itself; bytes that are no whole character are shown as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        """This token as the vocabulary writes it, such as ``Ġworld`` or ``▁world``; "" if there is none."""
        return self._backend.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure (end of sequence, roles of a chat) and is no text."""
        return token_id in self._special_ids

    def apply_chat_template(
        self,
        /,  # so that a template may have a variable of any name
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """The prompt for a chat. Encode it with ``add_special_tokens=False``: templates write their own.

        A message's content is a string or a list of parts ``{"type": "text", "text": ...}``. A template that takes
        the other form gets that: parts are joined, a line each; a string becomes one part.

        Raises:
          InvalidRequest: the model has no template, or the template refuses these messages, fails on them, or does
            more than it may.
        """
        template = self._template(tools)
        variables = {
            **self.special_tokens,
            **extra,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            convert = {"text": as_text, "parts": as_parts, "either": lambda content: content}[template.content]
            chat = [_for_template(message, convert) for message in messages]
            return template.render({**variables, "messages": chat})
        except TemplateError as e:
            raise InvalidRequest(str(e), "messages") from None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        max_tokens: int | None = None,
        **extra: Any,
    ) -> list[int]:
        """Token ids of a chat; see ``apply_chat_template`` and ``encode``."""
        text = self.apply_chat_template(messages, add_generation_prompt, **extra)
        try:
            return self.encode(text, add_special_tokens=False, max_tokens=max_tokens)
        except InvalidRequest as e:
            e.param = "messages"
            raise

    def _template(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        names = ("tool_use", "default") if tools is not None else ("default",)
        for name in names:
            if name in self.chat_templates:
                return self.chat_templates[name]
        what = f"only the chat templates {', '.join(sorted(self.chat_templates))}" if self.chat_templates else ""
        raise InvalidRequest(
            f"this model has {what or 'no chat template'}: send plain text (/v1/completions), or put a "
            "chat_template.jinja into the model's folder",
            "messages",
        )

    @functools.cached_property
    def _spelling(self) -> tuple[int, str]:
        """Most characters of a text that one token can be, 0 if there is no such number; and those that are in none."""
        return _spelling(self._backend)

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


class IncrementalDecoder:
    """Text of a sequence that grows token by token.

    A character whose bytes are spread over several tokens comes out with the last of them. All pieces and
    ``flush`` together are the text of the whole; what can never become a character comes out as U+FFFD.

    A generated text goes on from its prompt, so its first space is kept; ``strip_leading_space`` drops it as
    ``Tokenizer.decode`` does for tokenizers that put one before every text (Llama 2).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, strip_leading_space: bool = False):
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        # What tokens stand for that come when no character is begun: most of them, most of the time.
        self._whole = tokenizer._whole[skip_special_tokens]
        self._is_begun = False  # a character, of which not all bytes have come
        self._clean_ups = [_Replacer(old, new) for old, new in _CLEAN_UPS] if tokenizer._clean_up else []
        self._strip = strip_leading_space and _strips_leading_space(tokenizer._backend)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is complete with it."""
        text = None if self._is_begun else self._whole.get(token_id)
        if text is None:
            text = self._decode(token_id)
        if self._strip:
            text = self._cut(text)
        for replacer in self._clean_ups:
            text = replacer.push(text)
        return text

    def _decode(self, token_id: int) -> str:
        was_begun = self._is_begun
        if self._skip_special and self._tokenizer.is_special(token_id):
            text = ""
        else:
            text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
            self._is_begun = bool(self._utf8.getstate()[0])
        if not (was_begun or self._is_begun):
            self._whole[token_id] = text
        return text

    def flush(self) -> str:
        """Ends the sequence; returns what an unfinished character leaves."""
        text = self._cut(self._utf8.decode(b"", final=True))
        for replacer in self._clean_ups:
            text = replacer.push(text) + replacer.flush()
        return text

    def _cut(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _Replacer:
    """``str.replace`` on a text that grows: holds back an end that may begin what is replaced."""

    def __init__(self, old: str, new: str):
        self._old, self._new = old, new
        self._held = ""

    def push(self, text: str) -> str:
        *whole, rest = (self._held + text).split(self._old)
        keep = next((n for n in range(min(len(self._old) - 1, len(rest)), 0, -1) if self._old.startswith(rest[-n:])), 0)
        self._held = rest[len(rest) - keep :]
        return self._new.join([*whole, rest[: len(rest) - keep]])

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


_CLEAN_UPS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _clean_up(files: TokenizerFiles, backend: tokenizers.Tokenizer) -> bool:
    """Whether spaces before punctuation are dropped from decoded text: transformers does not do so for BPE."""
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    for field in ("clean_up_tokenization_spaces", forced):
        if not isinstance(files.config.get(field, False), bool):
            raise UnsupportedModel(
                f"tokenizer_config.json: {field} must be true or false, got {shown(files.config[field])}"
            )
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    return files.config.get("clean_up_tokenization_spaces", False) and (not is_bpe or files.config.get(forced, False))


def _for_template(message: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """A message as templates expect it: what is null is not there, reasoning goes by all of its names."""
    given = {name: value for name, value in message.items() if value is not None}
    if "content" in given:
        given["content"] = convert(given["content"])
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _too_long(context: int, tokens: str) -> PromptTooLong:
    return PromptTooLong(
        f"This model's maximum context length is {context} tokens. However, your prompt resulted in {tokens} tokens. "
        "Please reduce its length.",
        "prompt",
    )


def _library_failure(error: BaseException, what: str) -> BaseException:
    """The error of a call into the tokenizers library, as the caller's: a panic there is not even an ``Exception``."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return InvalidRequest(
            f"the tokenizer fails on this {what}: {type(error).__name__}: {str(error)[:300]}", "prompt"
        )
    return error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_NOTHING_KNOWN = 0, ""
_MOST_DROPPED = 32


def _spelling(backend: tokenizers.Tokenizer) -> tuple[int, str]:
    added = backend.get_added_tokens_decoder().values()
    shrinking = _shrinks(_state(backend.normalizer))
    dropped = _dropped(backend)
    if any(token.lstrip or token.rstrip for token in added) or shrinking == 0 or dropped is None:
        return _NOTHING_KNOWN
    if not _keeps_everything(_state(backend.pre_tokenizer)):
        return _NOTHING_KNOWN
    return shrinking * max(map(len, backend.get_vocab(with_added_tokens=True)), default=0), dropped


def _state(part: Any) -> Mapping[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _shrinks(normalizer: Mapping[str, Any] | None) -> int:
    """Most characters that a normalizer makes one of; 0 if there is no bound, or it is not known here."""
    match normalizer:
        case None | {"type": "Prepend" | "NFD" | "NFKD"}:
            return 1
        case {"type": "NFC" | "NFKC"}:
            return 4
        case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new) >= len(old):
            return 1
        case {"type": "Sequence", "normalizers": parts}:
            product = 1
            for part in parts:
                product *= _shrinks(part)
            return product
    return 0


def _keeps_everything(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    match pre_tokenizer:
        case None | {"type": "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Split" | "Punctuation", "behavior": behavior}:
            return behavior != "Removed"
        case {"type": "Sequence", "pretokenizers": parts}:
            return all(map(_keeps_everything, parts))
    return False


def _dropped(backend: tokenizers.Tokenizer) -> str | None:
    """The characters for which BPE has no token, where it spells those it does not know in bytes; None if it does not.

    Vocabularies lack bytes that hardly ever come. A character of several bytes has one that is not lacking.
    """
    if not isinstance(backend.model, tokenizers.models.BPE):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return ""
    state = _state(backend.pre_tokenizer) or {}
    if not any(part.get("type") == "ByteLevel" for part in state.get("pretokenizers", [state])):
        return None
    lacking = {byte for name, byte in _byte_level_table().items() if name not in vocabulary}
    dropped = "".join(chr(byte) for byte in sorted(lacking) if byte < 0x80)
    return None if lacking & set(range(0x80, 0xC0)) or len(dropped) > _MOST_DROPPED else dropped


def _piece_decoder(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How a vocabulary entry is turned into bytes, by the decoder that ``tokenizer.json`` names."""
    kinds = set(_decoder_kinds(backend))
    if "ByteLevel" in kinds:
        return functools.partial(_byte_level, _byte_level_table())
    if kinds and kinds <= _SENTENCEPIECE_DECODERS:
        return functools.partial(_sentencepiece, "ByteFallback" in kinds)
    raise UnsupportedModel(
        f"tokenizer.json: decoder {' + '.join(sorted(kinds)) or 'null'} is not supported; supported are ByteLevel and "
        "those of SentencePiece (Metaspace, or Replace + ByteFallback + Fuse + Strip)"
    )


def _decoder_kinds(backend: tokenizers.Tokenizer) -> Iterable[str]:
    if backend.decoder is None:
        return
    state = json.loads(backend.decoder.__getstate__())
    for part in state.get("decoders", [state]):
        yield part["type"]


def _strips_leading_space(backend: tokenizers.Tokenizer) -> bool:
    return bool({"Strip", "Metaspace"} & set(_decoder_kinds(backend)))


def _byte_level_table() -> dict[str, int]:
    """Byte-level BPE names each byte by a printable character: itself where it is one in Latin-1, and the
    characters from U+0100 on for the rest, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


def _byte_level(table: dict[str, int], piece: str) -> bytes:
    try:
        return bytes([table[c] for c in piece])
    except KeyError:  # an added token, written as it is
        return piece.encode()


def _sentencepiece(byte_fallback: bool, piece: str) -> bytes:
    if byte_fallback and (match := _BYTE_TOKEN.fullmatch(piece)):
        return bytes([int(match[1], 16)])
    return piece.replace(_SPACE_MARK, " ").encode()
