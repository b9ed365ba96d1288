"""Which experts are on the device, and getting them there.

May use moe_serve_kernels and predictors; knows nothing of requests, HTTP or whole models.
"""
