"""Virtual time: event heap, executors whose time is foretold, in-memory transport."""
