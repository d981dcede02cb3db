"""What a run will do, before it does it.

`survey` builds the recipe once and measures it, `sharding`, `times` and `plan` cut the work and say what
it will take. `compatibility`, `provenance` and `stored_spec` hold what is asked against a run that is there.
"""
