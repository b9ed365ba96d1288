"""Reading a Hugging Face checkpoint folder: its files, and its expert tensors as mmapped views.

Errors name the file and the tensor. Knows no model code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from expert_cache.storage import dense_codes, expert_file
from expert_cache.storage.dense_codes import DenseCodes
from expert_cache.storage.encoding import Encoding
from expert_cache.storage.expert_file import DTYPE_NAMES
from expert_cache.storage.safetensors_file import stored_tensors
from expert_cache.storage.store import ExpertStore, FusedLayout, StoredTensor, part_name
from moe_serve.config.model_folder import refuse_foreign_weights
from moe_serve.errors import CheckpointError
from moe_serve.gguf_files.folder import listing_in
from moe_serve.hf.composites import OTHER_TOWERS
from moe_serve.hf.config_file import read_config, scheme_in
from moe_serve.hf.contradictions import refuse_zero_points, settled_experts
from moe_serve.hf.expert_checks import Parts, check_present, check_shapes, is_transposed
from moe_serve.hf.family import FURTHER, PART_OF, Family, family_of
from moe_serve.hf.gguf_tensors import expert_tensors
from moe_serve.hf.leftovers import refuse_codes, refuse_unused_experts
from moe_serve.hf.scheme import Scheme
from moe_serve.hf.shard_index import INDEX, read_index, refuse_false_index
from moe_serve.hf.size_guard import refuse_missing_layers
from moe_serve.spec import ModelSpec

BESIDE = ("consolidated", "adapter_")
"""Files of other layouts, which some folders hold beside the checkpoint."""


def weight_files(folder: str) -> list[Path]:
    """The files that hold the checkpoint's tensors, all present; CheckpointError names a missing one."""
    listing = listing_in(folder)
    return safetensors_files(folder) if listing is None else list(listing.files)


def safetensors_files(folder: str) -> list[Path]:
    """The checkpoint's files, all present; CheckpointError names a missing shard."""
    path = Path(folder)
    weight_map = read_index(folder)
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
    else:
        found = sorted(p.name for p in path.glob("*.safetensors"))
        names = [name for name in found if not name.startswith(BESIDE)]
    if not names:
        refuse_foreign_weights(path)
        raise CheckpointError(f"{folder}: no *.safetensors file; convert the checkpoint with save_pretrained")
    for name in names:
        if not (path / name).is_file():
            raise CheckpointError(f"{folder}/{name}: this shard is listed in {INDEX} but missing")
    return [path / name for name in names]


def open_experts(
    folder: str, family: Family, layers: list[int], spec: ModelSpec, scheme: Scheme | None = None
) -> ExpertStore:
    """Map every expert tensor of the checkpoint; nothing is read yet.

    `layers`: the decoder layers that must have experts. CheckpointError names what is missing.
    """
    tensors: dict[int, Parts] = {layer: {} for layer in layers}
    listing = listing_in(folder)
    found = _all_expert_tensors(folder, family, scheme) if listing is None else expert_tensors(listing, family.has_gate)
    for layer, part, expert, tensor in found:
        tensors.setdefault(layer, {})[part, expert] = tensor
        if scheme is None and listing is None and layer in layers:
            dtype = DTYPE_NAMES.get(tensor.tensor.dtype, str(tensor.tensor.dtype))
            refuse_codes(tensor.file, [(tensor.name, dtype)])
    tensors = {layer: tensors[layer] for layer in layers}
    for layer, parts in tensors.items():
        refuse_unused_experts(folder, layer, (expert for _, expert in parts), spec.num_experts)
        for expert in range(spec.num_experts):
            check_present(f"{folder}: layer {layer} expert {expert}", expert, parts)
    if scheme is not None:
        refuse_zero_points(_named(folder, scheme.all_zero), scheme)
        tensors = settled_experts(folder, tensors, scheme)
    scaled = any(part.endswith("_scale") for part, _ in tensors[layers[0]])
    codes = next(stored for (part, _), stored in tensors[layers[0]].items() if part == "down")
    encoding = _encoding_of(codes, scheme) if scheme is not None and scaled else None
    # Quantised fused tensors hold rows as they are multiplied, whatever the family does with floats; so do GGUF files.
    transposed = encoding is None and listing is None and is_transposed(family, tensors[layers[0]], spec)
    fused = FusedLayout(transposed=transposed, interleaved=family.interleaved and listing is None)
    shape = (spec.expert_intermediate_size, spec.expert_hidden_size)
    store = ExpertStore(tensors, spec.num_experts, fused, encoding=encoding, shape=shape)
    check_shapes(folder, store, spec)
    return store


def _encoding_of(codes: StoredTensor, scheme: Scheme) -> Encoding:
    name, _ = scheme.split(codes.name) or (codes.name, "codes")
    return scheme.encoding_of(codes.tensor.dtype, name)


def dense_dtypes(folder: str, family: Family, quantized: bool = False) -> set[str]:
    """The stored dtypes of everything but experts, in safetensors' words, such as {"BF16"}.

    CheckpointError where a matrix holds codes and the checkpoint is not `quantized`.
    Opens every file, so that a damaged one is reported by name before anything is loaded.
    """
    found = set()
    for file in safetensors_files(folder):
        with _opened(file) as handle:
            names: list[str] = handle.keys()
            dense = {name: handle.get_slice(name).get_dtype() for name in names if _is_dense(name, family)}
            if not quantized:
                refuse_codes(file, dense.items())
            found |= set(dense.values())
    return found


def _is_dense(name: str, family: Family) -> bool:
    return family.match(name) is None and not _is_left_out(name)


def _is_left_out(name: str) -> bool:
    """A tensor of another tower or of a further layer."""
    return OTHER_TOWERS.search(name) is not None or FURTHER.search(name) is not None


def tensor_names(folder: str) -> list[str]:
    """Every tensor of the checkpoint, as its files name it."""
    if (listing := listing_in(folder)) is not None:
        return list(listing.tensors)
    names: list[str] = []
    for file in safetensors_files(folder):
        with _opened(file) as handle:
            names += handle.keys()
    return names


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: truncated or not a safetensors file ({error})")


def _all_expert_tensors(
    folder: str, family: Family, scheme: Scheme | None
) -> Iterator[tuple[int, str, int | None, StoredTensor]]:
    # disable=None: no bar where stderr is no terminal
    for file in tqdm(safetensors_files(folder), desc="Mapping experts", unit="file", disable=None):
        yield from _expert_tensors(file, family, scheme)


def _expert_tensors(
    file: Path, family: Family, scheme: Scheme | None
) -> Iterator[tuple[int, str, int | None, StoredTensor]]:
    try:
        for stored in stored_tensors(file, lambda name: _expert_part(name, family, scheme) is not None):
            found = _expert_part(stored.name, family, scheme)
            assert found
            yield *found, stored
            layer, part, expert = found
            if not family.has_gate and part.startswith("up"):  # act(up) * up: see Family.has_gate
                yield layer, "gate" + part.removeprefix("up"), expert, stored
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _expert_part(name: str, family: Family, scheme: Scheme | None) -> tuple[int, str, int | None] | None:
    """(layer, part, expert) of an expert tensor's name, None of another's."""
    base, role = (scheme.split(name) if scheme else None) or (name, "codes")
    match = family.match(base)
    if match is None:
        return None
    groups = match.groupdict()
    expert = int(groups["expert"]) if groups.get("expert") else None
    return int(groups["layer"]), part_name(PART_OF[groups["part"]], role), expert


def has_usual_names(folder: str) -> bool:
    """Whether transformers finds the files by itself."""
    return any((Path(folder) / name).is_file() for name in (INDEX, "model.safetensors"))


def dense_tensors(folder: str, family: Family, scheme: Scheme | None) -> Iterator[StoredTensor]:
    """Every tensor that is no expert's, no other tower's and no further layer's."""
    for file in safetensors_files(folder):
        try:
            yield from stored_tensors(file, lambda name: not _is_foreign(name, family, scheme))
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(file, error) from error


def _named(folder: str, end: str) -> Iterator[StoredTensor]:
    """Every tensor with that end of its name; none for no end."""
    for file in safetensors_files(folder) if end else ():
        yield from stored_tensors(file, lambda name: name.endswith(end))


def _is_foreign(name: str, family: Family, scheme: Scheme | None) -> bool:
    """An expert's tensor, also one that we do not use, or one that is left out."""
    if scheme is None or _is_left_out(name):
        return not _is_dense(name, family)
    bases = (name.removesuffix(suffix) + scheme.stem for suffix in scheme.unused if name.endswith(suffix))
    return any(_expert_part(base, family, scheme) is not None for base in (name, *bases))


def open_all_experts(folder: str) -> ExpertStore:
    """Map the experts of whichever of the model's layers have any, without loading a model.

    Layers behind those of config.json predict several tokens at once (MTP); they are not run here.
    """
    config = read_config(folder)
    spec = ModelSpec.from_hf(config)
    family, scheme = family_of(config), scheme_in(folder, config)
    refuse_false_index(folder)
    refuse_missing_layers(folder, tensor_names(folder), spec.num_layers)
    found = _layers_with_experts(folder, family, scheme)
    if not found:
        raise CheckpointError(f"{folder}: no expert tensor in the *.safetensors files")
    layers = sorted(layer for layer in found if layer < spec.num_layers)
    return open_experts(folder, family, layers, spec, scheme)


def _layers_with_experts(folder: str, family: Family, scheme: Scheme | None) -> set[int]:
    if (listing := listing_in(folder)) is not None:
        return {layer for layer, *_ in expert_tensors(listing, family.has_gate)}
    found: set[int] = set()
    for file in safetensors_files(folder):
        with _opened(file) as handle:
            found |= {part[0] for name in handle.keys() if (part := _expert_part(name, family, scheme))}  # noqa: SIM118
    return found


def open_expert_file(path: str, folder: str, layers: list[int], spec: ModelSpec) -> ExpertStore:
    """The experts from a file that `moe-serve pack` made of this checkpoint; CheckpointError if it is another's."""
    try:
        store, source = expert_file.read(Path(path))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"--moe-expert-file {path}: {error}") from error
    if source != checkpoint_fingerprint(folder):
        raise CheckpointError(
            f"--moe-expert-file {path} was not made from the checkpoint in {folder}, or that has changed since;"
            " make it again with `moe-serve pack`"
        )
    if store.decoder_layers != tuple(layers) or store.num_experts != spec.num_experts:
        raise CheckpointError(f"--moe-expert-file {path} does not hold the experts that {folder}/config.json asks for")
    check_shapes(path, store, spec)
    return store


def dense_codes_in(path: str, is_checked: bool = True) -> DenseCodes:
    """Dense weights in 12-bit codes of an expert file that `open_expert_file` took; CheckpointError: it is damaged.

    `is_checked`: all are read, and compared with their checksums.
    """
    try:
        found = dense_codes.read(Path(path))
        if is_checked:
            dense_codes.refuse_damage(Path(path), found)
        return found
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"--moe-expert-file {path}: {error}") from error


def checkpoint_fingerprint(folder: str) -> str:
    """Identifies the checkpoint in expert files made from it."""
    listing = listing_in(folder)
    return expert_file.fingerprint(safetensors_files(folder)) if listing is None else listing.fingerprint
