"""The recipe of the shipped tiny models (examples/models): generated data, tokenizers, training and measuring.

python -m tiny_models.train --output examples/models
"""
