"""CPU kernels in C++ behind a C interface, each with its torch reference beside the Python call."""
