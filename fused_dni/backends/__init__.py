"""Backends: one op, several implementations."""
