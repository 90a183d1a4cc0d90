"""Trains the small models that ship in ``fourdfy/shapes/assets``; see ``docs/shapes.md``."""
