"""Small numbers in English words, as SmolVLM's prompts write the number of a clip's frames."""

from __future__ import annotations

__all__ = ["spell"]

_SMALL = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_SMALL += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spell(number: int) -> str:
    """Write a number from 0 to 999,999 in words.

    >>> spell(8), spell(64), spell(120), spell(1024)
    ('eight', 'sixty-four', 'one hundred and twenty', 'one thousand and twenty-four')
    """
    if number < 20:
        return _SMALL[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_SMALL[number % 10]}" if number % 10 else "")
    if number < 1000:
        hundreds = f"{_SMALL[number // 100]} hundred"
        return hundreds + (f" and {spell(number % 100)}" if number % 100 else "")
    thousands, rest = f"{spell(number // 1000)} thousand", number % 1000
    return thousands + (f"{' and ' if rest < 100 else ', '}{spell(rest)}" if rest else "")
