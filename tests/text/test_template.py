"""Chat templates: the texts that transformers makes, and bounds on what a template may do."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slora_jax.errors import InvalidRequest, PromptTooLong
from slora_jax.text.template import ChatTemplate, TemplateError
from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.chat_templates import CHATS, TEMPLATES
from tests.helpers.small_tokenizers import byte_level, byte_level_folder

NAMES = {"image_token": "<image>", "pad_token": "<|end|>", "eos_token": "<|im_end|>", "add_bos_token": True}
ANSWERS = json.loads((Path(__file__).parent / "chats.json").read_text())
USER = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(tmp_path, name):
    tokenizer = Tokenizer.from_folder(byte_level_folder(tmp_path, chat_template=TEMPLATES[name], **NAMES))
    for (messages, arguments), expected in zip(CHATS, ANSWERS[name], strict=True):
        arguments = {"add_generation_prompt": False} | arguments
        if expected is None:
            with pytest.raises(InvalidRequest) as error:
                tokenizer.apply_chat_template(messages, **arguments)
            assert error.value.param == "messages"
        else:
            assert tokenizer.apply_chat_template(messages, **arguments) == expected


def made(template: str, messages=USER, **names: str) -> str:
    tokenizer = Tokenizer(byte_level(), special_tokens=names, chat_templates={"default": template})
    return tokenizer.apply_chat_template(messages)


LOOP_OVER_PARTS = (
    "{{ bos_token }}{%- for m in messages %}{{ '[' + m.role + ']' }}{%- for c in m['content'] %}"
    "{%- if c['type'] == 'text' %}{{ c['text'] | trim }}{%- endif %}{%- endfor %}{{ '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<A>' }}{%- endif %}"
)


def test_content_has_the_form_that_the_template_takes():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    two = [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]}]
    for messages in (USER, parts):
        assert made(LOOP_OVER_PARTS, messages, bos_token="<s>") == "<s>[user]Hello\n<A>"
        assert made("{% for m in messages %}{{ m.content }}{% endfor %}", messages) == "Hello"
    assert made(LOOP_OVER_PARTS, two, bos_token="<s>") == "<s>[user]Helloyou\n<A>"
    assert made("{{ messages[0].content }}", two) == "Hello\nyou"
    either = (
        "{% set c = messages[0].content %}{% if c is string %}{{ c }}{% else %}"
        "{% for x in c %}({{ x.text }}){% endfor %}{% endif %}"
    )
    assert [made(either, messages) for messages in (USER, parts, two)] == ["Hello", "(Hello)", "(Hello)(you)"]


@pytest.mark.parametrize(
    ("template", "content"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "text"),
        ("{% for m in messages %}{% for line in m.content.split('x') %}{{ line }}{% endfor %}{% endfor %}", "text"),
        ("{% for m in messages %}{% for t in m.tool_calls %}{{ t }}{% endfor %}{% endfor %}", "text"),
        ("{% for m in messages %}{% for p in m['content'] %}{{ p.text }}{% endfor %}{% endfor %}", "parts"),
        ("{% for m in messages %}{% set c = m.content %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}", "parts"),
        ("{% for p in messages[0].content | selectattr('type', 'equalto', 'text') %}{{ p }}{% endfor %}", "parts"),
        ("{% macro f(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(messages[0].content) }}", "parts"),
        (
            "{% macro f(x) %}{% if x is string %}{{ x }}{% else %}{% for p in x %}{{ p.text }}{% endfor %}{% endif %}"
            "{% endmacro %}{{ f(x=messages[0].content or []) }}",
            "either",
        ),
    ],
)
def test_which_form_a_template_takes(template, content):
    assert ChatTemplate(template).content == content


def test_absent_variables_are_none_and_not_undefined():
    template = (
        "{{ bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{%- if tools is not none and loop.last %}"
        "{{ '[TOOLS] [' }}{%- for t in tools %}{{ t.function | tojson }}{%- endfor %}{{ '][/TOOLS]' }}{%- endif %}"
        "{{ '[I]' + m.content + '[/I]' }}{%- endif %}{%- endfor %}{{ '<A>' if add_generation_prompt }}"
    )
    assert made(template, bos_token="<s>") == "<s>[I]Hello[/I]<A>"
    assert made("{{ documents is none }} {{ nothing is defined }}") == "True False"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
        "{{ range(1000000000) | list }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 1000000000 * [1] }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ ['a'] | map('center', 1000000000) | list }}",
        "{{ 'a'.ljust(1000000000) }}{{ 'a'.zfill(1000000000) }}",
        "{{ ('\\t' * 9999999).expandtabs(9999) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{% set f = '{:1000000000}'.format %}{{ f(1) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ ('a\\n' * 99999) | indent(9999) }}",
        "{{ (['a'] * 9999) | tojson(indent='b' * 99999) }}",
        "{{ ('a ' * 9999) | wordwrap(1, wrapstring='b' * 99999) }}",
        "{{ ('a ' * 12000000) | wordwrap(1) | length }}",
        "{{ ('&lt;' * 200000) | striptags | length }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
        "{{ ('b' * 99999).join('a' * 99999) }}",
        "{{ ('a' * 99999) | join('b' * 99999) }}",
        "{% set s = 'a' * 99999 %}{{ [[s] * 1000] * 1000 }}",
        "{% set s = 'a' * 99999 %}{{ ([[s] * 1000] * 1000) | tojson }}",
        "{% set s = 'a' * 99999 %}{{ 'x' ~ ([[s] * 1000] * 1000) }}",
        "{% set s = 'a' * 99999 %}{{ '%s' % [[s] * 1000] }}",
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = x %}{% endfor %}",
        "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s=2) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 1 | round(1000000000, 'floor') }}",
        "{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}",
        "{{ lipsum(n=99999) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 500 + "{% endif %}" * 500,
        "x" * 2_000_000,
    ],
)
def test_a_template_that_does_too_much_is_refused_soon(template):
    started = time.monotonic()
    with pytest.raises(InvalidRequest) as error:
        made(template)
    assert error.value.param == "messages"
    assert len(str(error.value)) < 500
    assert time.monotonic() - started < 30  # alone it is at most 4


# fmt: off
_JINJA = ["{{", "}}", "{%", "%}", "for", "x", "in", "messages", "endfor", "if", "|", "(", ")", "[", "]", ".", "~", "1"]
# fmt: on


@given(st.text(max_size=40) | st.lists(st.sampled_from(_JINJA)).map(" ".join))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_template_or_a_refusal(template):
    refusal = "the chat template"
    try:
        ChatTemplate(template).render({"messages": USER})
    except TemplateError as e:
        refusal = str(e)
    assert refusal.startswith("the chat template")


def test_a_chat_that_cannot_fit_is_refused():
    tokenizer = Tokenizer(
        byte_level(), chat_templates={"default": "{% for m in messages %}{{ m.content + '!' }}{% endfor %}"}
    )
    with pytest.raises(
        PromptTooLong, match=r"maximum context length is 8 tokens\. However, your prompt resulted in"
    ) as error:
        tokenizer.encode_chat([{"role": "user", "content": "x" * 40_000_000}], max_tokens=8)
    assert error.value.param == "messages"
    assert len(tokenizer.encode_chat(USER, max_tokens=8)) == len("Hello!") - 1


def test_named_templates():
    tokenizer = Tokenizer(byte_level(), chat_templates={"default": "d", "tool_use": "t"})
    assert tokenizer.apply_chat_template(USER) == "d"
    assert tokenizer.apply_chat_template(USER, tools=[]) == "t"
    only = Tokenizer(byte_level(), chat_templates={"rag": "r", "tool_use": "t"})
    with pytest.raises(InvalidRequest, match="only the chat templates rag, tool_use"):
        only.apply_chat_template(USER)
