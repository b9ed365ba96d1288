"""Experts brought ahead of time: who advises, and the audit of whether it pays."""
