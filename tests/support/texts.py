"""Any text, for tests with random input."""

from __future__ import annotations

from hypothesis import strategies as st

_CODE_POINTS = st.integers(0, 0x2FF) | st.integers(0, 0xD7FF) | st.integers(0xE000, 0x10FFFF)
#: Any characters of Unicode. `st.text()` would first make a table of all of them, for a second.
any_text = st.text(_CODE_POINTS.map(chr))
