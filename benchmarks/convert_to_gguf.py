"""llama.cpp's own converter, told how the tokenizer cuts text.

    python benchmarks/convert_to_gguf.py TREE PRE FOLDER --outtype bf16 --outfile model.gguf

The converter knows a tokenizer by a hash of what it makes of one text, so it refuses those of random and of tiny
checkpoints. PRE is the name that it would have found (`smollm`, `qwen2`, `gpt-2`), and says that the vocabulary is of
bytes; `auto` leaves both to the converter.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    tree, pre = Path(sys.argv[1]), sys.argv[2]
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    if pre != "auto":
        from conversion.base import TextModel  # type: ignore[import-not-found]

        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
        TextModel._set_vocab_sentencepiece = TextModel._set_vocab_llama_hf = TextModel._set_vocab_gpt2
    script = tree / "convert_hf_to_gguf.py"
    sys.argv = [str(script), *sys.argv[3:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
