"""From scores to decisions: which training samples are suspicious, what to do about them, why, and whether it helped.

Letters: N training samples, n of them tracked and judged, M test samples, E epochs.
"""
