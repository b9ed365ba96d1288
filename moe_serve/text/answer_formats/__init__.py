"""Answer formats by name: each file here exports `FORMAT`.

A package from outside offers one as an entry point of the group "moe_serve.answer_formats".
"""

from __future__ import annotations

from moe_serve_base.extensions import Extensions

FORMATS = Extensions(
    "answer format",
    __name__,
    __path__,
    symbol="FORMAT",
    group="moe_serve.answer_formats",
    attributes=("template", "marks", "without", "tool_parsers", "reasoning_parsers"),
)
