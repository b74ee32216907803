"""The study of a real model: ``study/real.yaml`` → cells → run folders of the shipped commands → OUTPUT/pages/real.md.

python -m study.real
"""
