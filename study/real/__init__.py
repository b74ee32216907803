"""The study of a real model: ``study/real.yaml`` → cells → run folders of the shipped commands → docs/results/real.md.

python -m study.real
"""
