"""Settings all tests share. They must take effect before JAX starts its backend."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
