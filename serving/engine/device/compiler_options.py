"""What XLA is told when it compiles a replica's programs, wherever it does."""

from typing import Any

_GPU: dict[str, Any] = {
    # Matrix products go to cuBLAS, by its own choice of algorithm. Trying algorithms out needs the
    # device, takes time at every start and may end differently each time.
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    # The arena is most of the memory and counted once for each operation that updates it in place:
    # XLA would compute things twice to make room that is not needed.
    "xla_disable_hlo_passes": "rematerialization",
}

_GPU_ON_ONE_CORE: dict[str, Any] = {
    # Kernels one after another: threads for them cost a process that has one core 8 % more.
    "xla_gpu_force_compilation_parallelism": 1,
}


def compiler_options(platform: str, *, one_core: bool = False) -> dict[str, Any]:
    """For `jax.stages.Lowered.compile`. platform: as JAX names that of the devices; one_core: of a
    process that others compile beside. What is compiled is the same."""
    if platform != "gpu":
        return {}
    return {**_GPU, **_GPU_ON_ONE_CORE} if one_core else _GPU
