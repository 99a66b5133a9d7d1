r"""Numbers as people and models write them, exactly: 1,200 · -$3.50 · 3/4 · \frac{3}{4} · 1 1/2 · 1{,}000 · 1e-05, as fractions.

An answer is what follows "####" (GSM8K), else what the last \boxed{…} holds, else the last number of the text. What is more than
one plain number or fraction (3\sqrt{2}, x^2, 48 + 24, a pair) has no value: it is never read as one of its digits.
"""

import re
from fractions import Fraction
from typing import Any, NamedTuple

_SIGN = r"[-\u2212\u2013]"  # hyphen, minus sign, en dash
_CURRENCY = r"(?:\\?\$|[€£¥₹₩₽]|(?<![A-Za-z])(?:Rs|INR|USD|EUR|GBP|CNY|RMB|JPY)\.?\ ?)"
_GROUP = r"(?:,|\{,\}|\\[,!]|[\u00a0\u2009\u202f])"  # stands between thousands
_EXPONENT = r"(?:[eE][-+]?\d{1,3}+(?![A-Za-z\d]))?+"  # three digits: nobody computes 1e999999999
_DECIMAL = rf"(?:(?:\d{{1,3}}+(?:{_GROUP}\d{{3}}(?!\d))++|\d++)(?:\.\d++)?+|(?<![\w.])\.\d++){_EXPONENT}"
# A sign counts only where it cannot be a subtraction; digits after a letter or a decimal point begin no number. Quantifiers are
# possessive: no text takes more than linear time.
_NUMBER = re.compile(
    rf"""(?:(?<![A-Za-z0-9.)\]}}])(?P<sign>{_SIGN}))?
    (?:{_CURRENCY}(?P<second_sign>{_SIGN})?|(?<![A-Za-z0-9])(?<!\d\.))
    (?:(?P<whole>\d++)(?:\\?\ (?=\d++/\d|\\[dtc]?frac)|(?=\\[dtc]?frac)))?
    (?:\\[dtc]?frac\s*+(?:\{{\s*+(?P<top>-?\d++)\s*+\}}\s*+\{{\s*+(?P<bottom>-?\d++)\s*+\}}|(?P<top_digit>\d)\s?(?P<bottom_digit>\d))
    |(?P<number>{_DECIMAL})(?:(?<!\d/)\ ?/\ ?(?P<divisor>{_DECIMAL})(?!\d|\ ?/\ ?\d))?)""",
    re.VERBOSE,
)
_MARK = re.compile(r"#{4,}+")
_BOX = re.compile(r"\\f?boxed\s*+\{")
# What may stand between the mark and the number, and (in the data's own column) after it.
_BEFORE = re.compile(
    r"(?:[\s*_`~\"'(\[{|:=+≈]|\$(?![-\d.])|\\[(\[,! ]|\\(?:text\w*|math\w+|f?boxed|displaystyle|left|approx)\s*+\{?)*+"
)
_VARIABLE = re.compile(r"[A-Za-z]\w?\s?=\s*+")
_AFTER = re.compile(r"(?:[\s*_`~\"')\]}|.$%°]|\\[)\]%$,! ]|\^\{?\\circ\}?|\\right)*+")
_HEADING = re.compile(r"[^\W\d_]{2}")
_MATHS = re.compile(r"[\\^√π]")
# After a number, these make it a part of something larger: a power, a root, a variable, a calculation, a list, a time, thousands.
_GOES_ON = re.compile(
    r"""\s*+(?:\^(?!\{?\s?\\circ)|[√π]|pi\b|\\(?!text|math|mbox|q?quad|circ|degree|end|right|f?boxed)[A-Za-z]
        |(?:[-+/×÷·\u2212\u2013]|\*(?!\*))\s*+(?:[\d.\\({$√π]|[b-zB-HJ-Z](?![A-Za-z]))
        |\*\*\d|\d|[xyz](?![A-Za-z]))
    |[,.:]\d|[\u00b9\u00b2\u00b3\u2070-\u2079\u00bc-\u00be\u2150-\u215e]|(?![mgshlLCFW])[A-Za-z](?![A-Za-z])""",
    re.VERBOSE,
)
# Before a number in running text, the same; and (skipped) the exponent of a unit, m^2, or a subscript, x_1.
_PART_BEFORE = re.compile(r"(?:\^\{?-?|\}\s?\{|\\[dtc]?frac\{?|\\sqrt\s?(?:\[\w{0,3}\])?\s?\{?|√|[\w)}\]]\s?/\s?)$")
_SKIPPED = re.compile(r"[A-Za-z}](?:\^\{?-?|_\{?)$")
_MORE = re.compile(r"(?<!\^)(?<!\^\{)\d|(?<=\d)!")
# Thousands in another style, of which the last groups alone look like a number: 1 000, 1,00,000, 1.000,50.
_GROUPS_BEFORE = re.compile(r"(?<!\d)\d{1,3}\ (?=\d{3}(?!\d))|\d,(?=\d+,\d)|\.\d{3},(?=\d)")


class Reading(NamedTuple):
    """What a text answers."""

    value: Fraction | None  # None: no number, or not one plain number
    marked: bool  # it follows "####"


def read(text: str) -> Reading:
    """The answer of a text: after the last "####" that an answer follows, else in the last box, else the last number."""
    marked = _after_mark(text)
    if marked is not None:
        return Reading(_leading(marked), True)
    boxed = _in_box(text)
    if boxed is not None:
        return Reading(_leading(boxed, alone=True), False)
    return Reading(_last(text), False)


def final_number(text: str) -> Fraction | None:
    """The value of a text's answer; None where there is none, or where it is not one plain number."""
    return read(text).value


def sole_number(value: Any) -> Fraction | None:
    """The number that a data row's column holds, alone or after "####" or in a box; None where it holds anything else."""
    if value is None or isinstance(value, bool):
        return None
    text = str(value)
    part = next((found for found in (_after_mark(text), _in_box(text)) if found is not None), text).strip()
    found = _NUMBER.match(part, _begin(part))
    return _value(found) if found and _AFTER.fullmatch(part, found.end()) else None


def _after_mark(text: str) -> str | None:
    """The line after the last "####" that is no heading such as "#### Step 4: add" or "#### 4. Add"."""
    pieces = _MARK.split(text)
    more = False  # digits further down
    for piece in reversed(pieces[1:]):
        line, _, later = piece.lstrip().partition("\n")
        more = more or re.search(r"\d", later) is not None
        begin = _begin(line)
        found = _NUMBER.match(line, begin)
        if found is None:
            heading = _HEADING.match(line, begin) or not _MATHS.search(line)
        else:
            heading = more and re.match(r"\d{1,2}[.):]\s+\S", line[begin:])
        if not heading:
            return line
        more = more or re.search(r"\d", line) is not None
    return None


def _in_box(text: str) -> str | None:
    """What the last box holds; "" where it is not closed."""
    begin = max((found.end() for found in _BOX.finditer(text)), default=None)
    if begin is None:
        return None
    depth = 1
    for brace in re.finditer(r"(?<!\\)[{}]", text[begin:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[begin : begin + brace.start()]
    return ""


def _begin(line: str) -> int:
    """Where the number of an answer should stand: after signs that have no meaning, and "x ="."""
    at = _BEFORE.match(line).end()  # pyright: ignore[reportOptionalMemberAccess]  (matches nothing, too)
    variable = _VARIABLE.match(line, at)
    return at if variable is None else variable.end()


def _leading(line: str, *, alone: bool = False) -> Fraction | None:
    """The number that an answer begins with; `alone`: no other may follow."""
    found = _NUMBER.match(line, _begin(line))
    if found is None or _GOES_ON.match(line, found.end()) or (alone and _MORE.search(line, found.end())):
        return None
    return _value(found)


def _last(text: str) -> Fraction | None:
    for found in reversed(list(_NUMBER.finditer(text))):
        before = text[max(0, found.start() - 16) : found.start()]
        if any(groups.end() == found.start() for groups in _GROUPS_BEFORE.finditer(text, max(0, found.start() - 5))):
            return None
        if _SKIPPED.search(before):
            continue
        return None if _PART_BEFORE.search(before) or _GOES_ON.match(text, found.end()) else _value(found)
    return None


def _value(found: re.Match[str]) -> Fraction | None:
    parts = found.groupdict()
    top, bottom = parts["top"] or parts["top_digit"], parts["bottom"] or parts["bottom_digit"]
    try:
        value = Fraction(int(top), int(bottom)) if top else _decimal(parts["number"]) / _decimal(parts["divisor"] or "1")
        value += int(parts["whole"] or 0)
    except (ValueError, ZeroDivisionError):  # more digits than Python reads, 4300; a denominator of 0
        return None
    return -value if bool(parts["sign"]) != bool(parts["second_sign"]) else value


def _decimal(text: str) -> Fraction:
    return Fraction(re.sub(_GROUP, "", text))
