"""KVConfig: the memory for keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, option

HEADING = "KV pages and batching"


@dataclass(frozen=True)
class KVConfig(Settings):
    """How keys and values are kept: pages of equal size, shared between equal prefixes."""

    HEADING: ClassVar[str] = HEADING

    page_size: int = option(16, "Tokens in one KV page.", bound="positive", aliases=("block_size",))
    cache_mib: int | None = option(
        None,
        "Memory for KV pages, in MiB. Default: room for --max-num-seqs full sequences, at most 25 % of free memory.",
        bound="positive",
        flat="kv_cache_mib",
    )
    num_pages: int | None = option(
        None,
        "Number of KV pages; overrides --kv-cache-mib.",
        bound="positive",
        flat="num_kv_pages",
        aliases=("num_gpu_blocks_override",),
    )
    enable_prefix_caching: bool = option(True, "Share the KV pages of equal prompt prefixes between requests.")
