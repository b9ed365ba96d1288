"""Where experts' bytes lie, and how they come: files, slots' memory, reading threads.

The names here are what other rooms of expert_cache use.
"""

from __future__ import annotations

from expert_cache.storage.arena import SlotArena
from expert_cache.storage.coded_records import record_layout, write_record
from expert_cache.storage.copy_stream import SlotOrder
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.encoding import Matrix
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.fetch import DEMAND, LATER, Fetch, Fetcher
from expert_cache.storage.moved_codes import codes_on
from expert_cache.storage.store import ExpertStore, ExpertWeights, Read, views_in

__all__ = [
    "DEMAND",
    "LATER",
    "DirectFile",
    "ExpertReadError",
    "ExpertStore",
    "ExpertWeights",
    "Fetch",
    "Fetcher",
    "Matrix",
    "Read",
    "SlotArena",
    "SlotOrder",
    "codes_on",
    "record_layout",
    "views_in",
    "write_record",
]
