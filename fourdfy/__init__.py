"""fourdfy: text to 4D scenes by hybrid score distillation."""

__version__ = "0.1.0"
