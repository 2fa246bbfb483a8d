"""A closed world: scenes of known factors, a miniature family trained on them, a judge that reads them back."""
