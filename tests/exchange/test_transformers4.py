"""What the tests of test_export_huggingface.py say of transformers 5 holds of transformers 4 too.

Only one of them fits into an environment: `make test` puts version 4 into a folder beside, and the same tests run again
in a process that finds it first.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ROOT / ".venv" / "transformers4"
TESTS = Path(__file__).with_name("test_export_huggingface.py")


def run(*arguments: str) -> subprocess.CompletedProcess:
    places = [str(BESIDE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_exported_folders_load_and_compute_the_same_in_transformers_4():
    if not BESIDE.is_dir():
        missing = f"transformers 4 is not in {BESIDE.relative_to(ROOT)}; `make test` puts it there"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    version = run("-c", "import transformers; print(transformers.__version__)")
    assert version.stdout.startswith("4."), version.stdout + version.stderr

    # Alone and without pytest's own options; the large model is one of the other version.
    tests = run("-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "not vit_b", str(TESTS))
    *_, summary = tests.stdout.splitlines() or [""]
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert "passed" in summary and "skipped" not in summary
