"""What a step is on the device: a plan as tensors, the KV cache, captured graphs, grammar masks, sampled tokens.

Knows no models and no queues.
"""
