"""Chat messages as the text a model was trained on, by the model's own Jinja template.

Templates are part of a checkpoint, so they run in Jinja's immutable sandbox. Decides where a
checkpoint keeps its templates (files of their own, tokenizer_config.json) and which one a request
gets, not how text becomes tokens.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sps2_mega.errors import ConfigError, RequestError

DEFAULT_FILE = "chat_template.jinja"
NAMED_FOLDER = "additional_chat_templates"
# Used for models without a template of their own: one `role: content` line per message.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template and the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    template: jinja2.Template
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Prompt text of `messages`, ready to be encoded without further special tokens.

        Raises:
            RequestError: the template refuses these messages, e.g. because roles do not alternate.
        """
        try:
            return self.template.render(
                **{**self.special_tokens, "tools": None, "documents": None, **variables},
                messages=messages,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(
                f"messages: the model's chat template refuses them: {type(error).__name__}: {error}"
            ) from error


def compile_template(text: str, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """Compile template text.

    Raises:
        ConfigError: it is not a valid Jinja template.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationBlock],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return ChatTemplate(environment.from_string(text), special_tokens)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error


def find_templates(folder: Path, configured: Mapping[str, str]) -> dict[str, str]:
    """Chat templates of a model folder by name; one without a name is called `default`.

    `chat_template.jinja` and `additional_chat_templates/NAME.jinja` together replace what
    tokenizer_config.json has (`configured`), which takes precedence over chat_template.json.

    Raises:
        ConfigError: a file of templates cannot be read.
    """
    files = {"default": folder / DEFAULT_FILE}
    files |= {
        path.name.removesuffix(".jinja"): path for path in (folder / NAMED_FOLDER).glob("*.jinja")
    }
    found = {name: _read(path) for name, path in sorted(files.items()) if path.is_file()}
    if found or configured:
        return found or dict(configured)
    legacy = folder / "chat_template.json"
    if not legacy.is_file():
        return {}
    try:
        value = json.loads(_read(legacy))
    except ValueError as error:
        raise ConfigError(f"{legacy} is not JSON: {error}") from None
    text = value.get("chat_template") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ConfigError(f"{legacy}: chat_template must be a text, found {type(text).__name__}")
    return {"default": text}


def choose_template(names: Collection[str], *, with_tools: bool) -> str:
    """Name of the template for a request: `tool_use` where it has tools, else `default`.

    Raises:
        RequestError: there are several templates, and none has the name that is needed.
    """
    if with_tools and "tool_use" in names:
        return "tool_use"
    if "default" in names:
        return "default"
    raise RequestError(
        f"messages: the model's chat templates are named {', '.join(sorted(names))}, and none is "
        "called default"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


class _GenerationBlock(jinja2.ext.Extension):
    """Tag `{% generation %}`, which marks assistant text for training: just its body here."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
