"""Pickled weights (pytorch_model.bin) as safetensors. The only place that reads pickles: tensors, no code."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from draft_opd.models.hub import PICKLES, pickles_in, read_config
from draft_opd.utils.errors import UserError, one_line
from draft_opd.utils.files import replace_folder

BESIDE = ("*.json", "*.txt", "*.jinja", "*.model")  # configs and tokenizers
SAFE = (2, 10)  # the first torch whose unpickler is not known to be broken
PICKLED = b"\x80"  # how a pickle that is no archive begins
TRAINER_FILES = ("training_args", "optimizer", "scheduler", "rng_state", "trainer_state")


def convert(source: Path, out: Path) -> dict[str, Any]:
    """Writes `out`: the tensors of the folder's pickles in model.safetensors, its configs and tokenizer.

    Returns what was done, for the screen. Raises `UserError` where there is nothing to convert, a pickle
    holds more than tensors, or `out` exists.
    """
    if torch.__version__ < SAFE:
        raise UserError(
            f"torch {torch.__version__} may run code that is hidden in a pickle (CVE-2026-24747): convert "
            f"with torch {SAFE[0]}.{SAFE[1]} or newer"
        )
    if not source.is_dir():
        raise UserError(f"'{source}' is not a folder: give one with config.json and a pickle of weights")
    if out.exists():
        raise UserError(f"'{out}' exists: choose a new folder or remove it")
    read_config(source, "drafter or target")
    files = pickles_in(source)
    left_out = [p.name for p in files if p.name.startswith(TRAINER_FILES)]
    files = [p for p in files if p.name not in left_out]
    if not files:
        hint = ": it has safetensors already" if any(source.glob("*.safetensors")) else ""
        raise UserError(f"'{source}' has no pickled weights ({', '.join(PICKLES)}){hint}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _tensors(file).items():
            if name in tensors:
                raise UserError(f"'{file}': the tensor '{name}' is in another file too: keep one of them")
            tensors[name] = tensor
    index = "pytorch_model.bin.index.json"
    kept = [p for pattern in BESIDE for p in sorted(source.glob(pattern)) if p.name != index]
    with replace_folder(out) as temporary:
        try:
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"'{source}': its tensors cannot be stored ({one_line(error, 80)})") from None
        for path in kept:
            shutil.copyfile(path, temporary / path.name)
    types = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return {
        "path": str(out),
        "read": [p.name for p in files],
        "tensors": len(tensors),
        "megabytes": round(sum(t.numel() * t.itemsize for t in tensors.values()) / 1e6, 1),
        "types": types,
        "copied": [p.name for p in kept],
        "left_out": left_out,
    }


def _tensors(file: Path) -> dict[str, Tensor]:
    """A pickle's tensors, by `torch.load(weights_only=True)`: nothing in it is run."""
    try:
        with file.open("rb") as opened:
            begins = opened.read(1)
        if begins != PICKLED and not zipfile.is_zipfile(file):
            raise UserError(f"'{file}' is not a pickle of weights")
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"'{file}' holds more than tensors, which could be code: it is not read. Load it where you "
            "trust it, and save its state_dict"
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"'{file}' is not a readable pickle of weights ({one_line(error, 80)})") from None
    if isinstance(found, dict) and len(found) == 1 and isinstance(next(iter(found.values())), dict):
        found = next(iter(found.values()))  # {"state_dict": ...}
    tensors = {k: v for k, v in found.items() if _is_plain(k, v)} if isinstance(found, dict) else {}
    others = [str(k) for k in found if k not in tensors] if isinstance(found, dict) else []
    if not tensors or others:
        what = f"'{others[0]}', which is no plain tensor" if others else "no tensors by name"
        raise UserError(f"'{file}' holds {what}: save a state_dict")
    # safetensors stores no tensor twice: tied ones get their own storage.
    return {k: v.contiguous().clone() for k, v in tensors.items()}


def _is_plain(name: object, value: object) -> bool:
    """Whether safetensors can hold it: a dense tensor by name."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return isinstance(name, str) and dense and not value.is_meta


def described(value: dict[str, Any]) -> dict[str, str]:
    """`convert`'s result for a table."""
    return {k: ", ".join(v) if isinstance(v, list) else json.dumps(v).strip('"') for k, v in value.items()}
