"""An engine whose answers are chosen by the test, and whose chat template shows tools."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from slora_jax.text.tokenizer import Tokenizer
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.small_tokenizers import byte_level_folder

TEMPLATE = """{%- if tools %}Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}
{% endif %}{%- for message in messages %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %} calls {{ call.function.name }}({{ call.function.arguments | tojson }})
{%- endfor %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

TAGGED = TEMPLATE.replace("Tools:", "Call in <tool_call> tags. Tools:")


class ToolEngine(FakeEngine):
    """Answers with ``says``, whatever it is asked, in tokens of a byte each."""

    says = ""

    def answer(self, request):
        return self._backend.encode(self.says)


@contextlib.contextmanager
def running_tool_engine(folder: Path, template: str = TEMPLATE) -> Iterator[ToolEngine]:
    """One that runs, with files in a folder of a test's own."""
    engine = ToolEngine(folder)
    (folder / "with tools").mkdir()
    engine.tokenizer = Tokenizer.from_folder(byte_level_folder(folder / "with tools", chat_template=template))
    engine.start()
    try:
        yield engine
    finally:
        engine.close()
