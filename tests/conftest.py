"""Eight fake CPU devices, a quick compiler, strict rank promotion, a compilation cache on disk."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# More host threads than cores, so that collectives of many fake devices cannot starve each other.
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()

# What is compiled here, and in processes of the tests, runs for a moment: most of the compiler's
# work would not pay.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_CACHE_DIR", ".jax_cache"))
shortest = float(os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.5))
jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def pytest_xdist_auto_num_workers(config):
    """One more than cores: tests of servers, pages and processes wait a quarter of the time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores + 1
