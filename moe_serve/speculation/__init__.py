"""Guesses of next tokens, checked several at a time, as long as that is faster."""
