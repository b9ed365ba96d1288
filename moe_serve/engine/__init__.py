"""Plan, run, apply: the loop over the scheduler and the model runner, and the thread that it runs on.

Knows one model in one process: no ranks (moe_serve/parallel/), no HTTP.
"""
