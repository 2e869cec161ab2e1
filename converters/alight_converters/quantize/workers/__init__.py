"""Scripts that run under another Python, in an environment that alight is not installed in.

Each reads one JSON object from stdin: `source` and `target` folders, `scheme`, `block`, `device`, and `rows`, a
.npy file of token ids, shape (rows, length).
"""
