"""Composites: checkpoints whose text model lies beside towers for images or sound. Only the text model is served.

Its config is the field `text_config`, its tensors carry a prefix, and the towers' tensors are not read. Knows names;
knows no tensors and loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

CARRIED = ("quantization_config", "tie_word_embeddings")
"""Of the whole checkpoint, and said outside of text_config."""
TEXT_PREFIXES = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.": "",
    r"^thinker\.model\.": "model.",
    r"^thinker\.lm_head\.": "lm_head.",
}
"""How composites name their text model's tensors -> how the text model itself names them."""
HOLDS_TEXT = ("text_config", "thinker_config")
"""Fields of config.json in which a text model's config lies."""
OTHER_TOWERS = re.compile(
    r"^(?:talker|code2wav)\.|^(?:model\.|thinker\.)?"
    r"(?:visual|vision_\w+|audio_\w+|sound_\w+|embed_vision|embed_audio|multi_modal_projector|mm_\w+)\."
)
"""Tensors of what is not served."""


def text_config_of(config: Any) -> Any:
    """The text model's config, with what only the composite's says of it; a text model's own config as it is."""
    text = config.get_text_config()
    if text is config:
        return config
    for name in CARRIED:
        if hasattr(config, name):
            setattr(text, name, getattr(config, name))
    if getattr(text, "dtype", None) is None:
        text.dtype = config.dtype
    return text


def key_mapping(names: Iterable[str]) -> dict[str, str]:
    """The renaming that leads from the files' `names` to the text model's; empty where they are those."""
    found = list(names)
    return {p: to for p, to in TEXT_PREFIXES.items() if any(re.search(p, name) for name in found)}


def towers_in(names: Iterable[str]) -> dict[str, int]:
    """The towers that are left out, and how many tensors each has."""
    found: dict[str, int] = {}
    for name in names:
        if match := OTHER_TOWERS.search(name):
            tower = match[0].removeprefix("model.").removeprefix("thinker.").rstrip(".")
            found[tower] = found.get(tower, 0) + 1
    return found
