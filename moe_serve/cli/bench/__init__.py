"""`moe-serve bench ...`: measurements, one file of this folder each."""

HELP = "Measure a running system."
