"""Chat templates that do what those of well-known families of models do, each written for these tests.

``CHATS`` are what the templates are rendered with, as messages and arguments of ``apply_chat_template``.
"""
# ruff: noqa: E501 (a line's end may be a part of a template)

TEMPLATES = {
    # The system's words stand within the first turn; roles alternate or the template complains.
    "bracketed turns": """
{%- if messages[0]['role'] == 'system' %}{% set first = '<<S>>\\n' + messages[0]['content'] + '\\n<</S>>\\n\\n' %}
{%- set rest = messages[1:] %}{%- else %}{% set rest = messages %}{% set first = '' %}{%- endif %}
{%- for m in rest %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}{% endif %}
{%- if loop.index0 == 0 %}{% set text = first + m['content'] %}{% else %}{% set text = m['content'] %}{% endif %}
{%- if m['role'] == 'user' %}{{ bos_token + '[I] ' + text.strip() + ' [/I]' }}
{%- else %}{{ ' ' ~ text.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}""",
    # Headers with names of roles, and the beginning of the text at the first message.
    "headers": """
{%- set loop_messages = messages %}{%- for message in loop_messages %}
{%- set content = '<|h|>' + message['role'] + '<|/h|>\\n\\n' + message['content'] | trim + '<|e|>' %}
{%- if loop.index0 == 0 %}{%- set content = bos_token + content %}{% endif %}{{- content }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|h|>assistant<|/h|>\\n\\n' }}{% endif %}""",
    # A date, tools in the system's turn, and calls as JSON.
    "headers with tools": """
{{- bos_token }}{%- if not date is defined %}{%- if strftime_now is defined %}{% set date = strftime_now('%Y')[:2] %}
{%- endif %}{%- endif %}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|h|>system<|/h|>\\n\\n' }}{%- if tools is not none %}{{- 'Tools: on\\n' }}{%- endif %}{{- 'Date: ' + date + '\\n' }}
{%- for t in tools or [] %}{{- t | tojson(indent=4) + '\\n\\n' }}{%- endfor %}{{- system + '<|e|>' }}
{%- for message in messages %}
{%- if message.tool_calls is defined %}{%- set call = message.tool_calls[0].function %}
{{- '<|h|>assistant<|/h|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|e|>' }}
{%- elif message.role in ['tool', 'ipython'] %}{{- '<|h|>ipython<|/h|>\\n\\n' }}
{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
{%- else %}{{- message.content }}{%- endif %}{{- '<|e|>' }}
{%- else %}{{- '<|h|>' + message['role'] + '<|/h|>\\n\\n' + message['content'] | trim + '<|e|>' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|h|>assistant<|/h|>\\n\\n' }}{%- endif %}""",
    # Tools before the last turn of the user; namespaces; ids of calls are checked for their length.
    "tools before the last turn": """
{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}{%- set ns = namespace(n=0) %}{{- bos_token }}
{%- for m in turns %}{%- if m['role'] == 'user' %}{%- set ns.n = ns.n + 1 %}
{%- if tools is not none and m == users[-1] %}{{- '[T] [' }}{%- for t in tools %}{%- set f = t.function %}
{{- '{"type": "function", "function": {' }}{%- for k, v in f.items() if k != 'return' %}
{%- if v is string %}{{- '"' + k + '": "' + v + '"' }}{%- else %}{{- '"' + k + '": ' + v | tojson }}{%- endif %}
{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '}}' }}
{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}{%- endfor %}{{- '[/T]' }}{%- endif %}
{%- if loop.last and system is defined %}{{- '[I] ' + system + '\\n\\n' + m['content'] + '[/I]' }}
{%- else %}{{- '[I] ' + m['content'] + '[/I]' }}{%- endif %}
{%- elif m['role'] == 'assistant' and m.tool_calls is defined %}{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}
{{- '[C] [' + (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}]' + eos_token }}{%- endfor %}
{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content'] | trim + eos_token }}
{%- else %}{{- '[R]' ~ m['content'] | string ~ '[/R]' }}{%- endif %}{%- endfor %}""",
    "marked turns": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|s|>system
You help.<|e|>
' }}{% endif %}{{'<|s|>' + message['role'] + '
' + message['content'] + '<|e|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|s|>assistant
' }}{% endif %}""",
    # A macro for content of either form; calls and answers of tools in tags.
    "marked turns with tools": """
{%- macro shown(content) -%}{%- if content is string -%}{{ content }}{%- elif content is not none -%}
{%- for part in content -%}{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}<image>{%- endif -%}{%- endfor -%}
{%- endif -%}{%- endmacro -%}
{%- if tools %}{{- '<|s|>system\\n' }}{%- if messages[0].role == 'system' %}{{- shown(messages[0].content) + '\\n\\n' }}
{%- endif %}{{- '# Tools\\n<tools>' }}{%- for tool in tools %}{{- '\\n' ~ tool | tojson }}{%- endfor %}
{{- '\\n</tools><|e|>\\n' }}{%- elif messages[0].role == 'system' %}
{{- '<|s|>system\\n' + shown(messages[0].content) + '<|e|>\\n' }}{%- endif %}
{%- set ns = namespace(multi=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}
{%- if ns.multi and message.role == 'user' %}{%- set ns.multi = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}{%- set content = shown(message.content) %}
{%- if message.role == 'user' or message.role == 'system' and not loop.first %}
{{- '<|s|>' + message.role + '\\n' + content + '<|e|>' + '\\n' }}
{%- elif message.role == 'assistant' %}{%- set thought = message.reasoning_content or '' %}
{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|s|>assistant\\n' }}{%- if thought and loop.index0 > ns.last %}{{- '<think>' + thought + '</think>\\n' }}{%- endif %}
{{- content }}{%- for call in message.tool_calls or [] %}{{- '\\n<call>' + call.function.name + ' ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '</call>' }}{%- endfor %}{{- '<|e|>\\n' }}
{%- elif message.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|s|>user' }}
{%- endif %}{{- '\\n<answer>\\n' + content + '\\n</answer>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|e|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|s|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}""",
    "lines with roles": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "no system": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}
{%- set role = message['role'] %}{% endif %}{{ '<turn>' + role + '\\n' + message['content'] | trim + '</turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{'<turn>model\\n'}}{% endif %}""",
    # Takes parts only.
    "parts": """{{ bos_token }}{%- for message in messages %}{{ '<turn>' + message.role + '\\n' }}
{%- for item in message['content'] %}{%- if item['type'] == 'image' %}{{ '<image>' }}
{%- elif item['type'] == 'text' %}{{ item['text'] | trim }}{%- endif %}{%- endfor %}{{ '</turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{%- endif %}""",
    "parts by attribute": """{% for message in messages %}{{ message.role | capitalize }}:
{%- for line in message['content'] | selectattr('type', 'equalto', 'text') %}{{ ' ' + line['text'] }}{% endfor %}
{{ '<end>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""",
    "either form": """{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.content is string %}{{ m.content }}{% else %}
{%- for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{{ '<|end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}""",
    "one line each": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- for message in messages %}{%- if message['role'] == 'system' %}{{ message['content'] }}
{%- else %}{%- if message['role'] == 'user' %}
{{'### Instruction:\\n' + message['content'] + '\\n'}}
{%- else %}
{{'### Response:\\n' + message['content'] + '\\n<|EOT|>\\n'}}
{%- endif %}{%- endif %}{%- endfor %}{% if add_generation_prompt %}
{{'### Response:'}}
{%- endif %}""",
    "thoughts dropped": """{%- set ns = namespace(is_first=false, system='') %}{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{ ns.system }}{%- for message in messages %}{%- if message['role'] == 'user' %}
{{- '<|User|>' + message['content'] }}{%- endif %}{%- if message['role'] == 'assistant' %}
{%- set content = message['content'] or '' %}{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}
{%- endif %}{{ '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}""",
    "documents": """{{ bos_token }}{% if documents %}{{ '<docs>' }}{% for d in documents %}{{ loop.index ~ '. ' ~ d.title ~ ': ' ~ d.text }}
{% endfor %}{{ '</docs>' }}{% endif %}{% if tools is defined and tools %}{{ '<tools>' ~ (tools | map(attribute='function') |
map(attribute='name') | join(', ')) ~ '</tools>' }}{% endif %}{% for message in messages %}{{ '<|START|><|' ~ message.role | upper ~
'|>' ~ message.content ~ '<|END|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}""",
    "spoken": """{% for message in messages %}{% if message.role == 'system' %}{{ message.content + ' ' }}
{%- elif message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}{% elif message.role == 'assistant' %}
{{- 'ASSISTANT: ' + message.content + eos_token + '\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
    "marked for training": """{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<|a|>' }}
{%- generation %}{% set seen = true %}{{- message.content + eos_token }}{%- endgeneration %}{{- seen is defined }}
{%- else %}{{- '<|' + message.role[0] + '|>' + message.content }}{%- if message.content == 'stop here' %}{% break %}{% endif %}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|a|>' }}{%- endif %}""",
    "extra names": """{{ image_token }}|{{ pad_token }}|{{ unk_token is defined }}|{{ add_bos_token is defined }}|{{ documents is none }}|
{{- tools is none }}|{{ additional_special_tokens is defined }}|{{ mode | default('none') }}|
{{- messages | tojson(ensure_ascii=true, sort_keys=true) }}|{{ dict(a=1) | tojson(separators=(',', ':')) }}""",
    "odd filters": """{{ messages | map(attribute='role') | unique | join('+') }}|{{ '%s-%03d' | format('x', 7) }}|{{ '%5.1f' % 2.25 }}|
{{- '{:>4}{}'.format(1, 'b') }}|{{ messages[-1].content.replace('i', 'ee') | title }}|{{ [3, 1, 2] | sort | list }}|
{{- messages | groupby('role') | map('first') | list }}|{{ 2 ** 10 % 7 }}|{{ 'ab' * 3 }}|{{ [1] * 2 + [3] }}|
{{- messages | length }}|{{ 'a,b'.split(',') | reverse | list }}|{{ messages[0] | items | list | length }}|
{{- range(3) | batch(2) | list }}|{{ none }}|{{ true }}|{{ 1.0 }}|{{ 'x' ~ none ~ 1 }}|{{ namespace(a=1).a }}""",
}

CHATS = [
    ([{"role": "user", "content": "Hi <there> é"}], {"add_generation_prompt": True}),
    (
        [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
        {"add_generation_prompt": True},
    ),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello! "},
            {"role": "user", "content": "stop here"},
        ],
        {"add_generation_prompt": True},
    ),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {"add_generation_prompt": False}),
    ([{"role": "user", "content": "a", "name": "n", "extra": None}], {"mode": "m", "enable_thinking": False}),
    ([{"role": "assistant", "content": "b", "reasoning": "because"}], {}),
    (
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "123456789",
                        "type": "function",
                        "function": {"name": "w", "arguments": {"at": "Łódź", "n": 1}},
                    }
                ],
            },
            {"role": "tool", "content": "rain"},
        ],
        {
            "add_generation_prompt": True,
            "tools": [
                {"type": "function", "function": {"name": "w", "description": "d", "parameters": {"a": [1, None]}}}
            ],
            "documents": [{"title": "t", "text": "x"}],
        },
    ),
]
