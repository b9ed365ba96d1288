"""Writing quantised checkpoints: what to round, to which codes, and what calibration saw. moe_serve/hf/ reads them."""
