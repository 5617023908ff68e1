"""Any text, made fit to stand in a page: nothing in it can act, and nothing in it hides."""

from __future__ import annotations

import json
import re
from typing import Any

# C0 controls but tab and line feed, DEL, C1; what turns the direction of other text; lone
# surrogates; and code points that HTML does not allow.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_IN_SCRIPT = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def visible(text: str) -> str:
    r"""`text` with what is invisible or steers made visible: NUL is ␀, others `[U+202E]`.

    Line ends become line feeds. Right-to-left letters stay: the page isolates them.

    >>> visible("a\x00b\u202ec")
    'a␀b[U+202E]c'
    """
    return _UNFIT.sub(_picture, text.replace("\r\n", "\n").replace("\r", "\n"))


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"[U+{code:04X}]"


def as_script(value: Any) -> str:
    """JSON that may stand between `<script type="application/json">` and its end.

    No `<` is left, so no text in it can end the element or begin a comment.
    Raises:
        ValueError: NaN or an infinity.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_IN_SCRIPT)
