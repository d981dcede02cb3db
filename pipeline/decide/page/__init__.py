"""The report as one HTML page: markup, charts as SVG, style and script, all of it escaped and self-contained."""
