"""Reads T5X checkpoints: the native format (version 3), Orbax with a msgpack index, Orbax OCDBT.

In each format a checkpoint is a set of zarr arrays. The name of an array is its dotted path in the
training state, and the names of the model's parameters start with "target.". T5X does not store the
sizes of the model, so `read_config` infers the sizes from the shapes of the arrays.

T5X has two networks for a T5. The plain network (`examples/t5`) stores one array per layer. The
scanned network (`examples/scalable_t5`) stores one array with the layers stacked on axis 1, in
which heads and head dim are separate dimensions; gkd_jax fuses these two dimensions into one.
"""

from collections.abc import Iterable
import itertools
import os
import re
from typing import Any

from etils import epath
import numpy as np
import tensorstore as ts

from gkd_jax.convert import formats, msgpack_tree
from gkd_jax.convert.layout import Entry, Layout, Part, layer_by_layer, unchanged
from gkd_jax.convert.stored import Index, Stored, check, in_memory
from gkd_jax.models import lm, t5
from gkd_jax.models.parameters import flatten
from gkd_jax.text import files


_PLACEHOLDER = "PLACEHOLDER://"
_TARGET = "target."
_CACHE = 2**30  # Bytes of decompressed chunks to cache: all shards of a layer need the same chunks.
_LARGEST_INDEX = 2**31  # Bytes of a msgpack file. Public files have a few hundred kilobytes.


def read_config(path: str) -> t5.T5Config:
    """Returns the config of the model in a checkpoint, inferred from the shapes of its arrays.

    T5X does not store the activations either. A gated MLP (`wi_0`, `wi_1`) is assumed to have the
    activations of T5 1.1, ("gelu", "linear"), and any other MLP those of T5 1.0, ("relu",). Without
    an array `logits_dense` the output head is assumed to be tied to the embedding and scaled, as
    T5X's `logits_via_embedding` does.

    Raises:
        FileNotFoundError: see `open_arrays`.
        ValueError: see `open_arrays`; also if an array that the sizes are inferred from is missing
            or has the wrong rank, or if the sizes contradict each other.
    """
    shapes = {name: array.shape for name, array in open_arrays(path).items()}
    scanned = _is_scanned(shapes)
    layer = "encoder.encoder" if scanned else "encoder.layers_0"

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes or len(shapes[name]) != rank:
            found = f"found {shapes[name]}" if name in shapes else "missing"
            raise ValueError(
                f"{path}: cannot infer the model's sizes: {_TARGET}{name} must be an array of "
                f"{rank} dimensions, {found}"
            )
        return shapes[name]

    vocab_size, d_model = shape("token_embedder.embedding", 2)
    per_layer = f"{layer}.relpos_bias.rel_embedding" in shapes
    bias = f"{layer if per_layer else 'encoder'}.relpos_bias.rel_embedding"
    bias_shape = shape(bias, 3 if scanned and per_layer else 2)
    heads = bias_shape[0]
    query = shape(f"{layer}.attention.query.kernel", 4 if scanned else 2)
    joined = query[-2] * query[-1] if scanned else query[-1]
    if not heads or joined % heads:
        raise ValueError(f"{path}: {heads} heads ({bias}) do not divide {joined} (query kernel)")
    tied = "decoder.logits_dense.kernel" not in shapes
    return t5.T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=heads,
        head_dim=joined // heads,
        d_ff=shape(f"{layer}.mlp.wo.kernel", 3 if scanned else 2)[0],
        num_encoder_layers=_num_layers(path, shapes, "encoder"),
        num_decoder_layers=_num_layers(path, shapes, "decoder"),
        mlp_activations=t5x_activations(f"{layer}.mlp.wi_0.kernel" in shapes),
        tie_embeddings=tied,
        scale_logits=tied,
        relpos_buckets=bias_shape[-1],
        per_layer_relpos=per_layer,
    )


def t5x_activations(gated: bool) -> tuple[str, ...]:
    """Returns the activations that a T5X checkpoint is taken to have."""
    return ("gelu", "linear") if gated else ("relu",)


def _num_layers(path: str, shapes: dict[str, tuple[int, ...]], stack: str) -> int:
    if _is_scanned(shapes):
        found = shapes.get(f"{stack}.{stack}.mlp.wo.kernel", ())
        count = found[1] if len(found) == 3 else 0
    else:
        matches = (re.match(rf"{stack}\.layers_(\d{{1,6}})\.", name) for name in shapes)
        count = max((int(match[1]) + 1 for match in matches if match), default=0)
        if count > len(shapes):
            raise ValueError(
                f"{path}: {stack}.layers_{count - 1} in a checkpoint of {len(shapes)} arrays"
            )
    if not count:
        raise ValueError(f"{path}: cannot infer the number of {stack} layers: none found")
    return count


def open_model(path: str, config: t5.T5Config) -> tuple[Layout, dict[str, Stored]]:
    """Returns the layout of a model and a checkpoint's stored arrays, which fit each other.

    Errors are those of `open_arrays` and `check`.
    """
    arrays = open_arrays(path)
    layout = t5x_layout(config, scanned=_is_scanned(arrays))
    check(layout, arrays, path)
    return layout, arrays


def open_arrays(path: str) -> dict[str, Stored]:
    """Returns the stored arrays of the model by their dotted names, without "target.".

    Zarr arrays are opened without reading their values. Small arrays that the msgpack index
    contains are read with the index.

    Raises:
        FileNotFoundError: if arrays are missing; the message names all of them.
        ValueError: if arrays or the index are damaged, or if there are no arrays of a model.
    """
    root = formats.t5x_root(path)
    if (root / "manifest.ocdbt").is_file():
        inline, specs = {}, _ocdbt_specs(root)
    else:
        inline, specs = _msgpack_specs(root)
    specs = {name: spec for name, spec in specs.items() if name.startswith(_TARGET)}
    found = {name: in_memory(name, x) for name, x in inline.items() if name.startswith(_TARGET)}
    found |= _open_zarr(specs)
    if not found:
        raise ValueError(f"{path} holds no array whose name starts with {_TARGET!r}")
    return {name.removeprefix(_TARGET): array for name, array in found.items()}


def t5x_layout(config: t5.T5Config, *, scanned: bool) -> Layout:
    """Returns the layout of a T5X checkpoint, with the names that T5X uses inside `target`.

    `scanned` tells T5X's scanned network from its plain network.
    """
    if not scanned:
        return layer_by_layer(config, _plain_part)
    leaves = flatten(lm.abstract_params(config))
    return {
        path: Entry(leaf.shape, (_scanned_part(config, path.split("/"), leaf.shape),))
        for path, leaf in leaves.items()
    }


def _plain_part(names: list[str], shape: tuple[int, ...], layer: int | None) -> Part:
    """Returns the stored array of a parameter, or of one layer of it; see `layer_by_layer`."""
    stored = (f"layers_{layer}" if name == "layers" else name for name in names)
    return unchanged(".".join(stored), shape)


def _scanned_part(config: t5.T5Config, names: list[str], shape: tuple[int, ...]) -> Part:
    """Returns the stored array of a parameter in T5X's scanned network."""
    stored_name = ".".join(names[0] if name == "layers" else name for name in names)
    if "layers" not in names:
        return unchanged(stored_name, shape)
    sizes: list[tuple[int, ...]] = [(size,) for size in shape[1:]]
    if names[-2] in ("query", "key", "value"):
        sizes[1] = (config.num_heads, config.head_dim)
    elif names[-2] == "out":
        sizes[0] = (config.num_heads, config.head_dim)
    first, *rest = itertools.chain(*sizes)
    stored_axes = itertools.chain([0], itertools.count(2))  # axis 1 has the layers
    axes = (tuple(itertools.islice(stored_axes, len(group))) for group in sizes)
    return Part(stored_name, (first, shape[0], *rest), ((1,), *axes))


def _is_scanned(names: Iterable[str]) -> bool:
    """Returns whether arrays with these names belong to T5X's scanned network."""
    return any(name.startswith("encoder.encoder.") for name in names)


def _ocdbt_specs(root: epath.Path) -> dict[str, Any]:
    """Returns, by name, the key-value store of each zarr array in an OCDBT database."""
    base = os.fspath(root)
    base = base if files.is_remote(base) else f"file://{os.path.abspath(base)}"
    store = {"driver": "ocdbt", "base": base.rstrip("/") + "/"}
    try:
        keys = ts.KvStore.open(store).result().list().result()
    except ValueError as error:
        raise ValueError(f"{root}/manifest.ocdbt is damaged: {_short(error)}") from error
    suffix = b"/.zarray"
    names = [key[: -len(suffix)].decode() for key in keys if key.endswith(suffix)]
    return {name: {**store, "path": f"{name}/"} for name in names}


def _msgpack_specs(root: epath.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays inside the msgpack index, and the key-value stores of the other arrays.

    The index names an array in a folder of its own either by a string that starts with
    PLACEHOLDER:// or by a TensorStore specification.
    """
    file = root / "checkpoint"
    if files.size_of(file) > _LARGEST_INDEX:
        raise ValueError(f"{file} has more than {_LARGEST_INDEX} bytes, expected an index")
    tree = msgpack_tree.parse(file.read_bytes(), os.fspath(file))
    if "optimizer" in tree:
        version = tree.get("version")
        if version is None or int(version) != 3:
            raise ValueError(f"{file}: T5X's format must have version 3, got {version!r}")
        tree = tree["optimizer"]
    elif "_optimizer" in tree:  # This is how Orbax wrote the index in early 2023.
        tree = tree["_optimizer"]
    inline: dict[str, np.ndarray] = {}
    specs: dict[str, Any] = {}

    def visit(node: Any, name: str) -> None:
        if isinstance(node, dict) and "driver" in node:
            specs[name] = _zarr_store(root, _spec_folder(node), f"{file}: {name}")
        elif isinstance(node, dict):
            for key, child in node.items():
                visit(child, f"{name}.{key}" if name else str(key))
        elif isinstance(node, str) and node.startswith(_PLACEHOLDER):
            specs[name] = _zarr_store(root, node.removeprefix(_PLACEHOLDER), f"{file}: {name}")
        elif isinstance(node, np.ndarray):
            inline[name] = node
        elif isinstance(node, int | float):
            inline[name] = np.asarray(node)

    visit(tree, "")
    return inline, specs


def _spec_folder(spec: dict[str, Any]) -> Any:
    """Returns the name of the array's folder that a TensorStore specification states.

    The specification may contain the full path on the machine that wrote the checkpoint. Only the
    last component is used, because the checkpoint may have been moved since.
    """
    store = spec.get("kvstore")
    folder = store.get("path") if isinstance(store, dict) else None
    if folder is None:  # TensorStore before 0.1.14 wrote the path at the top level.
        folder = spec.get("path")
    return folder.rstrip("/").split("/")[-1] if isinstance(folder, str) else folder


def _zarr_store(root: epath.Path, folder: Any, what: str) -> dict[str, Any]:
    """Returns the key-value store of an array's folder, which must be inside the checkpoint.

    The folder's name comes from an untrusted index, so names and links that lead out of the
    checkpoint are refused.
    """
    plain = isinstance(folder, str) and folder not in ("", ".", "..")
    if not plain or re.search(r"[/\\\0]", folder):
        raise ValueError(f"{what}: an array must lie in a folder of the checkpoint, got {folder!r}")
    base = os.fspath(root)
    if base.startswith("gs://"):
        bucket, _, inside = base.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": f"{inside.rstrip('/')}/{folder}/"}
    real = os.path.realpath(os.path.join(base, folder))
    if os.path.dirname(real) != os.path.realpath(base):
        raise ValueError(f"{what}: {folder} leads out of the checkpoint, to {real}")
    return {"driver": "file", "path": f"{real}/"}


def _open_zarr(specs: dict[str, Any]) -> dict[str, Stored]:
    """Opens zarr arrays concurrently; one error names every array that cannot be opened."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    options = {
        "driver": "zarr",
        "fill_missing_data_reads": False,  # A missing chunk is an error instead of zeros.
        "recheck_cached_data": "open",
    }
    opening = {
        name: ts.open({**options, "kvstore": store}, open=True, read=True, context=context)
        for name, store in specs.items()
    }
    arrays, problems, missing_only = {}, [], True
    for name, future in opening.items():
        try:
            arrays[name] = _stored(name, specs[name], future.result())
        except (ValueError, NotImplementedError) as error:
            problems.append(f"{name}: {_short(error)}")
            missing_only &= "NOT_FOUND" in str(error)
    if problems:
        kind = FileNotFoundError if missing_only else ValueError
        raise kind("cannot open these arrays:\n  " + "\n  ".join(problems))
    return arrays


def _stored(name: str, store: dict[str, Any], array: ts.TensorStore) -> Stored:
    metadata = array.spec().to_json()["metadata"]
    compressor = metadata.get("compressor") or {}
    check_tails = store["driver"] == "file" and compressor.get("id") == "gzip"

    def read(index: Index) -> np.ndarray:
        try:
            values = array[index].read().result()
        except ValueError as error:
            kind = FileNotFoundError if "NOT_FOUND" in str(error) else ValueError
            raise kind(f"{name}: {_short(error)}") from error
        if check_tails:
            _check_chunk_tails(name, store["path"], metadata, index)
        return values

    return Stored(
        name=name, shape=tuple(array.shape), dtype=np.dtype(array.dtype.numpy_dtype), read=read
    )


def _check_chunk_tails(name: str, folder: str, metadata: dict[str, Any], index: Index) -> None:
    """Raises ValueError if a gzip chunk that `index` touches is cut or damaged.

    A gzip file ends with the size of its uncompressed content, which TensorStore does not compare
    with what it decompressed.
    """
    chunks, separator = metadata["chunks"], metadata.get("dimension_separator", ".")
    itemsize = 2 if metadata["dtype"] == "bfloat16" else np.dtype(metadata["dtype"]).itemsize
    expected = int(np.prod(chunks)) * itemsize
    ranges = [
        range(part.start // size, -(-part.stop // size))
        for part, size in zip(index, chunks, strict=True)
    ]
    for numbers in itertools.product(*ranges):
        file = os.path.join(folder, separator.join(map(str, numbers)) if numbers else "0")
        with open(file, "rb") as chunk:
            chunk.seek(-4, os.SEEK_END)
            size = int.from_bytes(chunk.read(4), "little")
        if size != expected % 2**32:
            raise ValueError(f"{name}: the chunk {file} is cut or damaged")


def _short(error: Exception) -> str:
    """Returns TensorStore's error message without the appended specification and source lines."""
    return re.split(r" \[(?:tensorstore_spec|source locations)", str(error))[0]
