"""Kernels: one package per operation, one file per backend, one reference.

Knows arrays only; imports nothing from `lumen` or `serving`.
"""
