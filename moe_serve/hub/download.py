"""Downloading a checkpoint from the Hugging Face Hub into its cache, by huggingface_hub: only what is needed.

The family and the room on the disk are checked before the first weights come. A download that was cut off goes on where
it ended. Knows no tensors.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_serve.config.model_folder import CONFIG, cache_folder
from moe_serve.errors import ConfigError
from moe_serve.gguf_files.paths import SUFFIX
from moe_serve.hub.wanted import wanted_files

log = logging.getLogger(__name__)

MAIN = "main"
DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 20.0
GB = 1e9
CheckConfig = Callable[[Mapping[str, Any]], object]
"""Raises ConfigError for the fields of a config.json that cannot be served."""


class Repository:
    """One model on a hub, at one revision."""

    def __init__(self, model_id: str, revision: str | None, environment: Mapping[str, str]) -> None:
        from huggingface_hub import HfApi

        self.model_id, self.revision = model_id, revision or MAIN
        self._endpoint = environment.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
        self._cache = cache_folder(environment)
        self._token = environment.get("HF_TOKEN") or None
        self._api = HfApi(endpoint=self._endpoint, token=self._token)

    def download(self, variant: str | None, check: CheckConfig) -> Path:
        """The snapshot's folder, or the first GGUF file in it. `variant`: which of several GGUF files, such as Q4_K_M.

        ConfigError says what to do: no network, a gated model, no such model or revision, no room.
        """
        _hide_bars_in_logs()
        try:
            return self._download(variant, check)
        except ConfigError:
            raise
        except Exception as error:  # huggingface_hub lets those of its HTTP library through
            raise self._explained(error) from error

    @property
    def files_url(self) -> str:
        """Each file's URL is this, a slash and its name."""
        return f"{self._endpoint}/{self.model_id}/resolve/{self.revision}"

    @property
    def headers(self) -> dict[str, str]:
        """Of requests for files."""
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def names(self, variant: str | None) -> list[str]:
        """The files that a download would bring. Argument and errors as in `download`."""
        try:
            return wanted_files(self.model_id, self._listing()[0], variant)
        except ConfigError:
            raise
        except Exception as error:  # huggingface_hub lets those of its HTTP library through
            raise self._explained(error) from error

    def _listing(self) -> tuple[dict[str, int], str | None]:
        """(bytes of every file by name, the commit)."""
        info = self._api.model_info(self.model_id, revision=self.revision, files_metadata=True, timeout=TIMEOUT_S)
        return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}, info.sha

    def _download(self, variant: str | None, check: CheckConfig) -> Path:
        sizes, commit = self._listing()
        names = wanted_files(self.model_id, sizes, variant)
        if CONFIG in names:
            check(json.loads((self._snapshot([CONFIG]) / CONFIG).read_text(encoding="utf-8")))
        self._check_room({name: sizes[name] for name in names}, commit)
        folder = self._snapshot(names)
        return folder / names[0] if names[0].endswith(SUFFIX) else folder

    def _snapshot(self, names: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self.model_id,
                revision=self.revision,
                cache_dir=self._cache,
                token=self._token,
                endpoint=self._endpoint,
                allow_patterns=list(names),
            )
        )

    def _check_room(self, sizes: Mapping[str, int], commit: str | None) -> None:
        from huggingface_hub import try_to_load_from_cache

        def is_here(name: str) -> bool:
            return isinstance(try_to_load_from_cache(self.model_id, name, self._cache, commit), str)

        missing = {name: size for name, size in sizes.items() if not is_here(name)}
        total = sum(missing.values())
        self._cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._cache).free
        if total > free:
            raise ConfigError(
                f"{self.model_id} takes {total / GB:.1f} GB, but only {free / GB:.1f} GB are free in {self._cache};"
                " HF_HUB_CACHE names another place"
            )
        if missing:
            log.info("downloading %d files of %s, %.1f GB, to %s", len(missing), self.model_id, total / GB, self._cache)

    def _explained(self, error: Exception) -> ConfigError:
        """What a user can do about an error of huggingface_hub's."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if isinstance(error, GatedRepoError):
            return ConfigError(
                f"{self.model_id} is gated: accept its terms at {self._endpoint}/{self.model_id}, and set HF_TOKEN"
            )
        if isinstance(error, RepositoryNotFoundError):
            return ConfigError(
                f"{self.model_id}: no such folder, and no such model at {self._endpoint}; a private one needs HF_TOKEN"
            )
        if isinstance(error, RevisionNotFoundError):
            return ConfigError(f"--revision: {self.model_id} has no revision {self.revision!r}")
        if isinstance(error, HfHubHTTPError):
            return ConfigError(f"{self.model_id}: {self._endpoint} answered: {_first_line(error)}")
        return ConfigError(
            f"{self.model_id}: no such folder, and it cannot be downloaded from {self._endpoint}: {_first_line(error)}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _hide_bars_in_logs() -> None:
    """huggingface_hub draws progress bars on stderr; in a log file each would be one long line."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
