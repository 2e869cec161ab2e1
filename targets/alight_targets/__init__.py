"""Runtimes for alight. Each target is found by entry point; none imports another."""
