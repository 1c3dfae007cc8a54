"""A small fleet under faults: every seed a run in which all that is promised is checked."""
