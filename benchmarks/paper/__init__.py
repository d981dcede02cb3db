"""The papers' experiments: ``python -m benchmarks paper NAME --scale quick|two-cores|full``.

One file an experiment; `steps` keeps what is finished, `outcome` shows and stores it, `tasks` holds the
trainings. ``docs/benchmarks.md`` says what came out and how it differs from what was published.
"""
