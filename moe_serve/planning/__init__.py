"""From recordings to placements of experts over devices: what the `plan` commands and a live server share.

The solvers are in placement/. Knows no models and no ranks, and prints nothing.
"""

KINDS = "a trace of ours (.npz), an SGLang per-token recording (.pt), or vLLM routed_experts (.npy, .npz)"
"""Files that `recordings.read_routes` reads, for help texts."""
