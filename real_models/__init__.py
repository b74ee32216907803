"""The recipe of three models that a laptop can make of a real one: an aligned twin of SmolLM2-135M-Instruct, and two
judges of English that read prompt and response.

python -m real_models.make --output runs/real-models --data ../shared/data
"""
