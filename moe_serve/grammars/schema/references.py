"""`$ref`: found within a document, and spelled as a URI where a generator did not."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

FRAGMENT = "/?:@!$&'()*+,;=-._~"
"""What a URI's fragment may hold as it is, beside letters and digits."""
STRAY_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


class Missing:
    """Stands for what a pointer does not find."""


def resolve(document: Any, ref: str) -> Any:
    """What a reference within the document points at; Missing where it finds nothing, or leads elsewhere."""
    return _at(document, unquote(ref[1:])) if ref.startswith("#") else Missing


def repair(document: Any, ref: str) -> str:
    """A reference within the document as a URI has to spell it: `#/$defs/W[int]` becomes `#/$defs/W%5Bint%5D`."""
    if not ref.startswith("#"):
        return ref
    fragment = ref[1:]
    if _at(document, unquote(fragment)) is Missing and _at(document, fragment) is not Missing:
        return "#" + quote(fragment, safe=FRAGMENT)  # percent signs are part of the name
    return "#" + quote(STRAY_PERCENT.sub("%25", fragment), safe=FRAGMENT + "%")


def _at(document: Any, pointer: str) -> Any:
    if not pointer:
        return document
    if not pointer.startswith("/"):
        return Missing
    found = document
    for part in pointer[1:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return Missing
    return found
