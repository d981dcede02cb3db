"""From a run specification to a finished run: plan, drive, executors, reduce."""
