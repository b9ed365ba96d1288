"""MiniMax-M2: one block of invocations."""

from __future__ import annotations

from moe_serve.text.answer_format import NAMED_CALL, PLAIN, THINKING, AnswerFormat, passed_over

FORMAT = AnswerFormat(
    marks=("<minimax:tool_call>",),
    tool_parsers=("minimax_m2",),
    reasoning_parsers=("minimax_m2", "minimax_m2_append_think"),
    template={
        "start_anchor": "]~b]ai\n",
        "fields": {
            "reasoning_content": THINKING,
            "tool_calls": {
                "open_pattern": r'\s*(?:<minimax:tool_call>\s*)?<invoke name="(?P<name>[^"]+)">',
                "close": "</invoke>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {"tag_pattern": r'<parameter name="(?P<key>[^"]+)">(?P<value>.*?)</parameter>'},
                "transform": NAMED_CALL,
            },
            "calls_end": passed_over("</minimax:tool_call>"),
            "content": PLAIN,
        },
    },
)
