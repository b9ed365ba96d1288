"""From text to token ids and back: tokenizers, chat templates, and what a checkpoint says about its answers.

Knows no model and no step.
"""
