"""The stages of a run, one after the other: which of their units are missing, and having those done.

What ``run.json`` says is put together here: what was asked for, how it was cut, how far it came. A unit
commits itself (``units``); resuming a run is running it again. The computing is in ``workers``.
"""
