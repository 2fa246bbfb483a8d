"""Text for people: visible, laid out, counted."""
