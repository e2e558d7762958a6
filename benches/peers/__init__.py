"""What ``compare.py`` measures, and against whom: cases, optimizers, and one module per peer.

Workers import these modules with interpreters that lack roptim, torch or jax, so that at the top of each there are
only the standard library and NumPy.
"""
