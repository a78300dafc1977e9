"""Chat templates: a conversation becomes the text that the model was trained to see.

Templates are written for jinja2 as Hugging Face transformers sets it up. minijinja renders them in Rust, without access
to Python objects, so that a template from the internet can compute text and nothing else.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import minijinja

from ..common.errors import InvalidRequest

_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_FUEL = 10_000_000
"""Instructions that one rendering may take: a template that loops for ever ends with an error."""


class ChatTemplate:
    """One model's template. `source` is jinja; `names` are its special tokens (bos_token, eos_token, …)."""

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._env = minijinja.Environment(trim_blocks=True, lstrip_blocks=True, fuel=_FUEL)
        self._env.auto_escape_callback = lambda name: False
        self._env.add_filter("tojson", _tojson)
        self._env.add_global("raise_exception", _raise_exception)
        self._env.add_global("strftime_now", _strftime_now)
        try:
            self._env.add_template("chat", _plain(source))
        except minijinja.TemplateError as error:
            raise InvalidRequest(f"the model's chat template does not compile: {error}", param="model") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint folder: chat_template.jinja, chat_template.json, or the entry of
        tokenizer_config.json (a string, or a list of named templates, of which "default" is meant). None: a base
        model, which has none."""
        config = _read_json(folder / "tokenizer_config.json")
        source: object = config.get("chat_template")
        if (folder / "chat_template.json").is_file():
            source = _read_json(folder / "chat_template.json").get("chat_template", source)
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        return cls(source, _special_names(config)) if isinstance(source, str) else None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt's text, ending where the assistant is to go on. Raises `InvalidRequest` with the template's own
        words where it refuses the conversation."""
        try:
            text: str = self._env.render_template("chat", messages=messages, add_generation_prompt=True, **self._names)
        except (minijinja.TemplateError, InvalidRequest, TypeError, ValueError) as error:
            words = str(error).partition("\n")[0]
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {words}", param="messages"
            ) from error
        return text


def _plain(source: str) -> str:
    """`{% generation %}` marks the assistant's words for training (a transformers extension); it changes no text."""
    return _GENERATION_TAG.sub(lambda tag: f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}", source)


def _tojson(value: object, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    """As transformers does it: jinja2's own filter would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise InvalidRequest(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer_config.json spells a special token as a string or as an object with its content."""
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"):
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}", param="model") from error
    return found
