"""From a model to the artifact a device can hold: quantize, evaluate, choose.

torch lives here and nowhere else in alight, and only in the modules that need it.
"""
