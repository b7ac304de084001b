"""Compare the settings of an unfinished run with those of the run that wants to continue it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["settings_diff"]


def settings_diff(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Write one line for each setting that differs; the empty text if all are equal.

    Args:
        was: settings of the unfinished run, read from a JSON file.
        now: settings of this run; a tuple equals the list that JSON makes of it.

    >>> print(settings_diff({"--seed": 0, "--fast": True}, {"--seed": 7, "--fast": True}))
      --seed: was 0, is 7
    """
    now = json.loads(json.dumps(now))
    differ = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    return "\n".join(f"  {key}: was {was.get(key)!r}, is {now.get(key)!r}" for key in differ)
