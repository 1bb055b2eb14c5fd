"""The calculator that GSM8K is evaluated with (Cobbe et al., 2021): `48/2 =` becomes `48/2 = 24`.

Plain arithmetic in text, without `<<...>>` marks, since T5's vocabulary has no `<`. A
recursive-descent parser over `+ - * /`, parentheses, decimals and thousands commas; text that a
model wrote is never handed to `eval`. Values are exact fractions.

Signs are read as GSM8K writes them, which uses an en dash for minus in 178 equations. Where a sign
that is not read touches an expression (`5^2 + 3 =`), what is left of the expression is not what was
meant, and there is no result.
"""

from collections.abc import Sequence
from fractions import Fraction
import re
import unicodedata


Number = Fraction

_MAX_DIGITS = 18
_MAX_LEXEMES = 64
_MAX_DEPTH = 16
# At most six groups, and no look-ahead over many: the time must stay linear in any text.
_NUMBER = r"\d{1,3}(?:,\d{3}){1,6}(?:\.\d+)?(?!,?\d)|\d+(?:\.\d+)?|\.\d+"
_MINUS = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # hyphens, figure and en dash, minus signs
_TIMES = "*\u00b7\u00d7\u2217\u22c5\u2715"
_DIVIDE = "/\u00f7\u2044\u2215"
_OPERATORS = {
    **dict.fromkeys(_MINUS, "-"),
    **dict.fromkeys(f"{_TIMES}xX", "*"),
    **dict.fromkeys(_DIVIDE, "/"),
}
# A letter x is a times sign only before a number: not in "box" or "2x + 3".
_LEXEME = re.compile(
    rf"(?P<number>[$€£]?(?:{_NUMBER})%?)"
    rf"|(?P<operator>[+(){re.escape(_MINUS + _TIMES + _DIVIDE)}]"
    rf"|(?<![A-Za-z])[xX](?=[\s\u200b]*[$€£\d(.]))"
    r"|(?P<equals>=)|(?P<space>[\s\u200b]+)|(?P<other>[^\s=])"
)
# Signs, besides Unicode's mathematical symbols, that no expression may follow: dashes that are not
# read as minus, fractions and powers in one character, a percent sign on its own.
_UNREAD_KINDS = ("Sm", "Pd", "Pc", "No")
_UNREAD = "^%\\"
_BEFORE_SIGNED = ("", *"=.,:;!?")


def number(text: str) -> Number | None:
    """Value of a decimal such as `1,200.50`, `$3` or `20%`; None if it is none or is too long."""
    match = re.fullmatch(rf"[$€£]?({_NUMBER})(%?)", text)
    if match is None or sum(c.isdigit() for c in text) > _MAX_DIGITS:
        return None
    value = Fraction(match[1].replace(",", ""))
    return value / 100 if match[2] else value


def evaluate(expression: str) -> Number | None:
    """Exact value of an arithmetic expression; None where it is none, or divides by zero."""
    lexemes = [match for match in _LEXEME.finditer(expression) if match.lastgroup != "space"]
    if any(match.lastgroup not in ("number", "operator") for match in lexemes):
        return None
    return _parse([match[0] for match in lexemes])


def pending_result(text: str) -> str | None:
    """What a calculator writes after text that ends in `expression =`; None where it does not.

    For decoding: the result's pieces are forced when this is not None.
    """
    lexemes = [(str(match.lastgroup), match[0]) for match in _LEXEME.finditer(text[-2048:])]
    while lexemes and lexemes[-1][0] == "space":
        lexemes.pop()
    if not lexemes or lexemes[-1][0] != "equals":
        return None
    value = _value_before(lexemes, len(lexemes) - 1)
    return None if value is None else to_text(value)


def correct(text: str) -> str:
    """Text with the result of every `expression = number` made right.

    A corrected result replaces the wrong number in what follows too, so that later steps and the
    answer use it: the propagation by string matching of Wei et al. (2022). A result that is right
    once rounded to the two or more decimals it is written with stays as it is, and so does one that
    an expression follows (`4 + 4 / 2 = 4 + 2 = 6`: only the 6 is a result).
    """
    lexemes = [(str(match.lastgroup), match[0]) for match in _LEXEME.finditer(text)]
    for index, (kind, _) in enumerate(lexemes):
        if kind == "equals":
            _correct_result(lexemes, index)
    return "".join(written for _, written in lexemes)


def to_text(value: Number) -> str:
    """A number as people write it: whole, or with up to six decimals, without trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    millionths = round(value * 10**6)
    sign, (whole, rest) = "-" if millionths < 0 else "", divmod(abs(millionths), 10**6)
    decimals = f"{rest:06d}".rstrip("0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def _correct_result(lexemes: list[tuple[str, str]], equals: int) -> None:
    position = equals + 1
    while position < len(lexemes) and lexemes[position][0] == "space":
        position += 1
    negative = position < len(lexemes) and _OPERATORS.get(lexemes[position][1]) == "-"
    result = position + negative
    if result >= len(lexemes) or lexemes[result][0] != "number":
        return
    if _goes_on(lexemes, result + 1):
        return
    value, written = _value_before(lexemes, equals), number(lexemes[result][1])
    if value is None or written is None:
        return
    decimals = len(lexemes[result][1].rstrip("%").partition(".")[2])
    signed = -written if negative else written
    # "100 - 5 = 95%" is right, as is "1 - 0.05 = 95%".
    if signed == value or (lexemes[result][1].endswith("%") and signed * 100 == value):
        return
    if decimals >= 2 and round(value, decimals) == signed:
        return
    wrong = lexemes[result][1]
    if negative:
        lexemes[position] = ("other", "")
    lexemes[result] = ("number", _written_like(wrong, value))
    if negative or value < 0:
        return  # a sign of its own: what follows cannot be matched number by number
    for later in range(result + 1, len(lexemes)):
        kind, text = lexemes[later]
        if kind == "number" and number(text) == written:
            lexemes[later] = (kind, _written_like(text, value))


def _goes_on(lexemes: Sequence[tuple[str, str]], at: int) -> bool:
    """Whether a number before `at` only starts an expression (`= 4 + 2`, `= 1 1/2`)."""
    rest = [lexeme for lexeme in lexemes[at : at + 6] if lexeme[0] != "space"]
    kinds = [kind for kind, _ in rest]
    if kinds[:2] == ["operator", "number"]:
        return rest[0][1] != ")"
    if kinds[:1] == ["operator"] and rest[0][1] == "(":
        return True
    return kinds[:2] == ["number", "operator"] and rest[1][1] == "/"


def _written_like(pattern: str, value: Number) -> str:
    """The value with the currency or percent sign that the wrong number had."""
    currency = pattern[0] if pattern[0] in "$€£" else ""
    if pattern.endswith("%"):
        return f"{currency}{to_text(value * 100)}%"
    return f"-{currency}{to_text(-value)}" if value < 0 else f"{currency}{to_text(value)}"


def _value_before(lexemes: Sequence[tuple[str, str]], equals: int) -> Number | None:
    """Value of the expression, with an operator in it, that ends at an equals sign."""
    start = equals
    while start and lexemes[start - 1][0] in ("number", "operator", "space"):
        start -= 1
        if equals - start > 2 * _MAX_LEXEMES:
            return None
        if lexemes[start][0] == lexemes[start + 1][0] == "number":
            return None  # 1.2.3
    if not _starts_freely(lexemes, start, equals):
        return None
    run = [text for kind, text in lexemes[start:equals] if kind != "space"]
    for i in reversed(range(len(run) - 1)):
        if number(run[i]) is not None and number(run[i + 1]) is not None:
            if run[i + 2 : i + 3] and run[i + 2] in _DIVIDE:
                return None  # a mixed fraction, 1 1/2
            run = run[i + 1 :]  # a number of the sentence before
            break
    value = _parse(run) if len(run) > 2 else None
    while value is None and len(run) > 3 and run[0] == "(":  # "(3 + 4 = 7)"
        run = run[1:]
        value = _parse(run)
    return value


def _starts_freely(lexemes: Sequence[tuple[str, str]], start: int, equals: int) -> bool:
    """Whether what stands before `start` leaves the expression between the two as it is."""
    before = lexemes[start - 1][1] if start else ""
    touches = start < equals and lexemes[start][0] != "space"
    first = start
    while first < equals and lexemes[first][0] == "space":
        first += 1
    if first == equals:
        return False
    sign = _OPERATORS.get(lexemes[first][1], lexemes[first][1])
    if sign in ("+", "*", "/"):
        return False  # "2y + 3 + 4 =" is no arithmetic, though "+ 3 + 4" alone would be
    if sign == "-":  # of the number, or else a bullet, or a minus after what is not read
        is_its_own = lexemes[first + 1][0] == "number" or lexemes[first + 1][1] == "("
        return is_its_own and before in _BEFORE_SIGNED
    if before not in _BEFORE_SIGNED and (
        before in _UNREAD or unicodedata.category(before) in _UNREAD_KINDS
    ):
        return False
    digit = lexemes[first][1][0] in ".0123456789"
    if touches and digit and before.isalpha():
        return False  # x2, 5e3
    return not (touches and start > 1 and lexemes[start - 2][0] == "number")  # 3:30, 1,23


def _parse(lexemes: list[str]) -> Number | None:
    lexemes = [_OPERATORS.get(lexeme, lexeme) for lexeme in lexemes]
    if not lexemes or len(lexemes) > _MAX_LEXEMES:
        return None
    try:
        value, end = _sum(lexemes, 0, 0)
    except (_NoExpression, ZeroDivisionError):
        return None
    return value if end == len(lexemes) else None


class _NoExpression(Exception):
    """The lexemes are no arithmetic expression."""


def _sum(lexemes: list[str], at: int, depth: int) -> tuple[Number, int]:
    value, at = _product(lexemes, at, depth)
    while at < len(lexemes) and lexemes[at] in "+-":
        sign = 1 if lexemes[at] == "+" else -1
        term, at = _product(lexemes, at + 1, depth)
        value += sign * term
    return value, at


def _product(lexemes: list[str], at: int, depth: int) -> tuple[Number, int]:
    value, at = _factor(lexemes, at, depth)
    while at < len(lexemes) and lexemes[at] in "*/(":
        divides = lexemes[at] == "/"
        # 8(26) is a product too.
        factor, at = _factor(lexemes, at if lexemes[at] == "(" else at + 1, depth)
        value = value / factor if divides else value * factor
    return value, at


def _factor(lexemes: list[str], at: int, depth: int) -> tuple[Number, int]:
    if at >= len(lexemes) or depth > _MAX_DEPTH:
        raise _NoExpression
    if lexemes[at] in "+-":
        value, end = _factor(lexemes, at + 1, depth + 1)
        return (value if lexemes[at] == "+" else -value), end
    if lexemes[at] == "(":
        value, end = _sum(lexemes, at + 1, depth + 1)
        if end >= len(lexemes) or lexemes[end] != ")":
            raise _NoExpression
        return value, end + 1
    value = number(lexemes[at])
    if value is None:
        raise _NoExpression
    return value, at + 1
