"""What a model is made of: roles of its parameters, logical matrices, fingerprints."""
