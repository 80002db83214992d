"""Where models are: local folders, hub ids and the shipped target.

Nothing here loads torch or a model, so that a wrong path is said at once (`check_models`).
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from draft_opd.utils.errors import UserError

EMBEDDED = "embedded"
PICKLES = ("*.bin", "*.pt", "*.pth")
# What no target's config.json has: keys, and words in the names of architectures.
DRAFTER_KEYS = ("dflash_config", "draft_vocab_size", "speculators_model_type")
DRAFTER_WORDS = ("Draft", "DFlash", "DSpark", "Eagle")


def resolve_path(path_or_id: str) -> str:
    """`embedded` becomes the folder of the shipped target; anything else stays as it is."""
    if str(path_or_id) == EMBEDDED:
        return str(Path(__file__).parent.parent / EMBEDDED / "model")
    return str(path_or_id)


def find_folder(path_or_id: str | Path, kind: str) -> Path:
    """A local folder as it is; otherwise the hub snapshot of that id."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    text = str(path_or_id)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise UserError(f"{kind} '{text}' is not a folder: give a model folder or a hub id")
    check_hub(text, kind)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise UserError(
            f"{kind} '{text}' is neither a local folder nor a reachable hub id ({type(error).__name__})"
        ) from error


def check_hub(name: str, kind: str) -> None:
    """Raises `UserError` at once for a hub id that is neither cached nor to be had: the loaders
    would try for half a minute first."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise UserError(
            f"{kind} '{name}' is neither a local folder nor a hub id (or it is private: hf auth login)"
        ) from None
    except HFValidationError:
        raise UserError(f"{kind} '{name}' is neither a local folder nor a hub id") from None
    except Exception as error:  # of whichever HTTP library; a mirror may lack this route
        if getattr(error, "response", None) is None:
            raise UserError(
                f"{kind} '{name}' is no local folder, and the hub cannot be asked for it "
                f"({type(error).__name__})"
            ) from None


def read_config(folder: Path, kind: str) -> dict:
    """A folder's config.json. Raises `UserError` where it is missing or no model's."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        inside = [folder / n for n in ("last", "best") if (folder / n / "config.json").exists()]
        hint = f": it is a run folder, give {' or '.join(map(str, inside))}" if inside else ""
        raise UserError(f"{kind} folder '{folder}' has no config.json{hint}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"'{path}' is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' must hold a JSON object")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError(f"'{path}': architectures must be a list of names")
    return config


def is_drafter(config: dict) -> bool:
    """Whether a config.json is a drafter's, of whichever family and layout."""
    names = config.get("architectures") or []
    return any(key in config for key in DRAFTER_KEYS) or any(
        word in name for name in names for word in DRAFTER_WORDS
    )


def find_target_files(path_or_id: str, weights: bool = True) -> tuple[str, dict | None]:
    """What transformers loads a target from, and its config.json where it is a local folder.

    Raises `UserError` for what cannot be one: no folder and no hub id, or weights that are pickles
    only.
    """
    path = resolve_path(path_or_id)
    folder = Path(path)
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(
                f"target '{path}' is not a folder: give a model folder, a hub id, or '{EMBEDDED}'"
            )
        check_hub(path, "target")
        return path, None
    config = read_config(folder, "target")
    if weights and not any(folder.glob("*.safetensors")):
        pickles = pickles_in(folder)
        hint = (
            f"; {pickles[0].name} is a pickle, never read here: draft-opd convert {path} OUT"
            if pickles
            else ""
        )
        raise UserError(f"target '{path}' has no safetensors{hint}")
    return path, config


def find_drafter_files(path_or_id: str | Path) -> tuple[dict, list[Path]]:
    """A drafter's config.json and its weights file or shards, of which only the headers are read.

    Raises `UserError` where one of them is missing or damaged.
    """
    folder = find_folder(path_or_id, "drafter")
    config = read_config(folder, "drafter")
    files = _weights(folder)
    for weights in files:
        try:
            with safe_open(weights, "np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{weights}' is not a readable safetensors file ({error})") from error
    return config, files


def pickles_in(folder: Path) -> list[Path]:
    """Files of a folder that are pickles by their names."""
    return sorted(p for pattern in PICKLES for p in folder.glob(pattern))


def _weights(folder: Path) -> list[Path]:
    if (single := folder / "model.safetensors").exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"'{index}' is no index of shards ({type(error).__name__})") from error
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"'{index}' names '{outside[0]}', which is not a file of its folder")
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"'{index}' names '{missing[0]}', which is not there")
        return files
    if len(others := sorted(folder.glob("*.safetensors"))) == 1:
        return others
    if names := [p.name for p in pickles_in(folder)]:
        raise UserError(
            f"drafter '{folder}' has no safetensors but {names[0]}, a pickle, which is never read here: "
            f"draft-opd convert {folder} OUT"
        )
    raise UserError(
        f"drafter '{folder}' has no model.safetensors; of a hub repository that has pickles: hf download it, "
        "then draft-opd convert"
    )


def check_models(target: str | None, *drafters: str, weights: bool = True) -> None:
    """Raises `UserError` for a path that is no model's, before anything is loaded.

    weights: whether the target's are needed.
    """
    for drafter in drafters:
        find_drafter_files(drafter)
    if target is not None:
        find_target_files(target, weights)
