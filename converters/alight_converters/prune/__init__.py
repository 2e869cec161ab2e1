"""Pruning: fewer layers, narrower ones, or zeros in place of weights.

depth.py, width.py and sparse.py are the passes; target.py is the size that they are given. blocks.py takes a
model apart into layers, structure.py into the units that width pruning removes, importance.py says how much
each unit matters, sizes.py chooses the widths, solvers.py the zeros.
"""
