"""How answers are generated and judged, in a run and after it."""
