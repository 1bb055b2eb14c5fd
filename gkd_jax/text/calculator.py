"""The calculator with which GSM8K is evaluated (Cobbe et al., 2021): `48/2 =` becomes `48/2 = 24`.

The calculator finds arithmetic in plain text. It needs no `<<...>>` marks around an expression,
because T5's vocabulary has no `<`. A recursive-descent parser reads `+ - * /`, parentheses,
decimals and thousands commas; text that a model wrote is never passed to `eval`. Values are exact
fractions.

The accepted signs are those that occur in GSM8K, which for example uses an en dash as minus in 178
equations. An expression next to an unknown sign (`5^2 + 3 =`) has no result, because the readable
part of such an expression is not what the author meant.
"""

from collections.abc import Sequence
from fractions import Fraction
import re
import unicodedata


Number = Fraction

_MAX_DIGITS = 18
_MAX_LEXEMES = 64
_MAX_DEPTH = 16
# The pattern allows at most six groups of thousands and has no look-ahead over many characters, so
# that matching takes linear time in any text.
_NUMBER = r"\d{1,3}(?:,\d{3}){1,6}(?:\.\d+)?(?!,?\d)|\d+(?:\.\d+)?|\.\d+"
_MINUS = "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"  # Hyphens, figure and en dash, minus signs.
_TIMES = "*\u00b7\u00d7\u2217\u22c5\u2715"
_DIVIDE = "/\u00f7\u2044\u2215"
_OPERATORS = {
    **dict.fromkeys(_MINUS, "-"),
    **dict.fromkeys(f"{_TIMES}xX", "*"),
    **dict.fromkeys(_DIVIDE, "/"),
}
# The letter x is a times sign only before a number, and so neither in "box" nor in "2x + 3".
_LEXEME = re.compile(
    rf"(?P<number>[$€£]?(?:{_NUMBER})%?)"
    rf"|(?P<operator>[+(){re.escape(_MINUS + _TIMES + _DIVIDE)}]"
    rf"|(?<![A-Za-z])[xX](?=[\s\u200b]*[$€£\d(.]))"
    r"|(?P<equals>=)|(?P<space>[\s\u200b]+)|(?P<other>[^\s=])"
)
# Characters after which an expression has no result. `_UNREAD_KINDS` are Unicode categories:
# mathematical symbols, dashes that are not read as minus, underscores, and numbers in one character
# such as fractions and powers. `_BEFORE_SIGNED` has what may stand before an expression that begins
# with a minus; "" is the start of the text.
_UNREAD_KINDS = ("Sm", "Pd", "Pc", "No")
_UNREAD = "^%\\"
_BEFORE_SIGNED = ("", *"=.,:;!?")


def number(text: str) -> Number | None:
    """Returns the exact value of a decimal such as `1,200.50`, `$3` or `20%` (which is 1/5).

    The result is None if the text is no decimal or has more than 18 digits.
    """
    match = re.fullmatch(rf"[$€£]?({_NUMBER})(%?)", text)
    if match is None or sum(c.isdigit() for c in text) > _MAX_DIGITS:
        return None
    value = Fraction(match[1].replace(",", ""))
    return value / 100 if match[2] else value


def pending_result(text: str) -> str | None:
    """Returns the result to write after a text that ends in `expression =`, or else None.

    While a model decodes, the tokens of a result that is not None replace the model's own tokens.
    """
    lexemes = [(str(match.lastgroup), match[0]) for match in _LEXEME.finditer(text[-2048:])]
    while lexemes and lexemes[-1][0] == "space":
        lexemes.pop()
    if not lexemes or lexemes[-1][0] != "equals":
        return None
    value = _value_before(lexemes, len(lexemes) - 1)
    return None if value is None else to_text(value)


def correct(text: str) -> str:
    """Returns the text with the result of every `expression = number` corrected.

    The corrected number also replaces the wrong number in the text that follows, so that later
    steps and the answer use the corrected number. This is the propagation by string matching of Wei
    et al. (2022). Two kinds of numbers after an equals sign are not changed: a number with two or
    more decimals that equals the value rounded to as many decimals, and a number that begins
    another expression (in `4 + 4 / 2 = 4 + 2 = 6` only the 6 is a result).
    """
    lexemes = [(str(match.lastgroup), match[0]) for match in _LEXEME.finditer(text)]
    for index, (kind, _) in enumerate(lexemes):
        if kind == "equals":
            _correct_result(lexemes, index)
    return "".join(written for _, written in lexemes)


def to_text(value: Number) -> str:
    """Returns a number as people write it, with at most six decimals and no trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    millionths = round(value * 10**6)
    sign, (whole, rest) = "-" if millionths < 0 else "", divmod(abs(millionths), 10**6)
    decimals = f"{rest:06d}".rstrip("0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def _correct_result(lexemes: list[tuple[str, str]], equals: int) -> None:
    """Corrects in place the number after one equals sign, and that number in later lexemes."""
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
    # Both "100 - 5 = 95%" and "1 - 0.05 = 95%" are accepted as correct.
    if signed == value or (lexemes[result][1].endswith("%") and signed * 100 == value):
        return
    if decimals >= 2 and round(value, decimals) == signed:
        return
    wrong = lexemes[result][1]
    if negative:
        lexemes[position] = ("other", "")
    lexemes[result] = ("number", _written_like(wrong, value))
    if negative or value < 0:
        return  # The lexeme of a number has no sign, so later numbers cannot be compared.
    for later in range(result + 1, len(lexemes)):
        kind, text = lexemes[later]
        if kind == "number" and number(text) == written:
            lexemes[later] = (kind, _written_like(text, value))


def _goes_on(lexemes: Sequence[tuple[str, str]], at: int) -> bool:
    """Returns whether the number before index `at` begins an expression (`= 4 + 2`, `= 1 1/2`)."""
    rest = [lexeme for lexeme in lexemes[at : at + 6] if lexeme[0] != "space"]
    kinds = [kind for kind, _ in rest]
    if kinds[:2] == ["operator", "number"]:
        return rest[0][1] != ")"
    if kinds[:1] == ["operator"] and rest[0][1] == "(":
        return True
    return kinds[:2] == ["number", "operator"] and rest[1][1] == "/"


def _written_like(pattern: str, value: Number) -> str:
    """Returns the value as text, with the currency or percent sign that `pattern` has."""
    currency = pattern[0] if pattern[0] in "$€£" else ""
    if pattern.endswith("%"):
        return f"{currency}{to_text(value * 100)}%"
    return f"-{currency}{to_text(-value)}" if value < 0 else f"{currency}{to_text(value)}"


def _value_before(lexemes: Sequence[tuple[str, str]], equals: int) -> Number | None:
    """Returns the value of the expression before an equals sign; None if there is no expression.

    An expression must contain an operator.
    """
    start = equals
    while start and lexemes[start - 1][0] in ("number", "operator", "space"):
        start -= 1
        if equals - start > 2 * _MAX_LEXEMES:
            return None
        if lexemes[start][0] == lexemes[start + 1][0] == "number":
            return None  # Numbers without a space between them, as in 1.2.3, are no expression.
    if not _starts_freely(lexemes, start, equals):
        return None
    run = [text for kind, text in lexemes[start:equals] if kind != "space"]
    for i in reversed(range(len(run) - 1)):
        if number(run[i]) is not None and number(run[i + 1]) is not None:
            if run[i + 2 : i + 3] and run[i + 2] in _DIVIDE:
                return None  # Mixed fractions such as 1 1/2 are not supported.
            run = run[i + 1 :]  # The first number belongs to the sentence before the expression.
            break
    value = _parse(run) if len(run) > 2 else None
    # In "(3 + 4 = 7)" the opening parenthesis does not belong to the expression.
    while value is None and len(run) > 3 and run[0] == "(":
        run = run[1:]
        value = _parse(run)
    return value


def _starts_freely(lexemes: Sequence[tuple[str, str]], start: int, equals: int) -> bool:
    """Returns whether the text before an expression leaves the expression's meaning unchanged.

    The expression has the lexemes from `start` up to `equals`.
    """
    before = lexemes[start - 1][1] if start else ""
    touches = start < equals and lexemes[start][0] != "space"
    first = start
    while first < equals and lexemes[first][0] == "space":
        first += 1
    if first == equals:
        return False
    sign = _OPERATORS.get(lexemes[first][1], lexemes[first][1])
    if sign in ("+", "*", "/"):
        return False  # The readable "+ 3 + 4" of "2y + 3 + 4 =" is not the whole expression.
    # A minus must be the sign of the first number. Otherwise it may be a bullet, or may subtract
    # from something that the calculator cannot read.
    if sign == "-":
        is_its_own = lexemes[first + 1][0] == "number" or lexemes[first + 1][1] == "("
        return is_its_own and before in _BEFORE_SIGNED
    if before not in _BEFORE_SIGNED and (
        before in _UNREAD or unicodedata.category(before) in _UNREAD_KINDS
    ):
        return False
    digit = lexemes[first][1][0] in ".0123456789"
    if touches and digit and before.isalpha():
        return False  # The digits of x2 and 5e3 are no numbers of their own.
    # The same holds for the second number of 3:30 and of 1,23.
    return not (touches and start > 1 and lexemes[start - 2][0] == "number")


def _parse(lexemes: list[str]) -> Number | None:
    """Returns the value of an expression given as texts of lexemes; None if it has no value."""
    lexemes = [_OPERATORS.get(lexeme, lexeme) for lexeme in lexemes]
    if not lexemes or len(lexemes) > _MAX_LEXEMES:
        return None
    try:
        value, end = _sum(lexemes, 0, 0)
    except (_NoExpression, ZeroDivisionError):
        return None
    return value if end == len(lexemes) else None


class _NoExpression(Exception):
    """Raised when the lexemes are no arithmetic expression."""


# The grammar's rules. Each function parses from index `at` and returns the value with the index of
# the first lexeme after it; `depth` counts nested parentheses and signs.


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
        # 8(26) is a product without a times sign.
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
