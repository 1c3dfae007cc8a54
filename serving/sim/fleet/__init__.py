"""A large fleet under a workload: the real cores, with the devices' time foretold by a profile."""
