"""What the target said about trajectories, kept on disk: no forward of it is needed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from draft_opd.models.target import Target
from draft_opd.utils.errors import UserError
from draft_opd.utils.files import make_folder, read_json, write_bytes, write_json

SHARD = 64 << 20  # bytes that are collected before a file is written
Key = tuple[int, ...]  # a trajectory's tokens
CachedFeatures = tuple[Tensor, Tensor]  # features [L, F] and hidden states [L, H]


class FeatureFolder:
    """{tokens: (features, hidden)} in safetensors files of a folder, read memory-mapped.

    Files appear whole, so a run that was killed finds what it had written. The folder says which
    target, layers and type it holds; raises `UserError` for one that holds other ones, or that is
    damaged.
    """

    def __init__(self, folder: Path, about: dict):
        self.folder, self._waiting, self._size = make_folder(folder), {}, 0
        self._where: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        described = folder / "features.json"
        if described.exists():
            try:
                found = read_json(described)
            except UserError:
                found = None
            if found != about:
                raise UserError(
                    f"'{folder}' holds features of another target, other layers or another type "
                    f"({found}): remove it, or set data.features to another folder"
                )
        else:
            write_json(described, about)
        for path in sorted(folder.glob("*.safetensors")):
            for name in self._file(path).keys():  # noqa: SIM118 (not a dict)
                self._where[name.removesuffix(".features")] = path

    def _file(self, path: Path) -> safe_open:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"'{path}' is not a readable safetensors file ({error}): remove it, its "
                    "features are computed again"
                ) from error
        return self._open[path]

    def __contains__(self, key: object) -> bool:
        name = _name(key)
        return name in self._where or name in self._waiting

    def __getitem__(self, key: Key) -> CachedFeatures:
        name = _name(key)
        if name in self._waiting:
            return self._waiting[name]
        file = self._file(self._where[name])
        return file.get_tensor(f"{name}.features"), file.get_tensor(f"{name}.hidden")

    def __setitem__(self, key: Key, value: CachedFeatures) -> None:
        self._waiting[_name(key)] = value
        self._size += sum(x.numel() * x.element_size() for x in value)
        if self._size >= SHARD:
            self.flush()

    def flush(self) -> None:
        """Writes what is not on disk yet. Raises `UserError` where that is impossible."""
        if not self._waiting:
            return
        tensors = {
            f"{name}.{what}": x.contiguous()
            for name, cached in self._waiting.items()
            for what, x in zip(("features", "hidden"), cached, strict=True)
        }
        contents = hashlib.sha256("".join(sorted(self._waiting)).encode()).hexdigest()[:32]
        path = self.folder / f"{contents}.safetensors"
        if not path.exists():  # another process may have had the same texts
            write_bytes(path, save(tensors))
        self._where |= dict.fromkeys(self._waiting, path)
        self._waiting, self._size = {}, 0


def _name(key: object) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def about_features(target: Target, layers: Sequence[int], dtype: torch.dtype) -> dict:
    """What features depend on."""
    return {
        "weights": target.fingerprint,
        "layers": list(layers),
        "dtype": str(dtype).removeprefix("torch."),
    }
