"""E-steps: the interpreted reference, and compiled engines chosen by the structure of the factor graph."""
