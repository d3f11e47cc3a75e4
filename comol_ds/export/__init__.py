"""Adapter folders in and out of other programs' formats; runs anywhere, knows no optimizer."""
