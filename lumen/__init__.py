"""The model library: configurations, Flax modules, sharding, checkpoints, tokenizers, sampling.

Knows arrays; knows nothing of requests or networks.
"""
