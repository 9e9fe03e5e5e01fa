"""Podman-style templates: `--format '{{.Name}} {{.ID}}'`. Field substitution, `{{json .}}` and quoted texts, nothing more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt.errors import UsageError

_ACTION = re.compile(r"\{\{-?\s*(.*?)\s*-?\}\}")
_PATH = re.compile(r"\.(?:\w+(?:\.\w+)*)?")
_ESCAPES = {r"\t": "\t", r"\n": "\n"}
Part = Callable[[Mapping[str, Any]], str]


class Template:
    """A parsed template.

    Args:
        text: what the user typed.
        fields: the fields of the rows it will see, in snake case. Case and underscores do not matter in the template
            (`.ContainerID` is `container_id`); below a field dots go on (`.Stats.total_s`).

    Raises:
        UsageError: an unknown field or function, before any work is done.
    """

    def __init__(self, text: str, fields: Sequence[str]) -> None:
        self._fields = {_fold(name): name for name in fields}
        self._parts: list[Part] = []
        end = 0
        for action in _ACTION.finditer(text):
            self._literal(text[end : action.start()])
            self._parts.append(self._action(action[1]))
            end = action.end()
        self._literal(text[end:])

    def render(self, row: Mapping[str, Any]) -> str:
        return "".join(part(row) for part in self._parts)

    def _literal(self, text: str) -> None:
        if "{{" in text or "}}" in text:
            raise UsageError(f"--format: unbalanced braces in {text!r}")
        for escape, character in _ESCAPES.items():
            text = text.replace(escape, character)
        if text:
            self._parts.append(lambda row: text)

    def _action(self, action: str) -> Part:
        if len(action) >= 2 and action[0] == action[-1] and action[0] in '"`':
            text = action[1:-1].replace(r"\t", "\t").replace(r"\n", "\n")
            return lambda row: text
        as_json = action.startswith("json ")
        path = action.removeprefix("json ").strip()
        if not _PATH.fullmatch(path):
            raise UsageError(f"--format: {{{{{action}}}}} is not known", hint="fields look like {{.Name}}; {{json .}} and {{json .Name}} work too")
        keys = [key for key in path.split(".") if key]
        if keys:
            field = self._fields.get(_fold(keys[0]))
            if field is None:
                raise UsageError(f"--format: no field .{keys[0]}", hint="fields: " + ", ".join("." + _shown(name) for name in self._fields.values()))
            keys[0] = field

        def value(row: Mapping[str, Any]) -> str:
            found = _follow(row, keys)
            return json.dumps(found, separators=(",", ":"), ensure_ascii=False) if as_json else _text(found)

        return value


def _fold(name: str) -> str:
    return name.replace("_", "").lower()


def _shown(name: str) -> str:
    return "".join("ID" if word == "id" else word.capitalize() for word in name.split("_"))


def _follow(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = next((item for name, item in value.items() if _fold(name) == _fold(key)), None)
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, Mapping) and "message" in value:  # an error: what a person would want of it
        return str(value["message"])
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else str(value)
