"""Whether the tokenizer files that lie in an adapter's folder go with the base model's tokenizer.

Where the base has no tokenizer nobody asks: prompts are then token ids, and those outside its vocabulary are refused.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from slora_jax.errors import BadAdapter, UnsupportedModel, shown
from slora_jax.text.folder import TOKENIZER_FILE, TokenizerFiles, guarded, read_files
from slora_jax.text.tokenizer import Tokenizer

_MOST_KNOWN = 64


class AdapterTokenizers:
    """Checks adapters' folders against the tokenizer of their base; safe to use from many threads.

    Trainers save the base's tokenizer beside an adapter, so most folders have the same large file, which is looked
    through once.
    """

    def __init__(self, base: Tokenizer):
        self._base = base
        self._known: dict[bytes, str | None] = {}

    def tokenizer_of(self, folder: str | Path) -> Tokenizer | None:
        """The base's tokenizer with the chat template in the folder; None if none is there that differs.

        Files that say what the base's say, or less, are as good as none.

        Raises:
          BadAdapter: a token there is none of the base's, or has another id: the adapter was trained with an embedding
            that the base does not have. Or a file there is damaged.
        """
        folder = Path(folder)
        try:
            problem = self._file_problem(folder / TOKENIZER_FILE)
            if problem is None:
                files = read_files(folder)
                problem = self._other_problem(files)
                if problem is None:
                    return self._base.with_chat_template_of(files)
        except UnsupportedModel as e:
            problem = f"its tokenizer is not understood: {e}"
        raise BadAdapter(f"adapter {folder}: {problem}")

    def _other_problem(self, files: TokenizerFiles) -> str | None:
        added = files.config.get("added_tokens_decoder") or {}
        numbered = ((token["content"], int(number)) for number, token in added.items())
        return self._strangers(numbered) or self._strangers((text, None) for text in files.tokens)

    def _file_problem(self, file: Path) -> str | None:
        if not file.is_file():
            return None
        try:
            raw = file.read_bytes()
        except OSError as e:
            raise UnsupportedModel(f"{file} cannot be read: {e}") from None
        digest = hashlib.sha256(raw).digest()
        if digest not in self._known:
            backend = guarded(lambda: tokenizers.Tokenizer.from_buffer(raw), f"{file} cannot be read")
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[digest] = self._strangers(backend.get_vocab(with_added_tokens=True).items())
        return self._known[digest]

    def _strangers(self, tokens: Iterable[tuple[str, int | None]]) -> str | None:
        for text, wanted in tokens:
            found = self._base.token_id(text)
            if found is None or (wanted is not None and found != wanted):
                there = "which the base model's tokenizer does not have" if found is None else f"which is {found} there"
                number = "" if wanted is None else f" (id {wanted})"
                return (
                    f"its tokenizer has the token {shown(text)}{number}, {there}; train it without new "
                    "tokens, or merge it into the base model and serve that"
                )
        return None
