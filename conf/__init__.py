"""Holds the YAML defaults; a package so that Hydra finds them in a wheel."""
