"""Text to token ids and back, and chat messages to a prompt.

Three ways from ids to text: ``Tokenizer.decode`` for a whole sequence, ``IncrementalDecoder`` for one that
grows, and ``token_text`` for a token by itself (log-probabilities).
"""

import codecs
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from slora_jax.errors import InvalidRequest, UnsupportedModel

_SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCEPIECE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class Tokenizer:
    """The tokenizer of one model folder; safe to use from many threads.

    Attributes:
      special_tokens: ``bos_token``, ``eos_token``, ... as texts, those that the model names.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos_token: bool = False,
    ):
        # What tokenizer.json says about these is meant for training batches.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_template = chat_template
        self._bos_to_add = self.bos_token_id if add_bos_token else None
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._piece_bytes = _piece_decoder(backend)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` of a model folder.

        Raises:
          UnsupportedModel: no ``tokenizer.json``, or a file that cannot be read.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UnsupportedModel(
                f"{file} not found; make it with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises Exception itself
            raise UnsupportedModel(f"{file} cannot be read: {e}") from None
        config = _read_json(folder / "tokenizer_config.json")
        names = _read_json(folder / "special_tokens_map.json") | config
        return cls(
            backend,
            special_tokens={
                name: text
                for name, value in names.items()
                if name.endswith("_token") and (text := _token_content(value)) is not None
            },
            chat_template=_chat_template(folder, config),
            add_bos_token=config.get("add_bos_token") is True,
        )

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
        return self._chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``.

        With ``add_special_tokens``, what ``tokenizer.json`` adds is added, and the begin-of-sequence token
        where ``tokenizer_config.json`` asks for it and it is not there yet.

        Raises:
          InvalidRequest: the text is not valid Unicode (a lone surrogate).
        """
        try:
            ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequest("the text is not valid Unicode: it holds a lone surrogate", "prompt") from None
        if add_special_tokens and self._bos_to_add is not None and ids[:1] != [self._bos_to_add]:
            ids.insert(0, self._bos_to_add)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

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

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure (end of sequence, roles of a chat) and is no text."""
        return token_id in self._special_ids

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """The prompt for a chat. Encode it with ``add_special_tokens=False``: templates write their own.

        Raises:
          InvalidRequest: the model has no template, or the template refuses these messages.
        """
        if self._chat_template is None:
            raise InvalidRequest(
                "this model has no chat template: send plain text (/v1/completions), or put a "
                "chat_template.jinja into the model's folder",
                "messages",
            )
        variables = {**self.special_tokens, **extra}
        try:
            return self._compiled_template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **variables
            )
        except _TemplateRefusal as e:
            raise InvalidRequest(f"the model's chat template refuses these messages: {e}", "messages") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as e:
            raise InvalidRequest(
                f"the model's chat template fails on these messages: {type(e).__name__}: {e}", "messages"
            ) from None

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **extra: Any
    ) -> list[int]:
        """Token ids of a chat; see ``apply_chat_template``."""
        text = self.apply_chat_template(messages, add_generation_prompt, **extra)
        return self.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _compiled_template(self) -> jinja2.Template:
        # The template comes with the model, so it is not trusted.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        return environment.from_string(self._chat_template)

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
        self._strip = strip_leading_space and _strips_leading_space(tokenizer._backend)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that is complete with it."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._cut(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """Ends the sequence; returns what an unfinished character leaves."""
        return self._cut(self._utf8.decode(b"", final=True))

    def _cut(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class _TemplateRefusal(Exception):
    """A chat template called ``raise_exception``."""


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; for a prompt it is just its content."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str):
    raise _TemplateRefusal(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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


def _token_content(value: Any) -> str | None:
    """tokenizer_config.json writes a token as its text or as a mapping with its text in ``content``."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), None)
    return template


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UnsupportedModel(f"{path} is not valid JSON: {e}") from None
