"""All flags of the program, with their defaults, presets and checks. Imports no torch."""
