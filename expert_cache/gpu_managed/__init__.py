"""The cache that the GPU runs: slots, the pool in host memory, and the kernels' view of both."""
