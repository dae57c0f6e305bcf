"""Chat templates: Jinja that comes with a model or an adapter and turns messages into a prompt.

The text is what transformers makes of the same template and messages. A template is somebody else's program, though, so
it runs in Jinja's sandbox and within bounds: ``MAX_SECONDS`` of its thread, ``MAX_CHARACTERS`` made in all. What it
does in between (repeating, joining, formatting, replacing) is measured before it is done.
"""

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType
from typing import Any, Literal

import jinja2
import jinja2.defaults
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

MAX_SECONDS = 2.0
"""Most seconds of its thread's time that rendering one prompt may take."""

MAX_CHARACTERS = 2**26
"""Most characters, and entries of lists, that rendering one prompt may make, those of steps on the way among them, and
beside eight times those that go in."""

_TIMES_INPUT = 8
_MAX_SOURCE = 2**20
_MAX_ENTRIES = 2**17
_MAX_WIDTH = 10_000
_SLOW_FILTERS = frozenset({"striptags", "title", "urlize", "wordwrap"})
_MAX_SLOW = 2**18
"""Characters that a filter may take which looks at each in Python: a tenth of a second's work, which cannot be cut."""
_MAX_BITS = 4096
_LONGEST_SHOWN = 300

type Content = Literal["text", "parts", "either"]
"""What a template takes for a message's content: a string, a list of parts ``{"type": "text", "text": ...}``, or both.
"""


class TemplateError(Exception):
    """The template refuses these messages, fails on them, or does more than it may. The message says which."""


class ChatTemplate:
    """One template; safe to use from many threads. It is compiled when it is first used."""

    def __init__(self, source: str):
        self.source = source

    @property
    def content(self) -> Content:
        """What the template takes for a message's content, by how its program handles ``content``.

        Raises:
          TemplateError: it is not valid Jinja.
        """
        return _compiled(self.source)[1]

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables.

        Raises:
          TemplateError: see there.
        """
        code, _ = _compiled(self.source)
        environment = _Environment(MAX_CHARACTERS + _TIMES_INPUT * _weight(variables, MAX_CHARACTERS))
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        try:
            return "".join(template.generate(variables))
        except _TooMuch as e:
            raise TemplateError(f"the chat template does too much with these messages: {e}") from None
        except _Refusal as e:
            raise TemplateError(f"the chat template refuses these messages: {_cut(str(e))}") from None
        except Exception as e:  # whatever the template's program raises is its own
            raise TemplateError(
                f"the chat template fails on these messages: {type(e).__name__}: {_cut(str(e))}"
            ) from None


class _Refusal(Exception):
    """A chat template called ``raise_exception``."""


class _TooMuch(Exception):
    """A chat template went past a bound."""


@functools.lru_cache(maxsize=256)  # adapters trained alike have the same template
def _compiled(source: str) -> tuple[CodeType, Content]:
    if len(source) > _MAX_SOURCE:
        raise TemplateError(f"the chat template has {len(source)} characters; at most {_MAX_SOURCE} are taken")
    environment = _Environment()
    try:
        tree = environment.parse(source)
        content = _content(tree)
        return environment.compile(_Guard(environment).visit(tree)), content
    except _TooMuch as e:
        raise TemplateError(f"the chat template does too much: {e}") from None
    except Exception as e:  # Jinja's parser, and Python's compiler on what Jinja writes
        raise TemplateError(f"the chat template is not valid Jinja: {type(e).__name__}: {_cut(str(e))}") from None


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; for a prompt it is just its content.

    It is a scope of its own, as transformers has it: what is set inside is not set outside.
    """

    tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller):
        return caller()


class _Guard(jinja2.visitor.NodeTransformer):
    """Puts calls of the environment into a template's program: a step into every loop and macro, and the measured
    ``concatenated`` in place of ``~``."""

    def __init__(self, environment: jinja2.Environment):
        self._environment = environment

    def visit_For(self, node):
        self.generic_visit(node)
        step = self._call("step", [], node.lineno)
        if node.test is not None:
            node.test = self._made(jinja2.nodes.And(step, node.test), node.lineno)
        else:
            self._begin_with_step(node)
        return node

    def visit_Macro(self, node):
        self.generic_visit(node)
        self._begin_with_step(node)
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node):
        self.generic_visit(node)
        return self._call("concatenated", node.nodes, node.lineno)

    def _begin_with_step(self, node) -> None:
        step = jinja2.nodes.ExprStmt(self._call("step", [], node.lineno))
        node.body = [self._made(step, node.lineno), *node.body]

    def _call(self, method: str, arguments: list, line: int):
        function = jinja2.nodes.EnvironmentAttribute(method)
        return self._made(jinja2.nodes.Call(function, arguments, [], None, None), line)

    def _made(self, node, line: int):
        return node.set_lineno(line).set_environment(self._environment)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' environment of a chat template, within the bounds of one rendering."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, characters: int = MAX_CHARACTERS):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[jinja2.ext.loopcontrols, _GenerationTag],
            finalize=self._shown,
        )
        self._deadline = time.thread_time() + MAX_SECONDS
        self._most = self._left = characters
        self.concat = self._joined  # type: ignore[method-assign]  # Jinja's hook, which it takes as an attribute
        self.filters = dict(_FILTERS)
        self.tests = dict(_TESTS)
        self.globals |= {
            "raise_exception": _refuse,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]  # random text is in no prompt

    def step(self) -> bool:
        """Ends a program that goes on for too long."""
        if time.thread_time() > self._deadline:
            raise _TooMuch(f"it takes longer than {MAX_SECONDS:g} s")
        return True

    def concatenated(self, *values) -> str:
        """``a ~ b``."""
        self.measure(values)
        return self.made("".join(map(str, values)))

    def measure(self, value: Any, times: int = 1) -> None:
        """Refuses to write out ``value`` (so many times) if that makes more than may be made."""
        if _weight(value, self._left // max(1, times)) * times > self._left:
            raise _TooMuch(f"it makes more than {self._most} characters")

    def made(self, value: Any) -> Any:
        """Counts what was made, and returns it."""
        if isinstance(value, (str, list, tuple, dict)):
            if not isinstance(value, str) and len(value) > _MAX_ENTRIES:
                raise _TooMuch(f"it makes a list of more than {_MAX_ENTRIES} entries")
            self._left -= len(value)
            if self._left < 0:
                raise _TooMuch(f"it makes more than {self._most} characters")
        return value

    def call(__self, __context, __obj, *args, **kwargs):
        __self.step()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            __self._check_method(text, getattr(__obj, "__name__", ""), args, kwargs)
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            self._room_for(len(left) + len(right))
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                    self._room_for(len(sequence) * times)
        elif operator == "%" and isinstance(left, str):
            self._check_percent(left, right)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise _TooMuch(f"it computes with integers of more than {_MAX_BITS} bits")
        return self.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value):
        form = super().wrap_str_format(value)
        if form is None:
            return None

        def measured(*args, **kwargs):
            pattern = value.__self__
            if re.search(r"\d{5}|\{[^{}]*\{", pattern):
                raise _TooMuch("it formats with a width of more than four digits or one that is computed")
            self.measure([args, kwargs], max(1, pattern.count("{")))
            return form(*args, **kwargs)

        return measured

    def check_filter(self, name: str, value: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuses what one call of a filter must not do; each does what is bounded by what goes in and comes out."""
        self.step()
        if name in _ITERATING and isinstance(value, str) and len(value) > _MAX_ENTRIES:
            raise _TooMuch(f"it makes a list of more than {_MAX_ENTRIES} entries")
        if name in _SLOW_FILTERS and _weight(value, _MAX_SLOW) > _MAX_SLOW:
            raise _TooMuch(f"its filter {name} gets more than {_MAX_SLOW} characters")
        if name in _SIZED:
            self._check_widths([*args, *kwargs.values()])
        if name == "replace":
            self.measure(value)
            self._check_replace(str(value), *args, **kwargs)
        elif name == "format":
            self._check_percent(str(value), [args, kwargs])
        elif name == "join":
            # Between the entries of a list (or the characters of a string); a generator's are bounded in number.
            count = len(value) if isinstance(value, (str, list, tuple, dict)) else 1
            self.measure([value, args, kwargs])
            self.measure([args, kwargs], count)
        elif name in _WRITING:
            self.measure([value, args, kwargs])
            if name in ("indent", "tojson", "wordwrap"):
                widest = max((_width(option) for option in (*args, *kwargs.values())), default=0)
                lines = str(value).count("\n") if name == "indent" else _weight(value, MAX_CHARACTERS)
                self._room_for((lines + 1) * widest)

    def _check_method(self, text: str, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        if name in ("center", "ljust", "rjust", "zfill", "expandtabs"):
            self._check_widths([*args, *kwargs.values()])
            self._room_for(len(text) * (_MAX_WIDTH if name == "expandtabs" else 1))
        elif name == "replace":
            self._check_replace(text, *args, **kwargs)
        elif name == "join" and args:
            self.measure(args)
            if isinstance(args[0], (str, list, tuple, dict)):
                self._room_for(len(text) * len(args[0]))
        elif name == "translate":
            self.measure(args, len(text))

    def _check_replace(self, text: str, old: Any = "", new: Any = "", count: Any = None) -> None:
        self.measure([old, new])
        old, new = str(old), str(new)
        times = text.count(old) if old else len(text) + 1
        if isinstance(count, int) and count >= 0:
            times = min(times, count)
        self._room_for(len(text) + times * len(new))

    def _check_percent(self, pattern: str, values: Any) -> None:
        if re.search(r"\d{5}|%[^a-zA-Z%]*\*", pattern):
            raise _TooMuch("it formats with a width of more than four digits or one that is computed")
        self.measure(values, max(1, pattern.count("%")))

    def _check_widths(self, values: Iterable[Any]) -> None:
        if any(isinstance(width, int) and abs(width) > _MAX_WIDTH for width in values):
            raise _TooMuch(f"it asks for a width of more than {_MAX_WIDTH}")

    def _room_for(self, length: int) -> None:
        if length > self._left:
            raise _TooMuch(f"it makes more than {self._most} characters")

    def _shown(self, value: Any) -> Any:
        """What ``{{ value }}`` is about to write."""
        self.step()
        self.measure(value)
        return value if isinstance(value, str) else self.made(str(value))

    def _joined(self, pieces: Iterable[str]) -> str:
        """What a macro or a ``{% set %}`` block has written."""
        pieces = list(pieces)
        self._room_for(sum(map(len, pieces)))
        return self.made("".join(pieces))


def _width(option: Any) -> int:
    """Characters that an option of a filter puts into a line: so many, or these."""
    return len(option) if isinstance(option, str) else option if isinstance(option, int) else 0


def _weight(value: Any, most: int) -> int:
    """About how many characters ``value`` is when it is written out; stops counting once past ``most``.

    An entry that a list holds many times counts as often, as it is written as often.
    """
    if isinstance(value, str):
        return len(value)
    weight, waiting = 0, [value]
    while waiting and weight <= most:
        value = waiting.pop()
        weight += len(value) if isinstance(value, str) else 1
        if isinstance(value, (list, tuple)):
            waiting.extend(value)
        elif isinstance(value, Mapping):
            waiting.extend(value)
            waiting.extend(value.values())
    return weight


_WRITING = frozenset(
    [
        "string",
        "tojson",
        "pprint",
        "upper",
        "lower",
        "trim",
        "title",
        "capitalize",
        "center",
        "indent",
        "wordwrap",
        "striptags",
        "truncate",
        "urlize",
        "escape",
        "e",
        "forceescape",
        "xmlattr",
        "wordcount",
        "urlencode",
    ]
)
_SIZED = frozenset(["center", "indent", "wordwrap", "batch", "slice", "round", "tojson", "truncate"])
_ITERATING = frozenset(
    [
        "map",
        "select",
        "reject",
        "selectattr",
        "rejectattr",
        "list",
        "batch",
        "slice",
        "sort",
        "unique",
        "groupby",
        "sum",
        "join",
        "min",
        "max",
    ]
)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """As transformers has it: Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _measured_filter(name: str, function: Callable) -> Callable:
    @jinja2.pass_context
    def measured(context, value, *args, **kwargs):
        environment = context.environment
        environment.check_filter(name, value, args, kwargs)
        return environment.made(function(*_lead(function, context), value, *args, **kwargs))

    return measured


def _stepping_test(function: Callable) -> Callable:
    @jinja2.pass_context
    def stepping(context, value, *args, **kwargs):
        context.environment.step()
        return function(*_lead(function, context), value, *args, **kwargs)

    return stepping


def _lead(function: Callable, context) -> tuple:
    """What Jinja passes ahead of the value to a filter that asks for it."""
    wanted = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    if wanted is None:
        return ()
    return ({"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[wanted],)


_FILTERS = {
    name: _measured_filter(name, function)
    for name, function in (jinja2.defaults.DEFAULT_FILTERS | {"tojson": _to_json}).items()
}
_TESTS = {
    name: _stepping_test(function)  # type: ignore[arg-type]  # of these kinds of callables mypy makes "function"
    for name, function in jinja2.defaults.DEFAULT_TESTS.items()
}


def _refuse(message: Any):
    raise _Refusal(message)


class _Dict:
    """``dict`` of a template: it makes dictionaries, and is no type."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args, **kwargs):
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` of a template, without names that Python has for itself."""

    def __init__(*args, **kwargs):  # a name may be ``self``
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name that begins with an underscore, got {name!r}")


def _content(tree: jinja2.nodes.Template) -> Content:
    """A template that loops over a message's ``content`` takes parts; if it also asks whether that is a string, it
    takes strings too."""
    names = _content_names(tree)
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(jinja2.nodes.For)):
        return "text"
    asks = any(
        test.name in ("string", "mapping", "iterable", "sequence") and _is_content(test.node, names)
        for test in tree.find_all(jinja2.nodes.Test)
    )
    return "either" if asks else "parts"


def _content_names(tree: jinja2.nodes.Template) -> set[str]:
    """Variables and parameters of macros that a message's content is given to."""
    macros = {macro.name: [parameter.name for parameter in macro.args] for macro in tree.find_all(jinja2.nodes.Macro)}
    given = [
        (assignment.target.name, assignment.node)
        for assignment in tree.find_all(jinja2.nodes.Assign)
        if isinstance(assignment.target, jinja2.nodes.Name)
    ]
    for call in tree.find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name in macros:
            given += zip(macros[call.node.name], call.args, strict=False)
            given += [(keyword.key, keyword.value) for keyword in call.kwargs]
    names: set[str] = set()
    while more := {name for name, value in given if name not in names and _is_content(value, names)}:
        names |= more
    return names


def _is_content(node: jinja2.nodes.Node, names: set[str]) -> bool:
    """Whether an expression is a message's content, possibly filtered; not so what a call makes of it."""
    match node:
        case jinja2.nodes.Name(name=name):
            return name in names
        case jinja2.nodes.Getattr(attr=attribute):
            return attribute == "content"
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value=key)):
            return key == "content"
        case jinja2.nodes.Filter(node=inner) if inner is not None:
            return _is_content(inner, names)
        case jinja2.nodes.CondExpr(expr1=one, expr2=other):
            return _is_content(one, names) or (other is not None and _is_content(other, names))
        case jinja2.nodes.Or(left=one, right=other):
            return _is_content(one, names) or _is_content(other, names)
    return False


def as_text(content: Any) -> Any:
    """A message's content for a template that takes strings: the texts of its parts, a line each."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content
    texts = [
        text
        for part in content
        if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(text := part.get("text"), str)
    ]
    return "\n".join(texts) if len(texts) == len(content) else content


def as_parts(content: Any) -> Any:
    """A message's content for a template that takes parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
