"""Makes a teacher's own prompt with a template such as "{inputs} Solution: {targets}".

`{inputs}` is the student's prompt and `{targets}` the reference answer. For a chat, they are the
texts of the prompt's last turn and of the answer. As in Python's format strings, a brace that is
part of the text is doubled.
"""

import string


_FIELDS = ("inputs", "targets")


def parts(template: str) -> list[str]:
    """Splits a template at its fields.

    Returns:
        A text, a field, a text, and so on, such as ["", "inputs", " Solution: ", "targets", ""].

    Raises:
        ValueError: if the template has other fields than `inputs` and `targets`, or none.
    """
    found = [""]
    try:
        for text, field, spec, conversion in string.Formatter().parse(template):
            found[-1] += text
            if field is not None:
                if field not in _FIELDS or spec or conversion:
                    raise ValueError(f"it has the field {field!r}")
                found += [field, ""]
    except ValueError as error:
        raise ValueError(
            f"teacher_template must be a text with the fields {{inputs}} and {{targets}}, "
            f"got {template!r}: {error}"
        ) from None
    if len(found) == 1:
        raise ValueError(
            f"teacher_template must hold {{inputs}} or {{targets}}, got {template!r}: every "
            "prompt would be the same"
        )
    return found


def fill(template: str, *, inputs: str, targets: str | None) -> str:
    """Returns the prompt of one example.

    Raises:
        ValueError: if the template shows the answer and the example has none.
    """
    pieces = parts(template)
    if targets is None and "targets" in pieces[1::2]:
        raise ValueError(f"teacher_template={template!r} needs a target, got only a prompt")
    values = {"inputs": inputs, "targets": targets or ""}
    return "".join(values[x] if i % 2 else x for i, x in enumerate(pieces))
