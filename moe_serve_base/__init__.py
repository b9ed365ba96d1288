"""What every package above the kernels may use: extensions found by name, and files written whole.

Standard library only. Knows no experts, no models and no settings.
"""
