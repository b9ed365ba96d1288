"""Prediction methods, one file each."""
