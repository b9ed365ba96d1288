"""The operations of a Mixture-of-Experts layer, each beside the reference it must match.

torch and triton only; knows nothing of models, caches or requests. The folder above this package
is deliberately no package: an importable `kernels` breaks transformers.
"""
