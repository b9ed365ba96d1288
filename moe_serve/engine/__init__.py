"""Plan, run, apply: the loop over scheduler and model, its worker thread, and the numbers it reports.

Knows one model in one process: no ranks (moe_serve/parallel/), no HTTP.
"""
