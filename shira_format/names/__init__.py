"""Tensor names: prefixes, towers, and tables from the names of one program to those of another."""
