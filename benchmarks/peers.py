"""What the benchmarks share: every variant in a process of its own, one after the other, and a table of medians."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def in_processes(script: str, variants: list[dict], threads: int | None = None) -> list[dict]:
    """Run `python script --worker SPEC OUTPUT` for each variant in turn; a variant that fails says why.

    A bad kernel ends its own process only, and no variant meets what another has cached or allocated.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    results = []
    for variant in variants:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result.json"
            command = [sys.executable, script, "--worker", json.dumps(variant), str(output)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if output.exists():
                result = json.loads(output.read_text(encoding="utf-8"))
            else:
                result = {
                    "failed": (done.stderr.strip().splitlines() or ["ended without a result"])[-1][:200]
                }
        results.append(variant | result)
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": gpu or f"{cpu_name()}, {torch.get_num_threads()} threads",
        "gpus": torch.cuda.device_count(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def nanogpt_model(nanogpt_dir: str):
    """The module model.py of a nanoGPT checkout."""
    path = Path(nanogpt_dir) / "model.py"
    if not path.is_file():
        raise SystemExit(f"error: --nanogpt_dir {nanogpt_dir} holds no model.py: give a checkout of nanoGPT.")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def report(results: list[dict], columns: dict[str, str], output: str | None, **facts) -> None:
    """Print a table of the results, and write them with the machine's description as JSON.

    Args:
        columns: key of a result -> format of its values.
    """
    print("  ".join(f"{name:>18}" for name in columns))
    for result in results:
        cells = [
            form.format(result[name]) if result.get(name) is not None else "-"
            for name, form in columns.items()
        ]
        print(
            "  ".join(f"{cell:>18}" for cell in cells)
            + (f"  {result['failed']}" if "failed" in result else "")
        )
    facts = machine() | facts
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if output:
        Path(output).write_text(json.dumps(facts | {"results": results}, indent=1) + "\n", encoding="utf-8")
