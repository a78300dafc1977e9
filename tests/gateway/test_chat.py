from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.common.errors import InvalidRequest
from baton.gateway.chat import ChatTemplate

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": " You are <b>kind</b> & 'brief' \n"},
    {"role": "user", "content": "Sag „hallo“ {{ not_a_variable }} 😀"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhallo  "},
    {"role": "user", "content": "again"},
]
# Each in the style of one family of models, with the constructs that its published template needs.
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
HEADERS = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%Y") %}
    {%- else %}
        {%- set date_string = "2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "[system]\n\nToday: " + date_string + "\n\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '[' + message['role'] + ']\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif tools is not none %}
        {{- raise_exception("no tools here") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]\n\n' }}{%- endif %}"""
THINKING = """{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
        and not(message.content.startswith('<x>') and message.content.endswith('</x>')) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last or loop.last %}{{- '<think>' + thought.strip() + '</think>' }}{%- endif %}
    {%- endif %}
    {{- message.role ~ ':' ~ content ~ '\\n' }}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}"""
ALTERNATING = """{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = messages[0]['content'] %}
{% else %}
    {% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if loop.index0 == 0 and system is defined %}
        {% set content = '<<SYS>>' ~ system.strip() ~ '<</SYS>>' ~ message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% else %}{% generation %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""
FILTERS = """{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ messages | map(attribute='role') | join }}
{%- for message in messages if message.role != 'system' -%}{% if loop.index > 2 %}{% break %}{% endif %}
{{ loop.index }}{{ message.get('name', 'nobody') }}{{ message['content'][:3] | upper }}{% endfor %}
{%- macro part(text, mark='-') %}{{ mark }}{{ text.title() }}{{ mark }}{% endmacro %}{{ part('a b') }}
{{- part('c', mark='+') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages[-1].content.replace('a', 'o') }}"""


def as_transformers(source: str, messages: list[dict[str, Any]]) -> str:
    """The same template through jinja2, set up as transformers does it."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals["strftime_now"] = lambda pattern: __import__("datetime").datetime.now().strftime(pattern)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    env.globals["raise_exception"] = raise_exception
    source = source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return env.from_string(source).render(messages=messages, add_generation_prompt=True, **NAMES)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize(
    "source",
    [CHATML, HEADERS, THINKING, ALTERNATING, FILTERS],
    ids=["chatml", "headers", "thinking", "alternating", "filters"],
)
def test_templates_render_as_transformers_renders_them(source: str, start: int) -> None:
    messages = CONVERSATION[start:]
    assert ChatTemplate(source, NAMES).render(messages) == as_transformers(source, messages)


def test_a_template_may_refuse_the_conversation() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as refused:
        ChatTemplate(ALTERNATING, NAMES).render([CONVERSATION[1], CONVERSATION[3]])
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    "source", ["{{ messages.nothing.deeper }}", "{{ 'a' + 1 }}", "{% for i in range(9000) %}{% for j in range(9000) %}x"
    "{% endfor %}{% endfor %}"], ids=["undefined", "types", "endless"]
)  # fmt: skip
def test_a_template_that_fails_is_a_clear_error(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate(source, NAMES).render(CONVERSATION)


def test_a_template_that_does_not_compile_is_refused_at_the_start() -> None:
    with pytest.raises(InvalidRequest, match="does not compile"):
        ChatTemplate("{% if %}", NAMES)


def test_where_templates_are_found(tmp_path: Path) -> None:
    def loaded() -> str:
        template = ChatTemplate.load(tmp_path)
        assert template is not None
        return template.render([])

    config = tmp_path / "tokenizer_config.json"
    assert ChatTemplate.load(tmp_path) is None
    config.write_text('{"bos_token": "<s>"}')
    assert ChatTemplate.load(tmp_path) is None
    config.write_text('{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}one"}')
    assert loaded() == "<s>one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert loaded() == "two"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "three"}')
    assert loaded() == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert loaded() == "four"
    config.write_text("{")
    with pytest.raises(InvalidRequest, match="not JSON"):
        ChatTemplate.load(tmp_path)
