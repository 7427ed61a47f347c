"""Measurements of FlowGraph; nothing here is imported by the library."""
