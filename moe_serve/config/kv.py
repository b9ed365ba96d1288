"""KVConfig: the memory for keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moe_serve.config.settings import Settings, changed_settings, option
from moe_serve.errors import ConfigError

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
    prefix_cache_dir: str | None = option(
        None,
        "Folder for cached prefixes on disk: pages and states of finished requests are written there and loaded after a"
        " restart. Made if it does not exist. Default: prefixes are cached in memory alone.",
        metavar="FOLDER",
    )
    prefix_cache_disk_mib: int = option(
        16384,
        "Most bytes in --prefix-cache-dir, of all models, in MiB; the least recently used go first.",
        bound="positive",
    )
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

    def check(self) -> None:
        if self.prefix_cache_dir is not None and not self.enable_prefix_caching:
            raise ConfigError("--prefix-cache-dir keeps cached prefixes; it cannot go with --no-enable-prefix-caching")

    def no_effect(self) -> str | None:
        if self.prefix_cache_dir is None and "prefix_cache_disk_mib" in changed_settings(self):
            return "--prefix-cache-disk-mib has no effect without --prefix-cache-dir"
        return None
