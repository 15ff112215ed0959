"""Files of plans, profiles and presets: strict YAML, the fields they share, and the model they are about. No torch."""
