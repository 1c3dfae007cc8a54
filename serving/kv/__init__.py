"""KV memory: block allocator and prefix cache."""
