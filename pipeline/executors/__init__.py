"""Units of work done in this process or on Ray, retried when a worker is lost, told as events.

Executors know what a unit and a handler are, and nothing of stages. ``ray`` is imported in ``ray`` alone;
which worker goes where (``placement``) and which unit is next (``dispatch``) is decided without it.
"""
