"""Renders chat messages with a model's chat template, with the same result as transformers.

A chat template turns messages into the text format that a model was trained on. The template is a
Jinja program that comes with the model's files, so it is untrusted and runs in Jinja's immutable
sandbox. A template has the same names as in transformers 5: `raise_exception`, `strftime_now`, a
`tojson` that does not escape HTML, loop controls, and `{% generation %}` blocks, which mark the
assistant's text for other tools and print their content unchanged.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import functools
import json
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


Message = Mapping[str, Any]

# Messages store the reasoning before an answer under one of these keys. A template reads one of the
# first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a tokenizer.

    Attributes:
        templates: the Jinja text of each template by name. A template without a name is "default";
            "tool_use" is preferred if tools are given.
        special_tokens: the texts of special tokens by name, such as `bos_token`. Templates print
            them.
        source: the file of the templates, for error messages.
    """

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    source: str

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """Returns the text of messages, as transformers' `apply_chat_template` renders it.

        Args:
            messages: the messages, objects of JSON values with the keys `role` and `content`.
            tools: JSON schemas of the functions that the model may call.
            add_generation_prompt: whether the text ends with what precedes an answer of the
                assistant.
            now: the time that `strftime_now` prints; None is the current time.
            **variables: further variables of the template, such as `enable_thinking`.

        Raises:
            ValueError: if there are no messages, if there is no suitable template, or if the
                template raises an error.
        """
        if not messages:
            raise ValueError("messages must hold at least one message, got none")
        template = _compiled(self._chosen(tools is not None), self.source)
        names = {"strftime_now": (now or datetime.datetime.now()).strftime, **self.special_tokens}
        try:
            return template.render(
                **{**names, **variables},
                messages=[_as_templates_read(message) for message in messages],
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        # The template is an arbitrary program, so any exception may come from it.
        except Exception as error:
            raise ValueError(
                f"the chat template of {self.source!r} refuses these messages: "
                f"{type(error).__name__}: {error}"
            ) from None

    def _chosen(self, with_tools: bool) -> str:
        if with_tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" in self.templates:
            return self.templates["default"]
        raise ValueError(
            f"{self.source!r} has no chat template named 'default', got {sorted(self.templates)}"
        )


def _as_templates_read(message: Message) -> dict[str, Any]:
    """Returns a message in the form that templates expect.

    Keys with the value null are removed, because templates test whether a key is missing. Reasoning
    is stored under the keys that templates read.
    """
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, _REASONING[0]: reasoning}


class _Generation(jinja2.ext.Extension):
    """A Jinja extension that prints the content of `{% generation %}` blocks unchanged."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own annotation)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace`, which refuses attributes whose names begin with an underscore."""

    # As in Jinja, there is no parameter `self`, so that a template can call `namespace(self=...)`.
    def __init__(*args: Any, **attributes: Any):
        for name in dict(*args[1:], **attributes):
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(*args, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compiled(template: str, source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template of {source!r} is no Jinja: line {error.lineno}: {error.message}"
        ) from None
