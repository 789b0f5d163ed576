"""Every test sees eight simulated CPU devices; those that need one take `jax.devices()[:1]`.

Compiled programs are kept in the temporary folder, so that a second run is faster. `site/sitecustomize.py` lets the
tests, and through PYTHONPATH the processes that they start, import timm and transformers.
"""

import getpass
import importlib
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"maect_jax_tests_{getpass.getuser()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

SITE = Path(__file__).parent / "site"
os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, str(SITE))
importlib.import_module("torchvision_finder")
