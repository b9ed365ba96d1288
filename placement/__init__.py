"""Where experts live across devices: arrays in, a plan with its proven bound out.

numpy and a solver only: no torch, and none of the other packages.
"""
