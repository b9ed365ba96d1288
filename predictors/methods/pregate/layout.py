"""What the trained router and its training agree on."""

WIDTH = 128
SHORT = 0
"""Of context.RATES: the average that goes in with the routes. All go straight to their own experts as well."""
NAMES = ("routes", "averages", "out", "bias", "habit", "token", "last_token")
