"""Rewrites of the Graph, one per file; each takes a legal Graph and gives a new legal one."""
