"""A synthetic set as files that other tools read: PNG folders, parquet, tables, the exact set, and a data card."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lib.system.errors import CompanionError

EXACT = "set.safetensors"
IMAGES, CLASSES = "images.csv", "classes.csv"
LONGEST = 64  # numbers of a tensor that the card writes out
# what the kinds of lib.data.whitening do to pixels x in [0, 1]
FORMULAS = {
    "standardise": "(x - mean) / std, channel by channel",
    "zca": "(x - mean) @ matrix, x as one row of c * h * w values",
    "zca-kip": "((x - m) / n) @ matrix, x as one row of c * h * w values, m its mean and n the length of x - m",
    "zca-rfad": "((x - mean) / std) @ matrix, standardised channel by channel, then as one row of c * h * w values",
}


def write(synset, folder: Path, allow_empty: bool) -> None:
    """Fill ``folder`` (see :meth:`lib.synset.SyntheticSet.export`)."""
    labels = synset.hard_labels.cpu()
    counts = torch.bincount(labels, minlength=len(synset.classes)).tolist()
    names = folder_names(synset.classes)
    if 0 in counts and not allow_empty:
        raise CompanionError(
            f"the class {synset.classes[counts.index(0)]!r} has no image, and ImageFolder takes labels from folders with images: "
            "export(folder, allow_empty=True) leaves it an empty folder, for ImageFolder(..., allow_empty=True)"
        )
    pngs = [_png(image) for image in to_bytes(synset.viewable())]
    for name in names:
        (folder / "train" / name).mkdir(parents=True)
    files = [f"train/{names[label]}/{i:05d}.png" for i, label in enumerate(labels.tolist())]
    for file, png in zip(files, pngs, strict=True):
        (folder / file).write_bytes(png)
    _parquet(synset, pngs, labels, folder / "train.parquet")
    own = {"file": files, "label": labels.tolist(), "class": [synset.classes[label] for label in labels]}
    own |= {name: values.tolist() for name, values in _beside(synset).items()}
    _table(folder / IMAGES, own)
    _table(
        folder / CLASSES,
        {"label": range(len(names)), "folder": names, "class": synset.classes, "images": counts},
    )
    synset.save(folder / EXACT)
    (folder / "README.md").write_text(_card(synset, eight_bit_loss(synset), counts), encoding="utf-8")


def _beside(synset) -> dict[str, Tensor]:
    """What is known of every image apart from its label."""
    known = {"weight": synset.weights, "index": synset.indices}
    return {
        name: synset.decoder.labels(values).detach().cpu()
        for name, values in known.items()
        if values is not None
    }


def _table(path: Path, columns: dict) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))


def to_bytes(images01: Tensor) -> np.ndarray:
    """``(n, c, h, w)`` in [0, 1] -> uint8 ``(n, h, w, c)``."""
    return (images01 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def eight_bit_loss(synset) -> dict[str, float]:
    """What storing 8-bit pixels in [0, 1] loses: RMS error in normalised units, and the share of values that were clipped."""
    free = synset.transform.inverse(synset.images.detach())
    kept = torch.from_numpy(to_bytes(free.clamp(0, 1))).permute(0, 3, 1, 2).to(free) / 255
    error = synset.transform.forward(kept) - synset.images.detach()
    clipped = ((free < 0) | (free > 1)).double().mean()
    return {"rms": error.square().mean().sqrt().item(), "clipped": clipped.item()}


def folder_names(classes: tuple[str, ...]) -> list[str]:
    """Class names as folder names: unique, sorted like the labels, and safe on any file system."""
    safe = [
        "".join(char if char.isalnum() or char in "-_" else "_" for char in name)[:40] for name in classes
    ]
    digits = len(str(len(classes) - 1))
    return [f"{i:0{digits}d}_{name}" for i, name in enumerate(safe)]


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()


def _parquet(synset, pngs: list[bytes], labels: Tensor, path: Path) -> None:
    """Columns image (encoded PNG), label, and soft_label, weight, index when there are any, typed as ``datasets`` expects them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": png, "path": None} for png in pngs], image),
        "label": pa.array(labels.numpy(), pa.int64()),
    }
    features = {
        "image": {"_type": "Image"},
        "label": {"names": _unique(synset.classes), "_type": "ClassLabel"},
    }
    if synset.soft:
        count, soft = len(synset.classes), synset.targets.detach().cpu().float().numpy()
        columns["soft_label"] = pa.FixedSizeListArray.from_arrays(pa.array(soft.ravel()), count)
        features["soft_label"] = {
            "feature": {"dtype": "float32", "_type": "Value"},
            "length": count,
            "_type": "Sequence",
        }
    for name, values in _beside(synset).items():
        kind = "float32" if values.is_floating_point() else "int64"
        columns[name] = pa.array(values.to(getattr(torch, kind)).numpy())
        features[name] = {"dtype": kind, "_type": "Value"}
    table = pa.table(columns)
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path
    )


def _unique(classes: tuple[str, ...]) -> list[str]:
    """The names themselves, or with their labels where two are the same."""
    return list(classes) if len(set(classes)) == len(classes) else folder_names(classes)


def _numbers(name: str, values: Tensor) -> object:
    """A tensor as the card says it: its numbers, or where they are."""
    if values.numel() <= LONGEST:
        return values.detach().cpu().tolist()
    return f"{' x '.join(map(str, values.shape))} numbers, {name} in {EXACT}"


def preprocessing(synset) -> dict:
    """The transform of pixels in [0, 1], as plain values: kind, formula and numbers."""
    config = synset.transform.config()
    tensors = {name: _numbers(f"transform.{name}", t) for name, t in synset.transform.tensors().items()}
    return config | {"formula": FORMULAS.get(config["kind"], "see the kind")} | tensors


def _card(synset, loss: dict[str, float], counts: list[int]) -> str:
    method, data = synset.meta.get("method", "unknown method"), synset.meta.get("dataset", "unknown data")
    soft = (
        "`train.parquet` also holds the soft labels."
        if synset.soft
        else "Labels are hard; `train.parquet` holds the same."
    )
    more = []
    if 0 in counts:
        more.append(
            f"**{counts.count(0)} of {len(counts)} classes have no image** (`{CLASSES}`): open with "
            "`ImageFolder(..., allow_empty=True)`."
        )
    if synset.weights is not None:
        more.append(
            "**The images are weighted**: the loss of each counts `weight` times, in `images.csv` and `train.parquet`."
        )
    if synset.indices is not None:
        more.append("The images are real ones: `index` is the position in the training set.")
    if synset.step_size is not None:
        more.append(f"Learned step size: `{json.dumps(_numbers('step_size', synset.step_size))}`.")
    if synset.decoder.multiplicity > 1:
        stored = {name: value for name, value in json.loads(synset.header()["about"])["decoder"].items()}
        more.append(
            f"{len(synset.codes)} codes are stored in `{EXACT}`; the images here are formed from them: "
            f"`{json.dumps(stored)}`."
        )
    notes = "".join(f"{line}\n\n" for line in more)
    return f"""---
configs:
- config_name: default
  data_files: train.parquet
---
# {method} on {data}

{len(synset.images)} images for {len(synset.classes)} classes ({synset.ipc:g} stored per class, {synset.bytes_images} bytes of
pixels and {synset.bytes_labels} bytes of labels before this export). {soft}

| file | what |
| --- | --- |
| `train/<class>/<id>.png` | opens with `torchvision.datasets.ImageFolder`: folder names begin with the label, which keeps their order |
| `train.parquet` | opens with `datasets.load_dataset` |
| `{IMAGES}`, `{CLASSES}` | what is known of every image; the class of every folder, whose name may lack characters of the class's |
| `{EXACT}` | the exact set with everything that belongs to it |

{notes}**8-bit loss.** Pixels were learned as floats without bounds. Here they are de-normalised, clipped to [0, 1] and rounded to
8 bits: RMS error {loss["rms"]:.4f} in normalised units, {100 * loss["clipped"]:.2f} % of the values clipped. To train as the
method does, apply the preprocessing below to x = pixels / 255, or use `{EXACT}`.

Preprocessing: `{json.dumps(preprocessing(synset))}`

Made by: `{json.dumps(synset.meta, sort_keys=True, default=as_plain)}`
"""


def as_plain(value: object) -> object:
    """For ``json.dumps``: numbers and lists of NumPy's and PyTorch's types.

    Raises:
        CompanionError: for anything else.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    raise CompanionError(
        f"the meta of a set holds a {type(value).__name__}; allowed: numbers, strings, lists, dictionaries"
    )
