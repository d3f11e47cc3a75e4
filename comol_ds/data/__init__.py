"""From files and hub names to the micro-batches of one rank. Knows its rank as a number, and no process group."""
