"""Grammars: output that must be JSON of a schema, match a regular expression, or follow a Lark grammar.

`grammars.py` is the way in, `masks.py` computes the masks of a step. `compiler/` runs in processes of its own.
"""
