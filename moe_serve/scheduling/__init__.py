"""Which tokens every step computes: requests, sequences, pages and plans, as host integers.

Knows no torch, no tokenizer, no HTTP, and nothing of what a plan's tokens become.
"""
