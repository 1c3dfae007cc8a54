"""Generated message classes (`make protos`); do not edit."""
