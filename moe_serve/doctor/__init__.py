"""What `moe-serve doctor` finds out: measured rates, what fits, what is missing. Prints nothing."""
