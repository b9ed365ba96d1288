"""What every package above the kernels may use: extensions found by name, files read with care and written whole.

Standard library and numpy only. Knows no experts, no models and no settings.
"""
