"""Cached prefixes on disk: pages and saved states of finished turns, which survive a restart.

`files` and `folder` know bytes and file names; `tensors` knows where a page lies; `tier` runs the threads between them.
"""
