"""Holds the embedded quiz and safety prompts; a package so that they ship in the wheel."""
