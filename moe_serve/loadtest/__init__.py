"""The load generator behind `moe-serve bench serve`. Knows HTTP; knows nothing of our server's code."""
