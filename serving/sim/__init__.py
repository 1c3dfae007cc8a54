"""Virtual time: event heap, modelled executor, in-memory transport, fault injection."""
