"""Holds the embedded preference set; a package so that it ships in the wheel."""
