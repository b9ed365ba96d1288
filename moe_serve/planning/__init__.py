"""From recordings to placements of experts over devices: what the `plan` commands and a live server share.

The solvers are in placement/. Knows no models and no ranks, and prints nothing.
"""
