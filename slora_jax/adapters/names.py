"""Expressions over module names, as PEFT's configs have them, matched in a time that no expression can blow up.

PEFT matches with Python's ``re``, which backtracks: an expression from a stranger can take for ever, and holds the
interpreter's lock meanwhile. Here an expression is restricted to what ``re`` and RE2 read alike, and RE2 matches it in
time that grows with the name's length only. What RE2 does not know, looking ahead and behind, goes to ``re`` if there
are too few quantifiers to matter. What all expressions of one config may cost together is bounded too.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

import re2

_MAX_LENGTH = 1000
_MAX_COST = 10_000
"""RE2 instructions. A step of a match looks at each at most once: a few milliseconds for the longest name."""

# What both engines read alike: literals, escapes, sets, groups that capture or do not, quantifiers, anchors. Possessive
# throughout, so that reading an expression cannot take for ever either.
_SET_ITEM = r"(?:\\[dDwW.\-]|[A-Za-z0-9]-[A-Za-z0-9]|[A-Za-z0-9_.])"
_LITERAL = r"[A-Za-z0-9_ !\"#%&',/:;<=>@`~-]"
_QUANTIFIER = r"(?:[*+?]|\{\d{1,3}(?:,\d{0,3})?\})\??+"
_LOOK = r"\(\?<?[=!]"
_READ_ALIKE = re.compile(
    rf"(?:{_LITERAL}|\\[dDwWsSbB.\-/:^$|?*+()\[\]{{}}]|\[\^?+{_SET_ITEM}++-?+\]|{_QUANTIFIER}|[.^$|)]|{_LOOK}"
    r"|\((?:\?:)?+(?!\?))*+",
    re.ASCII,
)
_ESCAPE_OR_SET = re.compile(r"\\.|\[[^\]]*\]")
_MAX_BACKTRACKING_QUANTIFIERS = 4
_BACKTRACKING_COST = 2000

_OPTIONS = re2.Options()
_OPTIONS.log_errors = False
# A byte is a character, which keeps programs small: names and expressions are ASCII.
_OPTIONS.encoding = re2.Options.Encoding.LATIN1
_OPTIONS.max_mem = 2**20


class BadExpression(Exception):
    """An expression is none, or is not matched here; ``reason`` says why."""

    def __init__(self, text: str, reason: str):
        super().__init__(reason)
        self.text = text
        self.reason = reason


class Expression:
    """A compiled expression. Made by ``Expressions``."""

    def __init__(self, text: str, compiled):
        self.text = text
        self._compiled = compiled
        self._is_re2 = not isinstance(compiled, re.Pattern)

    def fullmatch(self, name: str) -> bool:
        return self._compiled.fullmatch(name.encode() if self._is_re2 else name) is not None

    def match(self, name: str) -> bool:
        """Whether it matches at the start of the name."""
        return self._compiled.match(name.encode() if self._is_re2 else name) is not None

    def number(self, name: str) -> int | None:
        """Its last group, if it matches at the start of the name and the group takes part."""
        match = self._compiled.match(name.encode() if self._is_re2 else name)
        found = match and match[self._compiled.groups]
        return None if found is None else int(found)


class Expressions:
    """Compiles the expressions of one config, and bounds what all of them may cost together."""

    def __init__(self):
        self._cost = 0

    def compile(self, text: str, form: str = "{}") -> Expression:
        """Compiles an expression.

        Args:
          text: what the config says.
          form: the expression to match with, ``{}`` standing for the text.

        Raises:
          BadExpression: it is no expression, or not one that is matched here.
        """
        if len(text) > _MAX_LENGTH:
            raise BadExpression(text, f"it has {len(text)} characters, and at most {_MAX_LENGTH} are read")
        if not _READ_ALIKE.fullmatch(text):
            raise BadExpression(
                text,
                "not an expression that is read here: write it in ASCII, without back references, flags, named groups "
                "and possessive quantifiers",
            )
        whole = form.format(text)
        # What is left of brackets belongs to groups.
        bare = _ESCAPE_OR_SET.sub("x", text)
        try:
            # Also where RE2 matches: it reads some that PEFT cannot.
            compiled = re.compile(whole)
        except (re.error, RecursionError, OverflowError) as e:
            raise BadExpression(text, f"not a valid expression: {e}") from None
        cost = _BACKTRACKING_COST
        if re.search(_LOOK, bare):
            _check_backtracking(text, bare)
        else:
            compiled, cost = _compile_with_re2(text, whole)
        self._cost += cost
        if self._cost > _MAX_COST:
            raise BadExpression(
                text, "with the config's other expressions it could take too long to match; write names, or fewer"
            )
        return Expression(text, compiled)


def _compile_with_re2(text: str, whole: str):
    try:
        compiled = re2.compile(whole.encode(), _OPTIONS)
    except re2.error as e:
        reason = e.args[0].decode("ascii", "replace") if e.args and isinstance(e.args[0], bytes) else e
        raise BadExpression(text, f"not a valid expression: {reason}") from None
    return compiled, compiled.programsize


def _check_backtracking(text: str, bare: str) -> None:
    bare = bare.replace("(?", "(")
    quantifiers = re.findall(r"[*+?]\??|\{[^}]*\}", bare)
    if len(quantifiers) > _MAX_BACKTRACKING_QUANTIFIERS or re.search(r"\)(?:[*+]|\{)", bare):
        raise BadExpression(
            text,
            "an expression that looks ahead or behind could take for ever to match; write it without repeated groups "
            f"and with at most {_MAX_BACKTRACKING_QUANTIFIERS} quantifiers",
        )


_PLAIN = re.compile(
    r"(\^?)((?:(?:(?:(?:model\.)?layers\.)?\d{1,6}\.)?(?:self_attn|mlp)\.)?(?:[qkvo]|gate|up|down)_proj)\$?",
    re.ASCII,
)


class NamePatterns[T]:
    """Values by expression, as ``rank_pattern`` has them: for a name, the first that matches counts.

    PEFT's rule: an expression matches a whole name, or the end of one that starts after a dot. Most are a plain name
    or the end of one, and are looked up; a config may have thousands of those.
    """

    def __init__(self, items: Iterable[tuple[str, T]], expressions: Expressions):
        """
        Raises:
          BadExpression: as ``Expressions.compile``.
        """
        self.items = tuple(items)
        self._plain: dict[str, int] = {}
        self._others: list[tuple[int, Expression]] = []
        for index, (text, _) in enumerate(self.items):
            # A dot stands for any character, but none of these ends of names can match another than itself:
            # of the same length and with the same module there is only one.
            plain = _PLAIN.fullmatch(text.replace("\\.", "."))
            if plain:
                self._plain.setdefault(plain[1] + plain[2], index)
                continue
            self._others.append((index, expressions.compile(text, r"(.*\.)?({})$")))

    def get(self, name: str, default: T) -> T:
        if not self.items:
            return default
        found = [self._plain[end] for end in (f"^{name}", *ends(name)) if end in self._plain]
        first = min(found, default=len(self.items))
        for index, expression in self._others:
            if index > first:
                break
            if expression.match(name):
                first = index
                break
        return self.items[first][1] if first < len(self.items) else default


# Adapters of one base model are asked about the same few hundred names.
@lru_cache(maxsize=4096)
def ends(name: str) -> tuple[str, ...]:
    """The name, and each end of it that starts after a dot."""
    parts = name.split(".")
    return tuple(".".join(parts[i:]) for i in range(len(parts)))
