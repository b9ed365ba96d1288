"""The embedded demo model: the script that trained it, its data recipe and its evaluation."""
