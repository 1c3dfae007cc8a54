"""Pure functions from snapshots to decisions. No I/O, no clock."""
