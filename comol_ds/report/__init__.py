"""From a run's router_load.jsonl to a page with pictures: one HTML file and PNGs. Needs no torch and no network."""
