"""KVConfig: the memory for keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, option

HEADING = "KV pages and batching"


@dataclass(frozen=True)
class KVConfig(Settings):
    """How keys and values are kept, and states of recurrent layers: in pages of equal size and rows of equal size, both
    shared between equal prefixes."""

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
    state_block_size: int | None = option(
        None,
        "Models with recurrent layers: prompts are computed in blocks of this many tokens, and a prefix can be shared"
        " up to the end of a block. A multiple of --page-size. Default: 256, or as many as --max-num-batched-tokens"
        " allows.",
        bound="positive",
        aliases=("mamba_block_size",),
    )
    state_cache_mib: int | None = option(
        None,
        "Memory for states of recurrent layers kept for later prompts, in MiB. 0: none. Default: two for each of"
        " --max-num-seqs, at most 10 % of free memory.",
        bound="not negative",
    )
    num_saved_states: int | None = option(
        None, "Number of states kept for later prompts; overrides --state-cache-mib.", bound="not negative"
    )
