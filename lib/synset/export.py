"""A synthetic set as files that other tools read: PNG folders, parquet, and a data card."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def write(synset, folder: Path) -> None:
    """Fill ``folder`` (see :meth:`lib.synset.SyntheticSet.export`)."""
    pixels = to_bytes(synset.viewable())
    labels = synset.hard_labels.cpu()
    pngs = [_png(image) for image in pixels]
    names = folder_names(synset.classes)
    for name in names:
        (folder / "train" / name).mkdir(parents=True)
    for i, (png, label) in enumerate(zip(pngs, labels.tolist(), strict=True)):
        (folder / "train" / names[label] / f"{i:05d}.png").write_bytes(png)
    _parquet(synset, pngs, labels, folder / "train.parquet")
    (folder / "README.md").write_text(_card(synset, eight_bit_loss(synset)), encoding="utf-8")


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
    """Columns image (encoded PNG), label, and soft_label when there are any, typed as ``datasets`` expects them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": png, "path": None} for png in pngs], image),
        "label": pa.array(labels.numpy(), pa.int64()),
    }
    features = {
        "image": {"_type": "Image"},
        "label": {"names": folder_names(synset.classes), "_type": "ClassLabel"},
    }
    if synset.soft:
        count, soft = len(synset.classes), synset.targets.detach().cpu().float().numpy()
        columns["soft_label"] = pa.FixedSizeListArray.from_arrays(pa.array(soft.ravel()), count)
        features["soft_label"] = {
            "feature": {"dtype": "float32", "_type": "Value"},
            "length": count,
            "_type": "Sequence",
        }
    table = pa.table(columns)
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path
    )


def _card(synset, loss: dict[str, float]) -> str:
    method, data = synset.meta.get("method", "unknown method"), synset.meta.get("dataset", "unknown data")
    soft = (
        "`train.parquet` also holds the soft labels."
        if synset.soft
        else "Labels are hard; `train.parquet` holds the same."
    )
    return f"""---
configs:
- config_name: default
  data_files: train.parquet
---
# {method} on {data}

{len(synset.images)} images for {len(synset.classes)} classes ({synset.ipc:g} stored per class, {synset.bytes_images} bytes of
pixels and {synset.bytes_labels} bytes of labels before this export). {soft}

`train/<class>/<id>.png` opens with `torchvision.datasets.ImageFolder`; `train.parquet` with `datasets.load_dataset`.
Folder names begin with the label, so that their alphabetical order is the label order.

**8-bit loss.** Pixels were learned as floats without bounds. Here they are de-normalised, clipped to [0, 1] and rounded to
8 bits: RMS error {loss["rms"]:.4f} in normalised units, {100 * loss["clipped"]:.2f} % of the values clipped. To train as the
method does, apply the preprocessing below to pixels / 255, or use the safetensors file, which is exact.

Preprocessing: `{json.dumps(synset.transform.config())}`

Made by: `{json.dumps(synset.meta, sort_keys=True)}`
"""
