"""What is read off a finished run."""
