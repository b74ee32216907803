"""The structure of models: roles of parameters, logical matrices, fingerprints."""
