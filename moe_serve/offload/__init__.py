"""From settings and machine to expert layers: where experts are kept, computed and read from, in how much memory.

The parts themselves are in expert_cache/. Knows no tokens, no requests and no HTTP.
"""
