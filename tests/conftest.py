"""Every test sees eight simulated CPU devices; those that need one take `jax.devices()[:1]`.

Compiled programs are kept in the temporary folder, so that a second run is faster.
"""

import getpass
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update(
    "jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"maect_jax_tests_{getpass.getuser()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
