"""Chat templates: messages become the text that a model was trained to read, as transformers does.

A template is a Jinja program that comes with a model, so it runs in Jinja's sandbox, which lets it
read what it is given and change or call nothing else. The names that a template finds are those of
transformers 5: `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, loop
controls, and `{% generation %}` blocks, which mark what the assistant wrote and print as they are.
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

# What a model wrote before its answer has several names; templates read one of them.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The templates of a tokenizer.

    Attributes:
        templates: Jinja text by name; a single one is "default", and "tool_use" is taken where
            tools are given.
        special_tokens: texts by name, such as `bos_token`, which a template prints.
        source: the file they come from, for messages.
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
        """The text of messages, as `apply_chat_template(..., tokenize=False)` renders it.

        Args:
            messages: objects with `role` and `content`, of JSON values.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end with what precedes an answer of the assistant.
            now: what `strftime_now` prints; None is the current time.
            **variables: further names that the template reads, such as `enable_thinking`.

        Raises:
            ValueError: if there are no messages, no template fits, or the template raises.
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
        # A template is a program of its own: whatever it raises is a fault of it and the messages.
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
    """Without nulls (templates test for a missing key), and reasoning under the name they read."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in _REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, _REASONING[0]: reasoning}


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}` prints what is inside."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own annotation)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's `namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **attributes: Any):  # so that `namespace(self=...)` works, as in Jinja
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
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
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
