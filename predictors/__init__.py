"""Guessing which experts the next layers and tokens will use, and scoring the guesses.

numpy only, torch in learned methods; knows neither caches nor models.
"""
